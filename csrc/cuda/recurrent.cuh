// The recurrent driver: any cell, one layer in one direction. One launch a step, which holds a tile of rows and units:
// the product with W_hh for it, then the cell as its epilogue. A sum runs over its terms in order, from the first to
// the last, whatever the sizes; so every output is bitwise the same on every run and for any batch.
#pragma once

#include "cuda/common.cuh"
#include "rows/recurrent.h"

namespace fastseq::cuda {

// The rows of one step: the first of them in packed order, and how many there are. None outside of the sequence.
struct Span {
  int64_t time, start, active;
};

// A launch and its neighbours in the order of computation.
struct Step {
  Span before, now, after;
  int64_t rows;         // of the launch
  int64_t empty_begin;  // rows of length 0 begin here; rows here and above pass their states through
};

// The steps of a call, on the host.
class Timeline {
 public:
  explicit Timeline(const RecurrentParams& p) : p_(p), rows_(total_rows(p)) {}

  int64_t rows() const { return rows_; }
  int64_t forward_step() const { return p_.reverse ? -1 : 1; }
  int64_t longest() const { return active_rows(p_, 0); }
  Span first() const { return p_.reverse ? shift({p_.steps, rows_, 0}, -1) : shift({-1, 0, 0}, 1); }
  Span last() const { return p_.reverse ? shift({-1, 0, 0}, 1) : shift({p_.steps, rows_, 0}, -1); }
  Span shift(const Span& span, int64_t by) const {
    const int64_t t = span.time + by;
    const int64_t active = active_rows(p_, t);
    return {t, by > 0 ? span.start + span.active : span.start - active, active};
  }

 private:
  const RecurrentParams& p_;
  const int64_t rows_;
};

// Where things lie, for the threads of a launch.
template <class Cell, class S>
struct Layer {
  using T = Compute<S>;
  static constexpr bool kHasCarry = Cell::kCarry != Carry::kNone;

  const RecurrentParams& p;
  const Step& step;

  __host__ static int64_t saved_elements(const RecurrentParams& p, int64_t rows) {
    return rows * (Cell::kSlots + kHasCarry) * p.hidden_size;
  }
  __device__ T* slots(int64_t row) const { return (T*)p.saved + row * Cell::kSlots * p.hidden_size; }
  __device__ T* carries(int64_t rows, int64_t row) const { return slots(rows) + row * p.hidden_size; }

  template <class Row>
  __device__ Row* row(const Sequence& sequence, const Span& span, int64_t b) const {
    return row_at<Row>(p, sequence, span.time, span.start, b);
  }

  // True if the state is cut before row b enters `span`; `first` if it starts there from its initial state.
  __device__ bool is_cut(const Span& span, bool first, int64_t b) const {
    return fastseq::is_cut(p, span.time, first, b);
  }

  // States of bfloat16 layers may be float32.
  __device__ T load_state(const State& state, int64_t b, int64_t u) const {
    if (!state.data) return 0;
    const int64_t index = batch_index(p, b);
    return p.float_state ? load(row_of<const T>(state, index) + u) : load(row_of<const S>(state, index) + u);
  }
  __device__ void store_state(const State& state, int64_t b, int64_t u, T v) const {
    if (!state.data) return;
    const int64_t index = batch_index(p, b);
    p.float_state ? store(row_of<T>(state, index) + u, v) : store(row_of<S>(state, index) + u, v);
  }

  // The hidden state before the step, as the storage of y holds it.
  __device__ S hidden_before(int64_t b, int64_t u) const {
    const bool first = b >= step.before.active;
    S h;
    if (is_cut(step.now, first, b))
      store(&h, 0);
    else if (first)
      store(&h, load_state(p.h_0, b, u));
    else
      h = row<const S>(p.y, step.before, b)[u];
    return h;
  }
  __device__ T carry_before(int64_t rows, int64_t b, int64_t u) const {
    const bool first = b >= step.before.active;
    if (is_cut(step.now, first, b)) return 0;
    if (first) return load_state(Cell::kCarry == Carry::kHidden ? p.h_0 : p.c_0, b, u);
    return carries(rows, step.before.start + b)[u];
  }
};

}  // namespace fastseq::cuda
