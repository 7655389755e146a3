// How the rows and the memory of an attention call are divided, and how rows are written.
#pragma once

#include "cpu/attention/streamed_product-inl.h"
#include "cpu/attention/tile_product-inl.h"
#include "cpu/base/arena.h"
#include "cpu/base/simd_math.h"
#include "cpu/base/threads.h"
#include "rows/attention.h"

namespace fastseq::FASTSEQ_ISA {

// Query rows of a block: the unit of work. Keys of packed panels are shared by all blocks of a head.
constexpr int64_t kQueryBlock = 96;

// With few query rows for a head of keys, products are dots of rows as they are stored: packing the keys would not pay.
// Backward does as forward did: P = exp(S - lse) is only as exact as S is the same.
constexpr int64_t kFewRows = 16;
inline bool few_queries(const AttentionParams& p) { return p.heads / p.kv_heads * p.queries <= kFewRows; }

// A row of storage from a row of results, times a factor.
template <class S>
FASTSEQ_INLINE void write_row(S* out, const Compute<S>* row, int64_t width, Compute<S> factor) {
  using V = Vec<Compute<S>>;
  for (int64_t c = 0; c < width; c += V::kLanes) store_first(out + c, load(row + c) * V(factor), width - c);
}

template <class S>
FASTSEQ_INLINE void zero_rows(const Heads& heads, int64_t b, int64_t n, int64_t begin, int64_t end, int64_t width) {
  for (int64_t i = begin; i < end; ++i) std::memset((void*)row_of<S>(heads, b, n, i), 0, width * sizeof(S));
}

template <class T>
FASTSEQ_INLINE void fill(T* out, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) out[i] = value;
}

// Below about a million flops a thread, waking it costs more than it saves. A few queries take five times as long for
// their flops: they wait for memory.
inline int attention_threads(const AttentionParams& p) {
  const double flops_per_thread = few_queries(p) ? 2e5 : 1e6;
  const double flops = 2.0 * p.batch * p.heads * p.queries * p.keys * (p.head_dim + p.value_dim);
  return int(max(1, min(p.threads, flops < 1e15 ? int64_t(flops / flops_per_thread) : p.threads)));
}

}  // namespace fastseq::FASTSEQ_ISA
