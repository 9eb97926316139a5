// The statistics of single rows, and of heads from them.
#pragma once

#include <cmath>
#include <vector>

#include "softmax.h"

namespace headprune::cpu::inline HEADPRUNE_PRECISION {

// The statistics of single rows before they are averaged, each laid out like lse.
struct RowStats {
  std::vector<Real> values;
  int64_t rows = 0;
  enum Field { entropy, max_prob, max_logit, first_mass, distance, output_norm, counted };
  Real& at(Field field, int64_t row) { return values[field * rows + row]; }
};

inline Real norm(const Real* row, int64_t dim) {
  Vec squares(0);
  int64_t x = 0;
  for (; x + kLanes <= dim; x += kLanes) squares = multiply_add(load(row + x), load(row + x), squares);
  Real sum = sum_of_lanes(squares);
  for (; x < dim; ++x) sum += row[x] * row[x];
  return std::sqrt(sum);
}

// Of the rows of a panel; `total`: their sums with the sinks, `output`: theirs, `stride` apart.
inline void record_stats(const Forward& problem, const Group& group, const SoftmaxPanel& panel, const Real* total, const Real* output,
                         int64_t stride, RowStats& stats) {
  for (int64_t r = 0; r < panel.rows; ++r) {
    const bool wanted = !problem.query_mask || problem.query_mask[group.batch * problem.sequences[group.batch].query_len + panel.query[r]];
    if (!wanted || panel.stats.top[r] == -kInfinity) continue;
    const int64_t row = problem.number_of(group.batch, panel.head[r], panel.query[r]);
    const Real inverse = 1.f / total[r];
    const Real mass = panel.sum[r] * inverse;
    stats.at(RowStats::counted, row) = 1.f;
    stats.at(RowStats::entropy, row) = std::log(total[r]) * mass - kLn2 * panel.stats.weighted[r] * inverse;
    stats.at(RowStats::max_prob, row) = std::exp2(panel.stats.top[r] - panel.high[r]) * inverse;
    stats.at(RowStats::max_logit, row) = panel.stats.top[r] * kLn2;
    stats.at(RowStats::first_mass, row) = panel.stats.first[r] * inverse;
    stats.at(RowStats::distance, row) = panel.stats.distance[r] * inverse;
    stats.at(RowStats::output_norm, row) = norm(output + r * stride, problem.value_dim);
  }
}

// Of each head over its counted rows, into problem.stats.
inline void average_stats(const Forward& problem, RowStats& rows) {
  const int64_t heads = problem.batches * problem.query_heads;
  for (int64_t head = 0; head < heads; ++head) {
    double sums[6] = {};
    double counted = 0;
    Real top = -kInfinity;
    const int64_t batch = head / problem.query_heads, first = problem.number_of(batch, head % problem.query_heads, 0);
    for (int64_t row = first; row < first + problem.sequences[batch].query_len; ++row) {
      if (rows.at(RowStats::counted, row) == 0.f) continue;
      counted += 1;
      top = std::max(top, rows.at(RowStats::max_logit, row));
      for (int field = 0; field < 6; ++field) sums[field] += rows.at(static_cast<RowStats::Field>(field), row);
    }
    for (int field = 0; field < 6; ++field) {
      problem.stats[field * heads + head] = static_cast<float>(sums[field] / std::max(counted, 1.0));
    }
    problem.stats[RowStats::max_logit * heads + head] = static_cast<float>(top);
  }
}

}  // namespace headprune::cpu::HEADPRUNE_PRECISION
