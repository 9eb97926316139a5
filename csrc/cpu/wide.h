// The products of attention for panels of many rows, which are in the vector lanes (tile.h), as the walk over the keys calls them.
#pragma once

#include "bias.h"
#include "keys.h"
#include "softmax.h"

namespace headprune::cpu::inline HEADPRUNE_PRECISION {

// The working memory of wide panels, shared by those of a thread.
struct WidePlace {
  Real *keys, *values;  // [kKeyBlock][dim]
  Real* scores;         // [kKeyBlock][row], in the end probabilities
  uint32_t *probs, *edge;  // what wide_pairs.h makes of them, and of a pair of values
};

// A block of keys: its first slot, its rows, and whether a panel has met them, so that they are in the cache.
struct WideBlock {
  int64_t slot;
  RowBlock key, value;
  bool met = false;
};

// In the type that we compute in. Other products have the same functions; a panel sees `count` keys of a block, from its key `first` on.
struct WideProducts {
  // The panel's queries.
  static void open(const Problem& problem, const Group& group, const SoftmaxPanel& panel, Real* buffer) {
    const int64_t width = panel.width(), dim = problem.head_dim;
    const Real factor = query_factor(problem);
    if (const Real* in_place = panel_in_place(problem, problem.query, group, panel)) {
      transpose(in_place, problem.query.row, width, dim, panel.queries, width);
      scale_row(panel.queries, width * dim, factor);
    } else {
      read_panel(problem, problem.query, group, panel, dim, dim, buffer);
      scale_row(buffer, width * dim, factor);
      transpose(buffer, dim, width, dim, panel.queries, width);
    }
  }

  static WideBlock read(const Problem& problem, const Group& group, const Keys& keys, int64_t slot, int64_t count, const WidePlace& place) {
    const int64_t head_dim = problem.head_dim, value_dim = problem.value_dim;
    return {slot, row_block(problem, problem.key, group, keys, slot, count, head_dim, head_dim, place.keys),
            row_block(problem, problem.value, group, keys, slot, count, value_dim, value_dim, place.values)};
  }

  template <int Vecs>
  static void score(const Problem& problem, const SoftmaxPanel& panel, const WideBlock& block, int64_t first, int64_t count, const WidePlace& place) {
    const RowBlock key = block.key.from(first), value = block.value.from(first);
    const Coming coming{value.data, value.stride, block.met ? 0 : problem.value_dim};
    score_block<Vecs>(key.data, key.stride, count, panel.queries, problem.head_dim, place.scores, coming);
  }

  // Probabilities as add_values takes them.
  template <int Vecs>
  static void close(int64_t, int64_t, const WidePlace&) {}

  // Adds the values of `from` up to `to` of those keys to the output.
  template <int Vecs>
  static void add_values(const Problem& problem, const SoftmaxPanel& panel, const WideBlock& block, int64_t first, int64_t from, int64_t to,
                         const WidePlace& place) {
    const RowBlock value = block.value.from(first + from);
    value_block<Vecs>(value.data, value.stride, to - from, place.scores + from * Vecs * kLanes, problem.value_dim, panel.output);
  }
};

}  // namespace headprune::cpu::HEADPRUNE_PRECISION
