// Which rows of an attention call a thread block holds.
#pragma once

#include "cuda/common.cuh"
#include "rows/attention.h"

namespace fastseq::cuda {

__host__ __device__ inline int64_t group_of(const AttentionParams& p) { return p.heads / p.kv_heads; }
__host__ __device__ inline int64_t rows_of_group(const AttentionParams& p) { return group_of(p) * p.queries; }

// A query of the rows that share a head of keys: the L queries of its first query head, then those of the second, and
// so on. So the heads of a group are together in a thread block, and keys are read once for all of them.
struct Row {
  int64_t n, i;
  bool exists, active;  // there is such a row; and it is no padding

  Row() = default;
  __device__ Row(const AttentionParams& p, const Extent& extent, int64_t kv_head, int64_t r)
      : n(kv_head * group_of(p) + r / p.queries),
        i(r % p.queries),
        exists(r < rows_of_group(p)),
        active(exists && i < extent.queries) {}
};

// The keys that one or more of the rows [first, end) of a group may see, or a few more of them.
__device__ inline Range keys_of_rows(const AttentionParams& p, const Window& window, int64_t first, int64_t end) {
  const int64_t i = first % p.queries, count = min(end - first, window.queries - i);
  if (i + end - first > p.queries) return window.queries > 0 ? window.keys_of(0, window.queries) : Range{0, 0};
  return count > 0 ? window.keys_of(i, count) : Range{0, 0};
}

// What a block of the grid works on, where each head of keys is given `count` blocks.
struct Block {
  int64_t b, kv_head, index;

  __device__ Block(const AttentionParams& p, int64_t count)
      : b(blockIdx.x / count / p.kv_heads),
        kv_head(blockIdx.x / count % p.kv_heads),
        index(count - 1 - blockIdx.x % count) {
  }  // with a causal mask, the last rows see the most keys: they start first
};

// In a grid of tiles of query rows, the rows [first, end) of its group that a block has.
struct RowBlock : Block {
  int64_t first, end;

  __device__ RowBlock(const AttentionParams& p, int64_t rows_of_tile)
      : Block(p, ceil_div(rows_of_group(p), rows_of_tile)),
        first(index * rows_of_tile),
        end(min(first + rows_of_tile, rows_of_group(p))) {}
};

// How many blocks that grid has along x.
inline int64_t row_blocks(const AttentionParams& p, int64_t rows_of_tile) {
  return p.batch * p.kv_heads * ceil_div(rows_of_group(p), rows_of_tile);
}

// As `launch`, for any number of blocks.
template <class... Params, class... Args>
cudaError_t launch_blocks(const Device& device, void (*kernel)(Params...), int64_t x, int64_t y, int threads,
                          const Args&... args) {
  if (x == 0 || y == 0) return cudaSuccess;
  if (x > 0x7fffffff || y > 0xffff) return cudaErrorInvalidConfiguration;
  return launch(device, kernel, dim3(unsigned(x), unsigned(y)), threads, args...);
}

}  // namespace fastseq::cuda
