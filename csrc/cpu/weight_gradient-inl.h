// dW = dG^T A and db = the sum of dG over all rows (t, b), A being the inputs or the hidden states before each step.
//
// K runs over rows in blocks of kRowBlock. A block of kColumns vectors of A is copied next to each other, which makes
// it an L1-resident panel for all gates that the thread owns; the gates are read where they lie.
//
// Sums over several blocks of rows are kept tile after tile in a buffer of their own. In dW itself the tiles of a
// column block lie a row of dW apart, each on a page of its own: at H = 1024 the products reached 50 % of the FMA peak
// there, in the buffer they reach 70 % (Zen 3).
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
  T* sums;             // (column blocks, panels, kWidth, kColumns vectors), or null: each sum is one block of rows
  const S** pointers;  // (kRowBlock), scratch
  T* packed;           // packed_elements, scratch

  // Panels whose gradients in a block of rows (256 KB) stay in the L2 cache while all columns pass by.
  static constexpr int64_t kPanels = (256 << 10) / (kRowBlock * L::kSavedWidth * int64_t(sizeof(T)));
  static constexpr int64_t kBlockColumns = kColumns * L::kLanes;
  static constexpr int64_t packed_elements() { return kRowBlock * kBlockColumns; }
  static bool needs_sums(int64_t rows) { return rows > kRowBlock || !std::is_same_v<S, T>; }
  static int64_t sums_elements(const L& layout, int64_t columns) {
    return ceil_div(columns, kBlockColumns) * layout.panels * L::kWidth * kBlockColumns;
  }

  const T* gradients(bool input, int64_t panel, int64_t row) const {
    return layout.saved_slots(schedule.p.saved, rows, panel, row) +
           (input ? Cell::kInputSlot : Cell::kRecurrentSlot) * L::kUnits;
  }
  static int gate(bool input, int term) { return input ? Cell::input_gate(term) : Cell::recurrent_gate(term); }

  void weights(const Team& team, bool input, S* dw) const {
    const int64_t columns = input ? layout.I : layout.H, blocks = ceil_div(columns, kBlockColumns);
    // Split over panels, or over columns where there are too few panels.
    const bool by_panels = layout.panels >= team.size;
    const auto share = [&](int64_t n, bool split, int end) {
      return split ? n * (team.rank + end) / team.size : n * end;
    };
    const int64_t panel_begin = share(layout.panels, by_panels, 0), panel_end = share(layout.panels, by_panels, 1);
    const int64_t block_begin = share(blocks, !by_panels, 0), block_end = share(blocks, !by_panels, 1);
    int64_t t = 0;
    for (int64_t row = 0; row < rows; row += kRowBlock) {
      const int64_t depth = min(kRowBlock, rows - row);
      for (int64_t k = 0; k < depth; ++k) {
        while (schedule.starts[t + 1] <= row + k) ++t;
        const int64_t b = row + k - schedule.starts[t];
        pointers[k] = input ? schedule.template row<const S>(schedule.p.x, t, b) : hidden.before(t, b);
      }
      // As many columns at once as fit the copy: few rows then write dW row after row, as memory likes it.
      const int64_t group = packed_elements() / (depth * kBlockColumns);
      for (int64_t first = panel_begin; first < panel_end; first += kPanels)
        for (int64_t begin = block_begin; begin < block_end; begin += group) {
          const int64_t last = min(panel_end, first + kPanels), end = min(block_end, begin + group);
          for (int64_t block = begin; block < end; ++block)
            copy_columns(block, columns, depth, packed_block(block - begin, depth));
          for (int64_t panel = first; panel < last; ++panel)
            for (int term = 0; term < Cell::kTerms; ++term) {
              const T* a = gradients(input, panel, row) + term * L::kUnits;
              for (int64_t unit = 0; unit < layout.units(panel); unit += kColumnRows)
                for (int64_t block = begin; block < end; ++block)
                  multiply(min(kColumnRows, layout.units(panel) - unit), depth, a + unit,
                           packed_block(block - begin, depth), row == 0, input, panel, term, unit, block, dw);
            }
        }
    }
    if (!sums) return;
    for (int64_t panel = panel_begin; panel < panel_end; ++panel)
      for (int64_t block = block_begin; block < block_end; ++block)
        for (int term = 0; term < Cell::kTerms; ++term)
          for (int64_t unit = 0; unit < layout.units(panel); ++unit)
            for (int j = 0; j < kColumns; ++j) {
              const int64_t u = block * kBlockColumns + j * L::kLanes;
              if (u < columns)
                store_first(dw + dw_row(input, panel, term, unit) * columns + u,
                            load(tile(block, panel, term, unit) + j * L::kLanes), columns - u);
            }
  }

  int64_t dw_row(bool input, int64_t panel, int term, int64_t unit) const {
    return gate(input, term) * layout.H + panel * L::kUnits + unit;
  }
  T* tile(int64_t block, int64_t panel, int term, int64_t unit) const {
    return sums + (((block * layout.panels + panel) * Cell::kTerms + term) * L::kUnits + unit) * kBlockColumns;
  }

  // The product of a block of rows for `count` gates and one block of columns.
  void multiply(int64_t count, int64_t depth, const T* a, const T* b, bool first, bool input, int64_t panel, int term,
                int64_t unit, int64_t block, S* dw) const {
    if (sums)
      return multiply_outer(count, depth, a, L::kSavedWidth, b, first, tile(block, panel, term, unit), kBlockColumns,
                            kBlockColumns);
    if constexpr (std::is_same_v<S, T>) {
      const int64_t columns = input ? layout.I : layout.H, u = block * kBlockColumns;
      multiply_outer(count, depth, a, L::kSavedWidth, b, first, dw + dw_row(input, panel, term, unit) * columns + u,
                     columns, columns - u);
    }
  }

  T* packed_block(int64_t index, int64_t depth) const { return packed + index * depth * kBlockColumns; }

  // kColumns vectors of A for the rows of a block, next to each other; zero beyond the last column.
  void copy_columns(int64_t block, int64_t columns, int64_t depth, T* out) const {
    for (int64_t k = 0; k < depth; ++k) FASTSEQ_UNROLL for (int j = 0; j < kColumns; ++j) {
        const int64_t u = (block * kColumns + j) * L::kLanes;
        store(out + (k * kColumns + j) * L::kLanes, u < columns ? load_first(pointers[k] + u, columns - u) : V(0));
      }
  }

  // Sums of 16 rows, of 16 of these, and so on: over 8192 rows, blocks of 128 erred three times as much as torch's
  // sums.
  static constexpr int kLevels = 4;
  static constexpr int64_t kLevelSums = 16;

  void biases(const Team& team, bool input, S* db) const {
    for (int64_t panel = layout.panels * team.rank / team.size; panel < layout.panels * (team.rank + 1) / team.size;
         ++panel)
      for (int term = 0; term < Cell::kTerms; ++term)
        for (int64_t lane = 0; lane < layout.units(panel); lane += L::kLanes) {
          V level[kLevels] = {V(0), V(0), V(0), V(0)};
          for (int64_t row = 0; row < rows;) {
            level[0] = level[0] + load(gradients(input, panel, row) + term * L::kUnits + lane);
            int64_t sums = ++row;
            for (int l = 1; l < kLevels && sums % kLevelSums == 0; ++l, sums /= kLevelSums) {
              level[l] = level[l] + level[l - 1];
              level[l - 1] = V(0);
            }
          }
          const V total = (level[0] + level[1]) + (level[2] + level[3]);
          store_first(db + gate(input, term) * layout.H + panel * L::kUnits + lane, total, layout.units(panel) - lane);
        }
  }
};

}  // namespace fastseq::FASTSEQ_ISA
