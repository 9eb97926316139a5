// What a warp does together, one instruction each. Fragments of the 16 x 8 x 16 matrix product as in the PTX ISA: lane l holds of
// the result the rows l / 4 and l / 4 + 8, columns 2 * (l % 4) and the next.
#ifndef HEADPRUNE_WARP_CUH
#define HEADPRUNE_WARP_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace headprune::cuda {

struct Half {};
struct BFloat16 {};
struct Float {};

struct Bytes16 {
  uint32_t words[4];
};

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int thread_index() { return threadIdx.x; }
__device__ inline int block_x() { return blockIdx.x; }
__device__ inline int block_y() { return blockIdx.y; }

__device__ inline char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

__device__ inline void sync_block() { __syncthreads(); }
__device__ inline bool any_in_block(bool value) { return __syncthreads_or(value); }
__device__ inline void sync_warp() { __syncwarp(); }
__device__ inline bool any_in_warp(bool value) { return __any_sync(kAllLanes, value); }
__device__ inline unsigned ballot(bool value) { return __ballot_sync(kAllLanes, value); }
__device__ inline float shuffle_xor(float value, int mask) { return __shfl_xor_sync(kAllLanes, value, mask); }
__device__ inline int64_t shuffle(int64_t value, int lane) {
  return __shfl_sync(kAllLanes, static_cast<long long>(value), lane);
}

// 16 bytes from global to shared memory, past the registers; zeros, and nothing is read, where `valid` is false.
__device__ inline void copy_async(void* shared, const void* global, bool valid) {
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(bytes) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// c += a b: a [16 x 16], b [16 x 8] by columns, c [16 x 8] fp32.
__device__ inline void multiply(Half, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void multiply(BFloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers in 32 bits, the first one in the low half.
__device__ inline uint32_t pack(Half, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline uint32_t pack(BFloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// With a relative error of 2^-22; subnormal results are 0.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline float number(Half, uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ inline float number(BFloat16, uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

// Memory that nobody reads again: it need not stay in L1.
__device__ inline Bytes16 load_once128(const void* from) {
  Bytes16 r;
  asm("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
      : "=r"(r.words[0]), "=r"(r.words[1]), "=r"(r.words[2]), "=r"(r.words[3])
      : "l"(from));
  return r;
}
__device__ inline uint32_t load_once32(const void* from) { return __ldg(static_cast<const unsigned*>(from)); }
__device__ inline uint16_t load_once16(const void* from) { return __ldg(static_cast<const unsigned short*>(from)); }

// What this thread wrote before is seen by every thread of the device that sees what it writes after.
__device__ inline void fence_device() { __threadfence(); }
__device__ inline int fetch_add(int* counter, int value) { return atomicAdd(counter, value); }
// From L2, where other blocks' results are; L1 may hold what was there before.
__device__ inline float4 load_from_l2(const float4* pointer) { return __ldcg(pointer); }
__device__ inline float load_from_l2(const float* pointer) { return __ldcg(pointer); }

}  // namespace headprune::cuda

#endif
