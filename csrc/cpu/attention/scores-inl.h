// From products of queries and keys to scores and their exponentials: what the attention drivers share between their
// matrix products. All of it runs on rows of a tile that the L1 cache holds.
#pragma once

#include "cpu/attention/layout-inl.h"
#include "math/online_softmax.h"
#include "math/philox.h"

namespace fastseq::FASTSEQ_ISA {

// The scores of one query head.
template <class S>
struct Scores {
  using T = Compute<S>;
  using V = Vec<T>;
  static constexpr int kLanes = V::kLanes;

  Window window;
  Softcap<V> softcap;
  const uint8_t* allowed;
  const S* bias;
  int64_t allowed_row, allowed_key, bias_row, bias_key;
  T slope;
  bool has_softcap, has_slope;
  uint32_t sequence, key_0, key_1, threshold;  // of dropout; a draw below the threshold drops
  T kept;                                      // the factor of what dropout keeps

  Scores(const AttentionParams& p, const Extent& extent, int64_t b, int64_t n)
      : window(extent.window(p)),
        softcap{V(T(p.softcap)), V(T(1 / p.softcap))},
        allowed(p.allowed),
        bias((const S*)p.bias),
        allowed_row(p.allowed_strides[2]),
        allowed_key(p.allowed_strides[3]),
        bias_row(p.bias_strides[2]),
        bias_key(p.bias_strides[3]),
        slope(p.alibi_slopes ? T(p.alibi_slopes[b * p.alibi_batch_stride + n * p.alibi_head_stride]) : T(0)),
        has_softcap(p.softcap > 0),
        has_slope(p.alibi_slopes),
        sequence(uint32_t(b * p.heads + n)),
        key_0(uint32_t(p.seed)),
        key_1(uint32_t(p.seed >> 32)),
        threshold(dropout_threshold(p.dropout_p)),
        kept(T(1 / (1 - p.dropout_p))) {
    if (allowed) allowed += b * p.allowed_strides[0] + n * p.allowed_strides[1];
    if (bias) bias += b * p.bias_strides[0] + n * p.bias_strides[1];
  }

  bool drops() const { return threshold > 0; }

  // Products of query i with the keys first, first + 1, ... become scores in place; -inf for keys it may not see.
  // `columns` is a multiple of the lanes. d score / d product goes to `derivative`, where that is not null and a
  // softcap makes it other than 1.
  void apply(int64_t i, int64_t first, int64_t columns, T* row, T* derivative = nullptr) const {
    const Range seen = window.keys_of(i, 1);
    const int64_t begin = Window::clamp(seen.begin - first, 0, columns);
    const int64_t end = Window::clamp(seen.end - first, begin, columns), start = begin / kLanes * kLanes;
    if (has_softcap) {
      for (int64_t c = start; c < end; c += kLanes) {
        V d;
        store(row + c, softcap.forward(load(row + c), d));
        if (derivative) store(derivative + c, d);
      }
      if (derivative) {
        fill(derivative, begin, T(0));
        fill(derivative + end, columns - end, T(0));
      }
    }
    if (bias) {
      const S* source = bias + i * bias_row + first * bias_key;
      for (int64_t c = start; c < end; c += kLanes)
        store(row + c, load(row + c) + load_strided(source + c * bias_key, bias_key, end - c));
    }
    if (has_slope) {
      const V lane = lane_numbers<T>();
      for (int64_t c = start; c < end; c += kLanes)
        store(row + c, alibi(load(row + c), V(slope), V(T(i + window.shift - first - c)) - lane));
    }
    const V never(-__builtin_inff());
    if (allowed) {
      const uint8_t* source = allowed + i * allowed_row + first * allowed_key;
      for (int64_t c = start; c < end; c += kLanes)
        store(row + c, select(load_flags<T>(source + c * allowed_key, allowed_key, end - c), load(row + c), never));
    }
    fill(row, begin, -T(__builtin_inff()));
    fill(row + end, columns - end, -T(__builtin_inff()));
  }

  // Asks for what `apply` will read of the masks for queries [i, i + rows), so that it comes while their products are
  // computed: every row of a mask is in another page, where the processor's own prefetcher begins anew.
  void prefetch(int64_t i, int64_t rows, int64_t first, int64_t columns) const {
    for (int64_t m = i; m < i + rows; ++m) {
      if (bias && bias_row && bias_key == 1) prefetch_read(bias + m * bias_row + first, columns);
      if (allowed && allowed_row && allowed_key == 1) prefetch_read(allowed + m * allowed_row + first, columns);
    }
  }

  // Words a row of `draw` needs room for.
  static constexpr int64_t draw_size(int64_t columns) {
    return ceil_div(columns, 4 * WordLanes::kLanes) * 4 * WordLanes::kLanes;
  }

  // The draws of query i for the keys first, ..., first + columns - 1; `first` is a multiple of 4.
  void draw(int64_t i, int64_t first, int64_t columns, uint32_t* words) const {
    LongWords lane;
    FASTSEQ_UNROLL for (int l = 0; l < WordLanes::kLanes; ++l) lane[l] = l;
    for (int64_t c = 0; c < columns; c += 4 * WordLanes::kLanes) {
      WordLanes x[4] = {lane + uint64_t((first + c) / 4), uint32_t(i), sequence, uint32_t(0)};
      philox(x, key_0, key_1);
      store_interleaved(words + c, x);
    }
  }

  // What dropout leaves of probabilities.
  FASTSEQ_INLINE V drop(V p, const uint32_t* words) const {
    return select(at_least<T>(words, threshold), p * V(kept), V(0));
  }

 private:
  template <class U>
  static FASTSEQ_INLINE void prefetch_read(const U* p, int64_t count) {
    constexpr int64_t kLine = 64;
    const char* const end = (const char*)(p + count);
    for (const char* line = (const char*)p; line < end; line += kLine) __builtin_prefetch(line, 0, 2);
  }

  static FASTSEQ_INLINE V load_strided(const S* p, int64_t stride, int64_t n) {
    if (stride == 1) return load_first(p, n);
    T lane[kLanes] = {};
    for (int64_t l = 0; l < n && l < kLanes; ++l) lane[l] = to_compute(p[l * stride]);
    return load(lane);
  }
};

// The largest of a row, -inf if all are NaN.
template <class T>
FASTSEQ_INLINE T largest_of(const T* row, int64_t columns) {
  constexpr int lanes = kLanes<T>;
  Vec<T> largest[4];
  FASTSEQ_UNROLL for (int j = 0; j < 4; ++j) largest[j] = Vec<T>(-T(__builtin_inff()));
  int64_t c = 0;
  for (; c + 4 * lanes <= columns; c += 4 * lanes)
    FASTSEQ_UNROLL for (int j = 0; j < 4; ++j) largest[j] = max(load(row + c + j * lanes), largest[j]);
  for (; c < columns; c += lanes) largest[0] = max(load(row + c), largest[0]);
  return largest_lane(max(max(largest[0], largest[1]), max(largest[2], largest[3])));
}

template <class T>
FASTSEQ_INLINE void scale_row(T* row, int64_t columns, T scale) {
  for (int64_t c = 0; c < columns; c += kLanes<T>) store(row + c, load(row + c) * Vec<T>(scale));
}

// Scores become exp(score - pivot), in place. Returns their sum.
template <class T>
FASTSEQ_INLINE T exponentiate(T* row, int64_t columns, T pivot) {
  constexpr int lanes = kLanes<T>;
  const Vec<T> shift(pivot);
  Vec<T> sum[2] = {Vec<T>(T(0)), Vec<T>(T(0))};
  const auto step = [&](int64_t c, Vec<T>& part) {
    const Vec<T> e = exp_vanishing(load(row + c) - shift);
    store(row + c, e);
    part = part + e;
  };
  int64_t c = 0;
  for (; c + 2 * lanes <= columns; c += 2 * lanes) {
    step(c, sum[0]);
    step(c + lanes, sum[1]);
  }
  if (c < columns) step(c, sum[0]);
  return sum_of_lanes(sum[0] + sum[1]);
}

// Rows of a tile that are summed up over parts of the keys.
template <class T>
struct SoftmaxRows {
  static constexpr int64_t padded(int64_t rows) { return ceil_div(rows, kLanes<T>) * kLanes<T>; }

  T *largest, *sum;

  SoftmaxRows(int64_t rows, Arena& arena) : largest(arena.take<T>(padded(rows))), sum(arena.take<T>(padded(rows))) {}

  void start(int64_t rows) const {
    fill(largest, padded(rows), -T(__builtin_inff()));
    fill(sum, padded(rows), T(0));
  }

  // For rows [first, first + count): takes in the largest scores of the next part and turns each into its pivot.
  // factors[m] is what the sums of before are multiplied with. Both arrays are padded.
  void raise(int64_t first, int64_t count, T* next, T* factors) const {
    for (int64_t m = 0; m < count; m += kLanes<T>) {
      OnlineSoftmax<Vec<T>> state{load_first(largest + first + m, count - m), load_first(sum + first + m, count - m)};
      store(factors + m, state.raise(load(next + m)));
      store(next + m, softmax_pivot(state.largest));
      store_first(largest + first + m, state.largest, count - m);
      store_first(sum + first + m, state.sum, count - m);
    }
  }

  // Writes a finished row: the average of values from their weighted sum, and the log of the sum of exp if wanted.
  template <class S>
  void finish(int64_t row, const T* values, int64_t width, S* out, double* lse) const {
    if (sum[row] == 0) {
      if (lse) *lse = -__builtin_inf();
      std::memset((void*)out, 0, width * sizeof(S));
      return;
    }
    if (lse) {
      const T log = std::is_same_v<T, float> ? T(__builtin_logf(float(sum[row]))) : T(__builtin_log(sum[row]));
      *lse = double(largest[row]) + double(log);
    }
    write_row(out, values, width, 1 / sum[row]);
  }
};

}  // namespace fastseq::FASTSEQ_ISA
