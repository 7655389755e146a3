// The products of attention, by tiles: a thread block holds a tile of the result, a thread a small rectangle of it in
// registers. A sum runs over its terms in order, from the first to the last.
#pragma once

#include "cuda/attention_layout.cuh"

namespace fastseq::cuda {

// 16 x 16 threads; each has kM rows x kN columns of a tile of kRows x kColumns.
template <class Type, int kRowsOfThread>
struct Tile {
  using T = Type;
  static constexpr int kSide = 16, kThreads = kSide * kSide;
  static constexpr int kM = kRowsOfThread, kN = 16 / sizeof(T);  // a thread reads 16 bytes of shared memory at once
  static constexpr int kRows = kSide * kM, kColumns = kSide * kN;
  static constexpr int kDepth = 32;            // terms of a sum in shared memory at a time
  static constexpr int kPad = 16 / sizeof(T);  // keeps the alignment, and rows out of the same banks

  static __device__ int row() { return threadIdx.x / kSide * kM; }
  static __device__ int column() { return threadIdx.x % kSide * kN; }

  // The operands of a product, terms along the first axis.
  struct alignas(16) Stage {
    T a[kDepth][kRows + kPad];
    T b[kDepth][kColumns + kPad];
  };
  // Weights of rows and columns.
  struct alignas(16) Weights {
    T at[kColumns][kRows + kPad];
  };
  // One value for each thread of a row.
  struct Partials {
    T of[kRows][kSide + 1];
  };
};

// Copies the terms [k0, k0 + kDepth) of `rows` rows to out[term][row]; `value(row, term)` is called for terms below
// `depth`. Eight threads read on in a row: a sector of memory in float, and no bank of shared memory twice.
template <class Tile, int kRows, class T, class Value, int kStride>
__device__ void stage_rows(T (&out)[Tile::kDepth][kStride], int64_t k0, int64_t depth, const Value& value) {
  for (int e = threadIdx.x; e < kRows * Tile::kDepth; e += Tile::kThreads) {
    const int k = e / (8 * kRows) * 8 + e % 8, row = e / 8 % kRows;
    out[k][row] = k0 + k < depth ? value(row, k0 + k) : T(0);
  }
}

// sums += a b^T: row r of the tile is row r of a, column c row c of b, both `depth` long. Threads without a row below
// `rows` have nothing to sum. All threads of the block call this together, and may write what a and b read after it.
template <class Tile, class T, class A, class B>
__device__ void add_dots(typename Tile::Stage& stage, int64_t depth, int rows, const A& a, const B& b,
                         T (&sums)[Tile::kM][Tile::kN]) {
  for (int64_t k0 = 0; k0 < depth; k0 += Tile::kDepth) {
    stage_rows<Tile, Tile::kRows>(stage.a, k0, depth, a);
    stage_rows<Tile, Tile::kColumns>(stage.b, k0, depth, b);
    __syncthreads();
    if (Tile::row() < rows) {
#pragma unroll 8
      for (int k = 0; k < Tile::kDepth; ++k)
#pragma unroll
        for (int m = 0; m < Tile::kM; ++m)
#pragma unroll
          for (int j = 0; j < Tile::kN; ++j)
            sums[m][j] = ::fma(stage.a[k][Tile::row() + m], stage.b[k][Tile::column() + j], sums[m][j]);
    }
    __syncthreads();
  }
}

// sums[c] += weights^T b, where chunk c has the columns from first_column + c * kColumns on of b, which is `depth` rows
// of `width`. Called as add_dots is; weights that were just written need no barrier before.
template <class Tile, class T, int kStride, int kChunks, int kM, class B>
__device__ void add_product(typename Tile::Stage& stage, const T (*weights)[kStride], int depth, int rows,
                            int64_t first_column, int64_t width, const B& b, T (&sums)[kChunks][kM][Tile::kN]) {
  const int row = threadIdx.x / Tile::kSide * kM;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int64_t column = first_column + c * Tile::kColumns;
    if (column >= width) break;
    for (int k0 = 0; k0 < depth; k0 += Tile::kDepth) {
      for (int e = threadIdx.x; e < Tile::kDepth * Tile::kColumns; e += Tile::kThreads) {
        const int k = e / Tile::kColumns, j = e % Tile::kColumns;
        stage.b[k][j] = k0 + k < depth && column + j < width ? b(k0 + k, column + j) : T(0);
      }
      __syncthreads();
      if (row < rows) {
#pragma unroll 8
        for (int k = 0; k < Tile::kDepth; ++k)
#pragma unroll
          for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int j = 0; j < Tile::kN; ++j)
              sums[c][m][j] = ::fma(weights[k0 + k][row + m], stage.b[k][Tile::column() + j], sums[c][m][j]);
      }
      __syncthreads();
    }
  }
}

// Sums over the threads of a row, in their order; every one of them gets the result.
template <class Tile, class T>
__device__ void sum_rows(typename Tile::Partials& partials, T (&sums)[Tile::kM]) {
  __syncthreads();
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m) partials.of[Tile::row() + m][threadIdx.x % Tile::kSide] = sums[m];
  __syncthreads();
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m) {
    T sum = 0;
#pragma unroll
    for (int t = 0; t < Tile::kSide; ++t) sum += partials.of[Tile::row() + m][t];
    sums[m] = sum;
  }
}

// The columns of a result that a thread block holds at most; wider rows are shared by several, each of which computes
// the scores again. Kernels come in this width and in half of it, for narrow rows.
constexpr int kWidth = 128;

template <class T>
constexpr int kColumnsOfTile = Tile<T, 1>::kColumns;

inline int64_t column_blocks(int64_t width) { return ceil_div(width, kWidth); }

}  // namespace fastseq::cuda
