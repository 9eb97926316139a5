// Vectors of floats and the elementary functions of the softmax, on top of at::vec.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "real.h"

namespace headprune::cpu::inline HEADPRUNE_PRECISION {

using Vec = at::vec::Vectorized<Real>;
constexpr int kLanes = Vec::size();
constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
constexpr Real kLog2e = static_cast<Real>(1.4426950408889634074);
constexpr Real kLowest = std::numeric_limits<Real>::lowest();
constexpr Real kFaintest = sizeof(Real) == 8 ? -1100 : -127;  // exponent of 2 below which all is 0
constexpr Real kLn2 = static_cast<Real>(0.6931471805599453094);

// What a Vec holds. GCC keeps arrays of these in registers, but not always those of a class with constructors.
#if defined(HEADPRUNE_AVX512)
using Lanes = __m512;
#elif defined(HEADPRUNE_AVX2)
using Lanes = __m256;
#elif defined(CPU_CAPABILITY_AVX512)
using Lanes = __m512d;
#elif defined(CPU_CAPABILITY_AVX2)
using Lanes = __m256d;
#else
using Lanes = Vec;
#endif

inline Vec multiply_add(Vec a, Vec b, Vec sum) { return at::vec::fmadd(a, b, sum); }
inline Vec load(const Real* from) { return Vec::loadu(from); }
inline void store(Real* to, Vec x) { x.store(to); }

// One instruction each where at::vec's own maximum spends several on passing NaN on. With NaN in one of the operands
// the second one is the result.
inline Vec max_second(Vec a, Vec b) {
#if defined(HEADPRUNE_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(HEADPRUNE_AVX2)
  return _mm256_max_ps(a, b);
#else
  return Vec::blendv(b, a, a > b);
#endif
}

inline Vec min_second(Vec a, Vec b) {
#if defined(HEADPRUNE_AVX512)
  return _mm512_min_ps(a, b);
#elif defined(HEADPRUNE_AVX2)
  return _mm256_min_ps(a, b);
#else
  return Vec::blendv(b, a, a < b);
#endif
}

inline Real sum_of_lanes(Vec x) {
#if defined(HEADPRUNE_AVX512)
  return _mm512_reduce_add_ps(x);
#elif defined(HEADPRUNE_AVX2)
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
  Real lanes[kLanes], sum = 0.f;
  store(lanes, x);
  for (Real lane : lanes) sum += lane;
  return sum;
#endif
}

// Lane i: the sum of the lanes of rows[i].
inline Vec lane_sums(const Vec (&rows)[kLanes]) {
#if defined(HEADPRUNE_AVX512)
  __m512 pairs[8], fours[4], halves[2];
  for (int i = 0; i < 8; ++i) {
    const __m512 a = rows[2 * i], b = rows[2 * i + 1];
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const auto fold = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); };
  for (int i = 0; i < 2; ++i) halves[i] = fold(fours[2 * i], fours[2 * i + 1]);
  return fold(halves[0], halves[1]);
#elif defined(HEADPRUNE_AVX2)
  __m256 fours[2];
  for (int i = 0; i < 2; ++i) {
    fours[i] = _mm256_hadd_ps(_mm256_hadd_ps(rows[4 * i], rows[4 * i + 1]), _mm256_hadd_ps(rows[4 * i + 2], rows[4 * i + 3]));
  }
  return _mm256_add_ps(_mm256_permute2f128_ps(fours[0], fours[1], 0x20), _mm256_permute2f128_ps(fours[0], fours[1], 0x31));
#else
  Real sums[kLanes];
  for (int i = 0; i < kLanes; ++i) sums[i] = sum_of_lanes(rows[i]);
  return load(sums);
#endif
}

// 2^x, relative error 1.6e-7 (fp64: 1 ulp), exactly 1 at 0: a sum whose maximum stays is not rescaled. In fp32 exactly 0 below -126.5
// (so for -inf as well), NaN stays NaN. x must not exceed 127.
#if defined(HEADPRUNE_FP64)
inline Vec exp2(Vec x) { return x.exp2(); }
inline Vec tanh(Vec x) { return x.tanh(); }
#else
inline Vec exp2(Vec x) {
  x = max_second(Vec(-127.f), x);
  const Vec whole = x.round();
  const Vec f = x - whole;
  Vec p = at::vec::fmadd(f, Vec(1.32647366e-3f), Vec(9.67151206e-3f));
  p = at::vec::fmadd(p, f, Vec(5.55072613e-2f));
  p = at::vec::fmadd(p, f, Vec(2.40222439e-1f));
  p = at::vec::fmadd(p, f, Vec(6.93147004e-1f));
  p = at::vec::fmadd(p, f, Vec(1.f));
#if defined(HEADPRUNE_AVX512)
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(whole), _mm512_set1_epi32(127));
  return p * Vec(_mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23)));
#elif defined(HEADPRUNE_AVX2)
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
  return p * Vec(_mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
#else
  Real power[kLanes], scaled[kLanes];
  store(power, whole);
  store(scaled, p);
  for (int lane = 0; lane < kLanes; ++lane) {
    const bool tiny = power[lane] < -126.5f;
    scaled[lane] = tiny ? 0.f : std::ldexp(scaled[lane], std::isnan(power[lane]) ? 0 : static_cast<int>(power[lane]));
  }
  return load(scaled);
#endif
}

// tanh as a rational function (Eigen's coefficients), a few ulp.
inline Vec tanh(Vec x) {
  x = at::vec::clamp(x, Vec(-7.90531110763549805f), Vec(7.90531110763549805f));
  const Vec x2 = x * x;
  Vec p = at::vec::fmadd(x2, Vec(-2.76076847742355e-16f), Vec(2.00018790482477e-13f));
  p = at::vec::fmadd(p, x2, Vec(-8.60467152213735e-11f));
  p = at::vec::fmadd(p, x2, Vec(5.12229709037114e-08f));
  p = at::vec::fmadd(p, x2, Vec(1.48572235717979e-05f));
  p = at::vec::fmadd(p, x2, Vec(6.37261928875436e-04f));
  p = at::vec::fmadd(p, x2, Vec(4.89352455891786e-03f));
  Vec q = at::vec::fmadd(x2, Vec(1.19825839466702e-06f), Vec(1.18534705686654e-04f));
  q = at::vec::fmadd(q, x2, Vec(2.26843463243900e-03f));
  q = at::vec::fmadd(q, x2, Vec(4.89352518554385e-03f));
  return x * p / q;
}
#endif

// to[column][row] = from[row][column] for `rows` x `columns` floats.
inline void transpose(const Real* from, int64_t from_stride, int64_t rows, int64_t columns, Real* to, int64_t to_stride) {
#if defined(HEADPRUNE_AVX512) || defined(HEADPRUNE_AVX2)
  constexpr int64_t tile = kLanes;
#else
  constexpr int64_t tile = 4;
#endif
  for (int64_t r = 0; r < rows; r += tile) {
    for (int64_t c = 0; c < columns; c += tile) {
      const Real* source = from + r * from_stride + c;
      Real* target = to + c * to_stride + r;
      if (r + tile <= rows && c + tile <= columns) {
#if defined(HEADPRUNE_AVX512)
        at::vec::transpose_mxn<Real>(source, from_stride, target, to_stride, 16, 16);
        continue;
#elif defined(HEADPRUNE_AVX2)
        at::vec::transpose_mxn<Real, 8, 8>(source, from_stride, target, to_stride);
        continue;
#endif
      }
      for (int64_t i = 0; i < std::min(tile, rows - r); ++i) {
        for (int64_t j = 0; j < std::min(tile, columns - c); ++j) target[j * to_stride + i] = source[i * from_stride + j];
      }
    }
  }
}

}  // namespace headprune::cpu::HEADPRUNE_PRECISION
