// The register-tiled products of attention, with query rows in the vector lanes.
//
// A panel is `Vecs * kLanes` query rows side by side. Scores are kept transposed, [key][row], so that keys and values
// are read in place, one broadcast each, and the softmax runs along the lanes without any horizontal step.
#pragma once

#include "vector.h"

namespace headprune::cpu::inline HEADPRUNE_PRECISION {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTile = 8;  // 8 x 2 accumulators of 32 registers
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kTile = 6;  // 6 x 2 of 16
#else
constexpr int kTile = 4;
#endif
constexpr int kPanelVecs = 2;
constexpr int kPanelRows = kPanelVecs * kLanes;

// out[i][lane] (+)= sum_x a[i * a_outer + x * a_inner] * b[x][lane] for i < Count, x < depth; rows of b and out are `b_stride`
// and `out_stride` apart.
// What is there is added at the end, not first: the error of a sum over many blocks is then that of the blocks' sums.
template <int Count, int Vecs, bool Add>
inline void multiply_tile(
    const Real* a, int64_t a_outer, int64_t a_inner, const Real* b, int64_t b_stride, int64_t depth, Real* out, int64_t out_stride) {
  Vec sum[Count][Vecs];
  for (int i = 0; i < Count; ++i) {
    for (int v = 0; v < Vecs; ++v) sum[i][v] = Vec(0.f);
  }
  for (int64_t x = 0; x < depth; ++x) {
    Vec column[Vecs];
    for (int v = 0; v < Vecs; ++v) column[v] = load(b + x * b_stride + v * kLanes);
    for (int i = 0; i < Count; ++i) {
      const Vec factor(a[i * a_outer + x * a_inner]);
      for (int v = 0; v < Vecs; ++v) sum[i][v] = at::vec::fmadd(factor, column[v], sum[i][v]);
    }
  }
  for (int i = 0; i < Count; ++i) {
    for (int v = 0; v < Vecs; ++v) {
      Real* to = out + i * out_stride + v * kLanes;
      store(to, Add ? load(to) + sum[i][v] : sum[i][v]);
    }
  }
}

template <int Vecs, bool Add, bool Unit, int Count = kTile>
inline void multiply_tail(
    int64_t count, const Real* a, int64_t stride, const Real* b, int64_t b_stride, int64_t depth, Real* out, int64_t out_stride) {
  if constexpr (Count > 0) {
    if (count == Count) {
      return multiply_tile<Count, Vecs, Add>(a, Unit ? 1 : stride, Unit ? stride : 1, b, b_stride, depth, out, out_stride);
    }
    multiply_tail<Vecs, Add, Unit, Count - 1>(count, a, stride, b, b_stride, depth, out, out_stride);
  }
}

constexpr int64_t kLine = 64 / sizeof(Real);  // of the cache

// Rows that are read after a product, asked for while it runs.
struct Coming {
  const Real* rows;
  int64_t stride, width;
  void ask_for(int64_t from, int64_t to) const {
    if (!width) return;
    for (int64_t row = from; row < to; ++row) {
      for (int64_t x = 0; x < width; x += kLine) __builtin_prefetch(rows + row * stride + x, 0, 2);
    }
  }
};

// How many of the rows that are left the next tile takes. One of one or two rows waits for its few sums: the last two share theirs.
inline int64_t tile_of(int64_t left) { return left > kTile && left < kTile + kTile / 2 ? (left + 1) / 2 : std::min<int64_t>(kTile, left); }

// scores[key][row] = sum_x keys[key][x] * queries[x][row]; `coming` has one row for each key.
template <int Vecs>
void score_block(
    const Real* keys, int64_t stride, int64_t count, const Real* queries, int64_t head_dim, Real* scores, const Coming& coming = {}) {
  constexpr int rows = Vecs * kLanes;
  for (int64_t key = 0, tile; key < count; key += tile) {
    tile = tile_of(count - key);
    coming.ask_for(key, key + tile);
    multiply_tail<Vecs, false, false>(tile, keys + key * stride, stride, queries, rows, head_dim, scores + key * rows, rows);
  }
}

// output[column][row] += sum_key values[key][column] * probs[key][row]
template <int Vecs>
void value_block(const Real* values, int64_t stride, int64_t count, const Real* probs, int64_t value_dim, Real* output) {
  constexpr int rows = Vecs * kLanes;
  for (int64_t column = 0, tile; column < value_dim; column += tile) {
    tile = tile_of(value_dim - column);
    multiply_tail<Vecs, true, true>(tile, values + column, stride, probs, rows, count, output + column * rows, rows);
  }
}

// out[i][column] += sum_x a(i, x) * b[x][column] with the columns in the lanes, `width` of them (a multiple of kLanes).
// a(i, x) is a[i + x * stride] where Unit, else a[i * stride + x].
template <bool Unit>
void columns_block(
    int64_t count, const Real* a, int64_t stride, const Real* b, int64_t b_stride, int64_t depth, int64_t width, Real* out,
    int64_t out_stride) {
  for (int64_t column = 0; column < width; column += kPanelRows) {
    const bool half = width - column < kPanelRows;
    for (int64_t i = 0; i < count; i += kTile) {
      const auto multiply = half ? multiply_tail<1, true, Unit> : multiply_tail<kPanelVecs, true, Unit>;
      multiply(std::min<int64_t>(kTile, count - i), a + i * (Unit ? 1 : stride), stride, b + column, b_stride, depth,
               out + i * out_stride + column, out_stride);
    }
  }
}

}  // namespace headprune::cpu::HEADPRUNE_PRECISION
