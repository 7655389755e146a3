// Gradients of scores, tile by tile: what all kernels of attention backward share.
#pragma once

#include "cuda/attention_scores.cuh"

namespace fastseq::cuda {

// In backward, a tile has as many query rows as keys.
template <class T>
using SquareTile = Tile<T, kColumnsOfTile<T> / 16>;

// Query rows that a thread block holds at a time, and what it computes of them with a tile of keys.
template <class S>
struct QueryRows {
  using T = Compute<S>;
  using V = Lane<T>;
  using Tile = SquareTile<T>;
  static constexpr int kM = Tile::kM, kN = Tile::kN;

  // Shared by the threads of the block.
  struct Memory {
    typename Tile::Stage stage;
    Row rows[Tile::kRows];
  };

  const AttentionParams& p;
  Memory& memory;
  const int64_t b, kv_head;
  const Extent extent;
  const Scores<S> scores;
  int count;  // rows from the first to the last that there is
  // Of this thread's rows. lse is two terms, and +inf where there is no key, which makes P zero.
  T lse[kM], lse_rest[kM], delta[kM];

  __device__ QueryRows(const AttentionParams& p, Memory& memory, int64_t b, int64_t kv_head)
      : p(p), memory(memory), b(b), kv_head(kv_head), extent(p, b), scores(p, extent, b) {}

  // Takes the rows [first, end) of the group, not more than a tile has. All threads of the block call this together.
  __device__ void take(int64_t first, int64_t end) {
    count = end - first;
    __syncthreads();
    if (threadIdx.x < Tile::kRows) {
      Row row(p, extent, kv_head, first + threadIdx.x);
      row.active = row.active && int(threadIdx.x) < count;
      memory.rows[threadIdx.x] = row;
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const Row& row = this->row(m);
      const double whole = row.active ? of_row(p.lse, p.lse_strides, row) : kNever<double>;
      lse[m] = T(whole == kNever<double> ? -whole : whole);
      lse_rest[m] = isfinite(whole) ? T(whole - lse[m]) : T(0);
      delta[m] = row.active && p.delta ? T(of_row(p.delta, p.delta_strides, row)) : T(0);
    }
  }

  __device__ const Row& row(int m) const { return memory.rows[Tile::row() + m]; }
  __device__ double of_row(const double* data, const int64_t* strides, const Row& row) const {
    return *element_of(data, strides, b, row.n, extent.q_start + row.i);
  }

  // Values of the rows taken, and of the keys from `key` on; 0 for padding.
  __device__ T q(int r, int64_t c) const { return of_query(p.q, r, c) * T(p.scale); }
  __device__ T dout(int r, int64_t c) const { return of_query(p.dout, r, c); }
  __device__ T k(int64_t key, int64_t c) const { return of_key(p.k, key, c); }
  __device__ T v(int64_t key, int64_t c) const { return of_key(p.v, key, c); }

  // Calls use(m, j, probability, its gradient, what dropout leaves of the probability, derivative of the softcap) for
  // this thread's rectangle of the rows taken and the keys from `key` on.
  template <class Use>
  __device__ void differentiate(int64_t key, const Use& use) const {
    T s[kM][kN] = {}, gradient[kM][kN] = {};
    add_dots<Tile>(
        memory.stage, p.head_dim, count, [&](int r, int64_t c) { return q(r, c); },
        [&](int r, int64_t c) { return k(key + r, c); }, s);
    add_dots<Tile>(
        memory.stage, p.value_dim, count, [&](int r, int64_t c) { return dout(r, c); },
        [&](int r, int64_t c) { return v(key + r, c); }, gradient);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      bool kept[kN];
      if (scores.drops()) scores.draw(row(m), key + Tile::column(), kept);
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        T derivative;
        const T score = scores.of(row(m), key + Tile::column() + j, s[m][j], derivative);
        const T probability = exp_vanishing(V(score - lse[m] - lse_rest[m])).raw;
        if (scores.drops())
          use(m, j, probability, scores.drop(gradient[m][j], kept[j]), scores.drop(probability, kept[j]), derivative);
        else
          use(m, j, probability, gradient[m][j], probability, derivative);
      }
    }
  }

 private:
  __device__ T of_query(const Heads& heads, int r, int64_t c) const {
    const Row& row = memory.rows[r];
    return row.active ? load(row_of<const S>(heads, b, row.n, extent.q_start + row.i) + c) : T(0);
  }
  __device__ T of_key(const Heads& heads, int64_t key, int64_t c) const {
    return key < extent.keys ? load(row_of<const S>(heads, b, kv_head, extent.k_start + key) + c) : T(0);
  }
};

// delta, the mean gradient of a row's probabilities less dlse; dS = P * (dP - delta). It is computed from these very
// gradients and not as <dout, out>: what they err by in common then cancels, and so does what lse errs by, which makes
// the probabilities of large scores add up to 1 + 60 eps. Where a query sees one key alone, dS is exactly dlse.
template <class S>
__global__ void __launch_bounds__(256) attention_delta(const __grid_constant__ AttentionParams p) {
  using T = Compute<S>;
  using Tile = SquareTile<T>;
  constexpr int kM = Tile::kM;
  __shared__ typename QueryRows<S>::Memory memory;
  __shared__ typename Tile::Partials partials;
  const RowBlock block(p, Tile::kRows);
  QueryRows<S> rows(p, memory, block.b, block.kv_head);
  rows.take(block.first, block.end);

  T sum[kM] = {}, total[kM] = {};
  const Range seen = keys_of_rows(p, rows.scores.window, block.first, block.end);
  for (int64_t key = seen.begin / Tile::kColumns * Tile::kColumns; key < seen.end; key += Tile::kColumns)
    rows.differentiate(key, [&](int m, int, T probability, T gradient, T, T) {
      sum[m] = ::fma(probability, gradient, sum[m]);
      total[m] += probability;
    });
  sum_rows<Tile>(partials, sum);
  sum_rows<Tile>(partials, total);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    const Row& row = rows.row(m);
    if (threadIdx.x % Tile::kSide || !row.active) continue;
    const T dlse = p.dlse ? T(rows.of_row(p.dlse, p.dlse_strides, row)) : T(0);
    *element_of(p.delta, p.delta_strides, block.b, row.n, rows.extent.q_start + row.i) =
        total[m] == 0 ? T(0) : sum[m] / total[m] - dlse;
  }
}

}  // namespace fastseq::cuda
