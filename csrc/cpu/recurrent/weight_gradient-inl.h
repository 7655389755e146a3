// dW = dG^T A and db = the sum of dG over all rows (t, b), A being the inputs or the hidden states before each step.
//
// K runs over rows in blocks of kRowBlock. A block of kColumns vectors of A is copied next to each other, which makes
// it an L1-resident panel for all gates that the thread owns; the gates are read where they lie.
//
// Sums over several blocks of rows are kept tile after tile in a buffer of their own. In dW itself the tiles of a
// column block lie a row of dW apart, each on a page of its own: at H = 1024 the products reached 50 % of the FMA peak
// there, in the buffer they reach 70 % (Zen 3).
//
// The tiles of dW are split over the threads. Where they are few, the blocks of rows are instead: each is added to the
// sums in its turn, which is the order in which one thread adds them.
#pragma once

#include "cpu/base/threads.h"
#include "cpu/recurrent/layout-inl.h"

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
  T* part;             // as sums, of one block of rows; null where tiles are split

  // Panels whose gradients in a block of rows (256 KB) stay in the L2 cache while all columns pass by.
  static constexpr int64_t kPanels = (256 << 10) / (kRowBlock * L::kSavedWidth * int64_t(sizeof(T)));
  static constexpr int64_t kBlockColumns = kColumns * L::kLanes;
  static constexpr int64_t packed_elements() { return kRowBlock * kBlockColumns; }
  static bool needs_sums(int64_t rows) { return rows > kRowBlock || !std::is_same_v<S, T>; }
  static int64_t tile_count(const L& layout, int64_t columns) {
    return ceil_div(columns, kBlockColumns) * layout.panels;
  }
  static int64_t sums_elements(const L& layout, int64_t columns) {
    return tile_count(layout, columns) * L::kWidth * kBlockColumns;
  }
  // With tiles for more than half of the threads, rows in turns would win little, and take each thread as much memory
  // as dW.
  static bool in_turns(const L& layout, int64_t columns, int64_t rows, int team) {
    return rows > kRowBlock && 2 * tile_count(layout, columns) <= team;
  }
  static int64_t part_elements(const L& layout, int64_t rows, int team) {
    const auto elements = [&](int64_t columns) {
      return in_turns(layout, columns, rows, team) ? sums_elements(layout, columns) : 0;
    };
    return max(elements(layout.I), elements(layout.H));
  }

  const T* gradients(bool input, int64_t panel, int64_t row) const {
    return layout.saved_slots(schedule.p.saved, rows, panel, row) +
           (input ? Cell::kInputSlot : Cell::kRecurrentSlot) * L::kUnits;
  }
  static int gate(bool input, int term) { return input ? Cell::input_gate(term) : Cell::recurrent_gate(term); }

  // `turns`: of this gradient, at 0.
  void weights(const Team& team, bool input, S* dw, Progress& turns) const {
    if (in_turns(layout, columns(input), rows, team.size)) return add_in_turns(team, input, dw, turns);
    const Tiles tiles = split(team, layout.panels, ceil_div(columns(input), kBlockColumns));
    int64_t t = 0;
    for (int64_t row = 0; row < rows; row += kRowBlock) multiply_block(tiles, input, row, row == 0, sums, dw, t);
    if (sums) write_weights(tiles, input, dw);
  }

  // Sums of 16 rows, of 16 of these, and so on: over 8192 rows, blocks of 128 erred three times as much as torch's
  // sums.
  static constexpr int kLevels = 4;
  static constexpr int64_t kLevelSums = 16;

  void biases(const Team& team, bool input, S* db) const {
    const int64_t vectors = Cell::kTerms * ceil_div(layout.H, L::kLanes);
    const Share share = Share::of(vectors, team);
    for (int64_t v = share.begin; v < share.end; ++v) {
      const int64_t unit = v / Cell::kTerms * L::kLanes, panel = unit / L::kUnits;
      const int term = int(v % Cell::kTerms);
      const int64_t at = term * L::kUnits + unit % L::kUnits;
      V level[kLevels] = {V(0), V(0), V(0), V(0)};
      for (int64_t row = 0; row < rows;) {
        level[0] = level[0] + load(gradients(input, panel, row) + at);
        int64_t sums = ++row;
        for (int l = 1; l < kLevels && sums % kLevelSums == 0; ++l, sums /= kLevelSums) {
          level[l] = level[l] + level[l - 1];
          level[l - 1] = V(0);
        }
      }
      store_first(db + gate(input, term) * layout.H + unit, (level[0] + level[1]) + (level[2] + level[3]),
                  layout.H - unit);
    }
  }

 private:
  // The tiles of a thread.
  struct Tiles {
    Share panels, blocks;
  };

  // A grid of as many threads as it can use; of those that use the same number, the one of the most panels.
  static Tiles split(const Team& team, int64_t panels, int64_t blocks) {
    int64_t across = 1, down = 1;
    for (int64_t most = team.size; most >= 1; --most) {
      const int64_t a = min(most, panels), d = min(team.size / most, blocks);
      if (a * d > across * down) across = a, down = d;
    }
    if (team.rank >= across * down) return {{0, 0}, {0, 0}};
    return {Share::of(panels, team.rank / down, across), Share::of(blocks, team.rank % down, down)};
  }

  int64_t columns(bool input) const { return input ? layout.I : layout.H; }

  // The products of the block of rows at `row`, added to `out` unless `first`, or to dw where `out` is null. `t` is a
  // step at or before the row's, and moves there.
  void multiply_block(const Tiles& tiles, bool input, int64_t row, bool first, T* out, S* dw, int64_t& t) const {
    const int64_t depth = min(kRowBlock, rows - row);
    for (int64_t k = 0; k < depth; ++k) {
      while (schedule.starts[t + 1] <= row + k) ++t;
      const int64_t b = row + k - schedule.starts[t];
      pointers[k] = input ? schedule.template row<const S>(schedule.p.x, t, b) : hidden.before(t, b);
    }
    // As many columns at once as fit the copy: few rows then write dW row after row, as memory likes it.
    const int64_t group = packed_elements() / (depth * kBlockColumns);
    for (int64_t panels = tiles.panels.begin; panels < tiles.panels.end; panels += kPanels)
      for (int64_t begin = tiles.blocks.begin; begin < tiles.blocks.end; begin += group) {
        const int64_t last = min(tiles.panels.end, panels + kPanels), end = min(tiles.blocks.end, begin + group);
        for (int64_t block = begin; block < end; ++block)
          copy_columns(block, columns(input), depth, packed_block(block - begin, depth));
        for (int64_t panel = panels; panel < last; ++panel)
          for (int term = 0; term < Cell::kTerms; ++term) {
            const T* a = gradients(input, panel, row) + term * L::kUnits;
            for (int64_t unit = 0; unit < layout.units(panel); unit += kColumnRows)
              for (int64_t block = begin; block < end; ++block)
                multiply(min(kColumnRows, layout.units(panel) - unit), depth, a + unit,
                         packed_block(block - begin, depth), first, input, panel, term, unit, block, out, dw);
          }
      }
  }

  void add_in_turns(const Team& team, bool input, S* dw, Progress& turns) const {
    const Tiles all = {{0, layout.panels}, {0, ceil_div(columns(input), kBlockColumns)}};
    const int64_t blocks = ceil_div(rows, kRowBlock);
    int64_t t = 0;
    for (int64_t block = team.rank; block < blocks; block += team.size) {
      multiply_block(all, input, block * kRowBlock, true, part, nullptr, t);
      turns.wait(block);
      add_part(all, block == 0);
      if (block + 1 == blocks) write_weights(all, input, dw);
      turns.set(block + 1);
    }
  }

  // Adds the part to the sums, or moves it there.
  void add_part(const Tiles& tiles, bool first) const {
    for (int64_t block = tiles.blocks.begin; block < tiles.blocks.end; ++block)
      for (int64_t panel = tiles.panels.begin; panel < tiles.panels.end; ++panel)
        for (int term = 0; term < Cell::kTerms; ++term) {
          T* total = tile(sums, block, panel, term, 0);
          const T* added = tile(part, block, panel, term, 0);
          for (int64_t i = 0; i < layout.units(panel) * kBlockColumns; i += L::kLanes)
            store(total + i, first ? load(added + i) : load(total + i) + load(added + i));
        }
  }

  void write_weights(const Tiles& tiles, bool input, S* dw) const {
    for (int64_t panel = tiles.panels.begin; panel < tiles.panels.end; ++panel)
      for (int64_t block = tiles.blocks.begin; block < tiles.blocks.end; ++block)
        for (int term = 0; term < Cell::kTerms; ++term)
          for (int64_t unit = 0; unit < layout.units(panel); ++unit)
            for (int j = 0; j < kColumns; ++j) {
              const int64_t u = block * kBlockColumns + j * L::kLanes;
              if (u < columns(input))
                store_first(dw + dw_row(input, panel, term, unit) * columns(input) + u,
                            load(tile(sums, block, panel, term, unit) + j * L::kLanes), columns(input) - u);
            }
  }

  int64_t dw_row(bool input, int64_t panel, int term, int64_t unit) const {
    return gate(input, term) * layout.H + panel * L::kUnits + unit;
  }
  T* tile(T* base, int64_t block, int64_t panel, int term, int64_t unit) const {
    return base + (((block * layout.panels + panel) * Cell::kTerms + term) * L::kUnits + unit) * kBlockColumns;
  }

  // The product of a block of rows for `count` gates and one block of columns.
  void multiply(int64_t count, int64_t depth, const T* a, const T* b, bool first, bool input, int64_t panel, int term,
                int64_t unit, int64_t block, T* out, S* dw) const {
    if (out)
      return multiply_outer(count, depth, a, L::kSavedWidth, b, first, tile(out, block, panel, term, unit),
                            kBlockColumns, kBlockColumns);
    if constexpr (std::is_same_v<S, T>) {
      const int64_t width = columns(input), u = block * kBlockColumns;
      multiply_outer(count, depth, a, L::kSavedWidth, b, first, dw + dw_row(input, panel, term, unit) * width + u,
                     width, width - u);
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
};

}  // namespace fastseq::FASTSEQ_ISA
