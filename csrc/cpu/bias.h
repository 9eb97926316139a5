// The bias of one panel and one block of keys, turned so that rows are lanes.
#pragma once

#include "panel.h"

namespace headprune::cpu::inline HEADPRUNE_PRECISION {

constexpr int64_t kKeyBlock = 128;
constexpr int64_t kThinBlock = 512;  // of thin panels (thin.h): they wait for memory anew with each block

struct BiasBlock {
  Real* rows;             // [kPanelRows][kKeyBlock], of thin panels [kThinRows][kThinBlock]
  Real* transposed;       // [kKeyBlock][panel width], in log2 units
  Real best[kThinBlock];  // the largest over the panel's rows that see the key by its position; -inf: none does
  bool shared;            // all rows have the same
};

// In log2 units. The lowest number (torch.finfo(dtype).min, which masks are often filled with) does not become -inf.
inline Real added_bias(Real bias) { return bias == -kInfinity ? bias : std::max(bias * kLog2e, kLowest); }

inline void read_bias_row(const Bias& bias, int64_t offset, const Keys& keys, int64_t slot, int64_t count, Real* row) {
  if (bias.is_bool) {
    const bool* from = static_cast<const bool*>(bias.data) + offset;
    for (int64_t key = 0; key < count; ++key) row[key] = from[keys.at(slot + key) * bias.column] ? 0.f : -kInfinity;
  } else if (bias.column == 1 && keys.index.empty()) {
    const Real* from = static_cast<const Real*>(bias.data) + offset + keys.first + slot;
    for (int64_t key = 0; key < count; ++key) row[key] = added_bias(from[key]);
  } else {
    const Real* from = static_cast<const Real*>(bias.data) + offset;
    for (int64_t key = 0; key < count; ++key) row[key] = added_bias(from[keys.at(slot + key) * bias.column]);
  }
}

// Reads rows, `stride` apart, and best. False where no row of the panel may see any key of the block.
inline bool read_bias(const Problem& problem, const Group& group, const Panel& panel, const Keys& keys, int64_t slot, int64_t count,
                      int64_t stride, BiasBlock& block) {
  const Bias& bias = problem.bias;
  std::fill_n(block.best, count, -kInfinity);
  int64_t previous = -1;
  block.shared = true;
  for (int64_t r = 0; r < panel.rows; ++r) {
    const int64_t offset = group.batch * bias.batch + panel.head[r] * bias.head + panel.query[r] * bias.row;
    Real* row = block.rows + r * stride;
    if (offset == previous) {
      std::copy_n(row - stride, count, row);
      if (panel.query[r] == panel.query[r - 1]) continue;
    } else {
      block.shared = block.shared && r == 0;
      previous = offset;
      read_bias_row(bias, offset, keys, slot, count, row);
    }
    const auto [from, to] = slots_of(problem, group, keys, panel.query[r], panel.query[r]);
    for (int64_t key = std::max<int64_t>(0, from - slot); key < std::min(count, to - slot); ++key) {
      block.best[key] = std::max(block.best[key], row[key]);
    }
  }
  return std::any_of(block.best, block.best + count, [](Real best) { return best != -kInfinity; });
}

// Fills `transposed` from `rows`.
inline void turn_bias(const Panel& panel, int64_t count, BiasBlock& block) {
  const int64_t width = panel.width();
  if (block.shared) {
    for (int64_t key = 0; key < count; ++key) std::fill_n(block.transposed + key * width, width, block.rows[key]);
    return;
  }
  for (int64_t r = panel.rows; r < width; ++r) std::fill_n(block.rows + r * kKeyBlock, count, -kInfinity);
  transpose(block.rows, kKeyBlock, width, count, block.transposed, width);
}

}  // namespace headprune::cpu::HEADPRUNE_PRECISION
