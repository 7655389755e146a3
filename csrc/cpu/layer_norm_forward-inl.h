// Layer normalization, forward. A row is read from memory once; the passes after the first find it in the cache.
#pragma once

#include "layer_norm_rows-inl.h"

namespace fastseq::FASTSEQ_ISA {

template <class S>
struct LayerNormForward {
  using T = Compute<S>;
  using V = Vec<T>;

  const LayerNormParams& p;

  static Status run(const LayerNormParams& p) {
    LayerNormForward forward{p};
    parallel(
        layer_norm_threads(p),
        [](void* context, const Team& team) {
          const auto& forward = *(const LayerNormForward*)context;
          const Share rows(forward.p.steps * forward.p.batch, team);
          for (int64_t row = rows.begin; row < rows.end; ++row) forward.normalize(row);
        },
        &forward);
    return kOk;
  }

 private:
  static FASTSEQ_INLINE float root(float x) { return __builtin_sqrtf(x); }
  static FASTSEQ_INLINE double root(double x) { return __builtin_sqrt(x); }

  static FASTSEQ_INLINE T total(const V (&sum)[kAccumulators]) {
    return sum_of_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }

  // z = x + residual as it is stored, so that bfloat16 normalizes what backward will read. Returns its sum.
  FASTSEQ_INLINE T add_residual(const S* x, const S* residual, S* z) const {
    V sum[kAccumulators] = {V(T(0)), V(T(0)), V(T(0)), V(T(0))};
    for_columns<T>(p.features, [&](int64_t c, int64_t count, int i) __attribute__((always_inline)) {
      store_first(z + c, load_first(x + c, count) + load_first(residual + c, count), count);
      sum[i] = sum[i] + load_first(z + c, count);
    });
    return total(sum);
  }

  FASTSEQ_INLINE T sum_of(const S* z) const {
    V sum[kAccumulators] = {V(T(0)), V(T(0)), V(T(0)), V(T(0))};
    for_columns<T>(p.features, [&](int64_t c, int64_t count, int i)
                                   __attribute__((always_inline)) { sum[i] = sum[i] + load_first(z + c, count); });
    return total(sum);
  }

  // Around the mean: E[z^2] - mean^2 would cancel where the mean is large beside the deviation.
  FASTSEQ_INLINE T sum_of_squares(const S* z, V mean) const {
    V sum[kAccumulators] = {V(T(0)), V(T(0)), V(T(0)), V(T(0))};
    for_columns<T>(p.features, [&](int64_t c, int64_t count, int i) __attribute__((always_inline)) {
      V d = load_first(z + c, count) - mean;
      if (count < V::kLanes) d = select(lane_numbers<T>().raw < V(T(count)).raw, d, V(T(0)));
      sum[i] = fma(d, d, sum[i]);
    });
    return total(sum);
  }

  void normalize(int64_t row) const {
    const S* z = row_of<const S>(p.x, p, row);
    S* const y = row_of<S>(p.y, p, row);
    T sum;
    if (p.residual.data) {
      S* const written = p.z.data ? row_of<S>(p.z, p, row) : y;  // y is written again, element by element
      sum = add_residual(z, row_of<const S>(p.residual, p, row), written);
      z = written;
    } else {
      sum = sum_of(z);
    }
    const T mean = sum / T(p.features);
    const T rstd = T(1) / root(sum_of_squares(z, mean) / T(p.features) + T(p.eps));
    if (p.mean) ((T*)p.mean)[row] = mean;
    if (p.rstd) ((T*)p.rstd)[row] = rstd;

    const LayerNorm<V> norm{mean, rstd};
    const S *weight = (const S*)p.weight, *bias = (const S*)p.bias;
    for_columns<T>(p.features, [&](int64_t c, int64_t count, int) __attribute__((always_inline)) {
      const V normalized = norm.normalize(load_first(z + c, count));
      store_first(y + c, fma(normalized, load_or(weight, c, count, T(1)), load_or(bias, c, count, T(0))), count);
    });
  }
};

}  // namespace fastseq::FASTSEQ_ISA
