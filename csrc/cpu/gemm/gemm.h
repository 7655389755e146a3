// The matrix products of the drivers, and how weights are packed for them. Nothing here knows a cell.
//
// Summation order: partial sums over blocks of kBlock terms of K, each an FMA chain in order of k that starts at zero,
// added one after the other. The order is the same for any number of rows, panels, steps and threads, and shorter
// chains round less. K is never blocked for the L1 cache beyond that: at 12 FMAs a term, panels stream from L2.
#pragma once

#include "cpu/base/share.h"
#include "cpu/base/simd.h"

namespace fastseq::FASTSEQ_ISA {

constexpr int64_t kBlock = 256;

// Rows of accumulators for `vectors` columns: 12 of 16 registers, or 24 of 32, hold them; one holds A, the rest B.
constexpr int rows_for(int vectors) { return kRegisters * 3 / 4 / vectors; }

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

// Packs the rows w[u], u < units (zero beyond), each of `depth` terms, as one vector column of a panel:
// out[k * step + u] for k = 0, 1, ... (in panel elements).
template <class S>
void pack_column(const S* w, int64_t stride, int64_t units, int64_t depth, typename PanelOf<S>::Element* out,
                 int64_t step);

// out[m][p] = bias[p] + A B for `count` rows and NP panels, NP being 2 only if count is 1.
// rows: row pointers of A. panels: (panel_depth, NV vectors) each. bias: NP * NV vectors.
template <int NV, class S>
void multiply_rows(const S* const* rows, int64_t count, int panel_count, int64_t depth,
                   const typename PanelOf<S>::Element* panels, int64_t panel_stride, const Compute<S>* bias,
                   Compute<S>* out, int64_t row_stride, int64_t out_panel_stride);

// The same product from plain weights: out[m * row_stride + u] = bias[u] + dot(w + u * depth, rows[m]) for `units` <=
// lanes rows of w; bias may be null. For single steps, where packing would cost six times the step itself.
template <class S>
void dot_rows(const S* const* rows, int64_t count, int64_t depth, const S* w, const S* bias, int64_t units,
              Compute<S>* out, int64_t row_stride);

// A vector of units of one row: `units` <= lanes rows of the weights from `first` on, and where their sums go.
template <class T>
struct UnitVector {
  int64_t first, units;
  T* out;
};

// That of one row with the bits of multiply_rows: the same sums in the same order, from weights as they lie. Writes
// whole vectors.
template <class S>
void transposed_row(const S* row, int64_t depth, const S* w, const S* bias, const UnitVector<Compute<S>>* vectors,
                    int count);

// The product dG W of gradients with weights. K is (panels, terms, units), in `chunks` parts a panel:
// A: row m of panel p is a + p * a_panel + m * a_row, its parts follow each other.
// B: part j of panel p for vector q of columns is b + p * b_panel + b_chunk[j] + q * b_vector, rows b_step apart.
template <class T>
struct GradientProduct {
  int64_t panels, chunks, chunk_depth;
  int64_t a_panel, a_row;
  const T* b;
  int64_t b_panel, b_chunk[4], b_vector, b_step;

  // out (count rows, vectors [q_begin, q_end)); out points at column 0.
  void multiply(const T* a, int64_t count, int64_t q_begin, int64_t q_end, T* out, int64_t out_stride) const;
};

// Vectors of columns, and rows, of a tile of the backward products.
constexpr int kColumns = 3, kColumnRows = rows_for(kColumns);

// out[m] (=, or += unless `first`) sum over k < depth of gates[k * gate_stride + m] * packed[k], a row of kColumns
// vectors, for `count` <= kColumnRows gates; `left` columns of out exist.
template <class T>
void multiply_outer(int64_t count, int64_t depth, const T* gates, int64_t gate_stride, const T* packed, bool first,
                    T* out, int64_t out_stride, int64_t left);

}  // namespace fastseq::FASTSEQ_ISA
