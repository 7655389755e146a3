// The kernel table of one ISA.
#include "cell_facts.h"
#include "cpu/base/peak-inl.h"

namespace fastseq::FASTSEQ_ISA {

namespace cells {
#define CELL(name, header, functor) extern const CellKernels name;
#include "cells.def"
#undef CELL
}  // namespace cells

extern const AttentionKernels kAttentionKernels[kDtypes];
extern const LayerNormKernels kLayerNormKernels[kDtypes];
extern const LinearKernels kLinearKernels[kDtypes];

static constexpr const CellKernels* kCells[] = {
#define CELL(name, header, functor) &cells::name,
#include "cells.def"
#undef CELL
    nullptr};

extern const Kernels kTable = {FASTSEQ_STRINGIFY(FASTSEQ_ISA),
                               kVectorBytes,
                               kCells,
                               kAttentionKernels,
                               kLayerNormKernels,
                               kLinearKernels,
                               fma_peak,
                               read_rate,
                               nullptr};

}  // namespace fastseq::FASTSEQ_ISA
