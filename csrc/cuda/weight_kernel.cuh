// One chunk of weights by one block; the last block of a head adds up the head's partial sums, in their order.
#pragma once

#include "warp.cuh"
#include "weight_stats.h"

namespace headprune::cuda {

// 16 bytes as numbers.
template <class T>
struct Vector {
  static constexpr int size = 8;
  __device__ static void widen(const Bytes16& bytes, float (&to)[size]) {
    for (int i = 0; i < 4; ++i) {
      to[2 * i] = number(T{}, bytes.words[i] & 0xffff);
      to[2 * i + 1] = number(T{}, bytes.words[i] >> 16);
    }
  }
  __device__ static float one(const char* from, int64_t i) { return number(T{}, load_once16(from + 2 * i)); }
};
template <>
struct Vector<Float> {
  static constexpr int size = 4;
  __device__ static void widen(const Bytes16& bytes, float (&to)[size]) {
    for (int i = 0; i < 4; ++i) to[i] = as_float(bytes.words[i]);
  }
  __device__ static float one(const char* from, int64_t i) { return as_float(load_once32(from + 4 * i)); }
};

template <bool kGrads>
struct WeightSums {
  static constexpr int count = kGrads ? 6 : 3;
  float values[count] = {};

  __device__ void add(float w, float g) {
    const float size = fabsf(w);
    values[0] += size;
    values[1] += w * w;
    values[2] = fmaxf(values[2], size);
    if constexpr (kGrads) {
      const float product = w * g;
      values[3] += product;
      values[4] += fabsf(product);
      values[5] += product * product;
    }
  }
  __device__ void join(int i, float other) { values[i] = i == 2 ? fmaxf(values[i], other) : values[i] + other; }
  __device__ void join(const WeightSums& other) {
#pragma unroll
    for (int i = 0; i < count; ++i) join(i, other.values[i]);
  }
};

// Where a thread stands in a chunk, in steps of `size` elements; goes on by all threads of the block without dividing.
struct Walk {
  int row, column, down, right, per_row, left;
  __device__ Walk(const Chunk& chunk, int size) {
    per_row = static_cast<int>(chunk.columns) / size;
    row = thread_index() / per_row;
    column = thread_index() % per_row;
    down = kWeightThreads / per_row;
    right = kWeightThreads % per_row;
    left = static_cast<int>(chunk.count) / size - thread_index();
  }
  __device__ int64_t at(const Chunk& chunk, int size) const { return chunk.offset + row * chunk.stride + column * size; }
  __device__ void step() {
    left -= kWeightThreads;
    row += down;
    column += right;
    if (column >= per_row) {
      column -= per_row;
      ++row;
    }
  }
};

constexpr int kVectorsAtOnce = 4;

// Several loads are under way before the first is used; every position has its own sums, so that none is a long chain.
template <class T, bool kGrads>
__device__ WeightSums<kGrads> sum_vectors(const char* w, const char* g, const Chunk& chunk) {
  constexpr int size = Vector<T>::size, bytes = 16 / size;
  WeightSums<kGrads> sums[kVectorsAtOnce];
  Walk walk(chunk, size);
  while (walk.left > 0) {
    Bytes16 weights[kVectorsAtOnce], grads[kVectorsAtOnce];
#pragma unroll
    for (int v = 0; v < kVectorsAtOnce; ++v) {
      const bool inside = walk.left > 0;
      const int64_t at = walk.at(chunk, size) * bytes;
      weights[v] = inside ? load_once128(w + at) : Bytes16{};
      if constexpr (kGrads) grads[v] = inside ? load_once128(g + at) : Bytes16{};
      walk.step();
    }
#pragma unroll
    for (int v = 0; v < kVectorsAtOnce; ++v) {
      float x[size], y[size] = {};
      Vector<T>::widen(weights[v], x);
      if constexpr (kGrads) Vector<T>::widen(grads[v], y);
#pragma unroll
      for (int i = 0; i < size; ++i) sums[v].add(x[i], y[i]);
    }
  }
  sums[0].join(sums[1]);
  sums[2].join(sums[3]);
  sums[0].join(sums[2]);
  return sums[0];
}

template <class T, bool kGrads>
__device__ WeightSums<kGrads> sum_elements(const char* w, const char* g, const Chunk& chunk) {
  WeightSums<kGrads> sums;
  for (Walk walk(chunk, 1); walk.left > 0; walk.step()) {
    const int64_t at = walk.at(chunk, 1);
    sums.add(Vector<T>::one(w, at), kGrads ? Vector<T>::one(g, at) : 0.f);
  }
  return sums;
}

// The sums of all threads, in thread 0.
template <bool kGrads>
__device__ void join_block(WeightSums<kGrads>& sums) {
  constexpr int warps = kWeightThreads / 32, count = WeightSums<kGrads>::count;
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  for (int mask = 16; mask; mask /= 2) {
#pragma unroll
    for (int i = 0; i < count; ++i) sums.join(i, shuffle_xor(sums.values[i], mask));
  }
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < count; ++i) shared[warp * count + i] = sums.values[i];
  }
  sync_block();
  if (thread_index() == 0) {
    for (int other = 1; other < warps; ++other) {
#pragma unroll
      for (int i = 0; i < count; ++i) sums.join(i, shared[other * count + i]);
    }
  }
}

// By thread 0 of the block that came last.
template <bool kGrads>
__device__ void finish_head(const WeightProblem& p, int head) {
  WeightSums<kGrads> sums;
  for (int slot = p.offsets[head]; slot < p.offsets[head + 1]; ++slot) {
#pragma unroll
    for (int i = 0; i < WeightSums<kGrads>::count; ++i) sums.join(i, load_from_l2(p.partial + int64_t{slot} * kMostStatistics + i));
  }
  // Maxima pass over NaN; the sum of magnitudes is NaN where a weight is, and only there.
  if (sums.values[0] != sums.values[0]) sums.values[2] = sums.values[0];
#pragma unroll
  for (int i = 0; i < WeightSums<kGrads>::count; ++i) p.stats[int64_t{i} * p.heads + head] = sums.values[i];
  p.arrived[head] = 0;
}

template <class T, bool kGrads>
__device__ void weight_chunk(const WeightProblem& p) {
  const Chunk chunk = p.chunks[block_x()];
  const char* w = reinterpret_cast<const char*>(p.weights[chunk.tensor]);
  const char* g = kGrads ? reinterpret_cast<const char*>(p.grads[chunk.tensor]) : nullptr;
  WeightSums<kGrads> sums =
      p.whole % Vector<T>::size == 0 ? sum_vectors<T, kGrads>(w, g, chunk) : sum_elements<T, kGrads>(w, g, chunk);
  join_block(sums);
  if (thread_index() != 0) return;
#pragma unroll
  for (int i = 0; i < WeightSums<kGrads>::count; ++i) p.partial[chunk.slot * kMostStatistics + i] = sums.values[i];
  fence_device();
  const int head = static_cast<int>(chunk.head);
  if (fetch_add(p.arrived + head, 1) + 1 == p.offsets[head + 1] - p.offsets[head]) {
    fence_device();
    finish_head<kGrads>(p, head);
  }
}

}  // namespace headprune::cuda
