// Backward without a matrix of probabilities (Dao 2023, "FlashAttention-2"):
//
//   P = exp(S - lse)        dV = P'^T dO, P' being P after dropout
//   dS = P * (dropout'(dO V^T) - delta)     dQ = scale dS K     dK = scale dS^T Q
//
// A kernel each for delta, for dQ, for dK and dV, and for the gradient of the bias. Every tile of a result belongs to
// one thread block, which adds what goes into it in a fixed order; so the same call gives the same bits.
#pragma once

#include "cuda/attention_bias_gradient.cuh"

namespace fastseq::cuda {

// The grid: blocks of query rows of all heads of keys, by blocks of columns.
template <class S, int kChunks>
__global__ void __launch_bounds__(256) attention_dq(const __grid_constant__ AttentionParams p) {
  using T = Compute<S>;
  using Tile = SquareTile<T>;
  constexpr int kM = Tile::kM, kN = Tile::kN;
  __shared__ typename QueryRows<S>::Memory memory;
  __shared__ typename Tile::Weights weights;
  const RowBlock block(p, Tile::kRows);
  const int64_t first_column = int64_t(blockIdx.y) * kChunks * Tile::kColumns;
  QueryRows<S> rows(p, memory, block.b, block.kv_head);
  rows.take(block.first, block.end);

  T dq[kChunks][kM][kN] = {};
  const Range seen = keys_of_rows(p, rows.scores.window, block.first, block.end);
  for (int64_t key = seen.begin / Tile::kColumns * Tile::kColumns; key < seen.end; key += Tile::kColumns) {
    rows.differentiate(key, [&](int m, int j, T probability, T gradient, T, T derivative) {
      weights.at[Tile::column() + j][Tile::row() + m] = probability * (gradient - rows.delta[m]) * derivative;
    });
    const auto k = [&](int r, int64_t c) { return rows.k(key + r, c); };
    add_product<Tile>(memory.stage, weights.at, Tile::kColumns, rows.count, first_column, p.head_dim, k, dq);
  }
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    const Row& row = rows.row(m);
    if (!row.exists || (p.q_starts && !row.active)) continue;
    S* out = row_of<S>(p.dq, block.b, row.n, rows.extent.q_start + row.i);
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const int64_t column = first_column + c * Tile::kColumns + Tile::column() + j;
        if (column < p.head_dim) store(out + column, dq[c][m][j] * T(p.scale));
      }
  }
}

// The grid: blocks of keys of all heads of keys, by blocks of columns. Goes through the rows of the group in order.
template <class S, int kChunks>
__global__ void __launch_bounds__(256) attention_dk_dv(const __grid_constant__ AttentionParams p) {
  using T = Compute<S>;
  using Tile = SquareTile<T>;
  constexpr int kM = Tile::kM, kN = Tile::kN;
  __shared__ typename QueryRows<S>::Memory memory;
  __shared__ typename Tile::Weights weights;  // a row of it is a query row, a column a key
  const Block block(p, ceil_div(p.keys, Tile::kColumns));
  const int64_t key = block.index * Tile::kColumns, group_rows = rows_of_group(p);
  const int64_t first_column = int64_t(blockIdx.y) * kChunks * Tile::kColumns;
  QueryRows<S> rows(p, memory, block.b, block.kv_head);
  const int keys = max(int64_t(0), min(rows.extent.keys - key, int64_t(Tile::kColumns)));

  T dk[kChunks][kN][kN] = {}, dv[kChunks][kN][kN] = {};
  for (int64_t first = 0; first < group_rows && keys; first += Tile::kRows) {
    const int64_t end = min(first + Tile::kRows, group_rows);
    const Range seen = keys_of_rows(p, rows.scores.window, first, end);
    if (seen.empty() || seen.begin >= key + keys || seen.end <= key) continue;
    rows.take(first, end);
    T scores[kM][kN];
    rows.differentiate(key, [&](int m, int j, T probability, T gradient, T kept, T derivative) {
      weights.at[Tile::row() + m][Tile::column() + j] = kept;
      scores[m][j] = probability * (gradient - rows.delta[m]) * derivative;
    });
    if (p.dv.data) {
      const auto dout = [&](int r, int64_t c) { return rows.dout(r, c); };
      add_product<Tile>(memory.stage, weights.at, Tile::kRows, keys, first_column, p.value_dim, dout, dv);
    }
    if (p.dk.data) {
      const auto q = [&](int r, int64_t c) { return rows.q(r, c); };
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int j = 0; j < kN; ++j) weights.at[Tile::row() + m][Tile::column() + j] = scores[m][j];
      add_product<Tile>(memory.stage, weights.at, Tile::kRows, keys, first_column, p.head_dim, q, dk);
    }
  }
  const auto write = [&](const Heads& out, int64_t width, const T(&sums)[kChunks][kN][kN]) {
#pragma unroll
    for (int m = 0; m < kN; ++m) {
      const int64_t j = key + threadIdx.x / Tile::kSide * kN + m;
      if (j >= (p.k_starts ? rows.extent.keys : p.keys)) continue;
      S* row = row_of<S>(out, block.b, block.kv_head, rows.extent.k_start + j);
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int i = 0; i < kN; ++i) {
          const int64_t column = first_column + c * Tile::kColumns + Tile::column() + i;
          if (column < width) store(row + column, sums[c][m][i]);
        }
    }
  };
  if (p.dk.data) write(p.dk, p.head_dim, dk);
  if (p.dv.data) write(p.dv, p.value_dim, dv);
}

template <class S>
struct AttentionBackward {
  using T = Compute<S>;
  using Tile = SquareTile<T>;

  static Status run(const AttentionParams& p) {
    const DeviceGuard guard(p.device.index);
    cudaError_t status = guard.status();
    const int64_t query_blocks = row_blocks(p, Tile::kRows);
    const int64_t key_blocks = p.batch * p.kv_heads * ceil_div(p.keys, Tile::kColumns);
    if (status == cudaSuccess) status = launch_blocks(p.device, attention_delta<S>, query_blocks, 1, 256, p);
    if (status == cudaSuccess && p.dq.data)
      status = queue(p, attention_dq<S, kAll / 2>, attention_dq<S, kAll>, query_blocks, p.head_dim);
    const int64_t width = max(p.dk.data ? p.head_dim : int64_t(0), p.dv.data ? p.value_dim : int64_t(0));
    if (status == cudaSuccess && width)
      status = queue(p, attention_dk_dv<S, kAll / 2>, attention_dk_dv<S, kAll>, key_blocks, width);
    if (status == cudaSuccess && p.dbias) status = queue_bias_gradient<S>(p);
    return status_of(status);
  }

 private:
  static constexpr int kAll = kWidth / Tile::kColumns;

  template <class Kernel>
  static cudaError_t queue(const AttentionParams& p, Kernel narrow, Kernel wide, int64_t blocks, int64_t width) {
    return launch_blocks(p.device, width <= kWidth / 2 ? narrow : wide, blocks, column_blocks(width), 256, p);
  }
};

}  // namespace fastseq::cuda
