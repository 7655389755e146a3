// dW = dG^T A and db = the sum of dG over all rows (t, b), A being the inputs or the hidden states before each step.
//
// K runs over rows in blocks of kRowBlock. A block of kColumns vectors of A is copied next to each other, which makes
// it an L1-resident panel for all gates that the thread owns; the gates are read where they lie.
#pragma once

#include "layout-inl.h"
#include "threads.h"

namespace fastseq::FASTSEQ_ISA {

// Rows of a block: with 128, the gradients of a panel (16 KB with AVX2) and the copied columns (12 KB) share the L1
// cache.
constexpr int64_t kRowBlock = 128;

template <class Cell, class S>
struct WeightGradient {
  using L = Layout<Cell, S>;
  using T = typename L::T;
  using V = typename L::V;

  const L& layout;
  const Schedule& schedule;
  const HiddenRows<S>& hidden;
  int64_t rows;
  T* sums;             // (G*H, N) where the storage is too narrow to sum in, else null
  const S** pointers;  // (kRowBlock), scratch
  T* packed;           // packed_elements, scratch

  static constexpr int64_t packed_elements() { return kRowBlock * kColumns * L::kLanes; }

  const T* gradients(bool input, int64_t panel, int64_t row) const {
    return layout.saved_slots(schedule.p.saved, rows, panel, row) +
           (input ? Cell::kInputSlot : Cell::kRecurrentSlot) * L::kUnits;
  }
  static int gate(bool input, int term) { return input ? Cell::input_gate(term) : Cell::recurrent_gate(term); }

  void weights(const Team& team, bool input, S* dw) const {
    const int64_t columns = input ? layout.I : layout.H, vectors = ceil_div(columns, L::kLanes);
    const int64_t blocks = ceil_div(vectors, kColumns);
    // Split over panels, or over columns where there are too few panels.
    const bool by_panels = layout.panels >= team.size;
    const auto share = [&](int64_t n, bool split, int end) {
      return split ? n * (team.rank + end) / team.size : n * end;
    };
    const int64_t panel_begin = share(layout.panels, by_panels, 0), panel_end = share(layout.panels, by_panels, 1);
    const int64_t block_begin = share(blocks, !by_panels, 0), block_end = share(blocks, !by_panels, 1);
    T* out = std::is_same_v<S, T> ? (T*)dw : sums;
    int64_t t = 0;
    for (int64_t row = 0; row < rows; row += kRowBlock) {
      const int64_t depth = min(kRowBlock, rows - row);
      for (int64_t k = 0; k < depth; ++k) {
        while (schedule.starts[t + 1] <= row + k) ++t;
        const int64_t b = row + k - schedule.starts[t];
        pointers[k] = input ? schedule.template row<const S>(schedule.p.x, t, b) : hidden.before(t, b);
      }
      // As many columns at once as fit the copy: few rows then write dW row after row, as memory likes it.
      const int64_t group = packed_elements() / (depth * kColumns * L::kLanes);
      for (int64_t begin = block_begin; begin < block_end; begin += group) {
        const int64_t end = min(block_end, begin + group);
        for (int64_t block = begin; block < end; ++block)
          copy_columns(block, columns, depth, packed_block(block - begin, depth));
        for (int64_t panel = panel_begin; panel < panel_end; ++panel)
          for (int term = 0; term < Cell::kTerms; ++term) {
            const int64_t first = gate(input, term) * layout.H + panel * L::kUnits;
            const T* a = gradients(input, panel, row) + term * L::kUnits;
            for (int64_t unit = 0; unit < layout.units(panel); unit += kColumnRows)
              for (int64_t block = begin; block < end; ++block) {
                const int64_t u = block * kColumns * L::kLanes;
                multiply_outer(min(kColumnRows, layout.units(panel) - unit), depth, a + unit, L::kSavedWidth,
                               packed_block(block - begin, depth), row == 0, out + (first + unit) * columns + u,
                               columns, columns - u);
              }
          }
      }
    }
    if constexpr (!std::is_same_v<S, T>)
      for (int64_t panel = panel_begin; panel < panel_end; ++panel)
        for (int term = 0; term < Cell::kTerms; ++term)
          for (int64_t unit = 0; unit < layout.units(panel); ++unit) {
            const int64_t at = (gate(input, term) * layout.H + panel * L::kUnits + unit) * columns;
            const int64_t end = min(columns, block_end * kColumns * L::kLanes);
            for (int64_t u = block_begin * kColumns * L::kLanes; u < end; u += L::kLanes)
              store_first(dw + at + u, load_first(sums + at + u, end - u), end - u);
          }
  }

  T* packed_block(int64_t index, int64_t depth) const { return packed + index * depth * kColumns * L::kLanes; }

  // kColumns vectors of A for the rows of a block, next to each other; zero beyond the last column.
  void copy_columns(int64_t block, int64_t columns, int64_t depth, T* out) const {
    for (int64_t k = 0; k < depth; ++k) FASTSEQ_UNROLL for (int j = 0; j < kColumns; ++j) {
        const int64_t u = (block * kColumns + j) * L::kLanes;
        store(out + (k * kColumns + j) * L::kLanes, u < columns ? load_first(pointers[k] + u, columns - u) : V(0));
      }
  }

  void biases(const Team& team, bool input, S* db) const {
    for (int64_t panel = layout.panels * team.rank / team.size; panel < layout.panels * (team.rank + 1) / team.size;
         ++panel)
      for (int term = 0; term < Cell::kTerms; ++term)
        for (int64_t lane = 0; lane < layout.units(panel); lane += L::kLanes) {
          V total(0);
          for (int64_t row = 0; row < rows; row += kRowBlock) {
            V sum(0);
            for (int64_t k = row; k < min(rows, row + kRowBlock); ++k)
              sum = sum + load(gradients(input, panel, k) + term * L::kUnits + lane);
            total = total + sum;
          }
          store_first(db + gate(input, term) * layout.H + panel * L::kUnits + lane, total, layout.units(panel) - lane);
        }
  }
};

}  // namespace fastseq::FASTSEQ_ISA
