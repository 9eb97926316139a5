// The products of wide panels (tile.h) on processors that multiply pairs of bf16 and add them in fp32 (AVX512_BF16): one instruction does the
// work of two. Queries and keys stay as they are; probabilities are rounded to bf16, as flash attention does.
//
// A pair is two neighbours along what is summed, in one number: of queries and keys two columns, of values and probabilities two keys.
#pragma once

#include "pairs.h"
#include "wide.h"

namespace headprune::cpu::inline HEADPRUNE_PRECISION {

constexpr int64_t kProbPairs = (kKeyBlock / 2 + 1) * kPanelRows;  // a block of probabilities may begin and end within a pair

#if defined(HEADPRUNE_AVX512)

inline int64_t pairs_of(int64_t count) { return (count + 1) / 2; }

// Row `row` of `dim` bf16, filled up with 0 to whole pairs.
inline void copy_pairs(const void* row, int64_t dim, uint32_t* pairs) {
  if (dim % 2) pairs[dim / 2] = 0;
  std::memcpy(pairs, row, dim * sizeof(at::BFloat16));
}

// A block of values as [pair of keys][column].
HEADPRUNE_PAIRS inline void pair_values(const Problem& problem, const Group& group, const Keys& keys, int64_t slot, int64_t count, uint32_t* to) {
  const int64_t dim = problem.value_dim;
  const auto row = [&](int64_t i) {
    return reinterpret_cast<const uint16_t*>(key_row(problem, problem.value, group.batch, group.kv_head, keys.at(slot + i)));
  };
  for (int64_t i = 0; i < count; i += 2, to += dim) {
    const uint16_t *even = row(i), *odd = i + 1 < count ? row(i + 1) : nullptr;
    int64_t x = 0;
    for (; x + kLanes <= dim; x += kLanes) {
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + x)));
      const __m512i high = odd ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd + x))) : _mm512_setzero_si512();
      _mm512_storeu_si512(to + x, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
    for (; x < dim; ++x) to[x] = even[x] | static_cast<uint32_t>(odd ? odd[x] : 0) << 16;
  }
}

// out[i][row] (+)= factor * sum_x a[i * a_outer + x * a_inner] . b[x][row] for i < Count, x < depth.
template <int Count, int Vecs, bool Add>
HEADPRUNE_PAIRS inline void multiply_paired_tile(const uint32_t* a, int64_t a_outer, int64_t a_inner, const uint32_t* b, int64_t depth, Real factor,
                                                 Real* out) {
  constexpr int rows = Vecs * kLanes;
  __m512 sum[Count][Vecs];
#pragma GCC unroll 8
  for (int i = 0; i < Count; ++i) {
    for (int v = 0; v < Vecs; ++v) sum[i][v] = _mm512_setzero_ps();
  }
  for (int64_t x = 0; x < depth; ++x) {
    __m512bh column[Vecs];
    for (int v = 0; v < Vecs; ++v) column[v] = (__m512bh)_mm512_loadu_si512(b + x * rows + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < Count; ++i) {
      const auto pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[i * a_outer + x * a_inner]));
      for (int v = 0; v < Vecs; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], column[v], pair);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Count; ++i) {
    for (int v = 0; v < Vecs; ++v) {
      Real* to = out + i * rows + v * kLanes;
      _mm512_storeu_ps(to, Add ? _mm512_add_ps(_mm512_loadu_ps(to), sum[i][v]) : _mm512_mul_ps(_mm512_set1_ps(factor), sum[i][v]));
    }
  }
}

// `count` <= Count rows of out.
template <int Vecs, bool Add, int Count = kTile>
HEADPRUNE_PAIRS inline void multiply_paired(int64_t count, const uint32_t* a, int64_t a_outer, int64_t a_inner, const uint32_t* b, int64_t depth,
                                            Real factor, Real* out) {
  if constexpr (Count > 0) {
    if (count == Count) return multiply_paired_tile<Count, Vecs, Add>(a, a_outer, a_inner, b, depth, factor, out);
    multiply_paired<Vecs, Add, Count - 1>(count, a, a_outer, a_inner, b, depth, factor, out);
  }
}

// output[column][row] += values[pair][column] . probs[pair][row] over `count` pairs of keys
template <int Vecs>
HEADPRUNE_PAIRS void add_pairs(const uint32_t* values, int64_t count, const uint32_t* probs, int64_t value_dim, Real* output) {
  for (int64_t column = 0; column < value_dim; column += kTile) {
    multiply_paired<Vecs, true>(std::min<int64_t>(kTile, value_dim - column), values + column, 1, value_dim, probs, count, 1, output + column * Vecs * kLanes);
  }
}

// Probabilities [key][row] of keys `first` up to `first + count` of a block, rounded, as [pair of keys][row]; 0 where a pair has another key.
template <int Vecs>
HEADPRUNE_PAIRS void pair_probs(const Real* probs, int64_t first, int64_t count, uint32_t* pairs) {
  constexpr int rows = Vecs * kLanes;
  alignas(64) static const uint16_t kInTurn[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i in_turn = _mm512_load_si512(kInTurn);
  for (int64_t key = -(first % 2); key < count; key += 2) {
    for (int v = 0; v < Vecs; ++v, pairs += kLanes) {
      const Real* at = probs + key * rows + v * kLanes;
      const __m512 even = key >= 0 ? _mm512_loadu_ps(at) : _mm512_setzero_ps();
      const __m512 odd = key + 1 < count ? _mm512_loadu_ps(at + rows) : _mm512_setzero_ps();
      _mm512_storeu_si512(pairs, _mm512_permutexvar_epi16(in_turn, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
    }
  }
}

struct PairedProducts {
  // Statistics are of probabilities that are not rounded.
  static bool serve(Type type, bool stats) { return type == Type::bfloat16 && !stats && multiplies_pairs(); }

  // As [pair of columns][row].
  static void open(const Problem& problem, const Group& group, const SoftmaxPanel& panel, Real* buffer) {
    const int64_t pairs = pairs_of(problem.head_dim), width = panel.width();
    auto* rows = reinterpret_cast<uint32_t*>(buffer);
    for (int64_t r = 0; r < panel.rows; ++r) {
      copy_pairs(query_row(problem, problem.query, group.batch, panel.head[r], panel.query[r]), problem.head_dim, rows + r * pairs);
    }
    std::fill_n(rows + panel.rows * pairs, (width - panel.rows) * pairs, 0);
    transpose(buffer, pairs, width, pairs, panel.queries, width);
  }

  // Keys as [key][pair of columns].
  static WideBlock read(const Problem& problem, const Group& group, const Keys& keys, int64_t slot, int64_t count, const WidePlace& place) {
    const int64_t pairs = pairs_of(problem.head_dim);
    for (int64_t i = 0; i < count; ++i) {
      const char* row = key_row(problem, problem.key, group.batch, group.kv_head, keys.at(slot + i));
      copy_pairs(row, problem.head_dim, reinterpret_cast<uint32_t*>(place.keys) + i * pairs);
    }
    pair_values(problem, group, keys, slot, count, reinterpret_cast<uint32_t*>(place.values));
    return {slot, {place.keys, pairs}, {place.values, problem.value_dim}};
  }

  template <int Vecs>
  HEADPRUNE_PAIRS static void score(
      const Problem& problem, const SoftmaxPanel& panel, const WideBlock& block, int64_t first, int64_t count, const WidePlace& place) {
    const int64_t pairs = pairs_of(problem.head_dim);
    const auto* keys = reinterpret_cast<const uint32_t*>(block.key.from(first).data);
    const auto* queries = reinterpret_cast<const uint32_t*>(panel.queries);
    const Real factor = query_factor(problem);
    for (int64_t key = 0; key < count; key += kTile) {
      multiply_paired<Vecs, false>(
          std::min<int64_t>(kTile, count - key), keys + key * pairs, pairs, 1, queries, pairs, factor, place.scores + key * Vecs * kLanes);
    }
  }

  template <int Vecs>
  static void close(int64_t first, int64_t count, const WidePlace& place) {
    pair_probs<Vecs>(place.scores, first, count, place.probs);
  }

  // Of a pair at an edge one half counts: the other key's value may be inf or NaN.
  template <int Vecs>
  static void add_values(const Problem& problem, const SoftmaxPanel& panel, const WideBlock& block, int64_t first, int64_t from, int64_t to,
                         const WidePlace& place) {
    const int64_t dim = problem.value_dim, begin = first / 2;
    const auto* values = reinterpret_cast<const uint32_t*>(block.value.data);
    const auto probs_of = [&](int64_t pair) { return place.probs + (pair - begin) * Vecs * kLanes; };
    const auto add_half = [&](int64_t key) {
      const uint32_t half = key % 2 ? 0xffff0000u : 0xffffu;
      for (int64_t x = 0; x < dim; ++x) place.edge[x] = values[key / 2 * dim + x] & half;
      add_pairs<Vecs>(place.edge, 1, probs_of(key / 2), dim, panel.output);
    };
    from += first, to += first;
    if (from % 2) add_half(from++);
    if (from / 2 < to / 2) add_pairs<Vecs>(values + from / 2 * dim, to / 2 - from / 2, probs_of(from / 2), dim, panel.output);
    if (from < to && to % 2) add_half(to - 1);
  }
};

#endif

}  // namespace headprune::cpu::HEADPRUNE_PRECISION
