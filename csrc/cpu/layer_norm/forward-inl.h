// Layer normalization, forward. A row is read from memory once; the passes after the first find it in the cache.
#pragma once

#include "cpu/layer_norm/rows-inl.h"

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
          const Share rows = Share::of(forward.p.steps * forward.p.batch, team);
          for (int64_t row = rows.begin; row < rows.end; ++row) forward.normalize(row);
        },
        &forward);
    return kOk;
  }

 private:
  static FASTSEQ_INLINE float root(float x) { return __builtin_sqrtf(x); }
  static FASTSEQ_INLINE double root(double x) { return __builtin_sqrt(x); }

  static FASTSEQ_INLINE V joined(const V (&sum)[kAccumulators]) { return (sum[0] + sum[1]) + (sum[2] + sum[3]); }

  // The sum over a row of what f(column, count, accumulator) gives.
  template <class F>
  FASTSEQ_INLINE T sum_over_row(const F& f) const {
    V total(T(0));
    for (int64_t begin = 0; begin < p.features; begin += kSumBlock<T>) {
      V sum[kAccumulators] = {V(T(0)), V(T(0)), V(T(0)), V(T(0))};
      for_columns<T>(begin, min(begin + kSumBlock<T>, p.features),
                     [&](int64_t c, int64_t count, int i)
                         __attribute__((always_inline)) { sum[i] = sum[i] + f(c, count, i); });
      total = total + joined(sum);
    }
    return sum_of_lanes(total);
  }

  void normalize(int64_t row) const {
    const S *x = nth_row<const S>(p.x, p.batch, row), *z = x;
    S* const y = nth_row<S>(p.y, p.batch, row);
    T mean;
    if (p.residual.data) {
      // z as it is stored, so that bfloat16 normalizes what backward will read. y is written again, element by element.
      const S* const residual = nth_row<const S>(p.residual, p.batch, row);
      S* const sum = p.z.data ? nth_row<S>(p.z, p.batch, row) : y;
      mean = sum_over_row([&](int64_t c, int64_t count, int) __attribute__((always_inline)) {
        store_first(sum + c, load_first(x + c, count) + load_first(residual + c, count), count);
        return load_first(sum + c, count);
      });
      z = sum;
    } else {
      mean = sum_over_row([&](int64_t c, int64_t count, int)
                              __attribute__((always_inline)) { return load_first(x + c, count); });
    }
    mean = mean / T(p.features);

    // The second pass corrects the mean by that of the deviations, and takes their squares: E[z^2] - mean^2 would
    // cancel where the mean is large (Chan et al. 1983, "Algorithms for computing the sample variance", the two-pass
    // form).
    V deviations[kAccumulators] = {V(T(0)), V(T(0)), V(T(0)), V(T(0))};
    const T squares = sum_over_row([&](int64_t c, int64_t count, int i) __attribute__((always_inline)) {
      V d = load_first(z + c, count) - V(mean);
      if (count < V::kLanes) d = select(lane_numbers<T>().raw < V(T(count)).raw, d, V(T(0)));
      deviations[i] = deviations[i] + d;
      return d * d;
    });
    const T correction = sum_of_lanes(joined(deviations)) / T(p.features);
    mean = mean + correction;
    const T variance = squares / T(p.features) - correction * correction;  // rounding may leave less than nothing
    const T rstd = T(1) / root((variance < T(0) ? T(0) : variance) + T(p.eps));
    if (p.mean) ((T*)p.mean)[row] = mean;
    if (p.rstd) ((T*)p.rstd)[row] = rstd;

    const LayerNorm<V> norm{mean, rstd};
    const S *weight = (const S*)p.weight, *bias = (const S*)p.bias;
    for_columns<T>(0, p.features, [&](int64_t c, int64_t count, int) __attribute__((always_inline)) {
      const V normalized = norm.normalize(load_first(z + c, count));
      store_first(y + c, fma(normalized, load_or(weight, c, count, T(1)), load_or(bias, c, count, T(0))), count);
    });
  }
};

}  // namespace fastseq::FASTSEQ_ISA
