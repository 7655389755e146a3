// Terms of a few rows straight from torch's weights, without packing: row-major dots for single steps, where packing
// would cost six times the step itself, and sums of one row in the order of packed panels.
#include "cpu/gemm/gemm.h"
#include "cpu/gemm/micro_kernel-inl.h"

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

// How rows of weights become terms in lanes: a square of as many rows as lanes is transposed in registers, kStep terms
// at a time. With kHalves two rows share a vector, which saves a stage of shuffles, but reads a line of the cache
// twice.
template <class S, bool kHalves>
struct Column {
  using T = Compute<S>;
  using V = Vec<T>;
  static constexpr int kLanes = V::kLanes, kVectors = kHalves ? kLanes / 2 : kLanes;
  static constexpr int kDepth = PanelOf<S>::kDepth, kStep = kVectors * kDepth;

  // acc + kStep terms of kLanes rows, in order of k.
  FASTSEQ_INLINE static V add(const S* row, const S* w, int64_t depth, V acc) {
    const auto words = [&](int64_t u) { return (const T*)(w + u * depth); };
    V column[kVectors];
    if constexpr (kHalves) {
      FASTSEQ_UNROLL for (int u = 0; u < kVectors; ++u) column[u] = load_halves(words(u), words(kVectors + u));
      transpose_halves(column);
    } else {
      FASTSEQ_UNROLL for (int u = 0; u < kVectors; ++u) column[u] = load(words(u));
      transpose(column);
    }
    FASTSEQ_UNROLL for (int i = 0; i < kVectors; ++i) acc = add_term(row + i * kDepth, kDepth, column[i], acc);
    return acc;
  }

  // The same of the first n terms of `units` rows.
  static V add_first(const S* row, const S* w, int64_t depth, int64_t units, int64_t n, V acc) {
    for (int64_t k = 0; k < n; k += kDepth) {
      S lane[kLanes * kDepth] = {};
      for (int64_t u = 0; u < min(units, kLanes); ++u)
        for (int64_t i = 0; i < min(kDepth, n - k); ++i) lane[u * kDepth + i] = w[u * depth + k + i];
      acc = add_term(row + k, n - k, load((const T*)lane), acc);
    }
    return acc;
  }

 private:
  FASTSEQ_INLINE static V add_term(const S* x, int64_t left, V column, V acc) {
    if constexpr (kDepth == 1) {
      return fma(V(*x), column, acc);
    } else {
      uint32_t word = 0;  // an odd last term is paired with 0
      std::memcpy(&word, x, left > 1 ? sizeof word : sizeof *x);
      return fma_pairs(broadcast_word(word), (Words)column.raw, acc);
    }
  }
};

// transposed_row for kVectors vectors at once; of more than one, all are whole.
template <int kVectors, bool kHalves, class S>
void transposed_vectors(const S* row, int64_t depth, const S* w, const S* bias, const UnitVector<Compute<S>>* vectors) {
  using C = Column<S, kHalves>;
  using V = typename C::V;
  const int64_t units = vectors[0].units;
  const S* weights[kVectors];
  V sum[kVectors];
  FASTSEQ_UNROLL for (int j = 0; j < kVectors; ++j) {
    weights[j] = w + vectors[j].first * depth;
    sum[j] = bias ? load_first(bias + vectors[j].first, units) : V(0);
  }
  for (int64_t k0 = 0; k0 < depth; k0 += kBlock) {
    const int64_t end = min(depth, k0 + kBlock);
    int64_t k = k0;
    V acc[kVectors];
    FASTSEQ_UNROLL for (int j = 0; j < kVectors; ++j) acc[j] = V(0);
    if (units >= C::kLanes)
      for (; k + C::kStep <= end; k += C::kStep)
        FASTSEQ_UNROLL for (int j = 0; j < kVectors; ++j) acc[j] = C::add(row + k, weights[j] + k, depth, acc[j]);
    FASTSEQ_UNROLL for (int j = 0; j < kVectors; ++j) {
      acc[j] = C::add_first(row + k, weights[j] + k, depth, units, end - k, acc[j]);
      sum[j] = sum[j] + acc[j];
    }
  }
  FASTSEQ_UNROLL for (int j = 0; j < kVectors; ++j) store(vectors[j].out, sum[j]);
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

template <class S>
void transposed_row(const S* row, int64_t depth, const S* w, const S* bias, const UnitVector<Compute<S>>* vectors,
                    int count) {
  constexpr int lanes = kLanes<Compute<S>>;
  // Lines that are a multiple of 4 KB apart share the 8 places of a set of the L1 cache. 16 rows then push each other
  // out, and a line had better be read at once: 42 GB/s of weights where the halves of 16 lanes take 35 (Zen 4).
  if (depth * sizeof(S) % 4096 == 0) {
    for (int i = 0; i < count; ++i) transposed_vectors<1, false>(row, depth, w, bias, vectors + i);
    return;
  }
  // One chain of FMAs keeps 8 lanes and fewer waiting: 28 GB/s, where two take 40. 16 lanes take 45.
  constexpr int most = lanes < 16 ? 2 : 1;
  for (int i = 0; i < count;) {
    if (most > 1 && i + 1 < count && min(vectors[i].units, vectors[i + 1].units) >= lanes) {
      transposed_vectors<most, true>(row, depth, w, bias, vectors + i);
      i += most;
    } else {
      transposed_vectors<1, true>(row, depth, w, bias, vectors + i++);
    }
  }
}

template void dot_rows(const float* const*, int64_t, int64_t, const float*, const float*, int64_t, float*, int64_t);
template void dot_rows(const double* const*, int64_t, int64_t, const double*, const double*, int64_t, double*, int64_t);
template void dot_rows(const BFloat16* const*, int64_t, int64_t, const BFloat16*, const BFloat16*, int64_t, float*,
                       int64_t);
template void transposed_row(const float*, int64_t, const float*, const float*, const UnitVector<float>*, int);
template void transposed_row(const double*, int64_t, const double*, const double*, const UnitVector<double>*, int);
template void transposed_row(const BFloat16*, int64_t, const BFloat16*, const BFloat16*, const UnitVector<float>*, int);

}  // namespace fastseq::FASTSEQ_ISA
