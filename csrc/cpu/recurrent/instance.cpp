// The recurrent driver for one cell: compiled for each cell of cells.def and each ISA.
#include FASTSEQ_CELL_HEADER

#include "cell_facts.h"
#include "cpu/recurrent/backward-inl.h"
#include "cpu/recurrent/forward-inl.h"

namespace fastseq::FASTSEQ_ISA::cells {

using Cell = FASTSEQ_CELL_FUNCTOR;

namespace {  // the same names for every cell

template <class S>
constexpr RecurrentKernels kernels_of() {
  return {[](const RecurrentParams& p) { return Layout<Cell, S>(p).panels_bytes(); },
          [](const RecurrentParams& p) { return Layout<Cell, S>(p).saved_bytes(total_rows(p)); }, pack_panels<Cell, S>,
          Forward<Cell, S>::run, Backward<Cell, S>::run};
}

constexpr RecurrentKernels kKernels[kDtypes] = {kernels_of<float>(), kernels_of<double>(), kernels_of<BFloat16>()};

}  // namespace

extern const CellKernels FASTSEQ_CELL_NAME = describe<Cell>(FASTSEQ_STRINGIFY(FASTSEQ_CELL_NAME), kKernels);

}  // namespace fastseq::FASTSEQ_ISA::cells
