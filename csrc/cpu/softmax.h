// The online softmax of a panel over blocks of keys.
//
// Names: high = running maximum m of the scores, sum = running denominator l (FlashAttention). Scores are in units of
// log2, so that exp is exp2.
#pragma once

#include "panel.h"
#include "thin.h"

namespace headprune::cpu::inline HEADPRUNE_PRECISION {

// Sums over keys of p * x and p * distance (x = score - high), and p of the first visible key; top = highest score.
struct PanelStats {
  Real *top, *weighted, *distance, *first;
};

struct SoftmaxPanel : Panel {
  Real* thin_queries;  // [row][whole_steps(head_dim)], arranged (thin.h), where the panel is thin
  Real* output;        // [value_dim][row]; where the panel is thin [row][whole_steps(value_dim)], arranged
  Real *high, *sum;    // [row]; the sink is in `high` but not in `sum`
  PanelStats stats;

  bool thin() const { return rows <= kThinRows; }
};

// All that the softmax of a panel of `rows` rows has come to, in one piece of memory.
inline int64_t output_floats(int64_t rows, int64_t value_dim) {
  return rows <= kThinRows ? rows * whole_steps(value_dim) : kPanelRows * value_dim;
}
inline int64_t state_floats(int64_t rows, int64_t value_dim) { return output_floats(rows, value_dim) + 6 * kPanelRows; }

inline void place_state(SoftmaxPanel& panel, Real* state, int64_t value_dim) {
  panel.output = state;
  state += output_floats(panel.rows, value_dim);
  for (Real** field : {&panel.high, &panel.sum, &panel.stats.top, &panel.stats.weighted, &panel.stats.distance, &panel.stats.first}) {
    *field = state;
    state += kPanelRows;
  }
}

template <int Vecs>
void edit_scores(const Edits& edits, const Panel& panel, const Keys& keys, int64_t slot, int64_t count, Real* scores) {
  constexpr int rows = Vecs * kLanes;
  for (int64_t key = 0; key < count; ++key) {
    const Vec key_position(static_cast<Real>(keys.at(slot + key)));
    for (int v = 0; v < Vecs; ++v) {
      Real* at = scores + key * rows + v * kLanes;
      Vec tanh_of_score;
      store(at, edited(edits, load(at), panel, key, v * kLanes, rows, key_position, tanh_of_score));
    }
  }
}

template <int Vecs>
void rescale(Real* panel_rows, int64_t count, const Vec* factor) {
  for (int64_t i = 0; i < count; ++i) {
    for (int v = 0; v < Vecs; ++v) {
      Real* at = panel_rows + (i * Vecs + v) * kLanes;
      store(at, load(at) * factor[v]);
    }
  }
}

// Takes one block of scores into the running softmax: scores become unnormalised probabilities.
template <int Vecs, bool Stats>
void softmax_step(const SoftmaxPanel& panel, const Keys& keys, int64_t slot, int64_t count, int64_t value_dim, Real* scores) {
  constexpr int rows = Vecs * kLanes;
  Vec block_high[Vecs];
  for (int v = 0; v < Vecs; ++v) block_high[v] = Vec(-kInfinity);
  for (int64_t key = 0; key < count; ++key) {
    for (int v = 0; v < Vecs; ++v) block_high[v] = max_second(load(scores + key * rows + v * kLanes), block_high[v]);
  }
  Vec high[Vecs], factor[Vecs], sum[Vecs], shift[Vecs];
  bool grew = false;
  for (int v = 0; v < Vecs; ++v) {
    const Vec old = load(panel.high + v * kLanes);
    const Vec now = max_second(block_high[v], old);
    store(panel.high + v * kLanes, now);
    high[v] = Vec::blendv(now, Vec(0.f), now == Vec(-kInfinity));
    shift[v] = max_second(Vec(kFaintest), old - high[v]);
    factor[v] = exp2(shift[v]);
    sum[v] = Vec(0.f);  // of this block
    grew = grew || ((factor[v] == Vec(1.f)) | (old == Vec(-kInfinity))).zero_mask() != 0;  // before any key there is nothing to scale
  }
  if (grew) rescale<Vecs>(panel.output, value_dim, factor);
  Vec weighted[Vecs], distance[Vecs];
  if constexpr (Stats) {
    const PanelStats& stats = panel.stats;
    for (int v = 0; v < Vecs; ++v) {
      const int at = v * kLanes;
      store(stats.top + at, max_second(block_high[v], load(stats.top + at)));
      weighted[v] = (load(stats.weighted + at) + shift[v] * load(panel.sum + at)) * factor[v];
      distance[v] = load(stats.distance + at) * factor[v];
      store(stats.first + at, load(stats.first + at) * factor[v]);
    }
  }
  for (int64_t key = 0; key < count; ++key) {
    for (int v = 0; v < Vecs; ++v) {
      Real* at = scores + key * rows + v * kLanes;
      const Vec x = load(at) - high[v];
      const Vec p = exp2(x);
      sum[v] = sum[v] + p;
      if constexpr (Stats) {
        const Vec apart = (Vec(static_cast<Real>(keys.at(slot + key))) - load(panel.position + v * kLanes)).abs();
        weighted[v] = at::vec::fmadd(p, max_second(Vec(kFaintest), x), weighted[v]);
        distance[v] = at::vec::fmadd(p, apart, distance[v]);
      }
      store(at, p);
    }
  }
  for (int v = 0; v < Vecs; ++v) {
    store(panel.sum + v * kLanes, at::vec::fmadd(load(panel.sum + v * kLanes), factor[v], sum[v]));
    if constexpr (Stats) {
      store(panel.stats.weighted + v * kLanes, weighted[v]);
      store(panel.stats.distance + v * kLanes, distance[v]);
      if (slot == 0 && count) store(panel.stats.first + v * kLanes, load(scores + v * kLanes));
    }
  }
}

// Takes what another panel with the same rows has come to over other keys into `panel`.
inline void merge(const SoftmaxPanel& panel, const SoftmaxPanel& other, int64_t value_dim) {
  for (int v = 0; v < panel.vecs; ++v) {
    const int at = v * kLanes;
    const Vec now = max_second(load(panel.high + at), load(other.high + at));
    const Vec high = Vec::blendv(now, Vec(0.f), now == Vec(-kInfinity));
    const Vec shift = max_second(Vec(kFaintest), load(panel.high + at) - high);
    const Vec other_shift = max_second(Vec(kFaintest), load(other.high + at) - high);
    const Vec factor = exp2(shift), other_factor = exp2(other_shift);
    const auto add = [&](Real* to, const Real* from) { store(to, load(to) * factor + load(from) * other_factor); };
    store(panel.high + at, now);
    if (panel.thin()) {
      Real factors[kLanes], other_factors[kLanes];
      store(factors, factor), store(other_factors, other_factor);
      for (int64_t r = 0, width = whole_steps(value_dim); r < panel.rows; ++r) {
        scale_row(panel.output + r * width, width, factors[r]);
        for (int64_t c = 0; c < width; c += kLanes) {
          Real* to = panel.output + r * width + c;
          store(to, multiply_add(Vec(other_factors[r]), load(other.output + r * width + c), load(to)));
        }
      }
    } else {
      for (int64_t c = 0; c < value_dim; ++c) add(panel.output + c * panel.width() + at, other.output + c * panel.width() + at);
    }
    const PanelStats &stats = panel.stats, &more = other.stats;
    store(stats.top + at, max_second(load(stats.top + at), load(more.top + at)));
    const Vec weighted = (load(stats.weighted + at) + shift * load(panel.sum + at)) * factor;
    store(stats.weighted + at, weighted + (load(more.weighted + at) + other_shift * load(other.sum + at)) * other_factor);
    add(stats.distance + at, more.distance + at);
    add(stats.first + at, more.first + at);
    add(panel.sum + at, other.sum + at);
  }
}

}  // namespace headprune::cpu::HEADPRUNE_PRECISION
