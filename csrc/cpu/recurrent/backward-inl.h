// The recurrent driver, backward: the chain rule through time.
//
// 1. From the last step to the first: the cell turns the saved gates of its panels into gradients in place, then
//    dh of the step before = dG W_hh for the same units. One barrier a step, between the two.
// 2. dx = dG W_ih for all steps.
// 3. dW = dG^T [x | h_prev], db = the sum of dG.
//
// The gradients dG lie where the gates lay, (panels, rows, slots, units): as rows they are the operand A of 1 and 2, as
// columns that of 3. Sums over K and over rows run in blocks, in an order fixed by the shape.
#pragma once

#include "cpu/base/threads.h"
#include "cpu/recurrent/layout-inl.h"
#include "cpu/recurrent/weight_gradient-inl.h"

namespace fastseq::FASTSEQ_ISA {

// W^T as the operand B of dG W: K is (panels, terms, units), columns are those of W.
template <class Cell, class S, bool kInput>
struct TransposedWeights {
  using L = Layout<Cell, S>;
  using T = typename L::T;

  const L& layout;
  const S* w;  // (G*H, N), as torch lays it out
  T* packed;   // (vectors of N, K, lanes), or null: w is read in place

  int64_t columns() const { return kInput ? layout.I : layout.H; }
  int64_t vectors() const { return ceil_div(columns(), L::kLanes); }
  int64_t depth() const { return layout.panels * L::kWidth; }
  int64_t elements() const { return vectors() * depth() * L::kLanes; }

  // In place, B has a row of W for each k and no room for tails.
  static bool in_place(const L& layout, int64_t columns, int64_t rows) {
    constexpr int64_t kPackRows = 16;  // fewer rows do not pay for a copy
    return std::is_same_v<S, T> && rows < kPackRows && layout.H % L::kUnits == 0 && columns % L::kLanes == 0;
  }

  int64_t row(int64_t panel, int term) const {
    return (kInput ? Cell::input_gate(term) : Cell::recurrent_gate(term)) * layout.H + panel * L::kUnits;
  }

  void pack(int64_t panel) const {
    for (int term = 0; term < Cell::kTerms; ++term)
      for (int64_t u = 0; u < L::kUnits; ++u) {
        T* out = packed + (panel * L::kWidth + term * L::kUnits + u) * L::kLanes;
        const S* source = w + (row(panel, term) + u) * columns();
        const bool exists = u < layout.units(panel);
        for (int64_t q = 0; q < vectors(); ++q)
          store(out + q * depth() * L::kLanes,
                exists ? load_first(source + q * L::kLanes, columns() - q * L::kLanes) : Vec<T>(0));
      }
  }

  // out (count, vectors [q_begin, q_end)) = dG W for `count` consecutive rows of dG from `slots`.
  void multiply(const T* slots, int64_t panel_stride, int64_t count, int64_t q_begin, int64_t q_end, T* out,
                int64_t out_stride) const {
    GradientProduct<T> product = {};
    product.panels = layout.panels;
    product.a_panel = panel_stride;
    product.a_row = L::kSavedWidth;
    if (packed) {
      product.chunks = 1;
      product.chunk_depth = L::kWidth;
      product.b = packed;
      product.b_panel = L::kWidth * L::kLanes;
      product.b_vector = depth() * L::kLanes;
      product.b_step = L::kLanes;
    } else {
      product.chunks = Cell::kTerms;
      product.chunk_depth = L::kUnits;
      product.b = (const T*)w;  // S is T
      product.b_panel = L::kUnits * columns();
      for (int term = 0; term < Cell::kTerms; ++term) product.b_chunk[term] = row(0, term) * columns();
      product.b_vector = L::kLanes;
      product.b_step = columns();
    }
    product.multiply(slots + (kInput ? Cell::kInputSlot : Cell::kRecurrentSlot) * L::kUnits, count, q_begin, q_end, out,
                     out_stride);
  }
};

template <class Cell, class S>
class Backward {
  using L = Layout<Cell, S>;
  using T = typename L::T;
  using V = typename L::V;
  // Rows of dx per pass: their part of dG and their result stay in the L2 cache.
  static constexpr int64_t kInputRows = 64;

 public:
  static Status run(const RecurrentParams& p) {
    Backward driver(p);
    Arena needed;
    driver.lay_out(needed);
    void* memory = allocate(needed.bytes());
    if (!memory) return kOutOfMemory;
    Arena arena(memory);
    driver.lay_out(arena);
    driver.schedule_.starts = driver.starts_;
    Schedule::fill_starts(p, driver.starts_);
    driver.hidden_.fill_zeros();
    parallel(driver.threads_, [](void* self, const Team& team) { ((Backward*)self)->work(team); }, &driver);
    release(memory);
    return kOk;
  }

 private:
  explicit Backward(const RecurrentParams& params)
      : p_(params),
        layout_(params),
        rows_(total_rows(params)),
        threads_(team_size(params, layout_)),
        width_(layout_.panels * L::kUnits) {}

  void lay_out(Arena& arena) {
    const auto place = [&](auto*& array, bool wanted, int64_t count) {
      array = wanted ? arena.take<std::remove_reference_t<decltype(*array)>>(count) : nullptr;
    };
    const bool pack_recurrent = !TransposedWeights<Cell, S, false>::in_place(layout_, layout_.H, rows_);
    const bool pack_input = p_.dx.data && !TransposedWeights<Cell, S, true>::in_place(layout_, layout_.I, rows_);
    place(starts_, true, p_.steps + 1);
    place(dh_, true, p_.batch * width_);
    place(dcarry_, true, p_.batch * width_);
    place(hidden_.initial, true, HiddenRows<S>::elements(p_));
    place(w_hh_.packed, pack_recurrent, w_hh_.elements());
    place(w_ih_.packed, pack_input, w_ih_.elements());
    place(dx_, p_.dx.data, threads_ * kInputRows * w_ih_.vectors() * L::kLanes);
    using Gradient = WeightGradient<Cell, S>;
    const bool gradients = p_.dw_ih || p_.dw_hh;
    part_elements_ = gradients ? Gradient::part_elements(layout_, rows_, threads_) : 0;
    place(pointers_, gradients, threads_ * kRowBlock);
    place(packed_, gradients, threads_ * Gradient::packed_elements());
    place(sums_, gradients && Gradient::needs_sums(rows_), Gradient::sums_elements(layout_, max(layout_.I, layout_.H)));
    place(parts_, part_elements_ > 0, threads_ * part_elements_);
  }

  void work(const Team& team) {
    const Partition partition(schedule_, layout_, team.size);
    const Slice slice = partition.slice(team.rank, team.size);
    const Share packed = Share::of(layout_.panels, team);
    for (int64_t panel = packed.begin; panel < packed.end; ++panel) {
      if (w_hh_.packed) w_hh_.pack(panel);
      if (w_ih_.packed) w_ih_.pack(panel);
    }
    begin(slice);
    team.wait();
    for (int64_t s = p_.steps - 1; s >= 0; --s) {
      const int64_t t = schedule_.time(s);
      const int64_t count = max(0, min(schedule_.active(t), slice.rows.end) - slice.rows.begin);
      differentiate(slice, t, count);
      if (!partition.by_rows) team.wait();
      propagate(slice, t, count, s == 0);
    }
    finish(slice);
    team.wait();
    if (p_.dx.data) input_gradient(team);
    weight_gradients(team);
  }

  int64_t last_vector(const Slice& slice) const { return min(w_hh_.vectors(), slice.panels.end * L::kVectors); }
  T* dh_row(int64_t b) const { return dh_ + b * width_; }
  T* dcarry_row(int64_t panel, int64_t b) const { return dcarry_ + (panel * p_.batch + b) * L::kUnits; }
  T* slots(int64_t panel, int64_t row) const { return layout_.saved_slots(p_.saved, rows_, panel, row); }

  // Calls f(batch index, unit, units left, dh, dcarry) for each vector of units of the slice.
  template <class F>
  FASTSEQ_INLINE void for_each_state(const Slice& slice, const F& f) const {
    for (int64_t panel = slice.panels.begin; panel < slice.panels.end; ++panel)
      for (int64_t b = slice.rows.begin; b < slice.rows.end; ++b)
        for (int64_t lane = 0; lane < layout_.units(panel); lane += L::kLanes)
          f(batch_index(p_, b), panel * L::kUnits + lane, layout_.units(panel) - lane,
            dh_row(b) + panel * L::kUnits + lane, dcarry_row(panel, b) + lane);
  }

  void begin(const Slice& slice) const {
    hidden_.fill(slice.rows.begin, slice.rows.end, slice.panels.begin * L::kUnits,
                 min(layout_.H, slice.panels.end * L::kUnits));
    for_each_state(slice, [&](int64_t index, int64_t unit, int64_t n, T* dh, T* dcarry) {
      store(dh, p_.dh_n.data ? load_state<S>(p_, p_.dh_n, index, unit, n) : V(0));
      store(dcarry, p_.dc_n.data ? load_state<S>(p_, p_.dc_n, index, unit, n) : V(0));
    });
  }

  void finish(const Slice& slice) const {
    for_each_state(slice, [&](int64_t index, int64_t unit, int64_t n, T* dh, T* dcarry) {
      const V carried = Cell::kCarry == Carry::kHidden ? load(dcarry) : V(0);
      if (p_.dh_0.data) store_state<S>(p_, p_.dh_0, index, unit, n, load(dh) + carried);
      if (p_.dc_0.data) store_state<S>(p_, p_.dc_0, index, unit, n, load(dcarry));
    });
  }

  // The cell backward: gates to their gradients, in place.
  void differentiate(const Slice& slice, int64_t t, int64_t count) const {
    for (int64_t panel = slice.panels.begin; panel < slice.panels.end; ++panel)
      for (int64_t b = slice.rows.begin; b < slice.rows.begin + count; ++b) {
        const bool cut = schedule_.is_cut(t, b), first = schedule_.is_first(t, b);
        const int64_t row = schedule_.starts[t] + b, index = batch_index(p_, b), units = layout_.units(panel);
        const T* carry = L::kHasCarry ? layout_.saved_carry(p_.saved, rows_, panel, row) : nullptr;
        const T* before = L::kHasCarry && !first ? layout_.saved_carry(p_.saved, rows_, panel,
                                                                       schedule_.starts[schedule_.time_before(t)] + b)
                                                 : nullptr;
        const State& initial = Cell::kCarry == Carry::kHidden ? p_.h_0 : p_.c_0;
        for (int64_t lane = 0; lane < units; lane += L::kLanes) {
          const int64_t unit = panel * L::kUnits + lane, n = units - lane;
          T* slot = slots(panel, row) + lane;
          BackwardStep<Cell, V> s;
          FASTSEQ_UNROLL for (int i = 0; i < Cell::kSlots; ++i) s.slot[i] = load(slot + i * L::kUnits);
          s.dh = load(dh_row(b) + unit);
          if (p_.dy.data) s.dh = s.dh + load_first(schedule_.template row<const S>(p_.dy, t, b) + unit, n);
          s.carry = s.carry_before = s.dcarry = V(0);
          if constexpr (L::kHasCarry) {
            s.carry = load(carry + lane);
            if (!cut) {
              if (!first)
                s.carry_before = load(before + lane);
              else if (initial.data)
                s.carry_before = load_state<S>(p_, initial, index, unit, n);
            }
            s.dcarry = load(dcarry_row(panel, b) + lane);
            if (p_.dc_all.data)
              s.dcarry = s.dcarry + load_first(schedule_.template row<const S>(p_.dc_all, t, b) + unit, n);
          }
          Cell::backward(s);
          FASTSEQ_UNROLL for (int i = 0; i < Cell::kSlots; ++i) store_padded(slot + i * L::kUnits, s.slot[i], n);
          if (L::kHasCarry) store(dcarry_row(panel, b) + lane, cut ? V(0) : s.dcarry);
        }
      }
  }

  // dh of the step before, for the units of the slice: nothing passes a cut.
  void propagate(const Slice& slice, int64_t t, int64_t count, bool last) const {
    if (last && !p_.dh_0.data) return;
    const int64_t begin = slice.panels.begin * L::kVectors, end = last_vector(slice);
    w_hh_.multiply(slots(0, schedule_.starts[t] + slice.rows.begin), rows_ * L::kSavedWidth, count, begin, end,
                   dh_row(slice.rows.begin), width_);
    if (!p_.reset) return;
    for (int64_t b = slice.rows.begin; b < slice.rows.begin + count; ++b)
      if (schedule_.is_cut(t, b))
        for (int64_t q = begin; q < end; ++q) store(dh_row(b) + q * L::kLanes, V(0));
  }

  void input_gradient(const Team& team) const {
    const int64_t vectors = w_ih_.vectors(), stride = vectors * L::kLanes;
    const Share rows = Share::of(rows_, team);
    T* out = dx_ + team.rank * kInputRows * stride;
    int64_t t = 0;
    for (int64_t row = rows.begin; row < rows.end; row += kInputRows) {
      const int64_t count = min(kInputRows, rows.end - row);
      w_ih_.multiply(slots(0, row), rows_ * L::kSavedWidth, count, 0, vectors, out, stride);
      for (int64_t m = 0; m < count; ++m) {
        while (schedule_.starts[t + 1] <= row + m) ++t;
        S* dx = schedule_.template row<S>(p_.dx, t, row + m - schedule_.starts[t]);
        for (int64_t q = 0; q < vectors; ++q) {
          const int64_t u = q * L::kLanes, n = layout_.I - u;
          const V v = load(out + m * stride + u);
          store_first(dx + u, p_.accumulate_dx ? load_first(dx + u, n) + v : v, n);
        }
      }
    }
  }

  void weight_gradients(const Team& team) {
    const auto wanted = [&](void* dw, void* db, bool input) {
      const WeightGradient<Cell, S> gradient{layout_,
                                             schedule_,
                                             hidden_,
                                             rows_,
                                             sums_,
                                             pointers_ + team.rank * kRowBlock,
                                             packed_ + team.rank * WeightGradient<Cell, S>::packed_elements(),
                                             parts_ + team.rank * part_elements_};
      if (dw) gradient.weights(team, input, (S*)dw, turns_[input]);
      if (db) gradient.biases(team, input, (S*)db);
    };
    wanted(p_.dw_hh, p_.db_hh, false);
    if (sums_) team.wait();
    wanted(p_.dw_ih, p_.db_ih, true);
  }

  const RecurrentParams& p_;
  const L layout_;
  const int64_t rows_;
  const int threads_;
  const int64_t width_;           // units of all panels, those beyond H included
  int64_t* starts_ = nullptr;     // (T + 1)
  T* dh_ = nullptr;               // (B, width)
  T* dcarry_ = nullptr;           // (panels, B, kUnits)
  T* dx_ = nullptr;               // per thread (kInputRows, vectors of I)
  const S** pointers_ = nullptr;  // per thread (kRowBlock)
  T* packed_ = nullptr;           // per thread
  T* sums_ = nullptr;             // see WeightGradient, or null
  int64_t part_elements_ = 0;
  T* parts_ = nullptr;  // per thread (part_elements)
  Progress turns_[2];   // of the gradients of W_hh and W_ih
  Schedule schedule_{p_, nullptr};
  HiddenRows<S> hidden_{schedule_, nullptr};
  TransposedWeights<Cell, S, false> w_hh_{layout_, (const S*)p_.w_hh, nullptr};
  TransposedWeights<Cell, S, true> w_ih_{layout_, (const S*)p_.w_ih, nullptr};
};

}  // namespace fastseq::FASTSEQ_ISA
