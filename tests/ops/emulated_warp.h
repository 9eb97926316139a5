// csrc/cuda/warp.cuh without a GPU: every thread of a block is a fiber, and what a warp does together is a meeting of its lanes.
// Copies to shared memory happen as late as the program allows, so that a missing wait is seen.
#define HEADPRUNE_WARP_CUH

#include <immintrin.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#define __device__

struct float4 {
  float x, y, z, w;
};

namespace headprune::cuda {

struct Half {};
struct BFloat16 {};
struct Float {};

struct Bytes16 {
  uint32_t words[4];
};

struct Meeting {
  int arrived = 0;
  unsigned generation = 0;
};

struct Copy {
  void* target;
  const void* source;
  bool valid;
};

struct Lane {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(96 * 1024);
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  bool done = false;
};

// The block that runs.
struct Block {
  int x, y, threads, current = 0;
  std::vector<char> memory;
  std::vector<std::unique_ptr<Lane>> lanes;
  std::vector<Meeting> warps;
  Meeting all;
  std::vector<char> slots;
  bool vote = false;
  ucontext_t scheduler;
  std::function<void()> program;
};
inline Block* block = nullptr;

constexpr int kSlot = 64;

inline void yield() {
  Lane& lane = *block->lanes[block->current];
  swapcontext(&lane.context, &block->scheduler);
}
inline void meet(Meeting& meeting, int size) {
  const unsigned generation = meeting.generation;
  if (++meeting.arrived == size) {
    meeting.arrived = 0;
    ++meeting.generation;
  }
  while (meeting.generation == generation) yield();
}

inline int thread_index() { return block->current; }
inline int block_x() { return block->x; }
inline int block_y() { return block->y; }
inline char* shared_memory() { return block->memory.data(); }
inline void sync_block() { meet(block->all, block->threads); }
inline void sync_warp() { meet(block->warps[thread_index() / 32], 32); }
inline bool any_in_block(bool value) {
  sync_block();
  block->vote = false;
  sync_block();
  block->vote = block->vote || value;
  sync_block();
  return block->vote;
}

// Every lane of the warp gives `mine`; `read` may then look at anyone's.
template <class T, class Read>
inline auto exchange(const T& mine, const Read& read) {
  static_assert(sizeof(T) <= kSlot);
  char* slots = block->slots.data() + thread_index() / 32 * 32 * kSlot;
  std::memcpy(slots + thread_index() % 32 * kSlot, &mine, sizeof(T));
  sync_warp();
  const auto of = [slots](int lane) {
    T value;
    std::memcpy(&value, slots + lane * kSlot, sizeof(T));
    return value;
  };
  const auto result = read(of);
  sync_warp();
  return result;
}

inline unsigned ballot(bool value) {
  return exchange(value, [](const auto& of) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(of(lane)) << lane;
    return bits;
  });
}
inline bool any_in_warp(bool value) { return ballot(value) != 0; }
inline float shuffle_xor(float value, int mask) {
  const int lane = thread_index() % 32;
  return exchange(value, [=](const auto& of) { return of(lane ^ mask); });
}
inline int64_t shuffle(int64_t value, int from) {
  return exchange(value, [=](const auto& of) { return of(from); });
}

inline Lane& this_lane() { return *block->lanes[block->current]; }
inline void copy_async(void* target, const void* source, bool valid) {
  if (reinterpret_cast<uintptr_t>(target) % 16 || (valid && reinterpret_cast<uintptr_t>(source) % 16)) {
    std::fprintf(stderr, "a copy of 16 bytes is not aligned\n");
    std::abort();
  }
  this_lane().open.push_back({target, source, valid});
}
inline void commit_copies() {
  this_lane().groups.push_back(std::move(this_lane().open));
  this_lane().open.clear();
}
template <int kPending>
inline void wait_copies() {
  auto& groups = this_lane().groups;
  for (; groups.size() > kPending; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      if (copy.valid) std::memcpy(copy.target, copy.source, 16);
      else std::memset(copy.target, 0, 16);
    }
  }
}

template <bool kTransposed>
inline void load_any_matrices(uint32_t (&r)[4], const void* row) {
  const int lane = thread_index() % 32;
  exchange(row, [&](const auto& of) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        const int line = kTransposed ? lane % 4 * 2 + i : lane / 4, column = kTransposed ? lane / 4 : lane % 4 * 2 + i;
        pair[i] = static_cast<const uint16_t*>(of(matrix * 8 + line))[column];
      }
      std::memcpy(&r[matrix], pair, 4);
    }
    return 0;
  });
}
inline void load_matrices(uint32_t (&r)[4], const void* row) { load_any_matrices<false>(r, row); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { load_any_matrices<true>(r, row); }

inline float number(Half, uint16_t bits) { return _cvtsh_ss(bits); }
inline float number(BFloat16, uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
template <class T>
inline T load_once(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T)) {  // the GPU's own rule: as long as it is wide
    std::fprintf(stderr, "a load of %zu bytes is not aligned\n", sizeof(T));
    std::abort();
  }
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}
inline Bytes16 load_once128(const void* from) { return load_once<Bytes16>(from); }
inline uint32_t load_once32(const void* from) { return load_once<uint32_t>(from); }
inline uint16_t load_once16(const void* from) { return load_once<uint16_t>(from); }
inline uint16_t rounded(Half, float value) { return _cvtss_sh(value, 0); }
inline uint16_t rounded(BFloat16, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
template <class T>
inline uint32_t pack(T, float low, float high) {
  return rounded(T{}, low) | static_cast<uint32_t>(rounded(T{}, high)) << 16;
}

struct Operands {
  uint32_t a[4], b[2];
};
template <class T>
inline void multiply(T, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int lane = thread_index() % 32;
  exchange(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}}, [&](const auto& of) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) {
        const uint32_t left = of(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2], right = of(column * 4 + k % 8 / 2).b[k / 8];
        c[i] += number(T{}, left >> k % 2 * 16 & 0xffff) * number(T{}, right >> k % 2 * 16 & 0xffff);
      }
    }
    return 0;
  });
}

inline float exp2_fast(float x) { return exp2f(x); }
inline void fence_device() {}
inline int fetch_add(int* counter, int value) {
  const int before = *counter;
  *counter += value;
  return before;
}
template <class T>
inline T load_from_l2(const T* pointer) {
  return *pointer;
}

inline void enter() {
  block->program();
  this_lane().done = true;
  yield();
}

// Runs `program` in every thread of one block, the lanes taking turns in an order that `seed` decides.
inline void run_block(int x, int y, int threads, int bytes, unsigned seed, std::function<void()> program) {
  Block one{x, y, threads};
  block = &one;
  one.memory.assign(bytes, '\xff');
  one.warps.resize(threads / 32);
  one.slots.resize(threads * kSlot);
  one.program = std::move(program);
  for (int i = 0; i < threads; ++i) {
    Lane& lane = *one.lanes.emplace_back(std::make_unique<Lane>());
    getcontext(&lane.context);
    lane.context.uc_stack = {lane.stack.data(), 0, lane.stack.size()};
    lane.context.uc_link = &one.scheduler;
    makecontext(&lane.context, enter, 0);
  }
  const int stride = 2 * static_cast<int>(seed % 32) + 1;  // odd: meets every lane of a power of two
  for (int left = threads, turn = 0; left; ++turn) {
    one.current = turn * stride % threads;
    Lane& lane = *one.lanes[one.current];
    if (lane.done) continue;
    swapcontext(&one.scheduler, &lane.context);
    left -= lane.done;
  }
  block = nullptr;
}

}  // namespace headprune::cuda
