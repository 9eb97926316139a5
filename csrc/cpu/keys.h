// Blocks of keys or values as fp32 rows: in place where they lie well, else copied (and widened) into scratch memory.
#pragma once

#include "rows.h"
#include "schedule.h"

namespace headprune::cpu::inline HEADPRUNE_PRECISION {

struct RowBlock {
  const Real* data;
  int64_t stride;
  RowBlock from(int64_t row) const { return {data + row * stride, stride}; }
};

// In place: fp32, no gaps between the visible keys, and rows that do not all fall into the same few cache sets.
inline bool reads_in_place(const Problem& problem, const Operand& operand, const Keys& keys, int64_t slot, int64_t count) {
  if (problem.type != kRealType || !keys.index.empty() || operand.row % 1024 == 0) return false;
  const int64_t key = keys.first + slot;
  return !problem.pages || key / problem.page_size == (key + count - 1) / problem.page_size;
}

// `width` >= dim: floats that may be read of each row, 0 where the row has none.
inline RowBlock row_block(
    const Problem& problem, const Operand& operand, const Group& group, const Keys& keys, int64_t slot, int64_t count, int64_t dim,
    int64_t width, Real* copy) {
  if (width == dim && reads_in_place(problem, operand, keys, slot, count)) {
    const char* row = key_row(problem, operand, group.batch, group.kv_head, keys.first + slot);
    return {reinterpret_cast<const Real*>(row), operand.row};
  }
  for (int64_t i = 0; i < count; ++i) {
    read_row(key_row(problem, operand, group.batch, group.kv_head, keys.at(slot + i)), problem.type, dim, copy + i * width);
    std::fill_n(copy + i * width + dim, width - dim, 0.f);
  }
  return {copy, width};
}

}  // namespace headprune::cpu::HEADPRUNE_PRECISION
