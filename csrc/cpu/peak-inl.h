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

// Flops per second of independent chains of FMAs in registers, best of the slices that fit in `seconds`.
template <class F>
double best_rate(double seconds, double flops, const F& slice) {
  const double end = seconds_now() + seconds;
  double best = 0;
  for (double start = seconds_now(); start < end;) {
    slice();
    const double stop = seconds_now();
    if (flops / (stop - start) > best) best = flops / (stop - start);
    start = stop;
  }
  return best;
}

inline double fma_peak(int dtype, double seconds) {
  constexpr int64_t kRepeats = 20'000;
  constexpr int kChains = 12;  // latency 4 or 5 times two units, and they fit in 16 registers with the two operands
  const auto rate = [&](auto scale, int flops_per_lane) {
    using V = decltype(scale);
    const V start = scale;
    V acc[kChains];
    FASTSEQ_UNROLL for (int j = 0; j < kChains; ++j) acc[j] = start;
    const double best = best_rate(seconds, double(flops_per_lane) * V::kLanes * kChains * kRepeats, [&] {
      for (int64_t k = 0; k < kRepeats; ++k)
        FASTSEQ_UNROLL for (int j = 0; j < kChains; ++j) {
          if (flops_per_lane == 4) {
            if constexpr (V::kLanes * sizeof(float) == kVectorBytes)
              acc[j] = fma_pairs((Words)start.raw, (Words)start.raw, acc[j]);
          } else {
            acc[j] = fma(acc[j], start, start);
          }
          asm volatile("" : "+x"(acc[j].raw));
        }
    });
    return best;
  };
  if (dtype == kFloat64) return rate(Vec<double>(0.5), 2);
  return rate(Vec<float>(0.5f), dtype == kBFloat16 ? 4 : 2);
}

}  // namespace fastseq::FASTSEQ_ISA
