// The rates at which this machine really does FMAs and reads memory, the yardsticks of the benchmarks.
#pragma once

#include <time.h>

#include "cpu/base/share.h"
#include "cpu/base/simd.h"
#include "cpu/base/threads.h"
#include "kernels.h"

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

// Reads cache lines in kStreams runs side by side, four lines of each at a time.
template <int kStreams>
void read_lines(const char* memory, int64_t lines) {
  constexpr int kVectors = 64 / kVectorBytes;
  constexpr int64_t kAtOnce = 4;
  Words sum[kVectors] = {};
  const auto read = [&](int64_t line) {
    FASTSEQ_UNROLL for (int v = 0; v < kVectors; ++v) {
      Words words;
      std::memcpy(&words, memory + 64 * line + v * kVectorBytes, sizeof words);
      sum[v] += words;
    }
  };
  const int64_t run = lines / (kStreams * kAtOnce) * kAtOnce;
  for (int64_t i = 0; i < run; i += kAtOnce)
    for (int s = 0; s < kStreams; ++s) FASTSEQ_UNROLL for (int j = 0; j < kAtOnce; ++j) read(s * run + i + j);
  for (int64_t i = kStreams * run; i < lines; ++i) read(i);
  FASTSEQ_UNROLL for (int v = 0; v < kVectors; ++v) asm volatile("" : : "x"(sum[v]));
}

// Bytes per second at which `threads` threads read `bytes` of memory, each a part of it, again and again for at least
// `seconds`. The fastest forms of those measured on a Zen 3 with 1 to 8 streams, with and without instructions that
// prefetch: of 128 MiB, one thread reads 29 GB/s in eight streams and 24 in two, four threads 47 in eight and 49 in
// two.
inline double read_rate(const void* memory, int64_t bytes, int threads, double seconds) {
  struct Task {
    const char* memory;
    int64_t lines;
  } task{(const char*)memory, bytes / 64};
  const double start = seconds_now();
  double elapsed = 0;
  int64_t runs = 0;
  for (; elapsed < seconds; ++runs) {
    const auto read = [](void* context, const Team& team) {
      const Task& t = *(const Task*)context;
      const Share lines = Share::of(t.lines, team);
      if (team.size == 1)
        read_lines<8>(t.memory + 64 * lines.begin, lines.end - lines.begin);
      else
        read_lines<2>(t.memory + 64 * lines.begin, lines.end - lines.begin);
    };
    parallel(threads, read, &task);
    elapsed = seconds_now() - start;
  }
  return double(runs) * 64 * double(task.lines) / elapsed;
}

}  // namespace fastseq::FASTSEQ_ISA
