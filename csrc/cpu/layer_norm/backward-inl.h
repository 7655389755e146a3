// Layer normalization, backward: two passes over a row, the second from the cache. One row at a time: two that share a
// page take up to 30 % longer where they come from memory, as the prefetcher follows one of them (Zen 3).
#pragma once

#include "cpu/layer_norm/rows-inl.h"

namespace fastseq::FASTSEQ_ISA {

template <class S>
struct LayerNormBackward {
  using T = Compute<S>;
  using V = Vec<T>;

  // The gradients of weight and bias are sums over blocks of rows, added in order of the blocks. The blocks follow from
  // the shape alone, and so do the results.
  static constexpr int64_t kSmallestBlock = 16, kMostBlocks = 64;

  const LayerNormParams& p;
  int64_t rows, block_rows, blocks, width;  // width of a sum: whole vectors
  T* sums;                                  // (blocks, 2, width): of dweight, of dbias; null: neither is wanted

  static Status run(const LayerNormParams& p) {
    LayerNormBackward backward{p, p.steps * p.batch, 0, 0, ceil_div(p.features, V::kLanes) * V::kLanes, nullptr};
    backward.block_rows = max(kSmallestBlock, ceil_div(backward.rows, kMostBlocks));
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
    const Share share = Share::of(blocks, team);
    for (int64_t block = share.begin; block < share.end; ++block) {
      if (sums)
        for (int64_t c = 0; c < 2 * width; c += V::kLanes) store(sum_of_block(block, 0) + c, V(T(0)));
      const int64_t end = min((block + 1) * block_rows, rows);
      for (int64_t row = block * block_rows; row < end; ++row) differentiate(row, block);
    }
    if (!sums) return;
    team.wait();
    const Share vectors = Share::of(width / V::kLanes, team);
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

  // The means over a row of d = dy * weight and of d * normalize(z).
  void means(const S* dy, const S* z, const LayerNorm<V>& norm, V* mean_d, V* mean_projection) const {
    V d_of_row(T(0)), projection_of_row(T(0));
    for (int64_t begin = 0; begin < p.features; begin += kSumBlock<T>) {
      V sum_d[kAccumulators], sum_projection[kAccumulators];
      for (int i = 0; i < kAccumulators; ++i) sum_d[i] = sum_projection[i] = V(T(0));
      for_columns<T>(begin, min(begin + kSumBlock<T>, p.features),
                     [&](int64_t c, int64_t count, int i) __attribute__((always_inline)) {
                       const V d = load_first(dy + c, count) * load_or((const S*)p.weight, c, count, T(1));
                       sum_d[i] = sum_d[i] + d;
                       sum_projection[i] = fma(d, norm.normalize(load_first(z + c, count)), sum_projection[i]);
                     });
      for (int i = 0; i < kAccumulators; ++i) {
        d_of_row = d_of_row + sum_d[i];
        projection_of_row = projection_of_row + sum_projection[i];
      }
    }
    *mean_d = sum_of_lanes(d_of_row) / T(p.features);
    *mean_projection = sum_of_lanes(projection_of_row) / T(p.features);
  }

  void differentiate(int64_t row, int64_t block) const {
    const S *const z = nth_row<const S>(p.z, p.batch, row), *const dy = nth_row<const S>(p.dy, p.batch, row);
    const S* const dz = p.dz.data ? nth_row<const S>(p.dz, p.batch, row) : nullptr;
    S* const dx = p.dx.data ? nth_row<S>(p.dx, p.batch, row) : nullptr;
    const LayerNorm<V> norm = {((const T*)p.mean)[row], ((const T*)p.rstd)[row]};
    V mean_d(T(0)), mean_projection(T(0));
    if (dx) means(dy, z, norm, &mean_d, &mean_projection);
    T *const dweight = sums ? sum_of_block(block, 0) : nullptr, *const dbias = sums ? sum_of_block(block, 1) : nullptr;
    for_columns<T>(0, p.features, [&](int64_t c, int64_t count, int) __attribute__((always_inline)) {
      const V g = load_first(dy + c, count), normalized = norm.normalize(load_first(z + c, count));
      if (sums) {
        store(dweight + c, fma(g, normalized, load(dweight + c)));
        store(dbias + c, load(dbias + c) + g);
      }
      if (!dx) return;
      V dx_c = norm.backward(normalized, g * load_or((const S*)p.weight, c, count, T(1)), mean_d, mean_projection);
      if (dz) dx_c = dx_c + load_first(dz + c, count);
      store_first(dx + c, dx_c, count);
    });
  }
};

}  // namespace fastseq::FASTSEQ_ISA
