// One attention as the kernels see it: raw pointers, sizes and strides (in elements). Nothing here knows torch tensors.
#pragma once

#include <cstdint>

#include "real.h"

namespace headprune::cpu::inline HEADPRUNE_PRECISION {

enum class Type { float32, bfloat16, float16, float64 };
constexpr Type kRealType = sizeof(Real) == 8 ? Type::float64 : Type::float32;

// [batch, head, row, column]; a column is one element.
struct Operand {
  void* data;
  int64_t batch, head, row;
};

// Added to the scores (float) or bool, true = may attend; strides are 0 where it broadcasts.
struct Bias {
  const void* data = nullptr;
  bool is_bool = false;
  int64_t batch = 0, head = 0, row = 0, column = 0;
};

// Where the rows of one sample lie: rows `query_start` and on of the query (and of everything that has its rows), rows
// `key_start` and on of key and value. The last query stands at the last key.
struct Sequence {
  int64_t query_start, query_len, key_start, kv_len;
  int64_t position(int64_t query) const { return query + kv_len - query_len; }
};

// Where the one number that each query row has (lse and the like) lies among `count` numbers.
struct RowNumbers {
  int64_t batch, head, count;
};

struct Problem {
  Type type;
  int64_t batches, query_heads, kv_heads, head_dim, value_dim;
  const Sequence* sequences;  // [batches]
  RowNumbers numbers;
  Operand query, key, value;
  // Paged key and value: key k of a sample is row k % page_size of page pages[sample * pages_per_sample + k / page_size],
  // where the page takes the place of the batch. Null: not paged.
  const int32_t* pages;
  int64_t page_size, pages_per_sample;
  const int64_t* kv_of_query;  // [query_heads], non-decreasing
  bool causal;
  int64_t window;  // 0: none
  Real scale;
  Real softcap;  // 0: none
  Bias bias;
  const Real* alibi_slopes;  // [query_heads] or null, like all that follow
  const Real* sinks;         // [query_heads]
  const Real* gate;          // [query_heads], one set per sample where gate_batch is not 0
  int64_t gate_batch;
  const bool* key_mask;  // key_mask_batch apart for each sample
  int64_t key_mask_batch;
  const bool* query_mask;  // [batches, query_len]

  Real gate_of(int64_t batch, int64_t head) const { return gate ? gate[batch * gate_batch + head] : 1.f; }
  int64_t number_of(int64_t batch, int64_t head, int64_t query) const {
    return batch * numbers.batch + head * numbers.head + sequences[batch].query_start + query;
  }
};

struct Forward : Problem {
  Operand output;  // in the type of the query
  Real* lse;      // of each row
  float* stats;   // [6, batches, query_heads] or null
};

}  // namespace headprune::cpu::HEADPRUNE_PRECISION
