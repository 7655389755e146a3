// Where things lie: panels of packed weights, the buffer saved for backward, and the rows of a sequence.
//
// A panel is kUnits hidden units with all their gates: kTerms gates x kVectors vectors. Gates of the same units meet in
// the registers of one tile, so that the cell is its epilogue.
#pragma once

#include "cpu/base/arena.h"
#include "cpu/base/simd_math.h"
#include "cpu/gemm/gemm.h"
#include "math/step.h"
#include "rows/recurrent.h"

namespace fastseq::FASTSEQ_ISA {

template <class Cell, class S>
struct Layout {
  using T = Compute<S>;
  using V = Vec<T>;
  using Element = typename PanelOf<S>::Element;

  static constexpr int kLanes = V::kLanes;
  static constexpr int kVectors = Cell::kTerms == 1 ? 4 : 1;  // a cell of one gate fills its tile with more units
  static constexpr int kUnits = kVectors * kLanes;
  static constexpr int kTile = Cell::kTerms * kVectors;  // vectors of a panel
  static constexpr int kWidth = Cell::kTerms * kUnits;   // columns of a panel
  static constexpr int kSavedWidth = Cell::kSlots * kUnits;
  static constexpr bool kHasCarry = Cell::kCarry != Carry::kNone;

  int64_t I, H, panels;

  explicit Layout(const RecurrentParams& p)
      : I(p.input_size), H(p.hidden_size), panels(ceil_div(p.hidden_size, kUnits)) {}

  // Packed weights, in bytes: input bias, recurrent bias (panels, kWidth), then the two matrices
  // (panels, panel_depth, kWidth).
  int64_t bias_bytes() const { return panels * kWidth * int64_t(sizeof(T)); }
  int64_t panel_stride(int64_t depth) const { return panel_depth<S>(depth) * kWidth; }
  int64_t matrix_bytes(int64_t depth) const { return panels * panel_stride(depth) * int64_t(sizeof(Element)); }
  int64_t panels_bytes() const { return 2 * bias_bytes() + matrix_bytes(I) + matrix_bytes(H); }

  template <class P>
  auto input_bias(P* base) const {
    return (copy_const<P, T>*)base;
  }
  template <class P>
  auto recurrent_bias(P* base) const {
    return (copy_const<P, T>*)((copy_const<P, char>*)base + bias_bytes());
  }
  template <class P>
  auto input_panels(P* base) const {
    return (copy_const<P, Element>*)((copy_const<P, char>*)base + 2 * bias_bytes());
  }
  template <class P>
  auto recurrent_panels(P* base) const {
    return (copy_const<P, Element>*)((copy_const<P, char>*)base + 2 * bias_bytes() + matrix_bytes(I));
  }

  // Saved for backward: the slots (panels, rows, kSavedWidth), then the carry after each step (panels, rows, kUnits).
  int64_t saved_bytes(int64_t rows) const {
    return panels * rows * (kSavedWidth + (kHasCarry ? kUnits : 0)) * int64_t(sizeof(T));
  }
  T* saved_slots(void* saved, int64_t rows, int64_t panel, int64_t row) const {
    return (T*)saved + (panel * rows + row) * kSavedWidth;
  }
  T* saved_carry(void* saved, int64_t rows, int64_t panel, int64_t row) const {
    return (T*)saved + panels * rows * kSavedWidth + (panel * rows + row) * kUnits;
  }

  // Units of a panel that exist.
  int64_t units(int64_t panel) const { return min(kUnits, H - panel * kUnits); }

 private:
  template <class P, class To>
  struct CopyConst {
    using Type = To;
  };
  template <class P, class To>
  struct CopyConst<const P, To> {
    using Type = const To;
  };
  template <class P, class To>
  using copy_const = typename CopyConst<P, To>::Type;
};

// The active rows of each step, and where they lie.
struct Schedule {
  const RecurrentParams& p;
  const int64_t* starts;  // (T + 1) first packed row of each step

  explicit Schedule(const RecurrentParams& params, const int64_t* packed_starts) : p(params), starts(packed_starts) {}

  static void fill_starts(const RecurrentParams& p, int64_t* starts) {
    starts[0] = 0;
    for (int64_t t = 0; t < p.steps; ++t) starts[t + 1] = starts[t] + active_rows(p, t);
  }

  // The s-th step in the order of computation, and the time before it in that order.
  int64_t time(int64_t s) const { return p.reverse ? p.steps - 1 - s : s; }
  int64_t time_before(int64_t t) const { return p.reverse ? t + 1 : t - 1; }

  int64_t active(int64_t t) const { return t < 0 || t >= p.steps ? 0 : starts[t + 1] - starts[t]; }
  int64_t total() const { return starts[p.steps]; }
  // Steps of all the rows before row b.
  int64_t steps_before(int64_t b) const {
    if (!p.batch_sizes) return b * p.steps;
    int64_t sum = 0;
    for (int64_t t = 0; t < p.steps; ++t) sum += min(b, p.batch_sizes[t]);
    return sum;
  }

  // True if row b starts at time t from its initial state; if time t is its last.
  bool is_first(int64_t t, int64_t b) const { return b >= active(time_before(t)); }
  bool is_last(int64_t t, int64_t b) const { return b >= active(p.reverse ? t - 1 : t + 1); }
  // True if the state is cut before row b enters time t.
  bool is_cut(int64_t t, int64_t b) const { return p.reset && fastseq::is_cut(p, t, is_first(t, b), b); }

  template <class S>
  S* row(const Sequence& sequence, int64_t t, int64_t b) const {
    return row_at<S>(p, sequence, t, starts[t], b);
  }
};

// The first n lanes of a state row at unit `u`, and their store. States of bfloat16 layers may be float32.
template <class S>
FASTSEQ_INLINE Vec<Compute<S>> load_state(const RecurrentParams& p, const State& state, int64_t index, int64_t u,
                                          int64_t n) {
  using T = Compute<S>;
  if (p.float_state) return load_first(row_of<const T>(state, index) + u, n);
  return load_first(row_of<const S>(state, index) + u, n);
}
template <class S>
FASTSEQ_INLINE void store_state(const RecurrentParams& p, const State& state, int64_t index, int64_t u, int64_t n,
                                Vec<Compute<S>> v) {
  using T = Compute<S>;
  if (p.float_state) return store_first(row_of<T>(state, index) + u, v, n);
  store_first(row_of<S>(state, index) + u, v, n);
}

// What one thread owns of a step.
struct Slice {
  Share panels, rows;
};

// How the steps of a layer are split; a function of its shape and of the team.
struct Partition {
  const Schedule& schedule;
  int64_t panels;
  bool by_rows;

  // A large batch is split by rows where there are fewer panels than threads, and where every L2 can hold the weights:
  // no barrier, so a pre-empted thread delays the call once and not at every step. Everything else is split by units,
  // and so are rows of different lengths where panels do: the thread of the longest has few of them at each step (LSTM,
  // 33 rows of 1 to 60 steps, H = 128, two threads: 1.82 ms by rows, 1.64 ms by units).
  static constexpr int64_t kRowsPerThread = 16, kSharedBytes = 4 << 20;

  template <class L>
  Partition(const Schedule& s, const L& layout, int team)
      : schedule(s),
        panels(layout.panels),
        by_rows(s.p.batch >= kRowsPerThread * team &&
                (panels < team || (!s.p.batch_sizes && layout.panels_bytes() <= kSharedBytes))) {}

  // The largest team that has work for every thread.
  template <class L>
  static int64_t most_threads(const RecurrentParams& p, const L& layout) {
    return max(layout.panels, p.batch / kRowsPerThread);
  }

  Slice slice(int rank, int team) const {
    if (by_rows) return {{0, panels}, {cut(rank, team), cut(rank + 1, team)}};
    return {Share::of(panels, rank, team), {0, schedule.p.batch}};
  }

 private:
  // The first row before which rank / team of all steps lie: rows are numbered by falling length.
  int64_t cut(int64_t rank, int64_t team) const {
    if (rank == team) return schedule.p.batch;  // rows of no steps included
    int64_t low = 0, high = schedule.p.batch;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (schedule.steps_before(middle) * team < schedule.total() * rank)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

// Below about a million flops a thread, waking it costs more than it saves.
constexpr int64_t kFlopsPerThread = 1'000'000;

template <class Cell, class S>
int team_size(const RecurrentParams& p, const Layout<Cell, S>& layout) {
  const int64_t flops = 2 * total_rows(p) * Cell::kTerms * layout.H * (layout.I + layout.H);
  return int(max(1, min(p.threads, min(Partition::most_threads(p, layout), flops / kFlopsPerThread))));
}

// The hidden state before each step as rows of storage, the operand of products with W_hh and of their gradients.
template <class S>
struct HiddenRows {
  const Schedule& schedule;
  S* initial;  // (B + 1, H): the initial states in the order of rows, then a row of zeros

  static int64_t elements(const RecurrentParams& p) { return (p.batch + 1) * p.hidden_size; }

  // Fills units [begin, end) of the initial states of rows [row_begin, row_end).
  void fill(int64_t row_begin, int64_t row_end, int64_t begin, int64_t end) const {
    using V = Vec<Compute<S>>;
    const RecurrentParams& p = schedule.p;
    for (int64_t b = row_begin; b < row_end; ++b)
      for (int64_t u = begin; u < end; u += V::kLanes)
        store_first(initial + b * p.hidden_size + u,
                    p.h_0.data ? load_state<S>(p, p.h_0, batch_index(p, b), u, end - u) : V(0), end - u);
  }
  void fill_zeros() const {
    std::memset((void*)(initial + schedule.p.batch * schedule.p.hidden_size), 0, schedule.p.hidden_size * sizeof(S));
  }

  const S* before(int64_t t, int64_t b) const {
    if (schedule.is_cut(t, b)) return initial + schedule.p.batch * schedule.p.hidden_size;
    if (schedule.is_first(t, b)) return initial + b * schedule.p.hidden_size;
    return schedule.template row<const S>(schedule.p.y, schedule.time_before(t), b);
  }
};

}  // namespace fastseq::FASTSEQ_ISA
