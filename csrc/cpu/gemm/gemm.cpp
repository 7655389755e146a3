#include "cpu/gemm/gemm.h"

#include "cpu/gemm/micro_kernel-inl.h"

namespace fastseq::FASTSEQ_ISA {

namespace {

// One tile of multiply_rows over the block of K that starts at k0: out[m][p] = bias[p] + A B for the first block, else
// out[m][p] += A B.
template <int MR, int NP, int NV, class S>
void multiply_panels(const S* const* rows, int64_t k0, int64_t depth, const typename PanelOf<S>::Element* panels,
                     int64_t panel_stride, const Compute<S>* bias, Compute<S>* out, int64_t row_stride,
                     int64_t out_panel_stride) {
  using V = Vec<Compute<S>>;
  constexpr int lanes = V::kLanes, step = NV * lanes;
  const S* a[MR];
  V acc[MR][NP * NV];
  FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) {
    a[m] = rows[m] + k0;
    FASTSEQ_UNROLL for (int j = 0; j < NP * NV; ++j) acc[m][j] = V(0);
  }
  accumulate<MR, NP, NV>(min(kBlock, depth - k0), a, 1, panels + k0 / PanelOf<S>::kDepth * step, panel_stride, step,
                         acc);
  FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) FASTSEQ_UNROLL for (int j = 0; j < NP * NV; ++j) {
    Compute<S>* c = out + m * row_stride + (j / NV) * out_panel_stride + (j % NV) * lanes;
    store(c, (k0 == 0 ? load(bias + j * lanes) : load(c)) + acc[m][j]);
  }
}

}  // namespace

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

// Rows run inside blocks of K, so that a block of the panel is read from L1 or L2 by all of them. One row runs two
// panels at once where there are two: 4 chains of FMAs alone would wait for each other (latency 4, two per cycle).
template <int NV, class S>
void multiply_rows(const S* const* rows, int64_t count, int panel_count, int64_t depth,
                   const typename PanelOf<S>::Element* panels, int64_t panel_stride, const Compute<S>* bias,
                   Compute<S>* out, int64_t row_stride, int64_t out_panel_stride) {
  const EvenSplit split(count, rows_for(NV));
  for (int64_t k0 = 0; k0 < depth; k0 += kBlock) {
    if (panel_count == 2) {
      multiply_panels<1, 2, NV, S>(rows, k0, depth, panels, panel_stride, bias, out, row_stride, out_panel_stride);
      continue;
    }
    for (int64_t part = 0; part < split.parts; ++part)
      with_constant<rows_for(NV)>(split.count(part), [&](auto mr) {
        const int64_t m = split.begin(part);
        multiply_panels<decltype(mr)::value, 1, NV, S>(rows + m, k0, depth, panels, panel_stride, bias,
                                                       out + m * row_stride, row_stride, out_panel_stride);
      });
  }
}

namespace {

// One tile of GradientProduct over the panels [begin, end): MR rows x NP vectors of columns.
template <int MR, int NP, class T>
void multiply_tile(const GradientProduct<T>& g, const T* rows, int64_t begin, int64_t end, int64_t q, T* out,
                   int64_t out_stride) {
  Vec<T> acc[MR][NP];
  FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) FASTSEQ_UNROLL for (int j = 0; j < NP; ++j) acc[m][j] = Vec<T>(0);
  for (int64_t panel = begin; panel < end; ++panel) {
    const T* a[MR];
    FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) a[m] = rows + panel * g.a_panel + m * g.a_row;
    const T* b = g.b + panel * g.b_panel + q * g.b_vector;
    for (int64_t chunk = 0; chunk < g.chunks; ++chunk) {
      accumulate<MR, NP, 1>(g.chunk_depth, a, 1, b + g.b_chunk[chunk], g.b_vector, g.b_step, acc);
      FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) a[m] += g.chunk_depth;
    }
  }
  FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) FASTSEQ_UNROLL for (int j = 0; j < NP; ++j) {
    T* c = out + m * out_stride + j * kLanes<T>;
    store(c, begin == 0 ? acc[m][j] : load(c) + acc[m][j]);
  }
}

}  // namespace

template <class T>
void GradientProduct<T>::multiply(const T* a, int64_t count, int64_t q_begin, int64_t q_end, T* out,
                                  int64_t out_stride) const {
  constexpr int kSingleRow = 8;  // vectors of a single row: enough chains of FMAs to hide their latency
  const int64_t block = max(1, kBlock / (chunks * chunk_depth));
  const EvenSplit split(count, kColumnRows);
  for (int64_t begin = 0; begin < panels; begin += block) {
    const int64_t end = min(panels, begin + block);
    if (count == 1) {
      for (int64_t q = q_begin; q < q_end; q += kSingleRow)
        with_constant<kSingleRow>(min(kSingleRow, q_end - q), [&](auto np) {
          multiply_tile<1, decltype(np)::value>(*this, a, begin, end, q, out + q * kLanes<T>, out_stride);
        });
      continue;
    }
    for (int64_t q = q_begin; q < q_end; q += kColumns)
      for (int64_t part = 0; part < split.parts; ++part)
        with_constant<kColumns>(min(kColumns, q_end - q), [&](auto np) {
          with_constant<kColumnRows>(split.count(part), [&](auto mr) {
            const int64_t m = split.begin(part);
            multiply_tile<decltype(mr)::value, decltype(np)::value>(*this, a + m * a_row, begin, end, q,
                                                                    out + m * out_stride + q * kLanes<T>, out_stride);
          });
        });
  }
}

template <class T>
void multiply_outer(int64_t count, int64_t depth, const T* gates, int64_t gate_stride, const T* packed, bool first,
                    T* out, int64_t out_stride, int64_t left) {
  with_constant<kColumnRows>(count, [&](auto mr) {
    constexpr int MR = decltype(mr)::value;
    Vec<T> acc[MR][kColumns];
    const T* a[MR];
    FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) {
      a[m] = gates + m;
      FASTSEQ_UNROLL for (int j = 0; j < kColumns; ++j) acc[m][j] = Vec<T>(0);
    }
    accumulate<MR, 1, kColumns>(depth, a, gate_stride, packed, 0, kColumns * kLanes<T>, acc);
    FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) FASTSEQ_UNROLL for (int j = 0; j < kColumns; ++j) {
      T* c = out + m * out_stride + j * kLanes<T>;
      const int64_t n = left - j * kLanes<T>;
      if (n > 0) store_first(c, first ? acc[m][j] : load_first(c, n) + acc[m][j], n);
    }
  });
}

#define FASTSEQ_INSTANTIATE(S)                                                                                   \
  template void pack_column<S>(const S*, int64_t, int64_t, int64_t, PanelOf<S>::Element*, int64_t);              \
  template void multiply_rows<2, S>(const S* const*, int64_t, int, int64_t, const PanelOf<S>::Element*, int64_t, \
                                    const Compute<S>*, Compute<S>*, int64_t, int64_t);                           \
  template void multiply_rows<3, S>(const S* const*, int64_t, int, int64_t, const PanelOf<S>::Element*, int64_t, \
                                    const Compute<S>*, Compute<S>*, int64_t, int64_t);                           \
  template void multiply_rows<4, S>(const S* const*, int64_t, int, int64_t, const PanelOf<S>::Element*, int64_t, \
                                    const Compute<S>*, Compute<S>*, int64_t, int64_t);
FASTSEQ_INSTANTIATE(float)
FASTSEQ_INSTANTIATE(double)
FASTSEQ_INSTANTIATE(BFloat16)

template struct GradientProduct<float>;
template struct GradientProduct<double>;
template void multiply_outer(int64_t, int64_t, const float*, int64_t, const float*, bool, float*, int64_t, int64_t);
template void multiply_outer(int64_t, int64_t, const double*, int64_t, const double*, bool, double*, int64_t, int64_t);

}  // namespace fastseq::FASTSEQ_ISA
