// Groups of few rows and many keys, which several threads work on: the keys in parts, each with a state of its own.
#pragma once

#include <memory>

#include "bias.h"
#include "softmax.h"

namespace headprune::cpu::inline HEADPRUNE_PRECISION {

constexpr int64_t kMostPanels = 4;
constexpr int64_t kPartKeys = 4 * kKeyBlock;

inline int64_t panels_of(int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

// The rows of a group that are split over the keys: its parts are blocks, numbered from `part` 0 on; their states lie one
// after the other.
struct Split {
  int64_t group, rows, parts, part_floats;
  std::unique_ptr<Real[]> states;
  Real* state(int64_t part) { return states.get() + part * part_floats; }
};

// Groups of few rows and many keys are split over the keys, so that all threads have work. Where they are split does not
// depend on the number of threads, nor does the result.
inline Split split_of(const Problem& problem, const Group& group, const Keys& keys, int64_t number, std::vector<Block>& blocks) {
  Split split{number, group.rows(problem), 0, 0, {}};
  if (split.rows > kMostPanels * kPanelRows) return split;
  const auto [from, to] = slots_of(problem, group, keys, 0, problem.sequences[group.batch].query_len - 1);
  const int64_t first = from / kPartKeys, last = (to + kPartKeys - 1) / kPartKeys;
  if (last - first < 2) return split;
  split.parts = last - first;
  for (int64_t part = 0; part < split.parts; ++part) {
    const int64_t start = (first + part) * kPartKeys;
    blocks.push_back({number, 0, split.rows, std::max(from, start), std::min(to, start + kPartKeys), part});
  }
  for (int64_t row = 0; row < split.rows; row += kPanelRows) {
    split.part_floats += state_floats(std::min<int64_t>(kPanelRows, split.rows - row), problem.value_dim);
  }
  split.states = std::make_unique_for_overwrite<Real[]>(split.parts * split.part_floats);
  return split;
}

// So many parts of a group are best taken one after the other: memory that nobody has asked for yet is met once. Small groups wait for
// memory and large ones compute, so that every thread still takes turns with all groups.
inline int64_t parts_together(int64_t parts, int64_t threads) { return std::max<int64_t>(1, parts / (16 * threads)); }

// Blocks `first` to `last` that one thread takes: parts of a group that follow one another, or a block alone.
struct Run {
  int64_t first, last;
};

inline std::vector<Run> runs_of(const std::vector<Block>& blocks, int64_t together) {
  std::vector<Run> runs;
  for (int64_t i = 0; i < static_cast<int64_t>(blocks.size()); ++i) {
    const Block& block = blocks[i];
    const bool goes_on = i && block.part > 0 && block.part % together && blocks[i - 1].group == block.group;
    if (goes_on) {
      runs.back().last = i;
    } else {
      runs.push_back({i, i});
    }
  }
  return runs;
}

}  // namespace headprune::cpu::HEADPRUNE_PRECISION
