// exp, sigmoid and tanh for any lane type. Relative accuracy about 2.5 units in the last place; NaN gives NaN.
//
// exp(x) - 1 = 2^n (e^r - 1) + (2^n - 1) with n = round(x / ln 2) and |r| <= ln(2) / 2. The Taylor polynomial of e^r -
// 1 to degree 7 (float: truncation 1.5e-8) or 13 (double: 1.2e-17) needs as many terms as a minimax one of the same
// error.
#pragma once

#include "cpu/base/simd.h"

namespace fastseq::FASTSEQ_ISA {

template <class T>
struct MathConstants;
template <>
struct MathConstants<float> {
  static constexpr int kDegree = 7, kMantissaBits = 23, kExponentBias = 127;
  static constexpr float kLog2e = 1.44269504f, kLn2High = 0.693145751953125f, kLn2Low = 1.42860677e-6f;
  static constexpr float kRound = 12582912.0f;   // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kExpLimit = 87.0f;      // e^87 and e^-87 are normal numbers
  static constexpr float kExpVanishes = -88.0f;  // n = -127: the exponent field of 2^n is 0
  static constexpr float kTanhLimit = 10.0f;     // tanh(10) rounds to 1
};
template <>
struct MathConstants<double> {
  static constexpr int kDegree = 13, kMantissaBits = 52, kExponentBias = 1023;
  static constexpr double kLog2e = 1.4426950408889634, kLn2High = 6.93147180369123816490e-01,
                          kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kRound = 6755399441055744.0;
  static constexpr double kExpLimit = 708.0;
  static constexpr double kExpVanishes = -709.0;
  static constexpr double kTanhLimit = 20.0;
};

namespace detail {

// x cut to [-limit, limit]. Written so that a NaN, for which both comparisons are false, passes.
template <class T>
FASTSEQ_INLINE Vec<T> clamp(Vec<T> x, T limit) {
  const Vec<T> high(limit), low(-limit);
  x = select(x.raw > high.raw, high, x);
  return select(x.raw < low.raw, low, x);
}

template <class T>
constexpr T inverse_factorial(int n) {
  double f = 1;
  for (int i = 2; i <= n; ++i) f *= i;
  return T(1 / f);
}

// x = n ln 2 + r: gives e^r - 1 and 2^n. x must lie between kExpVanishes, where 2^n comes out as 0, and kExpLimit.
template <class T>
FASTSEQ_INLINE void split_exp(Vec<T> x, Vec<T>& expm1_r, Vec<T>& two_n) {
  using C = MathConstants<T>;
  using Bits = typename Vec<T>::RawBits;
  const Vec<T> shifted = fma(x, Vec<T>(C::kLog2e), Vec<T>(C::kRound));
  const Vec<T> n = shifted - Vec<T>(C::kRound);
  const Vec<T> r = fma(n, Vec<T>(-C::kLn2Low), fma(n, Vec<T>(-C::kLn2High), x));
  Vec<T> q(inverse_factorial<T>(C::kDegree));
  FASTSEQ_UNROLL for (int i = C::kDegree - 1; i >= 2; --i) q = fma(q, r, Vec<T>(inverse_factorial<T>(i)));
  expm1_r = fma(q, r * r, r);
  // The low bits of `shifted` hold n in two's complement; the shift drops all above the exponent field.
  const Bits biased = ((Bits)shifted.raw - (Bits)Vec<T>(C::kRound).raw + C::kExponentBias) << C::kMantissaBits;
  two_n = Vec<T>((typename Vec<T>::Raw)biased);
}

}  // namespace detail

template <class T>
FASTSEQ_INLINE Vec<T> exp(Vec<T> x) {
  Vec<T> p, s;
  detail::split_exp(detail::clamp(x, MathConstants<T>::kExpLimit), p, s);
  return fma(p, s, s);
}

// e^x for x <= 0, up to rounding; exactly 0 from where it would not be a normal number, as for -inf.
template <class T>
FASTSEQ_INLINE Vec<T> exp_vanishing(Vec<T> x) {
  Vec<T> p, s;
  detail::split_exp(max(Vec<T>(MathConstants<T>::kExpVanishes), x), p, s);
  return fma(p, s, s);
}

template <class T>
FASTSEQ_INLINE Vec<T> sigmoid(Vec<T> x) {
  return Vec<T>(T(1)) / (Vec<T>(T(1)) + exp(-x));
}

// e / (e + 2) with e = e^(2|x|) - 1 keeps the relative accuracy near 0, where 1 - 2 / (e^(2x) + 1) loses it.
template <class T>
FASTSEQ_INLINE Vec<T> tanh(Vec<T> x) {
  using Bits = typename Vec<T>::RawBits;
  const Bits sign = (Bits)x.raw & (Bits)Vec<T>(T(-0.0)).raw;
  const Vec<T> a((typename Vec<T>::Raw)((Bits)x.raw ^ sign));
  Vec<T> p, s;
  detail::split_exp(detail::clamp(a + a, 2 * MathConstants<T>::kTanhLimit), p, s);
  const Vec<T> e = fma(p, s, s - Vec<T>(T(1)));
  const Vec<T> t = e / (e + Vec<T>(T(2)));
  return Vec<T>((typename Vec<T>::Raw)((Bits)t.raw | sign));
}

// max(x, 0); a NaN stays.
template <class T>
FASTSEQ_INLINE Vec<T> relu(Vec<T> x) {
  return select(x.raw < Vec<T>(T(0)).raw, Vec<T>(T(0)), x);
}

// The gradient of relu: 0 where its result y is <= 0, else dy (also where y is NaN, as torch).
template <class T>
FASTSEQ_INLINE Vec<T> relu_backward(Vec<T> y, Vec<T> dy) {
  return select(y.raw <= Vec<T>(T(0)).raw, Vec<T>(T(0)), dy);
}

}  // namespace fastseq::FASTSEQ_ISA
