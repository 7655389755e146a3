// The entries of the kernel table for one cell and one storage type.
#pragma once

#include "recurrent_backward-inl.h"
#include "recurrent_forward-inl.h"

namespace fastseq::FASTSEQ_ISA {

template <class Cell, class S>
constexpr RecurrentKernels recurrent_kernels() {
  return {[](const RecurrentParams& p) { return Layout<Cell, S>(p).panels_bytes(); },
          [](const RecurrentParams& p) { return Layout<Cell, S>(p).saved_bytes(Schedule::rows(p)); },
          pack_panels<Cell, S>, Forward<Cell, S>::run, Backward<Cell, S>::run};
}

}  // namespace fastseq::FASTSEQ_ISA
