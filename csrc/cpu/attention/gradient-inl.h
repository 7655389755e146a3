// Gradients of scores, tile by tile.
#pragma once

#include "cpu/attention/scores-inl.h"

namespace fastseq::FASTSEQ_ISA {

// Keys of a tile of probabilities: with kQueryBlock rows, P and dS are 75 KB each.
constexpr int64_t kKeyBlock = 192;

// How rows are laid out as operands. A vector more than the panels need keeps equal columns of the rows of a block out
// of the same sets of the cache.
template <class T>
struct GradientLayout {
  using G = Tile<T>;
  static constexpr int64_t kTileRow = G::ceil(kKeyBlock) + kLanes<T>;

  int64_t head_dim, value_dim, key_row, value_row;  // row strides of rows of D and of E

  explicit GradientLayout(const AttentionParams& p)
      : head_dim(p.head_dim),
        value_dim(p.value_dim),
        key_row(G::ceil(p.head_dim) + kLanes<T>),
        value_row(G::ceil(p.value_dim) + kLanes<T>) {}

  int64_t key_panels() const { return G::ceil(head_dim) / G::kColumns; }
  int64_t value_panels() const { return G::ceil(value_dim) / G::kColumns; }
};

// A block of query rows of one head with all that backward needs of it, and its tiles. Scratch of one thread. O is what
// the products multiply: T, or bfloat16 in pairs.
template <class S, class O>
struct QueryBlock {
  using T = Compute<S>;
  using G = Tile<T>;
  using L = GradientLayout<T>;
  using Element = typename PanelOf<O>::Element;  // as large as T

  static constexpr bool kWidened = std::is_same_v<O, T>;
  static constexpr int64_t kTileRow = L::kTileRow, kDepth = PanelOf<O>::kDepth;

  const AttentionParams& p;
  const L& layout;
  Element *q, *dout;              // (kQueryBlock, key_row), (kQueryBlock, value_row); where widened, q is scaled
  T *lse, *lse_rest;              // (kQueryBlock), as two terms; +inf where there is no key, which makes P zero
  T *delta, *dlse;                // (kQueryBlock)
  T *weights, *scores;            // (kQueryBlock, kTileRow): P after dropout, which become pairs of rows in place; dS
  Element* paired_scores;         // dS as pairs of rows, (kQueryBlock / 2, kTileRow), unless it is widened
  O* narrow_scores;               // dS in storage, (kQueryBlock, kTileRow), unless it is widened
  T* bias_scores;                 // dS before the softcap's derivative: a tile of its own only where the two differ
  T *probabilities, *derivative;  // (kTileRow): P of a row, and the derivative of the softcap
  uint32_t* words;

  static bool own_bias_scores(const AttentionParams& p) { return p.dbias && p.softcap > 0; }

  QueryBlock(const AttentionParams& params, const L& layout, Arena& arena) : p(params), layout(layout) {
    q = arena.take<Element>(kQueryBlock * layout.key_row);
    dout = arena.take<Element>(kQueryBlock * layout.value_row);
    lse = arena.take<T>(kQueryBlock);
    lse_rest = arena.take<T>(kQueryBlock);
    delta = arena.take<T>(kQueryBlock);
    dlse = arena.take<T>(kQueryBlock);
    weights = arena.take<T>(kQueryBlock * kTileRow);
    scores = arena.take<T>(kQueryBlock * kTileRow);
    bias_scores = own_bias_scores(p) ? arena.take<T>(kQueryBlock * kTileRow) : scores;
    paired_scores = kWidened ? nullptr : arena.take<Element>(kQueryBlock * kTileRow);
    narrow_scores = kWidened ? nullptr : (O*)(paired_scores + kQueryBlock / 2 * kTileRow);
    probabilities = arena.take<T>(kTileRow);
    derivative = arena.take<T>(kTileRow);
    words = arena.take<uint32_t>(Scores<S>::draw_size(kTileRow));
  }

  // ---- operands; i and j are multiples of kDepth where they are what a product sums over

  Right<O> queries_from(int64_t i) const {
    return {q + panel_depth<O>(i) * layout.key_row, G::kColumns, layout.key_row};
  }
  Right<O> gradients_from(int64_t i) const {
    return {dout + panel_depth<O>(i) * layout.value_row, G::kColumns, layout.value_row};
  }
  // P after dropout and dS of the keys j, j + 1, ... as rows, over the query rows from i on.
  Left<O> weights_by_key(int64_t i, int64_t j) const { return by_key(weights, i, j); }
  Left<O> scores_by_key(int64_t i, int64_t j) const { return by_key(kWidened ? scores : (T*)paired_scores, i, j); }
  // dS of the query rows i, i + 1, ..., over the keys from j on.
  Left<O> scores_by_row(int64_t i, int64_t j) const {
    return {(kWidened ? (const O*)scores : narrow_scores) + i * kTileRow + j, kTileRow, 1};
  }

  // Rows of Q and dO as left operands.
  struct Rows {
    Left<O> q, dout;
  };

  // Reads the rows [first, first + rows) of head n. delta is only needed where they meet their keys in several tiles.
  Rows load_rows(const Extent& extent, int64_t b, int64_t n, int64_t first, int64_t rows, bool needs_delta) const {
    const int64_t start = extent.q_start + first;
    const S *q_rows = row_of<const S>(p.q, b, n, start), *dout_rows = row_of<const S>(p.dout, b, n, start);
    if constexpr (kWidened) {
      copy_rows(q_rows, p.q.row_stride, rows, p.head_dim, T(p.scale), q, layout.key_row);
      copy_rows(dout_rows, p.dout.row_stride, rows, p.value_dim, T(1), dout, layout.value_row);
    } else {
      pack_columns(q_rows, p.q.row_stride, rows, p.head_dim, q, G::kColumns, layout.key_row);
      pack_columns(dout_rows, p.dout.row_stride, rows, p.value_dim, dout, G::kColumns, layout.value_row);
    }
    if (needs_delta)
      load_delta(dout_rows, row_of<const S>(p.out, b, n, start), rows);
    else
      fill(delta, rows, T(0));
    for (int64_t i = 0; i < rows; ++i) {
      dlse[i] = p.dlse ? T(*element_of(p.dlse, p.dlse_strides, b, n, start + i)) : T(0);
      delta[i] -= dlse[i];
      const double whole = *element_of(p.lse, p.lse_strides, b, n, start + i);
      lse[i] = T(whole == -__builtin_inf() ? __builtin_inf() : whole);
      lse_rest[i] = __builtin_isfinite(whole) ? T(whole - lse[i]) : T(0);
    }
    if constexpr (kWidened)
      return {{q, layout.key_row, 1}, {dout, layout.value_row, 1}};
    else
      return {{q_rows, p.q.row_stride, 1}, {dout_rows, p.dout.row_stride, 1}};
  }

  // P and dS of the loaded rows and the keys [key, key + columns), both multiples of kColumns, whose K and V are given
  // as panels of rows, and as they are stored, where the panels are not needed if few_queries. dS is the gradient of
  // the products. Keys that a query may not see get 0.
  void differentiate(const Scores<S>& of, const Rows& loaded, int64_t first, int64_t rows, int64_t key, int64_t columns,
                     const Element* keys, const Element* values, const S* k_rows, const S* v_rows) const {
    const EvenSplit split(rows, G::kRows);
    for (int64_t t = 0; t < split.parts; ++t) {
      const int64_t row = split.begin(t), count = split.count(t);
      const Range seen = of.window.keys_of(first + row, count);
      const int64_t begin = G::floor(Window::clamp(seen.begin - key, 0, columns));
      const int64_t seen_end = Window::clamp(seen.end - key, begin, columns), end = G::ceil(seen_end);
      T *weight = weights + row * kTileRow + begin, *score = scores + row * kTileRow + begin;
      product(loaded.q, row, count, p.head_dim, keys, k_rows, p.k.row_stride, begin, seen_end, end, weight);
      product(loaded.dout, row, count, p.value_dim, values, v_rows, p.v.row_stride, begin, seen_end, end, score);
      if constexpr (!kWidened)
        for (int64_t m = 0; m < count; ++m) scale_row(weight + m * kTileRow, end - begin, T(p.scale));
      for (int64_t i = row; i < row + count; ++i) {
        differentiate_row(of, first, i, key, begin, end);
        T* const tiles[] = {weights, scores, bias_scores};
        for (int tile = 0; tile < 2 + own_bias_scores(p); ++tile) {
          fill(tiles[tile] + i * kTileRow, begin, T(0));
          fill(tiles[tile] + i * kTileRow + end, columns - end, T(0));
        }
      }
    }
    if constexpr (!kWidened) {
      narrow_pairs(weights, kTileRow, rows, columns, (Element*)weights);
      narrow_pairs(scores, kTileRow, rows, columns, paired_scores);
      for (int64_t i = 0; i < rows; ++i) narrow(scores + i * kTileRow, columns, narrow_scores + i * kTileRow);
    }
  }

  // One double says a large lse with an error that makes the probabilities of a row add up to 1 + |lse| eps: enough to
  // be most of what dV errs by. There they are added up once more, and the log of their sum corrects lse.
  static constexpr double kLargeLse = 8;
  bool rounds_lse(int64_t rows) const {
    if constexpr (std::is_same_v<T, double>)
      for (int64_t i = 0; i < rows; ++i)
        if (__builtin_fabs(lse[i]) > kLargeLse && __builtin_isfinite(lse[i])) return true;
    return false;
  }

  // Adds up the probabilities of a tile, as `differentiate` has it, in lse_rest.
  void add_probabilities(const Scores<S>& of, const Rows& loaded, int64_t first, int64_t rows, int64_t key,
                         int64_t columns, const Element* keys, const S* k_rows) const {
    const EvenSplit split(rows, G::kRows);
    for (int64_t t = 0; t < split.parts; ++t) {
      const int64_t row = split.begin(t), count = split.count(t);
      const Range seen = of.window.keys_of(first + row, count);
      const int64_t begin = G::floor(Window::clamp(seen.begin - key, 0, columns));
      const int64_t seen_end = Window::clamp(seen.end - key, begin, columns), end = G::ceil(seen_end);
      product(loaded.q, row, count, p.head_dim, keys, k_rows, p.k.row_stride, begin, seen_end, end,
              weights + row * kTileRow + begin);
      for (int64_t i = row; i < row + count; ++i) {
        T* const weight = weights + i * kTileRow + begin;
        of.apply(first + i, key + begin, end - begin, weight);
        lse_rest[i] += exponentiate(weight, end - begin, lse[i]);
      }
    }
  }
  void correct_lse(int64_t rows) const {
    for (int64_t i = 0; i < rows; ++i) lse_rest[i] = lse_rest[i] > 0 ? T(__builtin_log(double(lse_rest[i]))) : T(0);
  }

 private:
  // Products of the rows [row, row + count) with the keys [begin, seen_end) of a tile, 0 from there to `end`.
  void product(const Left<O>& of, int64_t row, int64_t count, int64_t depth, const Element* panels, const S* stored,
               int64_t stride, int64_t begin, int64_t seen_end, int64_t end, T* out) const {
    const Left<O> rows{of.data + row * of.row, of.row, 1};
    if constexpr (kWidened)
      if (few_queries(p)) {
        dot_streamed(rows.data, rows.row, count, depth, stored + begin * stride, stride, seen_end - begin, out,
                     kTileRow);
        for (int64_t m = 0; m < count; ++m) fill(out + m * kTileRow + seen_end - begin, end - seen_end, T(0));
        return;
      }
    const int64_t panel = panel_depth<O>(depth);
    multiply_in_blocks(count, (end - begin) / G::kColumns, depth, rows,
                       Right<O>{panels + begin * panel, panel * G::kColumns, G::kColumns}, out, kTileRow);
  }

  Left<O> by_key(const T* tile, int64_t i, int64_t j) const {
    return {(const O*)(tile + i / kDepth * kTileRow + j), kDepth, kTileRow};
  }

  // delta_i = <dout_i, out_i>, each sum in the order of dO V^T: where a query sees one key alone, dS is then exactly 0.
  void load_delta(const S* dout_rows, const S* out_rows, int64_t rows) const {
    constexpr int lanes = kLanes<T>;
    if constexpr (kWidened)
      if (few_queries(p)) {
        for (int64_t i = 0; i < rows; ++i)
          dot_streamed(dout + i * layout.value_row, 0, 1, p.value_dim, out_rows + i * p.out.row_stride, 0, 1, delta + i,
                       0);
        return;
      }
    for (int64_t i = 0; i < rows; i += lanes) {
      Vec<T> total(T(0)), sum(T(0));
      for (int64_t c = 0; c < p.value_dim; c += lanes) {
        Vec<T> gradient[lanes], value[lanes];
        load_transposed(dout_rows + i * p.dout.row_stride + c, p.dout.row_stride, rows - i, p.value_dim - c, gradient);
        load_transposed(out_rows + i * p.out.row_stride + c, p.out.row_stride, rows - i, p.value_dim - c, value);
        for (int64_t k = 0; k < min(lanes, p.value_dim - c); ++k) sum = fma(gradient[k], value[k], sum);
        if ((c + lanes) % kBlock == 0) {
          total = total + sum;
          sum = Vec<T>(T(0));
        }
      }
      store_first(delta + i, total + sum, rows - i);
    }
  }

  // Row i: products become P after dropout, gradients of P become those of the products.
  void differentiate_row(const Scores<S>& of, int64_t first, int64_t i, int64_t key, int64_t begin, int64_t end) const {
    using V = Vec<T>;
    T *weight = weights + i * kTileRow, *score = scores + i * kTileRow;
    of.apply(first + i, key + begin, end - begin, weight + begin, derivative + begin);
    if (of.drops()) of.draw(first + i, key + begin, end - begin, words + begin);
    const V shift(lse[i]), rest(lse_rest[i]);
    V sum(T(0)), total(T(0));
    for (int64_t c = begin; c < end; c += kLanes<T>) {
      const V probability = exp_vanishing(load(weight + c) - shift - rest);
      V kept = probability, gradient = load(score + c);
      if (of.drops()) {
        kept = of.drop(probability, words + c);
        gradient = of.drop(gradient, words + c);
      }
      sum = fma(probability, gradient, sum);
      total = total + probability;
      store(weight + c, kept);
      store(score + c, gradient);
      store(probabilities + c, probability);
    }
    // With all keys of the row at hand, the mean of these very gradients: what they err by in common then cancels, and
    // so does what lse errs by, which makes the probabilities of large scores add up to 1 + 60 eps.
    const Range seen = of.window.keys_of(first + i, 1);
    const T all = sum_of_lanes(total);
    const bool complete = key + begin <= seen.begin && seen.end <= key + end && all > 0;
    const V mean(complete ? sum_of_lanes(sum) / all - dlse[i] : delta[i]);
    for (int64_t c = begin; c < end; c += kLanes<T>) {
      V gradient = load(probabilities + c) * (load(score + c) - mean);
      if (of.has_softcap) {
        if (bias_scores != scores) store(bias_scores + i * kTileRow + c, gradient);
        gradient = gradient * load(derivative + c);
      }
      store(score + c, gradient);
    }
  }
};

}  // namespace fastseq::FASTSEQ_ISA
