// The gradient of attention's bias: dS summed over the axes along which the bias was broadcast.
//
// A pass of its own that computes dS again: an item owns a tile of the gradient and adds all that goes into it, in the
// order of batch rows, heads and blocks. So nothing is added by two threads, whatever is broadcast.
#pragma once

#include "attention_gradient-inl.h"

namespace fastseq::FASTSEQ_ISA {

template <class S>
struct AttentionBiasGradient {
  using T = Compute<S>;
  using G = Tile<T>;
  using L = GradientLayout<T>;

  const AttentionParams& p;
  const L layout;
  int64_t query_blocks, key_blocks, scratch_elements;
  bool whole[4];  // the axes that are not broadcast
  T* scratch = nullptr;
  Queue queue;

  explicit AttentionBiasGradient(const AttentionParams& params)
      : p(params), layout(p), query_blocks(ceil_div(p.queries, kQueryBlock)), key_blocks(ceil_div(p.keys, kKeyBlock)) {
    using A = Arena<T>;
    for (int axis = 0; axis < 4; ++axis) whole[axis] = p.dbias_strides[axis] != 0;
    scratch_elements = QueryBlock<S>::elements(layout) + A::size(G::ceil(kKeyBlock) * p.head_dim) +
                       A::size(G::ceil(kKeyBlock) * p.value_dim) + A::size(kQueryBlock * L::kTileRow);
  }

  static Status run(const AttentionParams& p, int threads) {
    AttentionBiasGradient gradient(p);
    gradient.scratch = (T*)allocate(threads * gradient.scratch_elements * int64_t(sizeof(T)));
    if (!gradient.scratch) return kOutOfMemory;
    parallel(
        threads, [](void* context, const Team& team) { ((AttentionBiasGradient*)context)->work(team); }, &gradient);
    release(gradient.scratch);
    return kOk;
  }

 private:
  // Of a thread.
  struct Scratch {
    Arena<T> arena;
    QueryBlock<S> block;
    T *keys, *values;  // a block of each, as panels of rows
    T* sums;           // (kQueryBlock, kTileRow), or of one row or column where the queries or the keys are broadcast

    Scratch(const AttentionBiasGradient& a, T* memory) : arena{memory}, block(a.p, a.layout, arena) {
      keys = arena.take(G::ceil(kKeyBlock) * a.p.head_dim);
      values = arena.take(G::ceil(kKeyBlock) * a.p.value_dim);
      sums = arena.take(kQueryBlock * L::kTileRow);
    }
  };

  // Where an axis is broadcast, an item takes all of it, else the part `index`.
  Range part(int axis, int64_t index, int64_t size) const {
    return whole[axis] ? Range{index, index + 1} : Range{0, size};
  }

  void work(const Team& team) {
    const Scratch s(*this, scratch + team.rank * scratch_elements);
    const int64_t sizes[4] = {p.batch, p.heads, query_blocks, key_blocks};
    int64_t counts[4], items = 1;
    for (int axis = 0; axis < 4; ++axis) items *= counts[axis] = whole[axis] ? sizes[axis] : 1;
    for (int64_t item; (item = queue.take()) < items;) {
      Range parts[4];
      int64_t rest = item;
      for (int axis = 3; axis >= 0; --axis) {
        parts[axis] = part(axis, rest % counts[axis], sizes[axis]);
        rest /= counts[axis];
      }
      fill(s.sums, kQueryBlock * L::kTileRow, T(0));
      for (int64_t b = parts[0].begin; b < parts[0].end; ++b)
        for (int64_t n = parts[1].begin; n < parts[1].end; ++n)
          for (int64_t i = parts[2].begin; i < parts[2].end; ++i) add_row(b, n, i * kQueryBlock, parts[3], s);
      write(parts, s);
    }
  }

  // Adds dS of the query rows from `first` on, as many as a block has.
  void add_row(int64_t b, int64_t n, int64_t first, Range keys, const Scratch& s) const {
    const Extent extent(p, b);
    const int64_t rows = min(kQueryBlock, extent.queries - first), kv_head = n / (p.heads / p.kv_heads);
    if (rows <= 0) return;
    if (!whole[3]) return add_shared_by_keys(extent, b, n, first, rows, s);
    const Scores<S> scores(p, extent, b, n);
    s.block.load_rows(extent, b, n, first, rows);
    const Range seen = scores.window.keys_of(first, rows);
    const int64_t key = keys.begin * kKeyBlock, count = min(kKeyBlock, extent.keys - key);
    if (key >= seen.end || key + count <= seen.begin) return;
    const S* k = row_of<const S>(p.k, b, kv_head, extent.k_start + key);
    const S* v = row_of<const S>(p.v, b, kv_head, extent.k_start + key);
    if (!few_queries(p)) {
      pack_rows(k, p.k.row_stride, count, p.head_dim, s.keys);
      pack_rows(v, p.v.row_stride, count, p.value_dim, s.values);
    }
    s.block.differentiate(scores, first, rows, key, G::ceil(count), s.keys, s.values, k, v, true);
    // Rows of a sum: one each, or all in one.
    const int64_t sums = whole[2] ? rows : 1, added = rows / sums;
    for (int64_t i = 0; i < sums; ++i)
      for (int64_t c = 0; c < G::ceil(count); c += kLanes<T>) {
        Vec<T> sum(T(0));
        for (int64_t r = i; r < i + added; ++r) sum = sum + load(s.block.scores + r * L::kTileRow + c);
        store(s.sums + i * L::kTileRow + c, load(s.sums + i * L::kTileRow + c) + sum);
      }
  }

  // The softmax does not feel what is added to all keys alike; lse alone does.
  void add_shared_by_keys(const Extent& extent, int64_t b, int64_t n, int64_t first, int64_t rows,
                          const Scratch& s) const {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = extent.q_start + first + i;
      const T lse = *element_of<const T>(p.lse, p.lse_strides, b, n, row);
      T gradient = p.dlse ? *element_of<const T>(p.dlse, p.dlse_strides, b, n, row) : T(0);
      if (lse != lse) gradient = lse;
      if (lse != -T(__builtin_inff())) s.sums[whole[2] ? i * L::kTileRow : 0] += gradient;
    }
  }

  void write(const Range (&parts)[4], const Scratch& s) const {
    T* out = (T*)p.dbias + parts[0].begin * p.dbias_strides[0] + parts[1].begin * p.dbias_strides[1];
    const int64_t row = parts[2].begin * kQueryBlock, column = parts[3].begin * kKeyBlock;
    const int64_t rows = whole[2] ? min(kQueryBlock, p.queries - row) : 1;
    const int64_t columns = whole[3] ? min(kKeyBlock, p.keys - column) : 1;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        out[(row + i) * p.dbias_strides[2] + (column + j) * p.dbias_strides[3]] = s.sums[i * L::kTileRow + j];
  }
};

}  // namespace fastseq::FASTSEQ_ISA
