// The gradient of attention's bias: dS summed over the axes along which the bias was broadcast. A thread block has a
// tile of it and adds all that goes into it, in the order of batch rows, heads and blocks of queries.
#pragma once

#include "cuda/attention_gradient.cuh"

namespace fastseq::cuda {

// Axes (b, n, i, j) of the bias that are not broadcast.
struct Whole {
  bool axis[4];

  explicit Whole(const AttentionParams& p) {
    for (int a = 0; a < 4; ++a) axis[a] = p.dbias_strides[a] != 0;
  }
  // Where an axis is broadcast, a block takes all of it, else the part `index`.
  __device__ Range part(int a, int64_t index, int64_t size) const {
    return axis[a] ? Range{index, index + 1} : Range{0, size};
  }
  int64_t count(int a, int64_t size) const { return axis[a] ? size : 1; }
};

// The grid: tiles of keys fastest, then blocks of queries, heads and batch rows, of the whole axes. One block on a
// multiprocessor: for two, registers would spill.
template <class S>
__global__ void __launch_bounds__(256, 1) bias_gradient(const __grid_constant__ AttentionParams p, const Whole whole) {
  using T = Compute<S>;
  using Tile = SquareTile<T>;
  constexpr int kM = Tile::kM, kN = Tile::kN;
  __shared__ typename QueryRows<S>::Memory memory;
  __shared__ typename Tile::Weights sums_of_rows;
  const int64_t tiles = ceil_div(p.keys, Tile::kColumns), row_blocks = ceil_div(p.queries, Tile::kRows);
  const int64_t row_parts = whole.axis[2] ? row_blocks : 1, head_parts = whole.axis[1] ? p.heads : 1;
  const int64_t index = blockIdx.x / tiles, key = blockIdx.x % tiles * Tile::kColumns;
  const Range blocks = whole.part(2, index % row_parts, row_blocks);
  const Range heads = whole.part(1, index / row_parts % head_parts, p.heads);
  const Range batch = whole.part(0, index / row_parts / head_parts, p.batch);

  T sums[kM][kN] = {};
  for (int64_t b = batch.begin; b < batch.end; ++b)
    for (int64_t n = heads.begin; n < heads.end; ++n) {
      QueryRows<S> rows(p, memory, b, n / group_of(p));
      for (int64_t block = blocks.begin; block < blocks.end; ++block) {
        const int64_t start = n % group_of(p) * p.queries, first = start + block * Tile::kRows;
        const int64_t end = min(first + Tile::kRows, start + p.queries);
        const Range seen = keys_of_rows(p, rows.scores.window, first, end);
        if (seen.empty() || seen.begin >= key + Tile::kColumns || seen.end <= key) continue;
        rows.take(first, end);
        rows.differentiate(key, [&](int m, int j, T probability, T gradient, T, T) {
          sums[m][j] += probability * (gradient - rows.delta[m]);
        });
      }
    }

#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int j = 0; j < kN; ++j) sums_of_rows.at[Tile::column() + j][Tile::row() + m] = sums[m][j];
  __syncthreads();
  T* out = (T*)p.dbias + batch.begin * p.dbias_strides[0] + heads.begin * p.dbias_strides[1];
  const int rows = whole.axis[2] ? Tile::kRows : 1;
  for (int e = threadIdx.x; e < rows * Tile::kColumns; e += Tile::kThreads) {
    const int row = e / Tile::kColumns, column = e % Tile::kColumns;
    const int64_t i = blocks.begin * Tile::kRows + row, j = key + column;
    if (i >= p.queries || j >= p.keys) continue;
    T sum = sums_of_rows.at[column][row];
    if (!whole.axis[2])
      for (int r = 1; r < Tile::kRows; ++r) sum += sums_of_rows.at[column][r];
    out[i * p.dbias_strides[2] + j * p.dbias_strides[3]] = sum;
  }
}

// A bias that is the same for all keys: the softmax does not feel it, lse alone does. The grid: blocks of queries
// fastest, then heads and batch rows, of the whole axes; a thread has a query, or every 256th where they share a bias.
template <class S>
__global__ void __launch_bounds__(256)
    shared_bias_gradient(const __grid_constant__ AttentionParams p, const Whole whole) {
  using T = Compute<S>;
  constexpr int kThreads = 256;
  __shared__ T partials[kThreads];
  const int64_t row_parts = whole.axis[2] ? ceil_div(p.queries, kThreads) : 1;
  const int64_t head_parts = whole.axis[1] ? p.heads : 1, index = blockIdx.x / row_parts;
  const Range heads = whole.part(1, index % head_parts, p.heads);
  const Range batch = whole.part(0, index / head_parts, p.batch);
  const int64_t i = blockIdx.x % row_parts * kThreads + threadIdx.x;

  T sum = 0;
  for (int64_t b = batch.begin; b < batch.end; ++b) {
    const Extent extent(p, b);
    for (int64_t n = heads.begin; n < heads.end; ++n)
      for (int64_t row = i; row < (whole.axis[2] ? min(i + 1, extent.queries) : extent.queries); row += kThreads) {
        const int64_t at = extent.q_start + row;
        const double lse = *element_of(p.lse, p.lse_strides, b, n, at);
        if (lse == kNever<double>) continue;
        const double dlse = p.dlse ? *element_of(p.dlse, p.dlse_strides, b, n, at) : 0;
        sum += T(lse == lse ? dlse : lse);
      }
  }
  T* out = (T*)p.dbias + batch.begin * p.dbias_strides[0] + heads.begin * p.dbias_strides[1];
  if (whole.axis[2]) {
    if (i < p.queries) out[i * p.dbias_strides[2]] = sum;
    return;
  }
  partials[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int t = 1; t < kThreads; ++t) sum += partials[t];
  *out = sum;
}

template <class S>
cudaError_t queue_bias_gradient(const AttentionParams& p) {
  using Tile = SquareTile<Compute<S>>;
  const Whole whole(p);
  const int64_t others = whole.count(0, p.batch) * whole.count(1, p.heads);
  if (!whole.axis[3])
    return launch_blocks(p.device, shared_bias_gradient<S>, others * whole.count(2, ceil_div(p.queries, 256)), 1, 256,
                         p, whole);
  const int64_t blocks = whole.count(2, ceil_div(p.queries, Tile::kRows)) * ceil_div(p.keys, Tile::kColumns);
  return launch_blocks(p.device, bias_gradient<S>, others * blocks, 1, 256, p, whole);
}

}  // namespace fastseq::cuda
