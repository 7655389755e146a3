// __half of CUDA on the host: 5 bits of exponent, 10 of mantissa.
#pragma once

#include <math.h>
#include <stdint.h>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31, mantissa = h.bits & 1023;
  const float magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                          : exponent == 0 ? ldexpf(mantissa, -24)
                                          : ldexpf(1024 + mantissa, exponent - 25);
  return h.bits >> 15 ? -magnitude : magnitude;
}

// To the nearest, ties to even, as rintf rounds.
inline __half __float2half_rn(float f) {
  const uint16_t sign = signbit(f) ? 0x8000 : 0;
  if (f != f) return {0x7fff};
  f = fabsf(f);
  if (f < 6.103515625e-05f) return {uint16_t(sign | int(rintf(ldexpf(f, 24))))};  // 2^-14: below, multiples of 2^-24
  if (f >= 65520) return {uint16_t(sign | 0x7c00)};
  int exponent;
  frexpf(f, &exponent);                                       // f = m 2^exponent with 1/2 <= m < 1
  const int mantissa = int(rintf(ldexpf(f, 11 - exponent)));  // 1024 to 2048; the latter carries into the exponent
  return {uint16_t(sign | (((exponent + 14) << 10) + mantissa - 1024))};
}
