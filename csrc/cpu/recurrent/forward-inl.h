// The recurrent driver, forward: any cell, one layer in one direction, a step being a sequence with T = 1.
//
// Units are split over the threads, which meet in a barrier after each step; a large batch is split by rows instead and
// needs no barrier (see Partition). Either way each output comes from the same sums in the same order.
#pragma once

#include "cpu/base/threads.h"
#include "cpu/recurrent/layout-inl.h"

namespace fastseq::FASTSEQ_ISA {

template <class Cell, class S>
class Forward {
  using L = Layout<Cell, S>;
  using T = typename L::T;
  using V = typename L::V;

 public:
  static Status run(const RecurrentParams& p) {
    Forward driver(p);
    Arena needed;
    driver.lay_out(needed);
    void* memory = allocate(needed.bytes());
    if (!memory) return kOutOfMemory;
    Arena arena(memory);
    driver.lay_out(arena);
    driver.schedule_.starts = driver.starts_;
    Schedule::fill_starts(p, driver.starts_);
    driver.hidden_.fill_zeros();
    parallel(driver.threads_, [](void* self, const Team& team) { ((Forward*)self)->work(team); }, &driver);
    release(memory);
    return kOk;
  }

 private:
  // Projecting the input of about 128 rows at a time pays where a step alone has too few rows to be compute bound.
  static constexpr int64_t kHoistBelow = 8, kHoistRows = 128;
  // Rows whose terms are kept between the products and the cell, in the L1 cache.
  static constexpr int64_t kTileRows = 48;

  explicit Forward(const RecurrentParams& params)
      : p_(params),
        layout_(params),
        threads_(team_size(params, layout_)),
        chunk_(p_.panels && p_.batch < kHoistBelow ? ceil_div(kHoistRows, p_.batch) : 1) {}

  void lay_out(Arena& arena) {
    carry_ = arena.take<T>(layout_.panels * p_.batch * L::kUnits);
    hoisted_ = chunk_ > 1 ? arena.take<T>(layout_.panels * chunk_ * p_.batch * L::kWidth) : nullptr;
    pointers_ = arena.take<const S*>(threads_ * (chunk_ + 1) * p_.batch);
    starts_ = arena.take<int64_t>(p_.steps + 1);
    hidden_.initial = arena.take<S>(HiddenRows<S>::elements(p_));
  }

  void work(const Team& team) {
    const Partition partition(schedule_, layout_, team.size);
    const Slice slice = partition.slice(team.rank, team.size);
    const S** x_rows = pointers_ + team.rank * (chunk_ + 1) * p_.batch;
    const S** h_rows = x_rows + chunk_ * p_.batch;
    begin(slice);
    if (!partition.by_rows) team.wait();
    for (int64_t s0 = 0; s0 < p_.steps; s0 += chunk_) {
      const int64_t s1 = min(p_.steps, s0 + chunk_), chunk_rows = find_inputs(slice, s0, s1, x_rows);
      if (chunk_ > 1) hoist_inputs(slice, chunk_rows, x_rows);
      int64_t row = 0;  // of the chunk
      for (int64_t s = s0; s < s1; ++s) {
        const int64_t t = schedule_.time(s);
        step(slice, t, row, x_rows, h_rows);
        row += active(slice, t);
        if (!partition.by_rows) team.wait();
      }
    }
  }

  int64_t active(const Slice& slice, int64_t t) const {
    return max(0, min(schedule_.active(t), slice.rows.end) - slice.rows.begin);
  }
  // The carry and the initial hidden rows of the slice, and the final states of empty rows.
  void begin(const Slice& slice) const {
    hidden_.fill(slice.rows.begin, slice.rows.end, slice.panels.begin * L::kUnits,
                 min(layout_.H, slice.panels.end * L::kUnits));
    for (int64_t panel = slice.panels.begin; panel < slice.panels.end; ++panel)
      for (int64_t b = slice.rows.begin; b < slice.rows.end; ++b)
        for (int64_t lane = 0; lane < layout_.units(panel); lane += L::kLanes) {
          const int64_t unit = panel * L::kUnits + lane, n = layout_.units(panel) - lane, i = batch_index(p_, b);
          const V h = p_.h_0.data ? load_state<S>(p_, p_.h_0, i, unit, n) : V(0);
          const V c = p_.c_0.data ? load_state<S>(p_, p_.c_0, i, unit, n) : V(0);
          store(carry_row(panel, b) + lane, Cell::kCarry == Carry::kHidden ? h : c);
          if (b >= schedule_.active(0)) finish(i, unit, n, h, c);
        }
  }

  T* carry_row(int64_t panel, int64_t b) const { return carry_ + (panel * p_.batch + b) * L::kUnits; }

  void finish(int64_t index, int64_t unit, int64_t n, V h, V carry) const {
    if (p_.h_n.data) store_state<S>(p_, p_.h_n, index, unit, n, h);
    if (p_.c_n.data) store_state<S>(p_, p_.c_n, index, unit, n, carry);
  }

  // The input rows of the steps s0, ..., s1 - 1 in order of computation; returns their number.
  int64_t find_inputs(const Slice& slice, int64_t s0, int64_t s1, const S** rows) const {
    int64_t total = 0;
    for (int64_t s = s0; s < s1; ++s) {
      const int64_t t = schedule_.time(s), count = active(slice, t);
      for (int64_t b = 0; b < count; ++b)
        rows[total++] = schedule_.template row<const S>(p_.x, t, slice.rows.begin + b);
    }
    return total;
  }

  // Terms W a + bias of `count` rows in `n` panels (2 only if count is 1), from packed or plain weights.
  template <bool kInput>
  FASTSEQ_INLINE void terms(const S* const* rows, int64_t count, int64_t panel, int n, T* out,
                            int64_t panel_stride) const {
    const int64_t depth = kInput ? layout_.I : layout_.H;
    if (p_.panels) {
      const auto* panels = kInput ? layout_.input_panels(p_.panels) : layout_.recurrent_panels(p_.panels);
      const auto* bias = kInput ? layout_.input_bias(p_.panels) : layout_.recurrent_bias(p_.panels);
      const int64_t stride = layout_.panel_stride(depth);
      return multiply_rows<L::kTile, S>(rows, count, n, depth, panels + panel * stride, stride,
                                        bias + panel * L::kWidth, out, L::kWidth, panel_stride);
    }
    const S *w = (const S*)(kInput ? p_.w_ih : p_.w_hh), *bias = (const S*)(kInput ? p_.b_ih : p_.b_hh);
    UnitVector<T> vectors[2 * L::kTile];
    int found = 0;
    for (int i = 0; i < n; ++i) {
      // Units beyond H must be finite, as packed panels leave them.
      if (layout_.units(panel + i) < L::kUnits) std::memset(out + i * panel_stride, 0, count * L::kWidth * sizeof(T));
      for (int term = 0; term < Cell::kTerms; ++term) {
        const int64_t first = (kInput ? Cell::input_gate(term) : Cell::recurrent_gate(term)) * layout_.H;
        const int64_t row = first + (panel + i) * L::kUnits, units = layout_.units(panel + i);
        T* to = out + i * panel_stride + term * L::kUnits;
        for (int64_t lane = 0; lane < units; lane += L::kLanes) {
          const UnitVector<T> vector{row + lane, min(L::kLanes, units - lane), to + lane};
          if (p_.in_order)
            vectors[found++] = vector;
          else
            dot_rows(rows, count, depth, w + vector.first * depth, bias ? bias + vector.first : nullptr, vector.units,
                     vector.out, L::kWidth);
        }
      }
    }
    if (p_.in_order) transposed_row(rows[0], depth, w, bias, vectors, found);
  }

  // The input terms of a chunk: (panels, chunk rows, kWidth), each panel of a slice in its own place.
  T* hoisted_terms(int64_t panel, int64_t row) const {
    return hoisted_ + (panel * chunk_ * p_.batch + row) * L::kWidth;
  }

  void hoist_inputs(const Slice& slice, int64_t total, const S* const* rows) const {
    for (int64_t panel = slice.panels.begin; panel < slice.panels.end; ++panel)
      terms<true>(rows, total, panel, 1, hoisted_terms(panel, 0), 0);
  }

  void step(const Slice& slice, int64_t t, int64_t chunk_row, const S** x_rows, const S** h_rows) {
    alignas(64) T input_terms[kTileRows * L::kWidth], recurrent_terms[kTileRows * L::kWidth];
    const int64_t count = active(slice, t);
    for (int64_t b = 0; b < count; ++b) h_rows[b] = hidden_.before(t, slice.rows.begin + b);
    const EvenSplit split(count, kTileRows);
    for (int64_t panel = slice.panels.begin; panel < slice.panels.end;) {
      const int n = count == 1 && panel + 1 < slice.panels.end ? 2 : 1;
      for (int64_t part = 0; part < split.parts; ++part) {
        const int64_t first = split.begin(part), rows = split.count(part);
        if (chunk_ == 1) terms<true>(x_rows + first, rows, panel, n, input_terms, L::kWidth);
        terms<false>(h_rows + first, rows, panel, n, recurrent_terms, L::kWidth);
        for (int i = 0; i < n; ++i)
          for (int64_t m = 0; m < rows; ++m)
            apply(panel + i, t, slice.rows.begin + first + m,
                  chunk_ == 1 ? input_terms + (i + m) * L::kWidth : hoisted_terms(panel + i, chunk_row + first + m),
                  recurrent_terms + (i + m) * L::kWidth);
      }
      panel += n;
    }
  }

  // The cell on one row of one panel, the epilogue of the matrix product.
  FASTSEQ_INLINE void apply(int64_t panel, int64_t t, int64_t b, const T* x, const T* r) const {
    const int64_t units = layout_.units(panel), index = batch_index(p_, b);
    const bool cut = schedule_.is_cut(t, b), last = schedule_.is_last(t, b);
    T* carry = carry_row(panel, b);
    S* y = schedule_.template row<S>(p_.y, t, b) + panel * L::kUnits;
    const int64_t saved_row = schedule_.starts[t] + b;
    // All units of the panel, also those beyond H: backward sums over them too.
    for (int64_t lane = 0; lane < L::kUnits; lane += L::kLanes) {
      ForwardStep<Cell, V> s;
      FASTSEQ_UNROLL for (int i = 0; i < Cell::kTerms; ++i) {
        s.x[i] = load(x + i * L::kUnits + lane);
        s.r[i] = load(r + i * L::kUnits + lane);
      }
      s.carry = cut ? V(0) : load(carry + lane);
      Cell::forward(s);
      if (L::kHasCarry) store(carry + lane, s.carry);
      store_first(y + lane, s.h, units - lane);
      if (p_.saved) {
        T* slots = layout_.saved_slots(p_.saved, schedule_.total(), panel, saved_row) + lane;
        FASTSEQ_UNROLL for (int i = 0; i < Cell::kSlots; ++i)
            store_padded(slots + i * L::kUnits, s.saved[i], units - lane);
        if (L::kHasCarry)
          store_padded(layout_.saved_carry(p_.saved, schedule_.total(), panel, saved_row) + lane, s.carry,
                       units - lane);
      }
      if (p_.c_all.data)
        store_first(schedule_.template row<S>(p_.c_all, t, b) + panel * L::kUnits + lane, s.carry, units - lane);
      if (last) finish(index, panel * L::kUnits + lane, units - lane, s.h, s.carry);
    }
  }

  const RecurrentParams& p_;
  const L layout_;
  const int threads_;
  const int64_t chunk_;           // steps whose input terms are projected at once; 1: each step computes its own
  T* carry_ = nullptr;            // (panels, B, kUnits)
  T* hoisted_ = nullptr;          // (panels, chunk * B, kWidth), null if chunk is 1
  const S** pointers_ = nullptr;  // per thread: input rows of a chunk and hidden rows of a step
  int64_t* starts_ = nullptr;     // (T + 1)
  Schedule schedule_{p_, nullptr};
  HiddenRows<S> hidden_{schedule_, nullptr};
};

// Packs weights and biases into panels; see Layout for the order.
template <class Cell, class S>
void pack_panels(const RecurrentParams& p, void* panels) {
  using L = Layout<Cell, S>;
  struct Context {
    const RecurrentParams& p;
    L layout;
    void* panels;
  } context{p, L(p), panels};
  const auto work = [](void* pointer, const Team& team) {
    const auto& [p, layout, panels] = *(const Context*)pointer;
    const auto pack = [&, &p = p, &layout = layout](int64_t panel, const void* weights, const void* biases,
                                                    int64_t depth, int (*gate_of)(int), typename L::Element* out,
                                                    typename L::T* bias_out) {
      for (int term = 0; term < Cell::kTerms; ++term)
        for (int64_t lane = 0; lane < L::kUnits; lane += L::kLanes) {
          const int64_t row = gate_of(term) * layout.H + panel * L::kUnits + lane;
          const int64_t units = max(0, layout.units(panel) - lane), column = term * L::kUnits + lane;
          pack_column((const S*)weights + row * depth, depth, units, depth, out + column, L::kWidth);
          store(bias_out + column, biases && units ? load_first((const S*)biases + row, units) : typename L::V(0));
        }
    };
    const Share share = Share::of(layout.panels, team);
    for (int64_t panel = share.begin; panel < share.end; ++panel) {
      pack(
          panel, p.w_ih, p.b_ih, layout.I, [](int i) { return Cell::input_gate(i); },
          layout.input_panels(panels) + panel * layout.panel_stride(layout.I),
          layout.input_bias(panels) + panel * L::kWidth);
      pack(
          panel, p.w_hh, p.b_hh, layout.H, [](int i) { return Cell::recurrent_gate(i); },
          layout.recurrent_panels(panels) + panel * layout.panel_stride(layout.H),
          layout.recurrent_bias(panels) + panel * L::kWidth);
    }
  };
  const int64_t bytes = context.layout.panels_bytes();
  parallel(int(max(1, min(p.threads, min(context.layout.panels, bytes >> 18)))), work, &context);
}

}  // namespace fastseq::FASTSEQ_ISA
