// Products of a few rows with many that are read once, where they are stored: bound by memory, not by FMAs.
//
// Rows that follow one another are read as eight streams side by side, each from its begin to its end, and nothing is
// asked for in advance. A core's prefetchers run ahead of each stream, but not past the end of a page, and what is
// asked for by instructions takes their place: on a Zen 3, one thread reads 256 MiB at 20, 24 and 26 GB/s in 1, 2 and 4
// streams; with instructions that prefetch, at most at 18, 20 and 25.
//
// Rows that lie apart, as where heads are interleaved, the prefetchers do not follow. They are read in pairs, and asked
// for in advance: with 32 query heads for 8 of 4096 rows of 512 bytes, 10 GB/s instead of 5.
#pragma once

#include "cpu/gemm/micro_kernel-inl.h"

namespace fastseq::FASTSEQ_ISA {

constexpr int kStreams = 8;
constexpr int64_t kAhead = 8;  // rows between the one that is read and the one that is asked for

namespace detail {

constexpr int kMostRows = 4;

// Stored rows, of one stream each, that are multiplied at once with MR others: enough chains of FMAs to hide their
// latency, and 12 of 16 registers for sums at most.
template <int MR>
constexpr int kStreamsAtOnce = MR == 1  ? 8
                               : MR < 4 ? 4
                                        : 2;

// out[m * out_row + i * step] = <a + m * a_row, b + i * step * stride> for i < kKeys.
template <int MR, int kKeys, class S>
FASTSEQ_INLINE void dot_rows(const Compute<S>* a, int64_t a_row, int64_t depth, const S* b, int64_t stride,
                             Compute<S>* out, int64_t out_row, int64_t step) {
  using V = Vec<Compute<S>>;
  V acc[MR][kKeys];
  FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) FASTSEQ_UNROLL for (int i = 0; i < kKeys; ++i) acc[m][i] = V(0);
  const auto add = [&](int64_t c, const auto& load_lanes) __attribute__((always_inline)) {
    V row[MR];
    FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) row[m] = load_lanes(a + m * a_row + c);
    FASTSEQ_UNROLL for (int i = 0; i < kKeys; ++i) {
      const V column = load_lanes(b + i * step * stride + c);
      FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) acc[m][i] = fma(row[m], column, acc[m][i]);
    }
  };
  int64_t c = 0;
  for (; c + V::kLanes <= depth; c += V::kLanes) add(c, [](const auto* p) { return load(p); });
  if (c < depth) add(c, [&](const auto* p) { return load_first(p, depth - c); });
  FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) {
    Compute<S> sums[kKeys];
    sum_lanes(acc[m], sums);
    FASTSEQ_UNROLL for (int i = 0; i < kKeys; ++i) out[m * out_row + i * step] = sums[i];
  }
}

// out[m] += sum over i < kKeys of weights[m * weight_row + i * step] * (b + i * step * stride), rows of `width`.
template <int MR, int kKeys, class S>
FASTSEQ_INLINE void add_rows(const Compute<S>* weights, int64_t weight_row, const S* b, int64_t stride, int64_t width,
                             Compute<S>* out, int64_t out_row, int64_t step) {
  using V = Vec<Compute<S>>;
  // One row is summed up in two chains of FMAs, since the next keys wait for it; several are as many chains.
  constexpr int kFirst = MR == 1 ? (kKeys + 1) / 2 : kKeys;
  V weight[MR][kKeys];
  FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) FASTSEQ_UNROLL for (int i = 0; i < kKeys; ++i) weight[m][i] =
      V(weights[m * weight_row + i * step]);
  const auto add = [&](int64_t c, const auto& load_lanes) __attribute__((always_inline)) {
    V sum[MR], other[MR];
    FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) sum[m] = load(out + m * out_row + c);
    FASTSEQ_UNROLL for (int i = 0; i < kKeys; ++i) {
      const V value = load_lanes(b + i * step * stride + c);
      FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) {
        if (i < kFirst)
          sum[m] = fma(weight[m][i], value, sum[m]);
        else
          other[m] = i == kFirst ? weight[m][i] * value : fma(weight[m][i], value, other[m]);
      }
    }
    FASTSEQ_UNROLL for (int m = 0; m < MR; ++m)
        store(out + m * out_row + c, kFirst < kKeys ? sum[m] + other[m] : sum[m]);
  };
  int64_t c = 0;
  for (; c + V::kLanes <= width; c += V::kLanes) add(c, [](const S* p) { return load(p); });
  if (c < width) add(c, [&](const S* p) { return load_first(p, width - c); });
}

// Asks for the cache lines of a row. It need not exist: the rows after the last one wanted may be the next to be read.
template <class S>
FASTSEQ_INLINE void prefetch_row(const S* row, int64_t width) {
  for (int64_t c = 0; c < width; c += 64 / int64_t(sizeof(S))) __builtin_prefetch(row + c);
}

// Calls f(mr, row) with constants for the rows row, ..., row + mr - 1, which together are all rows.
template <class F>
FASTSEQ_INLINE void over_rows(int64_t rows, const F& f) {
  const EvenSplit split(rows, kMostRows);
  for (int64_t part = 0; part < split.parts; ++part)
    with_constant<kMostRows>(split.count(part), [&](auto mr) { f(mr, split.begin(part)); });
}

// Calls f(mr, keys, row, key, step) for those rows and the stored rows key, key + step, ..., key + (keys - 1) * step,
// which together are all of `count`: the rows b + i * stride, of `width`.
template <class S, class F>
FASTSEQ_INLINE void over_keys(int64_t rows, const S* b, int64_t stride, int64_t width, int64_t count, const F& f) {
  int64_t key = 0;
  if (stride == width) {
    const int64_t run = count / kStreams;
    for (; key < run; ++key)
      over_rows(rows, [&](auto mr, int64_t row) {
        constexpr int kKeys = kStreamsAtOnce<decltype(mr)::value>;
        for (int s = 0; s < kStreams; s += kKeys) f(mr, std::integral_constant<int, kKeys>(), row, key + s * run, run);
      });
    key = kStreams * run;
  } else {
    for (; key + 1 < count; key += 2) {
      prefetch_row(b + (key + kAhead) * stride, width);
      prefetch_row(b + (key + kAhead + 1) * stride, width);
      over_rows(rows, [&](auto mr, int64_t row) { f(mr, std::integral_constant<int, 2>(), row, key, 1); });
    }
  }
  // At most kStreams - 1 are left: with an instance for each number of rows they would take a fifth of the code.
  constexpr std::integral_constant<int, 1> one;
  for (; key < count; ++key)
    for (int64_t row = 0; row < rows; ++row) f(one, one, row, key, 1);
}

}  // namespace detail

// out[m * out_row + i] = <a + m * a_row, b + i * stride> for `rows` x `count`. The order of a sum depends on `depth`
// alone.
template <class S>
void dot_streamed(const Compute<S>* a, int64_t a_row, int64_t rows, int64_t depth, const S* b, int64_t stride,
                  int64_t count, Compute<S>* out, int64_t out_row) {
  detail::over_keys(rows, b, stride, depth, count, [&](auto mr, auto keys, int64_t row, int64_t key, int64_t step) {
    detail::dot_rows<decltype(mr)::value, decltype(keys)::value, S>(a + row * a_row, a_row, depth, b + key * stride,
                                                                    stride, out + row * out_row + key, out_row, step);
  });
}

// out[m] += sum over i < count of weights[m * weight_row + i] * (b + i * stride), rows of `width`; those of out are
// padded to whole vectors. The order of a sum depends on `rows`, on `count` and on whether the rows of b lie apart.
template <class S>
void add_streamed(const Compute<S>* weights, int64_t weight_row, int64_t rows, int64_t count, const S* b,
                  int64_t stride, int64_t width, Compute<S>* out, int64_t out_row) {
  detail::over_keys(rows, b, stride, width, count, [&](auto mr, auto keys, int64_t row, int64_t key, int64_t step) {
    detail::add_rows<decltype(mr)::value, decltype(keys)::value, S>(weights + row * weight_row + key, weight_row,
                                                                    b + key * stride, stride, width,
                                                                    out + row * out_row, out_row, step);
  });
}

}  // namespace fastseq::FASTSEQ_ISA
