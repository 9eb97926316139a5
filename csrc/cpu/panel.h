// A panel: up to kPanelRows query rows of a group in the vector lanes, and what the options do to its scores.
#pragma once

#include "rows.h"
#include "schedule.h"
#include "tile.h"

namespace headprune::cpu::inline HEADPRUNE_PRECISION {

struct Panel {
  int64_t rows;  // without the padding up to vecs * kLanes
  int vecs;
  int64_t head[kPanelRows], query[kPanelRows];
  Real lowest, highest;         // positions of the first and last query
  int64_t slots_from, slots_to;  // the keys that some row may see
  Real* queries;                // [head_dim][row], scaled so that scores come out in log2 units (or as tanh's argument)
  Real *position, *slope;       // [row]

  int64_t width() const { return vecs * kLanes; }
};

// Rows `first` and on of the group; the padding repeats the last one.
inline void place_panel(const Problem& problem, const Group& group, const Keys& keys, int64_t first, int64_t rows, Panel& panel) {
  const Sequence& sequence = problem.sequences[group.batch];
  const int64_t heads = static_cast<int64_t>(group.heads.size());
  panel.rows = rows;
  panel.vecs = rows <= kLanes ? 1 : kPanelVecs;
  int64_t query = first / heads, member = first % heads;
  for (int64_t r = 0; r < panel.width(); ++r) {
    panel.query[r] = query;
    panel.head[r] = group.heads[member];
    if (r < rows - 1 && ++member == heads) ++query, member = 0;
    panel.position[r] = static_cast<Real>(sequence.position(panel.query[r]));
    panel.slope[r] = problem.alibi_slopes ? problem.alibi_slopes[panel.head[r]] * kLog2e : 0.f;
  }
  panel.lowest = panel.position[0];
  panel.highest = panel.position[rows - 1];
  std::tie(panel.slots_from, panel.slots_to) = slots_of(problem, group, keys, panel.query[0], panel.query[rows - 1]);
}

// The factor on the queries that makes the raw scores what edited() takes.
inline Real query_factor(const Problem& problem) {
  return problem.softcap != 0.f ? problem.scale / problem.softcap : problem.scale * kLog2e;
}

// Where all rows of the panel, equally far apart, lie in the type that we compute in; null where they do not.
inline Real* panel_in_place(const Problem& problem, const Operand& operand, const Group& group, const Panel& panel) {
  if (problem.type != kRealType || group.heads.size() != 1 || panel.rows != panel.width()) return nullptr;
  return reinterpret_cast<Real*>(query_row(problem, operand, group.batch, panel.head[0], panel.query[0]));
}

// The panel's rows of the query or what is laid out like it, as fp32 rows `width` >= dim floats wide, filled up with 0.
inline void read_panel(
    const Problem& problem, const Operand& operand, const Group& group, const Panel& panel, int64_t dim, int64_t width, Real* rows) {
  for (int64_t r = 0; r < panel.rows; ++r) {
    read_row(query_row(problem, operand, group.batch, panel.head[r], panel.query[r]), problem.type, dim, rows + r * width);
    std::fill_n(rows + r * width + dim, width - dim, 0.f);
  }
  std::fill_n(rows + panel.rows * width, (panel.width() - panel.rows) * width, 0.f);
}

// The panel's rows of the output, to be written in the end.
inline void ask_for_output(const Forward& problem, const Group& group, const Panel& panel) {
  const int64_t bytes = problem.value_dim * element_size(problem.type);
  for (int64_t r = 0; r < panel.rows; ++r) {
    const char* row = query_row(problem, problem.output, group.batch, panel.head[r], panel.query[r]);
    for (int64_t x = 0; x < bytes; x += 64) __builtin_prefetch(row + x, 1, 2);
  }
}

// What is done to the raw scores of one block of keys of a panel.
struct Edits {
  Real softcap;      // in log2 units; 0: none
  bool alibi;
  const Real* bias;  // in log2 units, [key][row] or for thin panels [row][key]; null: none
  bool causal;        // some row of the panel lies before some key of the block
  int64_t window;     // 0: all rows see all keys of the block as far as the window goes

  bool any() const { return softcap != 0.f || alibi || bias || causal || window; }
};

inline Edits edits_of(const Problem& problem, const Panel& panel, const Keys& keys, int64_t slot, int64_t count, const Real* bias) {
  const Real first = static_cast<Real>(keys.at(slot)), last = static_cast<Real>(keys.at(slot + count - 1));
  const Real window = static_cast<Real>(problem.window);
  Edits edits{problem.softcap * kLog2e, problem.alibi_slopes != nullptr, bias, false, 0};
  edits.causal = problem.causal && last > panel.lowest;
  if (problem.window && (panel.highest - first >= window || last - panel.lowest >= window)) edits.window = problem.window;
  return edits;
}

inline Vec hide(Vec score, Vec condition) { return Vec::blendv(score, Vec(-kInfinity), condition); }

// kLanes scores at once. `ahead`: how far their keys stand ahead of their queries; `bias`: kLanes of it, read where there is one.
inline Vec edited(const Edits& edits, Vec score, Vec ahead, Vec slope, const Real* bias, Vec& tanh_of_score) {
  if (edits.softcap != 0.f) {
    tanh_of_score = tanh(score);
    score = Vec(edits.softcap) * tanh_of_score;
  }
  if (edits.alibi) score = score - slope * ahead.abs();
  if (edits.bias) {
    const Vec added = load(bias);
    score = hide(score + added, added == Vec(-kInfinity));
  }
  if (edits.causal) score = hide(score, ahead > Vec(0.f));
  if (edits.window) score = hide(score, ahead.abs() >= Vec(static_cast<Real>(edits.window)));
  return score;
}

// The scores of kLanes rows, from row `lane` of the panel on, and key number `key` of the block.
inline Vec edited(const Edits& edits, Vec score, const Panel& panel, int64_t key, int lane, int rows, Vec key_position, Vec& tanh_of_score) {
  const Real* bias = edits.bias + (edits.bias ? key * rows + lane : 0);
  return edited(edits, score, key_position - load(panel.position + lane), load(panel.slope + lane), bias, tanh_of_score);
}

}  // namespace headprune::cpu::HEADPRUNE_PRECISION
