// What both directions of layer normalization share: the loop over a row, and how many threads.
#pragma once

#include "cpu/base/share.h"
#include "cpu/base/simd.h"
#include "cpu/base/threads.h"
#include "math/layer_norm.h"
#include "rows/sequence.h"

namespace fastseq::FASTSEQ_ISA {

// f(column, count, accumulator) for every vector of the columns [begin, end). Four take turns as the accumulator of a
// sum: one alone would wait four cycles for each addition. `count` is a constant but for the last vector.
constexpr int kAccumulators = 4;
template <class T, class F>
FASTSEQ_INLINE void for_columns(int64_t begin, int64_t end, const F& f) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t c = begin;
  for (; c + kAccumulators * lanes <= end; c += kAccumulators * lanes)
    FASTSEQ_UNROLL for (int i = 0; i < kAccumulators; ++i) f(c + i * lanes, lanes, i);
  for (; c + lanes <= end; c += lanes) f(c, lanes, 0);
  if (c < end) f(c, end - c, 0);
}

// Sums are taken over blocks of columns, which are added up: at 16 additions to an accumulator less is rounded away
// than at hundreds.
template <class T>
constexpr int64_t kSumBlock = 16 * kAccumulators * kLanes<T>;

// What an optional weight or bias is at these columns.
template <class S>
FASTSEQ_INLINE Vec<Compute<S>> load_or(const S* values, int64_t column, int64_t count, Compute<S> absent) {
  return values ? load_first(values + column, count) : Vec<Compute<S>>(absent);
}

// A thread is worth waking for this many elements: they take about 5 us.
inline int layer_norm_threads(const LayerNormParams& p) {
  constexpr int64_t kElementsPerThread = 1 << 14;
  return int(max(1, min(p.threads, p.steps * p.batch * p.features / kElementsPerThread)));
}

}  // namespace fastseq::FASTSEQ_ISA
