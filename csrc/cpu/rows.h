// Moving rows between tensors of any supported type and fp32 scratch memory.
#pragma once

#include <algorithm>

#include <ATen/cpu/vec/functional.h>

#include "problem.h"
#include "vector.h"

namespace headprune::cpu::inline HEADPRUNE_PRECISION {

inline int64_t element_size(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

inline char* row_of(const Operand& operand, Type type, int64_t batch, int64_t head, int64_t row) {
  const int64_t offset = batch * operand.batch + head * operand.head + row * operand.row;
  return static_cast<char*>(operand.data) + offset * element_size(type);
}

// Row `query` of a sample, in the query or what is laid out like it.
inline char* query_row(const Problem& problem, const Operand& operand, int64_t batch, int64_t head, int64_t query) {
  return row_of(operand, problem.type, batch, head, problem.sequences[batch].query_start + query);
}

// Row `key` of a sample, in key or value or what is laid out like them.
inline char* key_row(const Problem& problem, const Operand& operand, int64_t batch, int64_t head, int64_t key) {
  if (problem.pages) {
    const int64_t page = problem.pages[batch * problem.pages_per_sample + key / problem.page_size];
    return row_of(operand, problem.type, page, head, key % problem.page_size);
  }
  return row_of(operand, problem.type, batch, head, problem.sequences[batch].key_start + key);
}

template <typename T>
inline void widen(const T* from, int64_t count, Real* to) {
  using Wide = at::vec::Vectorized<T>;
  int64_t i = 0;
  for (; i + Wide::size() <= count; i += Wide::size()) {
    auto [low, high] = at::vec::convert_to_float<T>(Wide::loadu(from + i));
    store(to + i, low);
    store(to + i + kLanes, high);
  }
  for (; i < count; ++i) to[i] = static_cast<Real>(from[i]);
}

template <typename T>
inline void narrow(const Real* from, int64_t count, T* to) {
  using Wide = at::vec::Vectorized<T>;
  int64_t i = 0;
  for (; i + Wide::size() <= count; i += Wide::size()) {
    at::vec::convert_from_float<T>(load(from + i), load(from + i + kLanes)).store(to + i);
  }
  for (; i < count; ++i) to[i] = static_cast<T>(from[i]);
}

inline void read_row(const void* from, Type type, int64_t count, Real* to) {
#if !defined(HEADPRUNE_FP64)
  if (type == Type::bfloat16) return widen(static_cast<const at::BFloat16*>(from), count, to);
  if (type == Type::float16) return widen(static_cast<const at::Half*>(from), count, to);
#endif
  std::copy_n(static_cast<const Real*>(from), count, to);
}

inline void write_row(const Real* from, int64_t count, Type type, void* to) {
#if !defined(HEADPRUNE_FP64)
  if (type == Type::bfloat16) return narrow(from, count, static_cast<at::BFloat16*>(to));
  if (type == Type::float16) return narrow(from, count, static_cast<at::Half*>(to));
#endif
  std::copy_n(from, count, static_cast<Real*>(to));
}

inline void scale_row(Real* row, int64_t count, Real factor) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(row + i, load(row + i) * Vec(factor));
  for (; i < count; ++i) row[i] *= factor;
}

}  // namespace headprune::cpu::HEADPRUNE_PRECISION
