// The micro-kernel, and the two ways in which weights are packed for it.
//
// Vectors of BLIS: MR rows x (NP panels of NV vectors) of accumulators stay in registers; A is read by broadcast and
// never packed, B streams from panels.
//
// Summation order: partial sums over blocks of kBlock terms of K, each an FMA chain in order of k that starts at zero,
// added one after the other. The order is the same for any number of rows, panels, steps and threads, and shorter
// chains round less.
#pragma once

#include "simd.h"

namespace fastseq::FASTSEQ_ISA {

constexpr int64_t kBlock = 256;

// Rows of accumulators for `vectors` columns: 12 of 16 registers, or 24 of 32, hold them; one holds A, the rest B.
constexpr int rows_for(int vectors) { return kRegisters * 3 / 4 / vectors; }

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `n` items in the fewest even parts of at most `most`.
struct EvenSplit {
  int64_t parts, size, larger;
  EvenSplit(int64_t n, int64_t most) : parts(ceil_div(n, most)), size(parts ? n / parts : 0), larger(n - parts * size) {}
  int64_t begin(int64_t part) const { return part * size + min(part, larger); }
  int64_t count(int64_t part) const { return size + (part < larger); }
};

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
    FASTSEQ_UNROLL for (int j = 0; j < NP * NV; ++j)
        column[j] = load(b + (j / NV) * b_panel + k * b_step + (j % NV) * kLanes<T>);
    FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) {
      const Vec<T> scalar(a[m][k * a_step]);
      FASTSEQ_UNROLL for (int j = 0; j < NP * NV; ++j) acc[m][j] = fma(scalar, column[j], acc[m][j]);
    }
  }
}

FASTSEQ_INLINE Words broadcast_word(uint32_t w) { return w - Words{}; }

// The same for bfloat16: a in storage, b in words that hold the weights of k and k + 1; an odd last k is paired with 0.
template <int MR, int NP, int NV>
FASTSEQ_INLINE void accumulate(int64_t depth, const BFloat16* const (&a)[MR], int64_t, const uint32_t* b,
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
      std::memcpy(&word, a[m] + 2 * pair, sizeof word);
      scalar[m] = broadcast_word(word);
    }
    step(pair, scalar);
  }
  if (depth & 1) {
    FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) scalar[m] = broadcast_word(a[m][depth - 1].bits);
    step(depth / 2, scalar);
  }
}

// How a storage type lies in a panel: one element of a panel holds kDepth consecutive k.
template <class S>
struct PanelOf {
  using Element = S;
  static constexpr int kDepth = 1;
};
template <>
struct PanelOf<BFloat16> {
  using Element = uint32_t;
  static constexpr int kDepth = 2;
};
template <class S>
constexpr int64_t panel_depth(int64_t k) {
  return ceil_div(k, PanelOf<S>::kDepth);
}

// out[m][p] = bias[p] + A B for MR rows and NP panels, in blocks of K.
// a: row pointers. panels: NP panels of (panel_depth, NV vectors). bias: NP * NV vectors. out: row and panel strides.
template <int MR, int NP, int NV, class S>
__attribute__((noinline)) void multiply_panels(const S* const* rows, int64_t depth,
                                               const typename PanelOf<S>::Element* panels, int64_t panel_stride,
                                               const Compute<S>* bias, Compute<S>* out, int64_t row_stride,
                                               int64_t out_panel_stride) {
  using V = Vec<Compute<S>>;
  constexpr int lanes = V::kLanes, step = NV * lanes;
  const S* a[MR];
  FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) a[m] = rows[m];
  for (int64_t k0 = 0; k0 < depth; k0 += kBlock) {
    V acc[MR][NP * NV];
    FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) FASTSEQ_UNROLL for (int j = 0; j < NP * NV; ++j) acc[m][j] = V(0);
    accumulate<MR, NP, NV>(min(kBlock, depth - k0), a, 1, panels + k0 / PanelOf<S>::kDepth * step, panel_stride, step,
                           acc);
    FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) {
      a[m] += kBlock;
      FASTSEQ_UNROLL for (int j = 0; j < NP * NV; ++j) {
        Compute<S>* c = out + m * row_stride + (j / NV) * out_panel_stride + (j % NV) * lanes;
        store(c, (k0 == 0 ? load(bias + j * lanes) : load(c)) + acc[m][j]);
      }
    }
  }
}

// multiply_panels for any number of rows. One row runs two panels at once where there are two: 4 chains of FMAs alone
// would wait for each other (latency 4, two per cycle).
template <int NV, class S>
FASTSEQ_INLINE void multiply_rows(const S* const* rows, int64_t count, int panels_left, int64_t depth,
                                  const typename PanelOf<S>::Element* panels, int64_t panel_stride,
                                  const Compute<S>* bias, Compute<S>* out, int64_t row_stride,
                                  int64_t out_panel_stride) {
  if (panels_left == 2)
    return multiply_panels<1, 2, NV, S>(rows, depth, panels, panel_stride, bias, out, row_stride, out_panel_stride);
  with_constant<rows_for(NV)>(count, [&](auto mr) {
    multiply_panels<decltype(mr)::value, 1, NV, S>(rows, depth, panels, panel_stride, bias, out, row_stride,
                                                   out_panel_stride);
  });
}

// One block of lanes x lanes, transposed: out[k * out_stride] lane u = w[u * stride + k]. `units` and `depth` may be
// fewer than the lanes; the missing ones are zero.
template <class S>
FASTSEQ_INLINE void load_transposed(const S* w, int64_t stride, int64_t units, int64_t depth,
                                    Vec<Compute<S>> (&rows)[kLanes<Compute<S>>]) {
  constexpr int lanes = kLanes<Compute<S>>;
  FASTSEQ_UNROLL for (int u = 0; u < lanes; ++u)
      rows[u] = u < units ? load_first(w + u * stride, depth) : Vec<Compute<S>>(0);
  transpose(rows);
}

// Packs the rows w[u], u < units (zero beyond), each of `depth` terms, as one vector column of a panel:
// out[k * step + u] for k = 0, 1, ... (in panel elements).
template <class S>
void pack_column(const S* w, int64_t stride, int64_t units, int64_t depth, typename PanelOf<S>::Element* out,
                 int64_t step) {
  using T = Compute<S>;
  constexpr int lanes = kLanes<T>;
  for (int64_t k0 = 0; k0 < depth; k0 += lanes) {
    Vec<T> rows[lanes];
    load_transposed(w + k0, stride, units, depth - k0, rows);
    const int64_t count = min(lanes, depth - k0);
    if constexpr (PanelOf<S>::kDepth == 1) {
      for (int64_t k = 0; k < count; ++k) store(out + (k0 + k) * step, rows[k]);
    } else {
      // The values came from bfloat16, so the upper half of each float is exact and the lower half zero.
      for (int64_t k = 0; k < count; k += 2) {
        const Words pair = ((Words)rows[k].raw >> 16) | (Words)rows[k + 1].raw;
        std::memcpy(out + (k0 + k) / 2 * step, &pair, sizeof pair);
      }
    }
  }
}

}  // namespace fastseq::FASTSEQ_ISA
