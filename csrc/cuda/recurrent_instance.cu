// The recurrent driver for one cell: compiled for each cell of cells.def.
#include FASTSEQ_CELL_HEADER

#include "cell_facts.h"
#include "cuda/recurrent_backward.cuh"
#include "cuda/recurrent_forward.cuh"

namespace fastseq::cuda::cells {

using Cell = FASTSEQ_CELL_FUNCTOR;

namespace {  // the same names for every cell

template <class S>
constexpr RecurrentKernels kernels_of() {
  return {nullptr,
          [](const RecurrentParams& p) {
            return Layer<Cell, S>::saved_elements(p, total_rows(p)) * int64_t(sizeof(Compute<S>));
          },
          nullptr, forward<Cell, S>, backward<Cell, S>};
}

constexpr RecurrentKernels kKernels[kCudaDtypes] = {kernels_of<float>(), kernels_of<double>(),
                                                    kernels_of<__nv_bfloat16>(), kernels_of<__half>()};

}  // namespace

extern const CellKernels FASTSEQ_CELL_NAME = describe<Cell>(FASTSEQ_STRINGIFY(FASTSEQ_CELL_NAME), kKernels);

}  // namespace fastseq::cuda::cells
