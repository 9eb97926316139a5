// Launches the decode kernel.
#include "decode.h"
#include "decode_kernel.cuh"

namespace headprune::cuda {

template <class T, int D>
__global__ void __launch_bounds__(kThreads, D > 64 ? 2 : 3) attention_decode_kernel(const DecodeProblem p) {
  decode_tile<T, D>(p);
}

namespace {

template <class T, int D>
cudaError_t launch(const DecodeProblem& problem, cudaStream_t stream) {
  constexpr int bytes = Layout<D>::bytes;
  static_assert(bytes == (D == 64 ? 57648 : D == 96 ? 83248 : 108848), "headprune/ops/cuda.py knows them, too");
  const cudaError_t status =
      cudaFuncSetAttribute(attention_decode_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  const dim3 grid(problem.batch * problem.tile_count, problem.splits);
  attention_decode_kernel<T, D><<<grid, kThreads, bytes, stream>>>(problem);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_type(const DecodeProblem& problem, cudaStream_t stream) {
  switch (problem.head_dim) {
    case 64: return launch<T, 64>(problem, stream);
    case 96: return launch<T, 96>(problem, stream);
    case 128: return launch<T, 128>(problem, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

const char* attention_decode(const DecodeProblem& problem, CUstream_st* stream) {
  const cudaError_t status =
      problem.type == Type::float16 ? launch_type<Half>(problem, stream) : launch_type<BFloat16>(problem, stream);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace headprune::cuda
