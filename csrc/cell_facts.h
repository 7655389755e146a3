// What the tables of kernels tell of a cell, read off its functor.
#pragma once

#include "kernels.h"
#include "math/step.h"

namespace fastseq {

// Callers know the gates of the slots by the first alone.
template <class Cell>
constexpr bool slots_follow_gates() {
  for (int i = 0; i < Cell::kTerms; ++i)
    if (Cell::input_gate(i) != (Cell::input_gate(0) + i) % Cell::kTerms || Cell::recurrent_gate(i) != i) return false;
  return true;
}

template <class Cell>
constexpr CellKernels describe(const char* name, const RecurrentKernels* kernels) {
  static_assert(slots_follow_gates<Cell>());
  return {name,
          Cell::kTerms,
          Cell::kCarry == Carry::kCell ? 1 : 0,
          Cell::kSlots,
          Cell::kInputSlot,
          Cell::kRecurrentSlot,
          Cell::input_gate(0),
          Cell::kCarry != Carry::kNone,
          kernels};
}

}  // namespace fastseq

#define FASTSEQ_STRINGIFY_(x) #x
#define FASTSEQ_STRINGIFY(x) FASTSEQ_STRINGIFY_(x)
