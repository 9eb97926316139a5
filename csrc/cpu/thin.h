// The products of attention for panels of few rows (decode): the columns are in the vector lanes, so that no lane idles, and
// keys and values are read as they lie, once. Scores and output keep the panel's layout.
#pragma once

#include "tile.h"

namespace headprune::cpu {

constexpr int kThinRows = kLanes >= 16 ? 8 : kLanes / 2;
constexpr int kThinAccumulators = kLanes >= 16 ? 16 : 8;

// scores[key][row] = sum_x keys[key][x] * queries[row][x]; rows of queries are head_dim apart.
template <int Rows>
void thin_scores(const float* keys, int64_t stride, int64_t count, const float* queries, int64_t head_dim, int64_t width, float* scores) {
  constexpr int tile = Rows * 4 <= kThinAccumulators ? 4 : Rows * 2 <= kThinAccumulators ? 2 : 1;
  std::fill_n(scores, count * width, 0.f);
  for (int64_t first = 0; first < count; first += tile) {
    const float* key[tile];  // past the end the last one again
    for (int k = 0; k < tile; ++k) key[k] = keys + std::min(first + k, count - 1) * stride;
    Vec sum[tile][Rows];
    for (auto& row : sum) std::fill_n(row, Rows, Vec(0.f));
    int64_t x = 0;
    for (; x + kLanes <= head_dim; x += kLanes) {
      Vec query[Rows];
      for (int r = 0; r < Rows; ++r) query[r] = load(queries + r * head_dim + x);
      for (int k = 0; k < tile; ++k) {
        const Vec columns = load(key[k] + x);
        for (int r = 0; r < Rows; ++r) sum[k][r] = at::vec::fmadd(columns, query[r], sum[k][r]);
      }
    }
    for (int k = 0; k < tile && first + k < count; ++k) {
      for (int r = 0; r < Rows; ++r) {
        float score = sum_of_lanes(sum[k][r]);
        for (int64_t rest = x; rest < head_dim; ++rest) score += key[k][rest] * queries[r * head_dim + rest];
        scores[(first + k) * width + r] = score;
      }
    }
  }
}

// sums[row][column] += sum_key values[key][column] * probs[key][row] for Vecs * kLanes columns; rows of sums `dim` apart.
template <int Rows, int Vecs>
inline void thin_columns(const float* values, int64_t stride, int64_t count, const float* probs, int64_t width, float* sums, int64_t dim) {
  Vec sum[Rows][Vecs];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vecs; ++v) sum[r][v] = load(sums + r * dim + v * kLanes);
  }
  for (int64_t key = 0; key < count; ++key) {
    Vec columns[Vecs];
    for (int v = 0; v < Vecs; ++v) columns[v] = load(values + key * stride + v * kLanes);
    for (int r = 0; r < Rows; ++r) {
      const Vec prob(probs[key * width + r]);
      for (int v = 0; v < Vecs; ++v) sum[r][v] = at::vec::fmadd(prob, columns[v], sum[r][v]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vecs; ++v) store(sums + r * dim + v * kLanes, sum[r][v]);
  }
}

// output[column][row] += sum_key values[key][column] * probs[key][row]; `sums` is room for [Rows][value_dim].
template <int Rows>
void thin_values(
    const float* values, int64_t stride, int64_t count, const float* probs, int64_t width, int64_t value_dim, float* output, float* sums) {
  constexpr int vecs = kThinAccumulators / Rows >= 4 ? 4 : kThinAccumulators / Rows >= 2 ? 2 : 1;
  constexpr int64_t few = 16;  // keys whose rows stay in the first cache between one range of columns and the next
  std::fill_n(sums, Rows * value_dim, 0.f);
  for (int64_t key = 0; key < count; key += few) {
    const int64_t here = std::min(few, count - key);
    const float *from = values + key * stride, *prob = probs + key * width;
    int64_t column = 0;
    for (; column + vecs * kLanes <= value_dim; column += vecs * kLanes) {
      thin_columns<Rows, vecs>(from + column, stride, here, prob, width, sums + column, value_dim);
    }
    for (; column + kLanes <= value_dim; column += kLanes) {
      thin_columns<Rows, 1>(from + column, stride, here, prob, width, sums + column, value_dim);
    }
    for (; column < value_dim; ++column) {
      for (int64_t k = 0; k < here; ++k) {
        for (int r = 0; r < Rows; ++r) sums[r * value_dim + column] += from[k * stride + column] * prob[k * width + r];
      }
    }
  }
  for (int64_t column = 0; column < value_dim; ++column) {
    for (int r = 0; r < Rows; ++r) output[column * width + r] += sums[r * value_dim + column];
  }
}

// thin_scores<rows> and thin_values<rows> for 1 <= rows <= kThinRows.
struct ThinProducts {
  decltype(&thin_scores<1>) scores;
  decltype(&thin_values<1>) values;
};

template <int Rows = kThinRows>
ThinProducts thin_products(int64_t rows) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return thin_products<Rows - 1>(rows);
  }
  return {thin_scores<Rows>, thin_values<Rows>};
}

}  // namespace headprune::cpu
