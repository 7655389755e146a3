// Layer normalization, backward: rows in groups, so that the sums of the weights' gradients are read and written once
// for all rows of a group.
#pragma once

#include "layer_norm_rows-inl.h"

namespace fastseq::FASTSEQ_ISA {

template <class S>
struct LayerNormBackward {
  using T = Compute<S>;
  using V = Vec<T>;

  static constexpr int kGroup = 2;  // four rows of 512 take 7 to 10 % longer: their streams meet in the same cache sets
  // The gradients of weight and bias are sums over blocks of rows, added in order of the blocks. The blocks follow from
  // the shape alone, and so do the results.
  static constexpr int64_t kSmallestBlock = 16, kMostBlocks = 64;

  const LayerNormParams& p;
  int64_t rows, block_rows, blocks, width;  // width of a sum: whole vectors
  T* sums;                                  // (blocks, 2, width): of dweight, of dbias; null: neither is wanted

  static Status run(const LayerNormParams& p) {
    LayerNormBackward backward{p, p.steps * p.batch, 0, 0, ceil_div(p.features, V::kLanes) * V::kLanes, nullptr};
    backward.block_rows = max(kSmallestBlock, ceil_div(ceil_div(backward.rows, kMostBlocks), kGroup) * kGroup);
    backward.blocks = ceil_div(backward.rows, backward.block_rows);
    if (p.dweight || p.dbias) {
      backward.sums = (T*)allocate(backward.blocks * 2 * backward.width * int64_t(sizeof(T)));
      if (!backward.sums) return kOutOfMemory;
    }
    parallel(
        layer_norm_threads(p), [](void* context, const Team& team) { ((const LayerNormBackward*)context)->work(team); },
        &backward);
    release(backward.sums);
    return kOk;
  }

 private:
  T* sum_of_block(int64_t block, int which) const { return sums + (2 * block + which) * width; }

  void work(const Team& team) const {
    const Share share(blocks, team);
    for (int64_t block = share.begin; block < share.end; ++block) {
      if (sums)
        for (int64_t c = 0; c < 2 * width; c += V::kLanes) store(sum_of_block(block, 0) + c, V(T(0)));
      int64_t row = block * block_rows;
      const int64_t end = min(row + block_rows, rows);
      for (; row + kGroup <= end; row += kGroup) differentiate<kGroup>(row, block);
      for (; row < end; ++row) differentiate<1>(row, block);
    }
    if (!sums) return;
    team.wait();
    const Share vectors(width / V::kLanes, team);
    add_blocks((S*)p.dweight, 0, vectors);
    add_blocks((S*)p.dbias, 1, vectors);
  }

  void add_blocks(S* out, int which, const Share& vectors) const {
    if (!out) return;
    for (int64_t c = vectors.begin * V::kLanes; c < vectors.end * V::kLanes; c += V::kLanes) {
      V sum(T(0));
      for (int64_t block = 0; block < blocks; ++block) sum = sum + load(sum_of_block(block, which) + c);
      store_first(out + c, sum, p.features - c);
    }
  }

  template <int kRows>
  void differentiate(int64_t first, int64_t block) const {
    const S *z[kRows], *dy[kRows], *dz[kRows];
    S* dx[kRows];
    LayerNorm<V> norm[kRows];
    for (int r = 0; r < kRows; ++r) {
      z[r] = row_of<const S>(p.z, p, first + r);
      dy[r] = row_of<const S>(p.dy, p, first + r);
      dz[r] = p.dz.data ? row_of<const S>(p.dz, p, first + r) : nullptr;
      dx[r] = p.dx.data ? row_of<S>(p.dx, p, first + r) : nullptr;
      norm[r] = {((const T*)p.mean)[first + r], ((const T*)p.rstd)[first + r]};
    }
    const S* const weight = (const S*)p.weight;
    V mean_d[kRows], mean_projection[kRows];
    for (int r = 0; r < kRows; ++r) mean_d[r] = mean_projection[r] = V(T(0));
    if (p.dx.data) {
      for (int64_t begin = 0; begin < p.features; begin += kSumBlock<T>) {
        V sum_d[kRows], sum_projection[kRows];
        for (int r = 0; r < kRows; ++r) sum_d[r] = sum_projection[r] = V(T(0));
        for_columns<T>(begin, min(begin + kSumBlock<T>, p.features),
                       [&](int64_t c, int64_t count, int) __attribute__((always_inline)) {
                         const V w = load_or(weight, c, count, T(1));
                         FASTSEQ_UNROLL for (int r = 0; r < kRows; ++r) {
                           const V d = load_first(dy[r] + c, count) * w;
                           sum_d[r] = sum_d[r] + d;
                           sum_projection[r] =
                               fma(d, norm[r].normalize(load_first(z[r] + c, count)), sum_projection[r]);
                         }
                       });
        for (int r = 0; r < kRows; ++r) {
          mean_d[r] = mean_d[r] + sum_d[r];
          mean_projection[r] = mean_projection[r] + sum_projection[r];
        }
      }
      for (int r = 0; r < kRows; ++r) {
        mean_d[r] = sum_of_lanes(mean_d[r]) / T(p.features);
        mean_projection[r] = sum_of_lanes(mean_projection[r]) / T(p.features);
      }
    }
    T *const dweight = sums ? sum_of_block(block, 0) : nullptr, *const dbias = sums ? sum_of_block(block, 1) : nullptr;
    for_columns<T>(0, p.features, [&](int64_t c, int64_t count, int) __attribute__((always_inline)) {
      const V w = load_or(weight, c, count, T(1));
      V sum_weight(T(0)), sum_bias(T(0));
      if (sums) sum_weight = load(dweight + c), sum_bias = load(dbias + c);
      FASTSEQ_UNROLL for (int r = 0; r < kRows; ++r) {
        const V g = load_first(dy[r] + c, count), normalized = norm[r].normalize(load_first(z[r] + c, count));
        sum_weight = fma(g, normalized, sum_weight);
        sum_bias = sum_bias + g;
        if (!p.dx.data) continue;
        V dx_r = norm[r].backward(normalized, g * w, mean_d[r], mean_projection[r]);
        if (p.dz.data) dx_r = dx_r + load_first(dz[r] + c, count);
        store_first(dx[r] + c, dx_r, count);
      }
      if (sums) store(dweight + c, sum_weight), store(dbias + c, sum_bias);
    });
  }
};

}  // namespace fastseq::FASTSEQ_ISA
