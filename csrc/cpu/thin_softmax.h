// Panels of few rows over blocks of keys: scores and probabilities are [row][key] with the keys in the vector lanes.
#pragma once

#include "bias.h"
#include "softmax.h"
#include "pairs.h"

namespace headprune::cpu::inline HEADPRUNE_PRECISION {

// The scores of a block of keys and what its bias is, of panels of either kind.
constexpr int64_t kBlockFloats = std::max(kKeyBlock * kPanelRows, kThinBlock * kThinRows);

// The working memory of thin panels, shared by those of a thread.
struct ThinPlace {
  Real *scores, *positions, *nothing;  // [kThinRows][kThinBlock], [kThinBlock + kLanes], zeros [value_dim + kStep]
  struct {
    const void *now[kThinBlock + kLanes], *later[kThinBlock + kLanes];
  } keys, values;
};

template <typename T>
void point_at_rows(const Problem& problem, const Operand& operand, const Group& group, const Keys& keys, int64_t slot, int64_t count,
                   const void** rows) {
  const auto row = [&](int64_t i) {
    return reinterpret_cast<const T*>(key_row(problem, operand, group.batch, group.kv_head, keys.at(slot + i)));
  };
  for (int64_t i = 0; i < count;) {
    const int64_t page_ends = problem.pages ? problem.page_size - (keys.first + slot + i) % problem.page_size : count;
    const int64_t stop = keys.index.empty() ? std::min(count, i + page_ends) : i + 1;
    for (const T* start = row(i); i < stop; ++i, start += operand.row) rows[i] = start;
  }
}

// Points at the keys and the values of slots `slot` up to `slot + count`, and at what comes after them: the values after the
// keys, then the keys that follow, up to slot `end`.
template <typename T>
void point(const Problem& problem, const Group& group, const Keys& keys, int64_t slot, int64_t count, int64_t end, ThinPlace& place) {
  const void* next[kMostRowsAhead];
  const int64_t row_bytes = sizeof(T) * std::max<int64_t>(1, std::max(problem.head_dim, problem.value_dim));
  const int64_t ahead = std::clamp<int64_t>(bytes_ahead() / row_bytes, 4, kMostRowsAhead);
  const int64_t padded = count + kLanes, coming = std::min(ahead, end - slot - count);
  point_at_rows<T>(problem, problem.key, group, keys, slot, count, place.keys.now);
  point_at_rows<T>(problem, problem.value, group, keys, slot, count, place.values.now);
  point_at_rows<T>(problem, problem.key, group, keys, slot + count, coming, next);
  for (auto* rows : {&place.keys, &place.values}) {
    const int64_t inside = std::max<int64_t>(0, count - ahead);
    std::fill(rows->now + count, rows->now + padded, rows->now[count - 1]);
    std::copy_n(rows->now + count - inside, inside, rows->later);
    std::fill(rows->later + inside, rows->later + padded, rows->now[count - 1]);
  }
  const int64_t few = std::min(count, ahead);
  std::copy_n(place.values.now, few, place.keys.later + count - few);
  std::copy_n(next, std::min(few, coming), place.values.later + count - few);
}

// What the options do to the scores of row `r`.
inline void edit_row(const Edits& edits, const Panel& panel, int64_t r, int64_t count, const Real* positions, Real* scores) {
  const Vec position(panel.position[r]), slope(panel.slope[r]);
  const Real* bias = edits.bias ? edits.bias + r * kThinBlock : nullptr;
  for (int64_t key = 0; key < count; key += kLanes) {
    Vec tanh_of_score;
    const Vec ahead = load(positions + key) - position;
    store(scores + key, edited(edits, load(scores + key), ahead, slope, bias + key, tanh_of_score));
  }
}

// Takes the scores of row `r` into its running softmax: they become unnormalised probabilities. `sums` is the row's output.
template <bool Stats>
void thin_softmax(const SoftmaxPanel& panel, int64_t r, bool first_block, int64_t count, const Real* positions, int64_t width, Real* scores,
                  Real* sums) {
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  std::fill(scores + count, scores + padded, -kInfinity);
  Vec tops(-kInfinity);
  for (int64_t key = 0; key < padded; key += kLanes) tops = max_second(load(scores + key), tops);
  const Real top = at::vec::vec_reduce_all<Real>([](Vec a, Vec b) { return max_second(a, b); }, tops);
  const Real old = panel.high[r], now = std::max(old, top), high = now == -kInfinity ? 0 : now;
  const Real shift = std::max(kFaintest, old - high), factor = now > old ? std::exp2(shift) * (old != -kInfinity) : 1;
  if (now > old && old != -kInfinity) scale_row(sums, width, factor);
  Vec sum(0), weighted(0), distance(0);
  for (int64_t key = 0; key < padded; key += kLanes) {
    const Vec x = load(scores + key) - Vec(high), p = exp2(x);
    sum = sum + p;
    if constexpr (Stats) {
      weighted = at::vec::fmadd(p, max_second(Vec(kFaintest), x), weighted);
      distance = at::vec::fmadd(p, (load(positions + key) - Vec(panel.position[r])).abs(), distance);
    }
    store(scores + key, p);
  }
  panel.high[r] = now;
  if constexpr (Stats) {
    const PanelStats& stats = panel.stats;
    stats.top[r] = std::max(stats.top[r], top);
    stats.weighted[r] = (stats.weighted[r] + shift * panel.sum[r]) * factor + sum_of_lanes(weighted);
    stats.distance[r] = stats.distance[r] * factor + sum_of_lanes(distance);
    stats.first[r] = first_block ? scores[0] : stats.first[r] * factor;
  }
  panel.sum[r] = panel.sum[r] * factor + sum_of_lanes(sum);
}

// Slots `slot` up to `slot + count` taken into the softmax and the output of a thin panel; `end`: behind the last slot that it sees.
template <typename T, bool Stats, ThinProducts<T> (*products_of)(int64_t rows)>
void attend_thin(const Problem& problem, const Group& group, const SoftmaxPanel& panel, const Keys& keys, int64_t slot, int64_t count,
                 int64_t end, BiasBlock& bias, ThinPlace& place) {
  const bool biased = problem.bias.data;
  if (biased && !read_bias(problem, group, panel, keys, slot, count, kThinBlock, bias)) return;
  const Edits edits = edits_of(problem, panel, keys, slot, count, biased ? bias.rows : nullptr);
  const ThinProducts<T> products = products_of(panel.rows);
  const int64_t width = whole_steps(problem.value_dim);
  point<T>(problem, group, keys, slot, count, end, place);
  const auto rows_of = [](const auto& rows) {
    return Rows<T>{reinterpret_cast<const T* const*>(rows.now), reinterpret_cast<const T* const*>(rows.later)};
  };
  products.scores(rows_of(place.keys), count, problem.head_dim, panel.thin_queries, query_factor(problem), place.scores, kThinBlock);
  if (edits.any() || Stats) {
    for (int64_t key = 0; key < count; ++key) place.positions[key] = static_cast<Real>(keys.at(slot + key));
    std::fill_n(place.positions + count, kLanes, Real(0));
  }
  for (int64_t r = 0; r < panel.rows; ++r) {
    Real* scores = place.scores + r * kThinBlock;
    if (edits.any()) edit_row(edits, panel, r, count, place.positions, scores);
    thin_softmax<Stats>(panel, r, slot == 0, count, place.positions, width, scores, panel.output + r * width);
  }
  // The values of keys that the bias hides from the whole panel may hold inf or NaN.
  for (int64_t key = 0; biased && key < count; ++key) {
    if (bias.best[key] == -kInfinity) place.values.now[key] = place.nothing;
  }
  place.values.now[count] = place.nothing;  // the partner of the last of an odd number of keys
  products.values(rows_of(place.values), count, problem.value_dim, place.scores, kThinBlock, panel.output);
}

// What depends on the type that thin panels read, on whether they take statistics, and on the processor.
struct ThinKind {
  void (*arrange)(const Real* row, int64_t dim, Real* arranged);
  Real (*arranged_at)(const Real* arranged, int64_t x);
  void (*attend)(const Problem&, const Group&, const SoftmaxPanel&, const Keys&, int64_t slot, int64_t count, int64_t end, BiasBlock&, ThinPlace&);
};

template <typename T>
ThinKind thin_kind(bool stats) {
  return {arrange<T>, arranged_at<T>, stats ? attend_thin<T, true, thin_products<T>> : attend_thin<T, false, thin_products<T>>};
}

// Statistics are of probabilities that are not rounded.
inline ThinKind thin_kind(Type type, bool stats) {
#if defined(HEADPRUNE_AVX512)
  if (type == Type::bfloat16 && !stats && multiplies_pairs()) {
    return {Pairs::arrange, Pairs::arranged_at, attend_thin<at::BFloat16, false, paired_products>};
  }
#endif
#if !defined(HEADPRUNE_FP64)
  if (type == Type::bfloat16) return thin_kind<at::BFloat16>(stats);
  if (type == Type::float16) return thin_kind<at::Half>(stats);
#endif
  return thin_kind<Real>(stats);
}

// The rows of a panel [row][head_dim] as its products want them.
inline void open_thin(const ThinKind& kind, const Problem& problem, const Real* rows, const SoftmaxPanel& panel) {
  const int64_t width = whole_steps(problem.head_dim);
  std::fill_n(panel.thin_queries, panel.rows * width, Real(0));
  for (int64_t r = 0; r < panel.rows; ++r) kind.arrange(rows + r * problem.head_dim, problem.head_dim, panel.thin_queries + r * width);
}

// The output as rows [row][value_dim].
inline void read_thin_output(const ThinKind& kind, const Problem& problem, const SoftmaxPanel& panel, Real* rows) {
  for (int64_t r = 0; r < panel.rows; ++r) {
    const Real* sums = panel.output + r * whole_steps(problem.value_dim);
    for (int64_t x = 0; x < problem.value_dim; ++x) *rows++ = kind.arranged_at(sums, x);
  }
}

}  // namespace headprune::cpu::HEADPRUNE_PRECISION
