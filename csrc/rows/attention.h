// Where the rows of an attention call lie, for the CPU and the GPU.
#pragma once

#include "kernels.h"
#include "math/mask.h"

namespace fastseq {

// One batch row: its number of queries and keys, and the rows of its tensors where they start.
struct Extent {
  int64_t queries, keys, q_start, k_start;

  FASTSEQ_CELL Extent(const AttentionParams& p, int64_t b)
      : queries(p.q_lengths ? p.q_lengths[b] : p.queries),
        keys(p.k_lengths ? p.k_lengths[b] : p.keys),
        q_start(p.q_starts ? p.q_starts[b] : 0),
        k_start(p.k_starts ? p.k_starts[b] : 0) {}

  FASTSEQ_CELL Window window(const AttentionParams& p) const {
    return Window(p.left, p.right, p.lower_right ? keys - queries : 0, queries, keys);
  }
};

template <class S>
FASTSEQ_CELL S* row_of(const Heads& heads, int64_t b, int64_t n, int64_t row) {
  return (S*)heads.data + b * heads.batch_stride + n * heads.head_stride + row * heads.row_stride;
}

// Element (b, n, row) of lse and what is laid out like it; null if there is none.
template <class T>
FASTSEQ_CELL T* element_of(T* data, const int64_t* strides, int64_t b, int64_t n, int64_t row) {
  return data ? data + b * strides[0] + n * strides[1] + row * strides[2] : nullptr;
}

}  // namespace fastseq
