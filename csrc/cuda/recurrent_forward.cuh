// Forward: one launch for each step.
#pragma once

#include "cuda/recurrent.cuh"

namespace fastseq::cuda {

// A block holds kRows rows x kUnits units with all their gates; a thread one row and unit.
struct ForwardTile {
  static constexpr int kRows = 16, kUnits = 8, kThreads = kRows * kUnits;
  static constexpr int kDepth = 32;  // terms of a sum in shared memory at a time: a warp reads 32 in a row
};

// sum[i] += <a row, the row of w that is gate `gate_of(i)` of this thread's unit>, both `depth` long. `a(b, k)` is
// called for rows below `rows`. All threads of the block call this together.
template <class Cell, class S, class T, class Operand>
__device__ void multiply(const Operand& a, int64_t rows, const S* w, int64_t depth, int64_t hidden_size,
                         int (*gate_of)(int), T (&sum)[Cell::kTerms]) {
  using Tile = ForwardTile;
  constexpr int kDepth = Tile::kDepth, kColumns = Cell::kTerms * Tile::kUnits;
  __shared__ T a_tile[Tile::kRows][kDepth + 1], w_tile[kColumns][kDepth + 1];  // + 1: no two rows in the same bank
  const int thread = threadIdx.x, row = thread / Tile::kUnits, unit = thread % Tile::kUnits;
  const int64_t first_row = int64_t(blockIdx.x) * Tile::kRows, first_unit = int64_t(blockIdx.y) * Tile::kUnits;
  for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
    const int lane = thread % kDepth;
    const int64_t k = k0 + lane;
    for (int r = thread / kDepth; r < Tile::kRows; r += Tile::kThreads / kDepth)
      a_tile[r][lane] = k < depth && first_row + r < rows ? a(first_row + r, k) : T(0);
    for (int c = thread / kDepth; c < kColumns; c += Tile::kThreads / kDepth) {
      const int64_t u = first_unit + c % Tile::kUnits;
      const int64_t w_row = gate_of(c / Tile::kUnits) * hidden_size + u;
      w_tile[c][lane] = k < depth && u < hidden_size ? load(w + w_row * depth + k) : T(0);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kDepth; ++j)
#pragma unroll
      for (int i = 0; i < Cell::kTerms; ++i) sum[i] = ::fma(a_tile[row][j], w_tile[i * Tile::kUnits + unit][j], sum[i]);
    __syncthreads();
  }
}

template <class Cell, class S>
__global__ void __launch_bounds__(ForwardTile::kThreads)
    forward_step(const RecurrentParams p, const Step step, const int64_t total_rows) {
  using T = Compute<S>;
  using L = Layer<Cell, S>;
  const L layer{p, step};
  const int64_t H = p.hidden_size, active = step.now.active;
  const int64_t b = int64_t(blockIdx.x) * ForwardTile::kRows + threadIdx.x / ForwardTile::kUnits;
  const int64_t u = int64_t(blockIdx.y) * ForwardTile::kUnits + threadIdx.x % ForwardTile::kUnits;

  T x[Cell::kTerms] = {}, r[Cell::kTerms] = {};  // sums begin with their bias
  if (p.b_ih && u < H) {
#pragma unroll
    for (int i = 0; i < Cell::kTerms; ++i) {
      x[i] = load((const S*)p.b_ih + Cell::input_gate(i) * H + u);
      r[i] = load((const S*)p.b_hh + Cell::recurrent_gate(i) * H + u);
    }
  }
  const auto hidden = [&](int64_t row, int64_t k) {
    const S h = layer.hidden_before(row, k);
    return load(&h);
  };
  const auto input = [&](int64_t row, int64_t k) { return load(layer.template row<const S>(p.x, step.now, row) + k); };
  multiply<Cell>(hidden, active, (const S*)p.w_hh, H, H, Cell::recurrent_gate, r);
  if (p.x.data) multiply<Cell>(input, active, (const S*)p.w_ih, p.input_size, H, Cell::input_gate, x);
  if (u >= H || b >= step.rows) return;

  if (b >= active) {
    if (b < step.empty_begin) return;
    layer.store_state(p.h_n, b, u, layer.load_state(p.h_0, b, u));
    layer.store_state(p.c_n, b, u, layer.load_state(p.c_0, b, u));
    return;
  }
  T* slots = layer.slots(step.now.start + b) + u;
  ForwardStep<Cell, Lane<T>> s;
#pragma unroll
  for (int i = 0; i < Cell::kTerms; ++i) {
    s.x[i] = p.x.data ? x[i] : x[i] + slots[(Cell::kInputSlot + i) * H];
    s.r[i] = r[i];
  }
  s.carry = L::kHasCarry ? layer.carry_before(total_rows, b, u) : T(0);
  Cell::forward(s);
#pragma unroll
  for (int i = 0; i < Cell::kSlots; ++i) slots[i * H] = s.saved[i].raw;
  if (L::kHasCarry) layer.carries(total_rows, step.now.start + b)[u] = s.carry.raw;
  store(layer.template row<S>(p.y, step.now, b) + u, s.h.raw);
  if (p.c_all.data) store(layer.template row<S>(p.c_all, step.now, b) + u, s.carry.raw);
  if (b >= step.after.active) {
    layer.store_state(p.h_n, b, u, s.h.raw);
    layer.store_state(p.c_n, b, u, s.carry.raw);
  }
}

template <class Cell, class S>
Status forward(const RecurrentParams& p) {
  const DeviceGuard guard(p.device.index);
  cudaError_t status = guard.status();
  const Timeline timeline(p);
  const int64_t by = timeline.forward_step();
  Span now = timeline.first();
  Step step{timeline.shift(now, -by), now, timeline.shift(now, by), p.batch, timeline.longest()};
  for (int64_t s = 0; s < p.steps && status == cudaSuccess; ++s) {
    const dim3 grid(ceil_div(step.rows, ForwardTile::kRows), ceil_div(p.hidden_size, ForwardTile::kUnits));
    status = launch(p.device, forward_step<Cell, S>, grid, ForwardTile::kThreads, p, step, timeline.rows());
    const Span after = timeline.shift(step.after, by);
    step = {step.now, step.after, after, step.after.active, p.batch};
  }
  return status_of(status);
}

}  // namespace fastseq::cuda
