// The rate at which one core of this machine really does FMAs, the yardstick of the benchmarks.
#pragma once

#include <time.h>

#include "../kernels.h"
#include "simd.h"

namespace fastseq::FASTSEQ_ISA {

inline double seconds_now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

// Independent chains of FMAs in registers: flops per second over at least `seconds`. An average, not the best moment:
// on a machine shared with others, a kernel must be compared with what the core gave at about the same time.
template <bool kPairs, class T>
double fma_rate(double seconds) {
  constexpr int64_t kRepeats = 20'000;
  constexpr int kChains = 12;  // latency 4 or 5 times two units; with the operand they fit in 16 registers
  const double flops = (kPairs ? 4.0 : 2.0) * kLanes<T> * kChains * kRepeats, start = seconds_now();
  double elapsed = 0;
  int64_t runs = 0;
  for (; elapsed < seconds; ++runs) {
    Vec<T> acc[kChains];
    const Vec<T> factor(T(0.5));
    // Hidden from the compiler, which would otherwise compute the equal chains once.
    FASTSEQ_UNROLL for (int j = 0; j < kChains; ++j) {
      acc[j] = factor;
      asm volatile("" : "+x"(acc[j].raw));
    }
    for (int64_t k = 0; k < kRepeats; ++k) FASTSEQ_UNROLL for (int j = 0; j < kChains; ++j) {
        if constexpr (kPairs)
          acc[j] = fma_pairs((Words)factor.raw, (Words)factor.raw, acc[j]);
        else
          acc[j] = fma(acc[j], factor, factor);
      }
    FASTSEQ_UNROLL for (int j = 0; j < kChains; ++j) asm volatile("" : : "x"(acc[j].raw));
    elapsed = seconds_now() - start;
  }
  return double(runs) * flops / elapsed;
}

inline double fma_peak(int dtype, double seconds) {
  if (dtype == kFloat64) return fma_rate<false, double>(seconds);
  return dtype == kBFloat16 ? fma_rate<true, float>(seconds) : fma_rate<false, float>(seconds);
}

}  // namespace fastseq::FASTSEQ_ISA
