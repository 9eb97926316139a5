// Statistics of every head's weights as a value: raw pointers, sizes. No torch, no CUDA headers.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace headprune::cuda {

enum class Element { float32, float16, bfloat16 };

// What one block reads: `count` elements from `offset` of a tensor on, `columns` in each row, rows `stride` elements apart; its
// partial sums go into `slot` (kernels/triton/weight_plan.py makes the table).
struct Chunk {
  int64_t tensor, offset, count, columns, stride, slot, head;
};

struct WeightProblem {
  Element element;
  int whole;                // elements that divide all offsets, counts, rows and strides; 1 where an address is not 16-byte aligned
  const int64_t* weights;   // addresses [tensors]
  const int64_t* grads;     // likewise, or null
  const Chunk* chunks;      // [chunk_count]
  const int* offsets;       // [heads + 1]: a head's first slot and the one behind its last
  int chunk_count, heads;
  float* partial;           // [chunk_count][kMostStatistics]
  int* arrived;             // [heads], 0; left 0
  float* stats;             // [3 or 6][heads], 0
};

constexpr int kMostStatistics = 6;
constexpr int kWeightThreads = 256;

// Launches on `stream`; null, or what went wrong.
const char* weight_stats(const WeightProblem& problem, CUstream_st* stream);

}  // namespace headprune::cuda
