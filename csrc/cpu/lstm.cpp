#include "../math/lstm.h"

#include "recurrent_table-inl.h"

namespace fastseq::FASTSEQ_ISA {

extern const RecurrentKernels kLstmKernels[kDtypes] = {
    recurrent_kernels<Lstm, float>(), recurrent_kernels<Lstm, double>(), recurrent_kernels<Lstm, BFloat16>()};

}  // namespace fastseq::FASTSEQ_ISA
