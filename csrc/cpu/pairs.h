// The products of thin panels (thin.h) on processors that multiply pairs of bf16 and add them in fp32 (AVX512_BF16): keys, queries and
// values are not widened, and one instruction does the work of two. Probabilities are rounded to bf16, as flash attention does.
#pragma once

#include "thin.h"

#if defined(HEADPRUNE_AVX512)

namespace headprune::cpu::inline HEADPRUNE_PRECISION {

#define HEADPRUNE_PAIRS __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c")))

inline bool multiplies_pairs() {
  static const bool found = __builtin_cpu_supports("avx512bf16");
  return found;
}

struct Pairs {
  // Queries stay as they are, in bf16.
  static void arrange(const Real* row, int64_t dim, Real* arranged) {
    auto* to = reinterpret_cast<at::BFloat16*>(arranged);
    for (int64_t x = 0; x < dim; ++x) to[x] = row[x];
  }
  // Two rows of values are interleaved within each 128 bits: the lower four of eight columns, then the upper four.
  static Real arranged_at(const Real* arranged, int64_t x) {
    const int64_t at = x % kStep, lane = at / 8, within = at % 8;
    return arranged[x / kStep * kStep + within / 4 * kLanes + lane * 4 + within % 4];
  }
};

// The columns of a step that are there, of `left`.
HEADPRUNE_PAIRS inline __mmask32 columns_there(int64_t left) { return left >= kStep ? ~__mmask32(0) : (__mmask32(1) << left) - 1; }

// Steps: of the head dimension, where it is that many whole ones; 0: any. Few queries then stay in registers.
template <int Heads, int Steps, bool Near>
HEADPRUNE_PAIRS inline void paired_scores_of(
    Rows<at::BFloat16> keys, int64_t count, int64_t dim, const Real* queries, Real factor, Real* scores, int64_t stride) {
  constexpr int tile = kLanes / Heads;
  constexpr bool held = Steps && Heads * Steps <= 12;
  const int64_t width = whole_steps(dim), steps = Steps ? Steps : width / kStep;
  __m512i query[held ? Heads * Steps : 1];
  #pragma GCC unroll 12
  for (int i = 0; held && i < Heads * Steps; ++i) query[i] = _mm512_loadu_si512(queries + i / Steps * width + i % Steps * kLanes);
  for (int64_t first = 0; first < count; first += tile) {
    Vec sums[kLanes];
    std::fill_n(sums, kLanes, Vec(0));
    #pragma GCC unroll 16
    for (int k = 0; k < tile; ++k) {
      __m512 sum[Heads];
      std::fill_n(sum, Heads, _mm512_setzero_ps());
      #pragma GCC unroll 4
      for (int64_t s = 0; s < steps; ++s) {
        const int64_t x = s * kStep;
        ask_for<Near>(keys.later[first + k] + x);
        const auto* from = keys.now[first + k] + x;
        const auto key = (__m512bh)(Steps ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(columns_there(dim - x), from));
        #pragma GCC unroll 8
        for (int r = 0; r < Heads; ++r) {
          // A query's bf16 take half of its row.
          const auto* there = reinterpret_cast<const at::BFloat16*>(queries + r * width) + x;
          sum[r] = _mm512_dpbf16_ps(sum[r], key, (__m512bh)(held ? query[held ? r * Steps + s : 0] : _mm512_loadu_si512(there)));
        }
      }
      for (int r = 0; r < Heads; ++r) sums[r * tile + k] = sum[r];
    }
    store_scores<Heads>(lane_sums(sums) * Vec(factor), first, scores, stride);
  }
}

template <int Heads, bool Near>
HEADPRUNE_PAIRS void paired_scores(
    Rows<at::BFloat16> keys, int64_t count, int64_t dim, const Real* queries, Real factor, Real* scores, int64_t stride) {
  const auto products = dim == 4 * kStep   ? paired_scores_of<Heads, 4, Near>
                        : dim == 2 * kStep ? paired_scores_of<Heads, 2, Near>
                                           : paired_scores_of<Heads, 0, Near>;
  products(keys, count, dim, queries, factor, scores, stride);
}

// Probabilities [row][key], rounded and in pairs of keys, each as one number.
HEADPRUNE_PAIRS inline void pair_up(const Real* probs, int64_t rows, int64_t count, int64_t stride, uint32_t* pairs) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t key = 0; key < count; key += kStep) {
      const __m512 low = _mm512_loadu_ps(probs + r * stride + key), high = _mm512_loadu_ps(probs + r * stride + key + kLanes);
      _mm512_storeu_si512(pairs + (r * stride + key) / 2, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }
}

template <int Heads, int Steps, bool Near>
HEADPRUNE_PAIRS inline void paired_columns(Rows<at::BFloat16> values, int64_t count, int64_t column, int64_t left, const uint32_t* pairs,
                                           int64_t stride, Real* sums, int64_t width) {
  __m512 sum[Heads * 2 * Steps];
  #pragma GCC unroll 24
  for (int i = 0; i < Heads * 2 * Steps; ++i) sum[i] = _mm512_setzero_ps();
  const __mmask32 last = columns_there(left - (Steps - 1) * kStep);
  for (int64_t key = 0; key < count; key += 2) {
    #pragma GCC unroll 4
    for (int s = 0; s < Steps; ++s) {
      const int64_t at = column + s * kStep;
      const __mmask32 there = s == Steps - 1 ? last : ~__mmask32(0);
      ask_for<Near>(values.later[key] + at);
      ask_for<Near>(values.later[key + 1] + at);
      const __m512i even = _mm512_maskz_loadu_epi16(there, values.now[key] + at);
      const __m512i odd = _mm512_maskz_loadu_epi16(there, values.now[key + 1] + at);
      const auto low = (__m512bh)_mm512_unpacklo_epi16(even, odd), high = (__m512bh)_mm512_unpackhi_epi16(even, odd);
      #pragma GCC unroll 8
      for (int r = 0; r < Heads; ++r) {
        const auto prob = (__m512bh)_mm512_set1_epi32(static_cast<int>(pairs[(r * stride + key) / 2]));
        const int to = (r * Steps + s) * 2;
        sum[to] = _mm512_dpbf16_ps(sum[to], prob, low);
        sum[to + 1] = _mm512_dpbf16_ps(sum[to + 1], prob, high);
      }
    }
  }
  #pragma GCC unroll 24
  for (int i = 0; i < Heads * 2 * Steps; ++i) {
    Real* to = sums + i / (2 * Steps) * width + column + i % (2 * Steps) * kLanes;
    _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[i]));
  }
}

template <int Heads, bool Near>
HEADPRUNE_PAIRS void paired_values(Rows<at::BFloat16> values, int64_t count, int64_t dim, const Real* probs, int64_t stride, Real* sums) {
  constexpr int steps = steps_at_once(Heads);
  const int64_t few = dim <= steps * kStep ? count : 16, width = whole_steps(dim);
  alignas(64) uint32_t pairs[kThinRows * kThinBlock / 2 + kLanes];
  pair_up(probs, Heads, count, stride, pairs);
  for (int64_t key = 0; key < count; key += few) {
    const int64_t here = std::min(few, count - key);
    int64_t column = 0;
    for (; column + (steps - 1) * kStep < dim; column += steps * kStep) {
      paired_columns<Heads, steps, Near>(values.from(key), here, column, dim - column, pairs + key / 2, stride, sums, width);
    }
    for (; column < dim; column += kStep) paired_columns<Heads, 1, Near>(values.from(key), here, column, dim - column, pairs + key / 2, stride, sums, width);
  }
}

template <int Heads>
ThinProducts<at::BFloat16> paired_products_up_to(int64_t rows) {
  if constexpr (Heads > 1) {
    if (rows < Heads) return paired_products_up_to<Heads - 1>(rows);
  }
  if (first_cache_has_room()) return {paired_scores<Heads, true>, paired_values<Heads, true>};
  return {paired_scores<Heads, false>, paired_values<Heads, false>};
}
inline ThinProducts<at::BFloat16> paired_products(int64_t rows) { return paired_products_up_to<kThinRows>(rows); }

}  // namespace headprune::cpu::HEADPRUNE_PRECISION

#endif
