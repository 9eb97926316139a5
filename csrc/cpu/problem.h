// One attention as the kernels see it: raw pointers, sizes and strides (in elements). Nothing here knows torch tensors.
#pragma once

#include <cstdint>

namespace headprune::cpu {

enum class Type { float32, bfloat16, float16 };

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

struct Problem {
  Type type;
  int64_t batches, query_heads, kv_heads, query_len, kv_len, head_dim, value_dim;
  Operand query, key, value;
  const int64_t* kv_of_query;  // [query_heads], non-decreasing
  bool causal;
  int64_t window;  // 0: none
  float scale;
  float softcap;  // 0: none
  Bias bias;
  const float* alibi_slopes;  // [query_heads] or null, like all that follow
  const float* sinks;         // [query_heads]
  const float* gate;          // [query_heads], one set per sample where gate_batch is not 0
  int64_t gate_batch;
  const bool* key_mask;    // [batches, kv_len]
  const bool* query_mask;  // [batches, query_len]

  int64_t position(int64_t query) const { return query + kv_len - query_len; }
  float gate_of(int64_t batch, int64_t head) const { return gate ? gate[batch * gate_batch + head] : 1.f; }
};

struct Forward : Problem {
  Operand output;  // in the type of the query
  float* lse;      // [batches, query_heads, query_len]
  float* stats;    // [6, batches, query_heads] or null
};

}  // namespace headprune::cpu
