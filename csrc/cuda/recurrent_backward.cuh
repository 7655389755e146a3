// Backward: one launch for each step, from the last to the first. It begins with the gradient of h, the product of the
// gate gradients that the launch before has left with W_hh, and ends with the gate gradients of its own step.
#pragma once

#include "cuda/recurrent.cuh"

namespace fastseq::cuda {

// A block holds kRows rows x kUnits units; a thread kRowsPerThread rows of one unit.
struct BackwardTile {
  static constexpr int kRows = 16, kUnits = 32, kThreads = 128, kRowsPerThread = kRows * kUnits / kThreads;
  static constexpr int kDepth = 32;
};

// sum[m] += the gate gradients of row m of this thread, times the column of W_hh that is its unit. All threads of the
// block call this together; rows at `rows` and above add nothing.
template <class Cell, class S, class T>
__device__ void multiply_transposed(const Layer<Cell, S>& layer, const Span& span, int64_t rows,
                                    T (&sum)[BackwardTile::kRowsPerThread]) {
  using Tile = BackwardTile;
  constexpr int kDepth = Tile::kDepth;
  __shared__ T a_tile[Tile::kRows][kDepth], w_tile[kDepth][Tile::kUnits];
  const int64_t H = layer.p.hidden_size;
  const int thread = threadIdx.x, unit = thread % Tile::kUnits, first = thread / Tile::kUnits;
  const int64_t first_row = int64_t(blockIdx.x) * Tile::kRows, u = int64_t(blockIdx.y) * Tile::kUnits + unit;
  const S* w = (const S*)layer.p.w_hh;
  for (int term = 0; term < Cell::kTerms; ++term)
    for (int64_t k0 = 0; k0 < H; k0 += kDepth) {
      const int lane = thread % kDepth;
      for (int r = thread / kDepth; r < Tile::kRows; r += Tile::kThreads / kDepth)
        a_tile[r][lane] = k0 + lane < H && first_row + r < rows
                              ? layer.slots(span.start + first_row + r)[(Cell::kRecurrentSlot + term) * H + k0 + lane]
                              : T(0);
      for (int j = first; j < kDepth; j += Tile::kThreads / Tile::kUnits)
        w_tile[j][unit] = k0 + j < H && u < H ? load(w + (Cell::recurrent_gate(term) * H + k0 + j) * H + u) : T(0);
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kDepth; ++j)
#pragma unroll
        for (int m = 0; m < Tile::kRowsPerThread; ++m)
          sum[m] = ::fma(a_tile[first * Tile::kRowsPerThread + m][j], w_tile[j][unit], sum[m]);
      __syncthreads();
    }
}

// `step.after` has been differentiated, `step.now` is to be. Either may be none: the first and the last launch.
template <class Cell, class S>
__global__ void __launch_bounds__(BackwardTile::kThreads)
    backward_step(const RecurrentParams p, const Step step, const int64_t total_rows) {
  using T = Compute<S>;
  using L = Layer<Cell, S>;
  using Tile = BackwardTile;
  const L layer{p, step};
  const int64_t H = p.hidden_size, u = int64_t(blockIdx.y) * Tile::kUnits + threadIdx.x % Tile::kUnits;
  T sum[Tile::kRowsPerThread] = {};
  if (int64_t(blockIdx.x) * Tile::kRows < step.after.active)
    multiply_transposed(layer, step.after, step.after.active, sum);
  if (u >= H) return;

  T* dcarries = (T*)p.dcarry;
  for (int m = 0; m < Tile::kRowsPerThread; ++m) {
    const int64_t b = int64_t(blockIdx.x) * Tile::kRows + threadIdx.x / Tile::kUnits * Tile::kRowsPerThread + m;
    if (b >= step.rows) return;
    // The gradient of the state after `now`: what came back from `after`, or for rows that end here the given one.
    const bool began = b < step.after.active, here = b < step.now.active;
    if (!began && !here && b < step.empty_begin) continue;
    T dh, dcarry = 0;
    if (began) {
      // A row that is not active at `now` had its first step at `after`. Nothing passes a cut.
      dh = layer.is_cut(step.after, !here, b) ? T(0) : sum[m];
      if (L::kHasCarry) dcarry = dcarries[b * H + u];
    } else {
      dh = layer.load_state(p.dh_n, b, u);
      dcarry = layer.load_state(p.dc_n, b, u);
    }
    if (!here) {
      layer.store_state(p.dh_0, b, u, Cell::kCarry == Carry::kHidden ? dh + dcarry : dh);
      layer.store_state(p.dc_0, b, u, dcarry);
      continue;
    }
    const int64_t row = step.now.start + b;
    T* slots = layer.slots(row) + u;
    BackwardStep<Cell, Lane<T>> s;
#pragma unroll
    for (int i = 0; i < Cell::kSlots; ++i) s.slot[i] = slots[i * H];
    if (p.dy.data) dh = dh + load(layer.template row<const S>(p.dy, step.now, b) + u);
    if (p.dc_all.data) dcarry = dcarry + load(layer.template row<const S>(p.dc_all, step.now, b) + u);
    s.dh = dh;
    s.dcarry = dcarry;
    s.carry = L::kHasCarry ? layer.carries(total_rows, row)[u] : T(0);
    s.carry_before = L::kHasCarry ? layer.carry_before(total_rows, b, u) : T(0);
    Cell::backward(s);
#pragma unroll
    for (int i = 0; i < Cell::kSlots; ++i) slots[i * H] = s.slot[i].raw;
    if (L::kHasCarry) dcarries[b * H + u] = layer.is_cut(step.now, b >= step.before.active, b) ? T(0) : s.dcarry.raw;
    if (p.hidden) ((S*)p.hidden)[row * H + u] = layer.hidden_before(b, u);
  }
}

template <class Cell, class S>
Status backward(const RecurrentParams& p) {
  const DeviceGuard guard(p.device.index);
  cudaError_t status = guard.status();
  const Timeline timeline(p);
  const int64_t by = -timeline.forward_step();
  Span now = timeline.last();
  Step step{timeline.shift(now, by), now, timeline.shift(now, -by), now.active, p.batch};
  // One more than there are steps: the initial states.
  for (int64_t s = 0; s <= p.steps && status == cudaSuccess; ++s) {
    const dim3 grid(ceil_div(step.rows, BackwardTile::kRows), ceil_div(p.hidden_size, BackwardTile::kUnits));
    status = launch(p.device, backward_step<Cell, S>, grid, BackwardTile::kThreads, p, step, timeline.rows());
    const Span before = timeline.shift(step.before, by);
    const bool initial = s + 1 == p.steps;
    step = {before, step.before, step.now, initial ? p.batch : max(step.before.active, step.now.active),
            initial ? timeline.longest() : p.batch};
    if (initial && !p.dh_0.data && !p.dc_0.data) break;
  }
  return status_of(status);
}

}  // namespace fastseq::cuda
