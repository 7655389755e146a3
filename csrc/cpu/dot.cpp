// The row-major dot micro-kernel: terms of a few rows straight from torch's weights, without packing. For single steps,
// where packing would cost six times the step itself.
#include "gemm.h"
#include "micro_kernel-inl.h"

namespace fastseq::FASTSEQ_ISA {

namespace {

// Longer sums are taken in blocks of so many terms: a lane of the baseline then adds 256 at most.
constexpr int64_t kDotBlock = 1024;

// sums[m * NR + i] = dot(w row i, a row m) over the terms [begin, end), for NR weight rows x MR input rows; lanes run
// along K.
template <int NR, int MR, class S>
FASTSEQ_INLINE void dot_tile(const S* const (&w)[NR], const S* const (&a)[MR], int64_t begin, int64_t end,
                             Compute<S>* sums) {
  using V = Vec<Compute<S>>;
  V acc[MR * NR];
  FASTSEQ_UNROLL for (int i = 0; i < MR * NR; ++i) acc[i] = V(0);
  const auto step = [&](const auto& load_lanes) {
    V row[MR];
    FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) row[m] = load_lanes(a[m]);
    FASTSEQ_UNROLL for (int i = 0; i < NR; ++i) {
      const V weight = load_lanes(w[i]);
      FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) acc[m * NR + i] = fma(weight, row[m], acc[m * NR + i]);
    }
  };
  int64_t k = begin;
  for (; k + V::kLanes <= end; k += V::kLanes) step([k](const S* p) { return load(p + k); });
  if (k < end) step([k, end](const S* p) { return load_first(p + k, end - k); });
  FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) sum_lanes(reinterpret_cast<V(&)[NR]>(acc[m * NR]), sums + m * NR);
}

// out[m * row_stride + u] = bias[u] + dot(w + u * depth, rows[m]) for `units` <= lanes rows of w. bias may be null.
template <int NR, int MR, class S>
void dot_column(const S* const* rows, int64_t depth, const S* w, const S* bias, int64_t units, Compute<S>* out,
                int64_t row_stride) {
  const S* a[MR];
  FASTSEQ_UNROLL for (int m = 0; m < MR; ++m) a[m] = rows[m];
  for (int64_t first = 0; first < units; first += NR) {
    const S* weight[NR];
    FASTSEQ_UNROLL for (int i = 0; i < NR; ++i) weight[i] = w + min(first + i, units - 1) * depth;
    Compute<S> sums[MR * NR] = {};
    for (int64_t k = 0; k < depth; k += kDotBlock) {
      Compute<S> part[MR * NR];
      dot_tile<NR, MR>(weight, a, k, min(depth, k + kDotBlock), part);
      for (int i = 0; i < MR * NR; ++i) sums[i] = sums[i] + part[i];
    }
    const int64_t count = min(NR, units - first);
    for (int m = 0; m < MR; ++m)
      for (int64_t i = 0; i < count; ++i) {
        const Compute<S> b = bias ? to_compute(bias[first + i]) : Compute<S>(0);
        out[m * row_stride + first + i] = b + sums[m * NR + i];
      }
  }
}

}  // namespace

template <class S>
void dot_rows(const S* const* rows, int64_t count, int64_t depth, const S* w, const S* bias, int64_t units,
              Compute<S>* out, int64_t row_stride) {
  constexpr int kMostRows = kRegisters * 3 / 4 / 4;
  if (count == 1) {
    constexpr int kWeightRows = kLanes<Compute<S>> < 8 ? kLanes<Compute<S>> : 8;
    return dot_column<kWeightRows, 1>(rows, depth, w, bias, units, out, row_stride);
  }
  for (int64_t m = 0; m < count; m += kMostRows)
    with_constant<kMostRows>(min(kMostRows, count - m), [&](auto mr) {
      dot_column < kLanes<Compute<S>>
          <4 ? 2 : 4, decltype(mr)::value>(rows + m, depth, w, bias, units, out + m * row_stride, row_stride);
    });
}

template void dot_rows(const float* const*, int64_t, int64_t, const float*, const float*, int64_t, float*, int64_t);
template void dot_rows(const double* const*, int64_t, int64_t, const double*, const double*, int64_t, double*, int64_t);
template void dot_rows(const BFloat16* const*, int64_t, int64_t, const BFloat16*, const BFloat16*, int64_t, float*,
                       int64_t);

}  // namespace fastseq::FASTSEQ_ISA
