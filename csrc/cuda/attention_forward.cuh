// Forward without a matrix of scores (Milakov & Gimelshein 2018; Dao et al. 2022, "FlashAttention"): a thread block has
// a tile of query rows and goes through the keys tile by tile. Where there are few blocks and many keys, as in decoding
// with a cache, the keys are cut into parts, whose results a second kernel merges in their order.
#pragma once

#include "cuda/attention_scores.cuh"

namespace fastseq::cuda {

// How the keys are cut: by the shape alone, so that the same call gives the same bits on every GPU.
struct Parts {
  static constexpr int64_t kBlocks = 256;     // of the grid, where there are keys enough: two for every multiprocessor
  static constexpr int64_t kLeastKeys = 256;  // of a part

  int64_t count, keys;

  Parts(const AttentionParams& p, int64_t rows_of_tile, int64_t keys_of_tile) {
    const int64_t blocks = row_blocks(p, rows_of_tile);
    const int64_t wanted = blocks ? max(int64_t(1), min(ceil_div(kBlocks, blocks), p.keys / kLeastKeys)) : int64_t(1);
    keys = ceil_div(ceil_div(p.keys, wanted), keys_of_tile) * keys_of_tile;
    count = keys ? ceil_div(p.keys, keys) : 1;
  }
};

// The results of the parts, for row (b, n, i) and part: the softmax so far, and the sum of values (E).
template <class T>
struct PartialResults {
  T *largest, *sum, *values;
  int64_t parts, value_dim;

  __device__ PartialResults(const AttentionParams& p, int64_t parts)
      : largest((T*)p.parts),
        sum(largest + p.batch * p.heads * p.queries * parts),
        values(sum + p.batch * p.heads * p.queries * parts),
        parts(parts),
        value_dim(p.value_dim) {}

  static int64_t bytes(const AttentionParams& p, int64_t parts) {
    return parts == 1 ? 0 : p.batch * p.heads * p.queries * parts * (2 + p.value_dim) * int64_t(sizeof(T));
  }
};

// Writes `count` values of a finished row from a column on: the average from the weighted sum.
template <class S, class T>
__device__ void finish_values(const AttentionParams& p, const Extent& extent, int64_t b, const Row& row, int64_t column,
                              int count, const T* values, T sum) {
  if (!row.exists || (p.q_starts && !row.active)) return;
  const T factor = sum == 0 ? T(0) : 1 / sum;
  S* out = row_of<S>(p.out, b, row.n, extent.q_start + row.i) + column;
  for (int j = 0; j < count && column + j < p.value_dim; ++j) store(out + j, sum == 0 ? T(0) : values[j] * factor);
}

template <class T>
__device__ void finish_lse(const AttentionParams& p, const Extent& extent, int64_t b, const Row& row, T largest,
                           T sum) {
  if (!p.lse || !row.exists || (p.q_starts && !row.active)) return;
  *element_of(p.lse, p.lse_strides, b, row.n, extent.q_start + row.i) =
      sum == 0 ? kNever<double> : double(largest) + double(::log(sum));
}

// The grid: blocks of rows of all heads of keys, by parts times blocks of columns. Left to itself, the compiler keeps
// to 128 registers for two blocks on a multiprocessor, and spills.
template <class S, int kM, int kChunks>
__global__ void __launch_bounds__(256, kM == 1 ? 2 : 1)
    attention_forward(const __grid_constant__ AttentionParams p, const Parts parts) {
  using T = Compute<S>;
  using V = Lane<T>;
  using Tile = Tile<T, kM>;
  constexpr int kN = Tile::kN;
  __shared__ typename Tile::Stage stage;
  __shared__ typename Tile::Weights weights;
  __shared__ typename Tile::Partials partials;
  __shared__ Row rows[Tile::kRows];

  const RowBlock block(p, Tile::kRows);
  const int64_t b = block.b, part = blockIdx.y % parts.count;
  const int64_t first_column = blockIdx.y / parts.count * kChunks * Tile::kColumns;
  const int count = block.end - block.first;
  const Extent extent(p, b);
  const Scores<S> scores(p, extent, b);
  if (threadIdx.x < Tile::kRows) rows[threadIdx.x] = Row(p, extent, block.kv_head, block.first + threadIdx.x);
  __syncthreads();
  const auto q = [&](int r, int64_t c) {
    const Row& row = rows[r];
    return row.active ? load(row_of<const S>(p.q, b, row.n, extent.q_start + row.i) + c) * T(p.scale) : T(0);
  };

  OnlineSoftmax<V> softmax[kM];  // the sums are of this thread's columns alone until the end
#pragma unroll
  for (int m = 0; m < kM; ++m) softmax[m] = {kNever<T>, T(0)};
  T values[kChunks][kM][kN] = {};
  const Range seen = keys_of_rows(p, scores.window, block.first, block.end);
  const int64_t begin = max(part * parts.keys, seen.begin / Tile::kColumns * Tile::kColumns);
  const int64_t stop = min((part + 1) * parts.keys, seen.end);
  for (int64_t key = begin; key < stop; key += Tile::kColumns) {
    const auto k = [&](int r, int64_t c) {
      return key + r < extent.keys ? load(row_of<const S>(p.k, b, block.kv_head, extent.k_start + key + r) + c) : T(0);
    };
    const auto v = [&](int r, int64_t c) {
      return key + r < extent.keys ? load(row_of<const S>(p.v, b, block.kv_head, extent.k_start + key + r) + c) : T(0);
    };
    T s[kM][kN] = {};
    add_dots<Tile>(stage, p.head_dim, count, q, k, s);

#pragma unroll
    for (int m = 0; m < kM; ++m) {
      V largest = kNever<T>;
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        T derivative;
        s[m][j] = scores.of(rows[Tile::row() + m], key + Tile::column() + j, s[m][j], derivative);
        largest = max(V(s[m][j]), largest);
      }
      partials.of[Tile::row() + m][threadIdx.x % Tile::kSide] = largest.raw;
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      V largest = kNever<T>;
#pragma unroll
      for (int t = 0; t < Tile::kSide; ++t) largest = max(V(partials.of[Tile::row() + m][t]), largest);
      const V factor = softmax[m].raise(largest), pivot = softmax_pivot(softmax[m].largest);
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int j = 0; j < kN; ++j) values[c][m][j] *= factor.raw;
      bool kept[kN];
      if (scores.drops()) scores.draw(rows[Tile::row() + m], key + Tile::column(), kept);
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const V weight = exp_vanishing(V(s[m][j]) - pivot);
        softmax[m].sum = softmax[m].sum + weight;
        weights.at[Tile::column() + j][Tile::row() + m] =
            scores.drops() ? scores.drop(weight.raw, kept[j]) : weight.raw;
      }
    }
    add_product<Tile>(stage, weights.at, Tile::kColumns, count, first_column, p.value_dim, v, values);
  }

  T sums[kM];
#pragma unroll
  for (int m = 0; m < kM; ++m) sums[m] = softmax[m].sum.raw;
  sum_rows<Tile>(partials, sums);
  const bool first_thread = threadIdx.x % Tile::kSide == 0 && first_column == 0;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    const Row& row = rows[Tile::row() + m];
    const PartialResults<T> results(p, parts.count);
    const int64_t at = ((b * p.heads + row.n) * p.queries + row.i) * parts.count + part;
    if (first_thread && parts.count == 1) finish_lse(p, extent, b, row, softmax[m].largest.raw, sums[m]);
    if (first_thread && parts.count > 1 && row.exists) {
      results.largest[at] = softmax[m].largest.raw;
      results.sum[at] = sums[m];
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int64_t column = first_column + c * Tile::kColumns + Tile::column();
      if (parts.count == 1)
        finish_values<S>(p, extent, b, row, column, kN, values[c][m], sums[m]);
      else if (row.exists)
#pragma unroll
        for (int j = 0; j < kN && column + j < p.value_dim; ++j)
          results.values[at * p.value_dim + column + j] = values[c][m][j];
    }
  }
}

// A block merges the parts of a row, in their order, into its result; a thread has a column.
template <class S>
__global__ void __launch_bounds__(128) merge_parts(const __grid_constant__ AttentionParams p, const Parts parts) {
  using T = Compute<S>;
  using V = Lane<T>;
  const int64_t group = blockIdx.x / rows_of_group(p), b = group / p.kv_heads;
  const Extent extent(p, b);
  const Row row(p, extent, group % p.kv_heads, blockIdx.x % rows_of_group(p));
  const PartialResults<T> results(p, parts.count);
  const int64_t first = ((b * p.heads + row.n) * p.queries + row.i) * parts.count;
  for (int64_t column = threadIdx.x; column < p.value_dim; column += blockDim.x) {
    OnlineSoftmax<V> softmax{kNever<T>, T(0)};
    V sum = T(0);
    for (int64_t part = first; part < first + parts.count; ++part) {
      V own, other = softmax.merge({results.largest[part], results.sum[part]}, own);
      sum = fma(V(results.values[part * p.value_dim + column]), other, sum * own);
    }
    finish_values<S>(p, extent, b, row, column, 1, &sum.raw, softmax.sum.raw);
    if (column == 0) finish_lse(p, extent, b, row, softmax.largest.raw, softmax.sum.raw);
  }
}

template <class S>
struct AttentionForward {
  using T = Compute<S>;
  static constexpr int kColumns = kColumnsOfTile<T>, kM = kColumns / 16;

  // With few rows, a tile of one row for a thread.
  static bool few_rows(const AttentionParams& p) { return rows_of_group(p) <= 16; }
  static Parts parts_of(const AttentionParams& p) { return Parts(p, few_rows(p) ? 16 : 16 * kM, kColumns); }
  static int64_t parts_bytes(const AttentionParams& p) { return PartialResults<T>::bytes(p, parts_of(p).count); }

  static Status run(const AttentionParams& p) {
    const DeviceGuard guard(p.device.index);
    cudaError_t status = guard.status();
    const Parts parts = parts_of(p);
    if (status == cudaSuccess) status = few_rows(p) ? queue_tiles<1>(p, parts) : queue_tiles<kM>(p, parts);
    if (status == cudaSuccess && parts.count > 1)
      status = launch_blocks(p.device, merge_parts<S>, p.batch * p.heads * p.queries, 1, 128, p, parts);
    return status_of(status);
  }

 private:
  template <int kRowsOfThread>
  static cudaError_t queue_tiles(const AttentionParams& p, const Parts& parts) {
    constexpr int kAll = kWidth / kColumns;
    const auto kernel = p.value_dim <= kWidth / 2 ? attention_forward<S, kRowsOfThread, kAll / 2>
                                                  : attention_forward<S, kRowsOfThread, kAll>;
    const int64_t blocks = row_blocks(p, 16 * kRowsOfThread);
    return launch_blocks(p.device, kernel, blocks, parts.count * column_blocks(p.value_dim), 256, p, parts);
  }
};

}  // namespace fastseq::cuda
