// Which rows of a recurrent call are active, where they lie and where they are cut, for the CPU and the GPU.
#pragma once

#include "rows/sequence.h"

namespace fastseq {

// How many rows are active at time t: none outside of the sequence. On the host, as `batch_sizes` is there.
FASTSEQ_CELL int64_t active_rows(const RecurrentParams& p, int64_t t) {
  return t < 0 || t >= p.steps ? 0 : p.batch_sizes ? p.batch_sizes[t] : p.batch;
}

// Those of all steps together, on the host.
FASTSEQ_CELL int64_t total_rows(const RecurrentParams& p) {
  if (!p.batch_sizes) return p.steps * p.batch;
  int64_t sum = 0;
  for (int64_t t = 0; t < p.steps; ++t) sum += p.batch_sizes[t];
  return sum;
}

// Where row b is in padded tensors and in states.
FASTSEQ_CELL int64_t batch_index(const RecurrentParams& p, int64_t b) { return p.order ? p.order[b] : b; }

// Row b at time t, which begins at the packed row `start`.
template <class S>
FASTSEQ_CELL S* row_at(const RecurrentParams& p, const Sequence& sequence, int64_t t, int64_t start, int64_t b) {
  return p.packed ? (S*)sequence.data + (start + b) * sequence.row_stride : row_at<S>(sequence, t, batch_index(p, b));
}

// The row of a state at a batch index.
template <class S>
FASTSEQ_CELL S* row_of(const State& state, int64_t index) {
  return (S*)state.data + index * state.row_stride;
}

// True if the state of row b is cut before it enters time t; `first` if it starts there from its initial state.
FASTSEQ_CELL bool is_cut(const RecurrentParams& p, int64_t t, bool first, int64_t b) {
  if (!p.reset || (p.reverse && first)) return false;
  const int64_t boundary = p.reverse ? t + 1 : t;  // between the steps boundary - 1 and boundary
  return p.reset[boundary * p.reset_step_stride + batch_index(p, b) * p.reset_row_stride];
}

}  // namespace fastseq
