// The contract between a cell and the drivers: a cell is a pointwise functor, values in, values out.
//
// V is a lane type with + - * / and, found by argument-dependent lookup, fma, sigmoid, tanh and relu.
// A cell declares
//   kSlots            values kept per unit for backward; backward turns them into gradients in place
//   kTerms            gates of the input term x = W_ih x_t + b_ih and of the recurrent term r = W_hh h_prev + b_hh
//   kInputSlot        the gradient of x[i] is left in slot kInputSlot + i,
//   kRecurrentSlot    that of r[i] in slot kRecurrentSlot + i
//   input_gate(i)     torch's gate index of x[i],
//   recurrent_gate(i) and of r[i]
//   kCarry            what a unit carries from step to step outside the matrix product: nothing, its cell or its hidden
//                     state
#pragma once

#if defined(__CUDACC__)
#define FASTSEQ_CELL __host__ __device__ __forceinline__
#else
#define FASTSEQ_CELL inline __attribute__((always_inline))
#endif

namespace fastseq {

enum class Carry { kNone, kCell, kHidden };

template <class Cell, class V>
struct ForwardStep {
  V x[Cell::kTerms], r[Cell::kTerms];  // in
  V carry;                             // in: before the step, out: after it
  V h;                                 // out
  V saved[Cell::kSlots];               // out
};

template <class Cell, class V>
struct BackwardStep {
  V slot[Cell::kSlots];   // in: what forward saved, out: gradients of the terms
  V carry, carry_before;  // in: after and before the step
  V dh;                   // in: gradient of h, from outside the cell and through r of the next step
  V dcarry;               // in: gradient of the carry after the step, out: before it
};

}  // namespace fastseq
