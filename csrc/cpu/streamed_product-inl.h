// Products of a few rows with many that are read once, where they are stored: bound by memory, not by FMAs.
//
// Two stored rows are read at a time, each from its begin to its end. A core's prefetchers follow that: on a Zen 3,
// rows of 512 bytes come from DRAM at 18 GB/s one or two at a time, at 10 GB/s eight at a time.
#pragma once

#include "micro_kernel-inl.h"

namespace fastseq::FASTSEQ_ISA {

// Rows between the one that is read and the one that is asked for. Measured on a Zen 3, one thread, 32 heads of 4096
// keys with D = 128: 13.4 GB/s with 8, 10.3 GB/s without; with 32 query heads for 8 of keys, 15.0 against 8.6.
constexpr int64_t kAhead = 8;

namespace detail {

// Asks for the cache lines of a row. It need not exist: the rows after the last one wanted may be the next to be read.
template <class S>
FASTSEQ_INLINE void prefetch_row(const S* row, int64_t width) {
  for (int64_t c = 0; c < width; c += 64 / int64_t(sizeof(S))) __builtin_prefetch(row + c);
}

// parts[m][i] = lanes whose sum is <a + m * a_row, b + i * stride>, for two rows b, the second of which may be the
// first.
template <int MR, class S>
FASTSEQ_INLINE void dot_pair(const Compute<S>* a, int64_t a_row, int64_t depth, const S* const (&b)[2],
                             Vec<Compute<S>>* const (&parts)[MR]) {
  using V = Vec<Compute<S>>;
  V acc[MR][2][2];  // of even and odd vectors: enough chains of FMAs to hide their latency
  FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) FASTSEQ_UNROLL for (int i = 0; i < 4; ++i) acc[m][i / 2][i % 2] = V(0);
  const auto step = [&](int64_t c, int odd, const auto& load_lanes) {
    const V column[2] = {load_lanes(b[0] + c), load_lanes(b[1] + c)};
    FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) {
      const V row = load_lanes(a + m * a_row + c);
      FASTSEQ_UNROLL for (int i = 0; i < 2; ++i) acc[m][i][odd] = fma(row, column[i], acc[m][i][odd]);
    }
  };
  const auto whole = [](const auto* p) { return load(p); };
  int64_t c = 0;
  for (; c + 2 * V::kLanes <= depth; c += 2 * V::kLanes) {
    step(c, 0, whole);
    step(c + V::kLanes, 1, whole);
  }
  if (c < depth) step(c, 0, [&](const auto* p) { return load_first(p, depth - c); });
  if (c + V::kLanes < depth)
    step(c + V::kLanes, 1, [&](const auto* p) { return load_first(p, depth - c - V::kLanes); });
  FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) FASTSEQ_UNROLL for (int i = 0; i < 2; ++i) parts[m][i] =
      acc[m][i][0] + acc[m][i][1];
}

// out[m] += sum over i of weights[m * weight_row + i] * b[i], rows of `width`, for kKeys rows b.
template <int MR, int kKeys, class S>
FASTSEQ_INLINE void add_weighted(const Compute<S>* weights, int64_t weight_row, const S* b, int64_t stride,
                                 int64_t width, Compute<S>* out, int64_t out_row) {
  using V = Vec<Compute<S>>;
  V weight[MR][kKeys];
  FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) FASTSEQ_UNROLL for (int i = 0; i < kKeys; ++i) weight[m][i] =
      V(weights[m * weight_row + i]);
  const auto step = [&](int64_t c, const auto& load_lanes) {
    V value[kKeys];
    FASTSEQ_UNROLL for (int i = 0; i < kKeys; ++i) value[i] = load_lanes(b + i * stride + c);
    FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) {
      V sum = load(out + m * out_row + c);
      FASTSEQ_UNROLL for (int i = 0; i < kKeys; ++i) sum = fma(weight[m][i], value[i], sum);
      store(out + m * out_row + c, sum);
    }
  };
  int64_t c = 0;
  for (; c + V::kLanes <= width; c += V::kLanes) step(c, [](const S* p) { return load(p); });
  if (c < width) step(c, [&](const S* p) { return load_first(p, width - c); });
}

}  // namespace detail

// out[m * out_row + i] = <a + m * a_row, b + i * stride> for `rows` x `count`. The order of a sum depends on `depth`
// alone.
template <class S>
void dot_streamed(const Compute<S>* a, int64_t a_row, int64_t rows, int64_t depth, const S* b, int64_t stride,
                  int64_t count, Compute<S>* out, int64_t out_row) {
  constexpr int kMostRows = kRegisters * 3 / 16, kBlock = 8;  // three rows fill 12 of 16 registers with sums
  const EvenSplit split(rows, kMostRows);
  for (int64_t first = 0; first < count; first += kBlock)
    for (int64_t part = 0; part < split.parts; ++part)
      with_constant<kMostRows>(split.count(part), [&](auto mr) {
        constexpr int MR = decltype(mr)::value;
        const int64_t row = split.begin(part), last = count - 1;
        Vec<Compute<S>> parts[MR][kBlock];
        for (int i = 0; i < kBlock; i += 2) {
          Vec<Compute<S>>* pair[MR];
          FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) pair[m] = parts[m] + i;
          detail::prefetch_row(b + (first + i + kAhead) * stride, depth);
          detail::prefetch_row(b + (first + i + kAhead + 1) * stride, depth);
          const S* const rows_of_b[2] = {b + min(first + i, last) * stride, b + min(first + i + 1, last) * stride};
          detail::dot_pair<MR, S>(a + row * a_row, a_row, depth, rows_of_b, pair);
        }
        FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) {
          Compute<S> sums[kBlock];
          sum_lanes(parts[m], sums);
          for (int64_t i = 0; i < min(kBlock, count - first); ++i) out[(row + m) * out_row + first + i] = sums[i];
        }
      });
}

// out[m] += sum over i < count of weights[m * weight_row + i] * (b + i * stride), rows of `width`; those of out are
// padded to whole vectors.
template <class S>
void add_streamed(const Compute<S>* weights, int64_t weight_row, int64_t rows, int64_t count, const S* b,
                  int64_t stride, int64_t width, Compute<S>* out, int64_t out_row) {
  constexpr int kMostRows = kRegisters / 4;
  const EvenSplit split(rows, kMostRows);
  for (int64_t i = 0; i < count; i += 2) {
    detail::prefetch_row(b + (i + kAhead) * stride, width);
    detail::prefetch_row(b + (i + kAhead + 1) * stride, width);
    for (int64_t part = 0; part < split.parts; ++part)
      with_constant<kMostRows>(split.count(part), [&](auto mr) {
        constexpr int MR = decltype(mr)::value;
        const int64_t row = split.begin(part);
        if (i + 1 < count)
          detail::add_weighted<MR, 2, S>(weights + row * weight_row + i, weight_row, b + i * stride, stride, width,
                                         out + row * out_row, out_row);
        else
          detail::add_weighted<MR, 1, S>(weights + row * weight_row + i, weight_row, b + i * stride, stride, width,
                                         out + row * out_row, out_row);
      });
  }
}

}  // namespace fastseq::FASTSEQ_ISA
