// The kernel table of one ISA.
#include "../kernels.h"
#include "peak-inl.h"

#define FASTSEQ_STRINGIFY_(x) #x
#define FASTSEQ_STRINGIFY(x) FASTSEQ_STRINGIFY_(x)

namespace fastseq::FASTSEQ_ISA {

extern const RecurrentKernels kRnnTanhKernels[kDtypes], kRnnReluKernels[kDtypes], kLstmKernels[kDtypes],
    kGruKernels[kDtypes];
extern const AttentionKernels kAttentionKernels[kDtypes];
extern const LayerNormKernels kLayerNormKernels[kDtypes];
extern const LinearKernels kLinearKernels[kDtypes];

const RecurrentKernels* recurrent_kernels(int cell) {
  const RecurrentKernels* const kernels[kCells] = {kRnnTanhKernels, kRnnReluKernels, kLstmKernels, kGruKernels};
  return kernels[cell];
}

extern const Kernels kTable = {FASTSEQ_STRINGIFY(FASTSEQ_ISA),
                               kVectorBytes,
                               recurrent_kernels,
                               kAttentionKernels,
                               kLayerNormKernels,
                               kLinearKernels,
                               fma_peak,
                               read_rate,
                               nullptr};

}  // namespace fastseq::FASTSEQ_ISA
