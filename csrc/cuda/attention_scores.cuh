// From products of queries and keys to scores, and the draws of dropout.
#pragma once

#include "cuda/attention_tile.cuh"
#include "math/online_softmax.h"
#include "math/philox.h"

namespace fastseq::cuda {

// A 32-bit word, with what math/philox.h asks for.
struct Word {
  uint32_t raw;

  Word() = default;
  __host__ __device__ constexpr Word(uint32_t value) : raw(value) {}

  friend __host__ __device__ Word operator^(Word a, Word b) { return a.raw ^ b.raw; }
  friend __host__ __device__ void multiply_words(Word a, uint32_t b, Word& high, Word& low) {
    const uint64_t product = uint64_t(a.raw) * b;
    high = uint32_t(product >> 32);
    low = uint32_t(product);
  }
};

template <class T>
constexpr T kNever = -T(__builtin_inff());

// The scores of a batch row.
template <class S>
struct Scores {
  using T = Compute<S>;
  using V = Lane<T>;

  const AttentionParams& p;
  const int64_t b;
  const Window window;
  const Softcap<V> softcap;
  const uint32_t threshold;  // of dropout; a draw below it drops
  const T kept_factor;       // of what dropout keeps

  __device__ Scores(const AttentionParams& p, const Extent& extent, int64_t b)
      : p(p),
        b(b),
        window(extent.window(p)),
        softcap{V(T(p.softcap)), V(T(1 / p.softcap))},
        threshold(dropout_threshold(p.dropout_p)),
        kept_factor(T(1 / (1 - p.dropout_p))) {}

  // The score of a product, -inf for a key that the row may not see, and d score / d product.
  __device__ T of(const Row& row, int64_t j, T product, T& derivative) const {
    derivative = 1;
    if (!row.active || j >= window.keys || !window.sees(row.i, j)) return kNever<T>;
    if (p.allowed && !p.allowed[offset(p.allowed_strides, row, j)]) return kNever<T>;
    V score = product;
    if (p.softcap > 0) {
      V d;
      score = softcap.forward(score, d);
      derivative = d.raw;
    }
    if (p.bias) score = score + V(load((const S*)p.bias + offset(p.bias_strides, row, j)));
    if (p.alibi_slopes)
      score = alibi(score, V(p.alibi_slopes[b * p.alibi_batch_stride + row.n * p.alibi_head_stride]),
                    V(T(row.i + window.shift - j)));
    return score.raw;
  }

  __device__ bool drops() const { return threshold > 0; }

  // Which of the keys first, ..., first + kN - 1 dropout keeps for a row. `first` is a multiple of kN, that is 2 or 4.
  template <int kN>
  __device__ void draw(const Row& row, int64_t first, bool (&kept)[kN]) const {
    Word x[4] = {uint32_t(first / 4), uint32_t(row.i), uint32_t(b * p.heads + row.n), 0u};
    philox(x, uint32_t(p.seed), uint32_t(p.seed >> 32));
    const bool second = kN < 4 && first % 4;
#pragma unroll
    for (int j = 0; j < kN; ++j) kept[j] = (second ? x[4 - kN + j] : x[j]).raw >= threshold;
  }
  __device__ T drop(T value, bool kept) const { return kept ? value * kept_factor : T(0); }

 private:
  __device__ int64_t offset(const int64_t* strides, const Row& row, int64_t j) const {
    return b * strides[0] + row.n * strides[1] + row.i * strides[2] + j * strides[3];
  }
};

}  // namespace fastseq::cuda
