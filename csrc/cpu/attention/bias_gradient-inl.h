// The gradient of attention's bias: dS, summed over the axes along which the bias was broadcast.
//
// Threads add to the result itself and take turns at each part of it, in the order of the items. Items are given out in
// that order, so the earliest one at work never waits. The sums thus have one order for any number of threads, and need
// no memory. A tile is differentiated before its turn is waited for: only additions wait for each other.
//
// Where many add to a part, each 32 of them add to a memory of its own, which then goes into the result: with a batch
// of 512 and two heads, one chain of sums erred 2.5 to 3.9 times as much as torch's.
//
// Where the queries are broadcast, an item adds up its rows by itself, and takes its turn at the end.
#pragma once

#include "cpu/attention/gradient-inl.h"

namespace fastseq::FASTSEQ_ISA {

template <class S>
struct BiasGradient {
  using T = Compute<S>;
  using L = GradientLayout<T>;

  static constexpr int64_t kCell = kKeyBlock;  // keys of a part
  static constexpr int64_t kRecent = 32;       // turns whose additions are kept apart

  const AttentionParams& p;
  int64_t group, query_blocks, shares, cells, width;
  bool whole[4];              // the axes that are not broadcast
  Progress* turns = nullptr;  // (B, N, query_blocks, cells), broadcast axes being 1: how many are done with a part
  T* recent = nullptr;        // (B, N, query_blocks, part_rows, sum_row), the same; null where few add to a part

  // `shares` is the number of items of a head of keys; the units of an item, blocks of rows of one of its query heads,
  // are a share, 2 shares, ... apart.
  BiasGradient(const AttentionParams& params, int64_t shares)
      : p(params), group(p.heads / p.kv_heads), query_blocks(ceil_div(p.queries, kQueryBlock)), shares(shares) {
    for (int axis = 0; axis < 4; ++axis) whole[axis] = p.dbias_strides[axis] != 0;
    width = whole[3] ? p.keys : 1;
    cells = ceil_div(width, kCell);
  }

  Status allocate_turns() {
    const int64_t parts = (whole[0] ? p.batch : 1) * (whole[1] ? p.heads : 1) * (whole[2] ? query_blocks : 1);
    turns = (Progress*)allocate(parts * cells * int64_t(sizeof(Progress)));
    if (!turns) return kOutOfMemory;
    for (int64_t part = 0; part < parts * cells; ++part) turns[part] = Progress();
    if (turns_of_part() <= kRecent) return kOk;
    recent = (T*)allocate(parts * part_rows() * sum_row() * int64_t(sizeof(T)));
    return recent ? kOk : kOutOfMemory;
  }
  void release_turns() const {
    release(turns);
    release(recent);
  }

  // How many add to a part.
  int64_t turns_of_part() const {
    const int64_t of_a_row = whole[1] ? 1 : whole[2] ? p.heads : p.kv_heads;
    return (whole[0] ? 1 : p.batch) * of_a_row * (whole[2] ? 1 : shares);
  }
  int64_t part_rows() const { return whole[2] ? kQueryBlock : 1; }

  // ---- the sums of an item, where the queries are broadcast

  int64_t sum_planes() const { return !p.dbias || whole[2] ? 0 : whole[1] ? group : 1; }
  int64_t sum_row() const { return Tile<T>::ceil(width); }

  void start_item(T* sums) const { fill(sums, sum_planes() * sum_row(), T(0)); }

  void finish_item(int64_t b, int64_t kv_head, int64_t share, const T* sums) const {
    for (int64_t plane = 0; plane < sum_planes(); ++plane) {
      Turn turn = turn_at(b, kv_head * group + plane, 0, heads_before(b, kv_head) * shares + share);
      take(turn, cells);
      add_row(turn.target, sums + plane * sum_row(), 0, width);
      pass(turn, cells);
    }
  }

  // ---- a unit

  // On its way through the cells of its rows.
  struct Turn {
    Progress* turns;
    int64_t before;         // how many come before it
    T *out, *target;        // (rows, width): the result, and what is added to, that or `recent`
    int64_t target_row;     // its row stride
    int64_t rows;           // of the part
    int64_t taken, passed;  // cells that have been waited for, and that are done with
    T* sums;                // (width), where the queries are broadcast
  };

  Turn start_unit(int64_t b, int64_t kv_head, int64_t unit, T* sums) const {
    const int64_t member = unit / query_blocks, block = unit % query_blocks;
    int64_t before = heads_before(b, kv_head);
    if (!whole[1]) {
      before *= group;
      for (int64_t other = block; other < group * query_blocks; other += query_blocks)
        before += other % shares < unit % shares || (other % shares == unit % shares && other < unit);
    }
    Turn turn = turn_at(b, kv_head * group + member, block, before);
    turn.sums = sums + (whole[1] ? member : 0) * sum_row();
    return turn;
  }

  // Adds the tile of the keys [key, end), which follow those of the tile before.
  template <class O>
  void add(Turn& turn, const Scores<S>& of, const QueryBlock<S, O>& block, int64_t first, int64_t rows, int64_t key,
           int64_t end) const {
    if (!whole[3]) return;
    if (!whole[2]) {
      for (int64_t c = 0; c < end - key; c += kLanes<T>) {
        Vec<T> sum(T(0));
        for (int64_t i = 0; i < rows; ++i) sum = sum + load(block.bias_scores + i * L::kTileRow + c);
        store(turn.sums + key + c, load(turn.sums + key + c) + sum);
      }
      return;
    }
    take(turn, ceil_div(end, kCell));
    for (int64_t i = 0; i < rows; ++i) {
      const Range seen = of.window.keys_of(first + i, 1);
      add_row(turn.target + i * turn.target_row, block.bias_scores + i * L::kTileRow - key, max(key, seen.begin),
              min(end, seen.end));
    }
    pass(turn, end / kCell);
  }

  // After its last tile.
  void finish_unit(Turn& turn, const Extent& extent, int64_t b, int64_t n, int64_t first, int64_t rows) const {
    if (whole[2]) take(turn, cells);
    if (!whole[3]) add_shared_by_keys(turn, extent, b, n, first, rows);
    if (whole[2]) pass(turn, cells);
  }

 private:
  // How many heads of keys, in the order of the work, come before one and add to the same gradient.
  int64_t heads_before(int64_t b, int64_t kv_head) const {
    const int64_t rows = whole[0] ? 0 : b;
    return whole[1] ? rows : rows * p.kv_heads + kv_head;
  }

  Turn turn_at(int64_t b, int64_t n, int64_t block, int64_t before) const {
    int64_t part = (whole[0] ? b : 0) * (whole[1] ? p.heads : 1) + (whole[1] ? n : 0);
    if (whole[2]) part = part * query_blocks + block;
    const int64_t first = block * kQueryBlock;
    T* out = (T*)p.dbias + b * p.dbias_strides[0] + n * p.dbias_strides[1] + first * p.dbias_strides[2];
    T* target = recent ? recent + part * part_rows() * sum_row() : out;
    const int64_t target_row = recent ? sum_row() : p.dbias_strides[2];
    const int64_t rows = whole[2] ? min(kQueryBlock, p.queries - first) : 1;
    return {turns + part * cells, before, out, target, target_row, rows, 0, 0, nullptr};
  }

  // Waits for the cells before `end`. The first to come finds them as they were allocated.
  void take(Turn& turn, int64_t end) const {
    for (; turn.taken < end; ++turn.taken) {
      turn.turns[turn.taken].wait(turn.before);
      const int64_t key = turn.taken * kCell, count = min(kCell, width - key);
      for (int64_t i = 0; i < turn.rows; ++i) {
        if (turn.before == 0) fill(turn.out + i * p.dbias_strides[2] + key, count, T(0));
        if (recent && turn.before % kRecent == 0) fill(turn.target + i * turn.target_row + key, count, T(0));
      }
    }
  }

  void pass(Turn& turn, int64_t end) const {
    const int64_t done = turn.before + 1;
    const bool joins = recent && (done % kRecent == 0 || done == turns_of_part());
    for (; turn.passed < end; ++turn.passed) {
      const int64_t key = turn.passed * kCell;
      for (int64_t i = 0; i < (joins ? turn.rows : 0); ++i)
        add_row(turn.out + i * p.dbias_strides[2], turn.target + i * turn.target_row, key, min(key + kCell, width));
      turn.turns[turn.passed].set(done);
    }
  }

  void add_row(T* out, const T* row, int64_t begin, int64_t end) const {
    for (int64_t j = begin; j < end; j += kLanes<T>)
      store_first(out + j, load_first(out + j, end - j) + load(row + j), end - j);
  }

  // The softmax does not feel what is added to all keys alike; lse alone does.
  void add_shared_by_keys(const Turn& turn, const Extent& extent, int64_t b, int64_t n, int64_t first,
                          int64_t rows) const {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = extent.q_start + first + i;
      const double lse = *element_of(p.lse, p.lse_strides, b, n, row);
      T gradient = p.dlse ? T(*element_of(p.dlse, p.dlse_strides, b, n, row)) : T(0);
      if (lse != lse) gradient = T(lse);
      if (lse != -__builtin_inf()) *(whole[2] ? turn.target + i * turn.target_row : turn.sums) += gradient;
    }
  }
};

}  // namespace fastseq::FASTSEQ_ISA
