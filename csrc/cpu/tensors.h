// From torch tensors to the problem that the kernels see.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "problem.h"

namespace headprune::cpu::inline HEADPRUNE_PRECISION {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
constexpr at::ScalarType kReal = c10::CppTypeToScalarType<Real>::value;

// What the operators take besides query, key and value.
struct Options {
  at::IntArrayRef kv_of_query;
  bool causal;
  int64_t window;
  double scale, softcap;
  OptionalTensor bias, alibi_slopes, sinks, key_mask, query_mask, gate;
};

// A problem and what keeps its memory alive.
struct Held {
  Problem problem{};
  std::vector<Sequence> sequences;
  std::vector<Tensor> tensors;

  Tensor keep(Tensor tensor) { return tensors.emplace_back(std::move(tensor)); }
  const Real* floats(const OptionalTensor& tensor) {
    return tensor ? keep(tensor->to(kReal).contiguous()).const_data_ptr<Real>() : nullptr;
  }
  const bool* bools(const OptionalTensor& tensor) { return tensor ? keep(tensor->contiguous()).const_data_ptr<bool>() : nullptr; }
};

inline Type type_of(const Tensor& tensor) {
  const at::ScalarType type = tensor.scalar_type();
  if (type == kReal) return kRealType;
#if !defined(HEADPRUNE_FP64)
  if (type == at::kBFloat16) return Type::bfloat16;
  if (type == at::kHalf) return Type::float16;
#endif
  TORCH_CHECK(false, "these kernels compute in ", kReal, ", which does not fit ", type);
}

inline Tensor rows_contiguous(const Tensor& tensor) {
  return tensor.stride(3) == 1 || tensor.size(3) <= 1 ? tensor : tensor.contiguous();
}

inline Operand operand(const Tensor& tensor) { return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

// [tokens, heads, dim] as [1, heads, tokens, dim].
inline Tensor as_one_batch(const Tensor& packed) { return packed.transpose(0, 1).unsqueeze(0); }

inline Bias bias_of(Held& held, const OptionalTensor& given, int64_t query_len, int64_t kv_len) {
  if (!given) return {};
  const Problem& problem = held.problem;
  const bool is_bool = given->scalar_type() == at::kBool;
  const Tensor bias =
      held.keep(is_bool ? *given : given->to(kReal)).expand({problem.batches, problem.query_heads, query_len, kv_len});
  return {bias.const_data_ptr(), is_bool, bias.stride(0), bias.stride(1), bias.stride(2), bias.stride(3)};
}

// `sequences` one by one: for [1, heads, tokens, dim] tensors that hold all of them; for others one for each of the batch.
inline Held hold(const Tensor& query, const Tensor& key, const Tensor& value, std::vector<Sequence> sequences, const Options& options) {
  Held held;
  Problem& problem = held.problem;
  problem.type = type_of(query);
  TORCH_CHECK(key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type(), "dtypes differ");
  TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4, "expected [batch, heads, length, dim]");
  TORCH_CHECK(static_cast<int64_t>(options.kv_of_query.size()) == query.size(1), "kv_of_query does not fit the query heads");
  held.sequences = std::move(sequences);
  problem.sequences = held.sequences.data();
  problem.batches = static_cast<int64_t>(held.sequences.size());
  problem.query_heads = query.size(1);
  problem.head_dim = query.size(3);
  problem.kv_heads = key.size(1);
  problem.value_dim = value.size(3);
  problem.numbers = {query.size(1) * query.size(2), query.size(2), query.size(0) * query.size(1) * query.size(2)};
  problem.query = operand(held.keep(rows_contiguous(query)));
  problem.key = operand(held.keep(rows_contiguous(key)));
  problem.value = operand(held.keep(rows_contiguous(value)));
  problem.kv_of_query = options.kv_of_query.data();
  problem.causal = options.causal;
  problem.window = std::min<int64_t>(options.window, int64_t{1} << 40);  // positions are added to it
  problem.scale = static_cast<Real>(options.scale);
  problem.softcap = static_cast<Real>(options.softcap);
  problem.bias = bias_of(held, options.bias, query.size(2), key.size(2));
  problem.alibi_slopes = held.floats(options.alibi_slopes);
  problem.sinks = held.floats(options.sinks);
  problem.gate = held.floats(options.gate);
  problem.gate_batch = options.gate && options.gate->dim() == 2 ? problem.query_heads : 0;
  problem.key_mask = held.bools(options.key_mask);
  problem.key_mask_batch = options.key_mask ? options.key_mask->size(1) : 0;
  problem.query_mask = held.bools(options.query_mask);
  return held;
}

inline Held hold(const Tensor& query, const Tensor& key, const Tensor& value, const Options& options) {
  return hold(query, key, value, std::vector<Sequence>(query.size(0), {0, query.size(2), 0, key.size(2)}), options);
}

inline void check_starts(const char* name, const int32_t* starts, int64_t count, int64_t tokens) {
  TORCH_CHECK_VALUE(count == 0 || starts[0] == 0, name, " begins with ", starts[0], "; expected 0, the first token.");
  for (int64_t i = 1; i < count; ++i) {
    TORCH_CHECK_VALUE(starts[i - 1] <= starts[i] && starts[i] <= tokens, name, "[", i, "] is ", starts[i], " behind ", starts[i - 1],
                      "; expected starts that do not fall and end within the ", tokens, " tokens.");
  }
}

// Sequence i has the rows cu_seqlens[i] up to cu_seqlens[i + 1].
inline Held hold_packed(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q,
                        const Tensor& cu_seqlens_k, const Options& options) {
  const Tensor starts_q = cu_seqlens_q.contiguous(), starts_k = cu_seqlens_k.contiguous();
  const int32_t *q = starts_q.const_data_ptr<int32_t>(), *k = starts_k.const_data_ptr<int32_t>();
  check_starts("cu_seqlens_q", q, starts_q.numel(), query.size(0));
  check_starts("cu_seqlens_k", k, starts_k.numel(), key.size(0));
  std::vector<Sequence> sequences;
  for (int64_t i = 0; i + 1 < starts_q.numel(); ++i) sequences.push_back({q[i], q[i + 1] - q[i], k[i], k[i + 1] - k[i]});
  Held held = hold(as_one_batch(query), as_one_batch(key), as_one_batch(value), std::move(sequences), options);
  for (Operand* one : {&held.problem.query, &held.problem.key, &held.problem.value}) one->batch = 0;
  held.problem.numbers.batch = 0;
  return held;
}

// A few new rows of each sample against a cache, contiguous [batch, kv_heads, capacity, dim] or, with a page_table, in pages
// [pages, kv_heads, page_size, dim].
inline Held hold_cache(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache, const Tensor& lengths,
                       const OptionalTensor& page_table, const Options& options) {
  const Tensor counts = lengths.contiguous();
  const int64_t pages = page_table ? page_table->size(1) : 1, capacity = pages * key_cache.size(2);
  std::vector<Sequence> sequences;
  for (int64_t i = 0; i < query.size(0); ++i) {
    const int64_t length = counts.const_data_ptr<int32_t>()[i];
    TORCH_CHECK_VALUE(0 <= length && length <= capacity, "lengths[", i, "] is ", length, "; the cache holds 0 to ", capacity, " keys.");
    sequences.push_back({0, query.size(2), 0, length});
  }
  Held held = hold(query, key_cache, value_cache, std::move(sequences), options);
  if (!page_table) return held;
  const Tensor table = held.keep(page_table->contiguous());
  Problem& problem = held.problem;
  problem.pages = table.const_data_ptr<int32_t>();
  problem.page_size = key_cache.size(2);
  problem.pages_per_sample = pages;
  for (int64_t i = 0; i < problem.batches; ++i) {
    // Pages in front of the window may have been given back.
    const int64_t first = problem.window ? std::max<int64_t>(0, problem.sequences[i].position(0) - problem.window + 1) : 0;
    for (int64_t page = first / std::max<int64_t>(problem.page_size, 1); page * problem.page_size < problem.sequences[i].kv_len; ++page) {
      const int64_t number = problem.pages[i * pages + page];
      TORCH_CHECK_VALUE(0 <= number && number < key_cache.size(0), "page_table[", i, ", ", page, "] is ", number, "; the cache has ",
                        key_cache.size(0), " pages, from 0 up.");
    }
  }
  return held;
}

}  // namespace headprune::cpu::HEADPRUNE_PRECISION
