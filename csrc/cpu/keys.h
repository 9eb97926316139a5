// Blocks of keys or values as fp32 rows: in place where they lie well, else copied (and widened) into scratch memory.
#pragma once

#include "rows.h"
#include "schedule.h"

namespace headprune::cpu {

struct RowBlock {
  const float* data;
  int64_t stride;
};

// In place: fp32, no gaps between the visible keys, and rows that do not all fall into the same few cache sets.
inline bool reads_in_place(const Operand& operand, Type type, const Keys& keys) {
  return type == Type::float32 && keys.index.empty() && operand.row % 1024 != 0;
}

inline RowBlock row_block(
    const Operand& operand, Type type, int64_t batch, int64_t head, const Keys& keys, int64_t slot, int64_t count, int64_t dim,
    float* copy) {
  if (reads_in_place(operand, type, keys)) {
    return {reinterpret_cast<const float*>(row_of(operand, type, batch, head, keys.first + slot)), operand.row};
  }
  for (int64_t i = 0; i < count; ++i) read_row(row_of(operand, type, batch, head, keys.at(slot + i)), type, dim, copy + i * dim);
  return {copy, dim};
}

}  // namespace headprune::cpu
