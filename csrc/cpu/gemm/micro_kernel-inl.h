// The micro-kernel: MR rows x (NP panels of NV vectors) of accumulators stay in registers, A is read by broadcast and
// never packed, B streams from panels.
#pragma once

#include "cpu/gemm/gemm.h"

namespace fastseq::FASTSEQ_ISA {

// Calls f(std::integral_constant<int, n>) for a run-time n in 1..kMost.
template <int kMost, class F>
FASTSEQ_INLINE void with_constant(int64_t n, const F& f) {
  if constexpr (kMost > 1) {
    if (n < kMost) return with_constant<kMost - 1>(n, f);
  }
  f(std::integral_constant<int, kMost>());
}

// acc[m][p * NV + v] += sum over k of a[m][k * a_step] * b[p * b_panel + k * b_step + v * lanes ...]
template <int MR, int NP, int NV, class T>
FASTSEQ_INLINE void accumulate(int64_t depth, const T* const (&a)[MR], int64_t a_step, const T* b, int64_t b_panel,
                               int64_t b_step, Vec<T> (&acc)[MR][NP * NV]) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> column[NP * NV];
    FASTSEQ_UNROLL for (int j = 0; j < NP * NV; ++j) column[j] =
        load(b + (j / NV) * b_panel + k * b_step + (j % NV) * kLanes<T>);
    FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) {
      const Vec<T> scalar(a[m][k * a_step]);
      FASTSEQ_UNROLL for (int j = 0; j < NP * NV; ++j) acc[m][j] = fma(scalar, column[j], acc[m][j]);
    }
  }
}

// One block of lanes x lanes, transposed: out[k * out_stride] lane u = w[u * stride + k]. `units` and `depth` may be
// fewer than the lanes; the missing ones are zero.
template <class S>
FASTSEQ_INLINE void load_transposed(const S* w, int64_t stride, int64_t units, int64_t depth,
                                    Vec<Compute<S>> (&rows)[kLanes<Compute<S>>]) {
  constexpr int lanes = kLanes<Compute<S>>;
  FASTSEQ_UNROLL for (int u = 0; u < lanes; ++u) rows[u] =
      u < units ? load_first(w + u * stride, depth) : Vec<Compute<S>>(0);
  transpose(rows);
}

FASTSEQ_INLINE Words broadcast_word(uint32_t w) { return w - Words{}; }

// The same for bfloat16 in pairs of k and k + 1: neighbours in a, one word in b. An odd last k is paired with 0.
template <int MR, int NP, int NV>
FASTSEQ_INLINE void accumulate(int64_t depth, const BFloat16* const (&a)[MR], int64_t a_step, const uint32_t* b,
                               int64_t b_panel, int64_t b_step, Vec<float> (&acc)[MR][NP * NV]) {
  const auto step = [&](int64_t pair, const Words(&scalar)[MR]) {
    FASTSEQ_UNROLL for (int j = 0; j < NP * NV; ++j) {
      Words column;
      std::memcpy(&column, b + (j / NV) * b_panel + pair * b_step + (j % NV) * kLanes<float>, sizeof column);
      FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) acc[m][j] = fma_pairs(scalar[m], column, acc[m][j]);
    }
  };
  Words scalar[MR];
  for (int64_t pair = 0; pair < depth / 2; ++pair) {
    FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) {
      uint32_t word;
      std::memcpy(&word, a[m] + 2 * pair * a_step, sizeof word);
      scalar[m] = broadcast_word(word);
    }
    step(pair, scalar);
  }
  if (depth & 1) {
    FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) scalar[m] = broadcast_word(a[m][(depth - 1) * a_step].bits);
    step(depth / 2, scalar);
  }
}

}  // namespace fastseq::FASTSEQ_ISA
