// The products of attention for panels of few rows (decode). The columns are in the vector lanes, so that no lane idles, and
// keys and values are read as they lie and in their own type, once, through one pointer for each row.
#pragma once

#include <unistd.h>

#include <cstring>

#include "rows.h"

namespace headprune::cpu::inline HEADPRUNE_PRECISION {

constexpr int kThinRows = kLanes >= 16 ? 8 : 4;
constexpr int kStep = 2 * kLanes;     // elements that are read at once
constexpr int64_t kMostRowsAhead = 64;
constexpr int kThinAccumulators = kLanes >= 16 ? 24 : 12;

inline int64_t whole_steps(int64_t dim) { return (dim + kStep - 1) / kStep * kStep; }

// Two vectors of the kStep elements at `from`; element i is number place(i) of them.
template <typename T>
struct Reader {
  static int place(int i) { return i; }
  static void read(const T* from, Vec& low, Vec& high) { std::tie(low, high) = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from)); }
};
template <>
struct Reader<Real> {
  static int place(int i) { return i; }
  static void read(const Real* from, Vec& low, Vec& high) { low = load(from), high = load(from + kLanes); }
};
#if defined(HEADPRUNE_AVX512) || defined(HEADPRUNE_AVX2)
// A bf16 is the upper half of a float: even elements are shifted up, odd ones are where they belong.
template <>
struct Reader<at::BFloat16> {
  static int place(int i) { return i % 2 * kLanes + i / 2; }
  static void read(const at::BFloat16* from, Vec& low, Vec& high) {
#if defined(HEADPRUNE_AVX512)
    const __m512i both = _mm512_loadu_si512(from);
    low = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    high = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-65536)));
#else
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    low = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    high = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(-65536)));
#endif
  }
};
#endif

// The order in which Reader<T> gives the elements of a row, and back.
template <typename T>
void arrange(const Real* row, int64_t dim, Real* arranged) {
  for (int64_t x = 0; x < dim; ++x) arranged[x / kStep * kStep + Reader<T>::place(x % kStep)] = row[x];
}
template <typename T>
Real arranged_at(const Real* arranged, int64_t x) {
  return arranged[x / kStep * kStep + Reader<T>::place(x % kStep)];
}

// The last `count` < kStep elements of a row, filled up with 0.
template <typename T>
inline void read_rest(const T* from, int64_t count, Vec& low, Vec& high) {
  T rest[kStep] = {};
  std::memcpy(rest, from, count * sizeof(T));
  Reader<T>::read(rest, low, high);
}

// Whether rows are asked for into the first cache. One of 32 KB was slower for it, one of 48 KB faster (bench/NOTES.md).
inline bool first_cache_has_room() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  static const bool room = sysconf(_SC_LEVEL1_DCACHE_SIZE) >= 48 << 10;
  return room;
#else
  return false;
#endif
}
inline int64_t bytes_ahead() { return first_cache_has_room() ? 8 << 10 : 16 << 10; }

// Into the first cache (Near) or the second.
template <bool Near, typename T>
[[gnu::always_inline]] inline void ask_for(const T* elements) {
  for (size_t bytes = 0; bytes < kStep * sizeof(T); bytes += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(elements) + bytes, 0, Near ? 3 : 2);
  }
}

// Rows of keys or values: `now` (the last one repeated kLanes times), and what is read some rows after each.
template <typename T>
struct Rows {
  const T* const* now;
  const T* const* later;
  Rows from(int64_t row) const { return {now + row, later + row}; }
};

// The scores of as many keys from `first` on as fit the lanes, [row][key], into rows that are `stride` apart.
template <int Heads>
inline void store_scores(Vec scores, int64_t first, Real* rows, int64_t stride) {
  constexpr int tile = kLanes / Heads;
  Real found[kLanes];
  store(found, scores);
  for (int r = 0; r < Heads; ++r) {
    if (first + tile <= stride) {
      std::memcpy(rows + r * stride + first, found + r * tile, tile * sizeof(Real));
    } else {
      std::copy_n(found + r * tile, stride - first, rows + r * stride + first);
    }
  }
}

// scores[row][key] = factor * sum_x keys[key][x] * queries[row][x]; rows of scores are `stride` >= count apart, those of queries
// whole_steps(dim), arranged. Rows of keys up to kLanes behind the last one are read too.
template <typename T, int Heads, bool Near>
void thin_scores(Rows<T> keys, int64_t count, int64_t dim, const Real* queries, Real factor, Real* scores, int64_t stride) {
  constexpr int tile = kLanes / Heads;
  const int64_t width = whole_steps(dim), whole = dim / kStep * kStep;
  for (int64_t first = 0; first < count; first += tile) {
    Vec sums[kLanes];
    std::fill_n(sums, kLanes, Vec(0));
    // Row after row, as they lie in memory: the processor then reads ahead better than across several rows.
    #pragma GCC unroll 16
    for (int k = 0; k < tile; ++k) {
      Lanes sum[Heads];
      const auto multiply = [&](int64_t x, Vec low, Vec high) {
        #pragma GCC unroll 8
        for (int r = 0; r < Heads; ++r) {
          sum[r] = multiply_add(low, load(queries + r * width + x), Vec(sum[r]));
          sum[r] = multiply_add(high, load(queries + r * width + x + kLanes), Vec(sum[r]));
        }
      };
      std::fill_n(sum, Heads, Vec(0));
      Vec low, high;
      for (int64_t x = 0; x < whole; x += kStep) {
        ask_for<Near>(keys.later[first + k] + x);
        Reader<T>::read(keys.now[first + k] + x, low, high);
        multiply(x, low, high);
      }
      if (whole < dim) {
        read_rest(keys.now[first + k] + whole, dim - whole, low, high);
        multiply(whole, low, high);
      }
      for (int r = 0; r < Heads; ++r) sums[r * tile + k] = sum[r];
    }
    store_scores<Heads>(lane_sums(sums) * Vec(factor), first, scores, stride);
  }
}

// sums[row][column] += sum_key values[key][column] * probs[row][key] for Steps * kStep columns from `column` on; where Rest
// only `rest` of them are there.
template <typename T, int Heads, int Steps, bool Rest, bool Near>
inline void thin_columns(Rows<T> values, int64_t count, int64_t column, int64_t rest, const Real* probs, int64_t stride, Real* sums, int64_t width) {
  Lanes sum[Heads * 2 * Steps];
#pragma GCC unroll 24
  for (int i = 0; i < Heads * 2 * Steps; ++i) sum[i] = Vec(0);
  for (int64_t key = 0; key < count; ++key) {
    const T* from = values.now[key] + column;
    if constexpr (!Rest) {
#pragma GCC unroll 4
      for (int s = 0; s < Steps; ++s) ask_for<Near>(values.later[key] + column + s * kStep);
    }
#pragma GCC unroll 4
    for (int s = 0; s < Steps; ++s) {
      Vec low, high;
      if constexpr (Rest) {
        read_rest(from, rest, low, high);
      } else {
        Reader<T>::read(from + s * kStep, low, high);
      }
#pragma GCC unroll 8
      for (int r = 0; r < Heads; ++r) {
        const Vec prob(probs[r * stride + key]);
        const int at = (r * Steps + s) * 2;
        sum[at] = multiply_add(prob, low, sum[at]);
        sum[at + 1] = multiply_add(prob, high, sum[at + 1]);
      }
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < Heads * 2 * Steps; ++i) {
    Real* to = sums + i / (2 * Steps) * width + column + i % (2 * Steps) * kLanes;
    store(to, load(to) + Vec(sum[i]));
  }
}

// So many steps of the columns are summed at once, for the registers.
constexpr int steps_at_once(int heads) { return kThinAccumulators / (2 * heads) >= 4 ? 4 : kThinAccumulators / (2 * heads) >= 2 ? 2 : 1; }

// sums[row][column] += sum_key values[key][column] * probs[row][key]; rows of sums are whole_steps(dim) apart, arranged.
template <typename T, int Heads, bool Near>
void thin_values(Rows<T> values, int64_t count, int64_t dim, const Real* probs, int64_t stride, Real* sums) {
  constexpr int steps = steps_at_once(Heads);
  const int64_t few = dim <= steps * kStep ? count : 16;  // keys whose rows stay in the first cache between two ranges of columns
  const int64_t width = whole_steps(dim), whole = dim / kStep * kStep;
  for (int64_t key = 0; key < count; key += few) {
    const int64_t here = std::min(few, count - key);
    int64_t column = 0;
    for (; column + steps * kStep <= whole; column += steps * kStep) {
      thin_columns<T, Heads, steps, false, Near>(values.from(key), here, column, 0, probs + key, stride, sums, width);
    }
    for (; column < whole; column += kStep) thin_columns<T, Heads, 1, false, Near>(values.from(key), here, column, 0, probs + key, stride, sums, width);
    if (whole < dim) thin_columns<T, Heads, 1, true, Near>(values.from(key), here, whole, dim - whole, probs + key, stride, sums, width);
  }
}

// thin_scores<T, rows> and thin_values<T, rows> for 1 <= rows <= kThinRows.
template <typename T>
struct ThinProducts {
  decltype(&thin_scores<T, 1, false>) scores;
  decltype(&thin_values<T, 1, false>) values;
};

template <typename T, int Heads>
ThinProducts<T> thin_products_up_to(int64_t rows) {
  if constexpr (Heads > 1) {
    if (rows < Heads) return thin_products_up_to<T, Heads - 1>(rows);
  }
  if (first_cache_has_room()) return {thin_scores<T, Heads, true>, thin_values<T, Heads, true>};
  return {thin_scores<T, Heads, false>, thin_values<T, Heads, false>};
}
template <typename T>
ThinProducts<T> thin_products(int64_t rows) {
  return thin_products_up_to<T, kThinRows>(rows);
}

}  // namespace headprune::cpu::HEADPRUNE_PRECISION
