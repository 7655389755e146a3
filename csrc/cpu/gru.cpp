#include "../math/gru.h"

#include "recurrent_table-inl.h"

namespace fastseq::FASTSEQ_ISA {

extern const RecurrentKernels kGruKernels[kDtypes] = {recurrent_kernels<Gru, float>(), recurrent_kernels<Gru, double>(),
                                                      recurrent_kernels<Gru, BFloat16>()};

}  // namespace fastseq::FASTSEQ_ISA
