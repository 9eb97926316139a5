// The register-tiled products of attention, with query rows in the vector lanes.
//
// A panel is `Vecs * kLanes` query rows side by side. Scores are kept transposed, [key][row], so that keys and values
// are read in place, one broadcast each, and the softmax runs along the lanes without any horizontal step.
#pragma once

#include "vector.h"

namespace headprune::cpu {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTile = 8;  // 8 x 2 accumulators of 32 registers
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kTile = 6;  // 6 x 2 of 16
#else
constexpr int kTile = 4;
#endif
constexpr int kPanelVecs = 2;
constexpr int kPanelRows = kPanelVecs * kLanes;

// out[i][row] (+)= sum_x a[i * a_outer + x * a_inner] * b[x][row] for i < Count, x < depth; b and out have panel rows.
template <int Count, int Vecs, bool Add>
inline void multiply_tile(
    const float* a, int64_t a_outer, int64_t a_inner, const float* b, int64_t depth, float* out) {
  constexpr int rows = Vecs * kLanes;
  Vec sum[Count][Vecs];
  for (int i = 0; i < Count; ++i) {
    for (int v = 0; v < Vecs; ++v) sum[i][v] = Add ? load(out + i * rows + v * kLanes) : Vec(0.f);
  }
  for (int64_t x = 0; x < depth; ++x) {
    Vec column[Vecs];
    for (int v = 0; v < Vecs; ++v) column[v] = load(b + x * rows + v * kLanes);
    for (int i = 0; i < Count; ++i) {
      const Vec factor(a[i * a_outer + x * a_inner]);
      for (int v = 0; v < Vecs; ++v) sum[i][v] = at::vec::fmadd(factor, column[v], sum[i][v]);
    }
  }
  for (int i = 0; i < Count; ++i) {
    for (int v = 0; v < Vecs; ++v) store(out + i * rows + v * kLanes, sum[i][v]);
  }
}

template <int Vecs, bool Add, bool Unit, int Count = kTile>
inline void multiply_tail(
    int64_t count, const float* a, int64_t stride, const float* b, int64_t depth, float* out) {
  if constexpr (Count > 0) {
    if (count == Count) return multiply_tile<Count, Vecs, Add>(a, Unit ? 1 : stride, Unit ? stride : 1, b, depth, out);
    multiply_tail<Vecs, Add, Unit, Count - 1>(count, a, stride, b, depth, out);
  }
}

// scores[key][row] = sum_x keys[key][x] * queries[x][row]
template <int Vecs>
void score_block(const float* keys, int64_t stride, int64_t count, const float* queries, int64_t head_dim, float* scores) {
  for (int64_t key = 0; key < count; key += kTile) {
    multiply_tail<Vecs, false, false>(
        std::min<int64_t>(kTile, count - key), keys + key * stride, stride, queries, head_dim, scores + key * Vecs * kLanes);
  }
}

// output[column][row] += sum_key values[key][column] * probs[key][row]
template <int Vecs>
void value_block(const float* values, int64_t stride, int64_t count, const float* probs, int64_t value_dim, float* output) {
  for (int64_t column = 0; column < value_dim; column += kTile) {
    multiply_tail<Vecs, true, true>(
        std::min<int64_t>(kTile, value_dim - column), values + column, stride, probs, count, output + column * Vecs * kLanes);
  }
}

}  // namespace headprune::cpu
