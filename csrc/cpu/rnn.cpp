#include "../math/rnn.h"

#include "recurrent_table-inl.h"

namespace fastseq::FASTSEQ_ISA {

extern const RecurrentKernels kRnnTanhKernels[kDtypes] = {recurrent_kernels<Rnn<Tanh>, float>(),
                                                          recurrent_kernels<Rnn<Tanh>, double>(),
                                                          recurrent_kernels<Rnn<Tanh>, BFloat16>()};
extern const RecurrentKernels kRnnReluKernels[kDtypes] = {recurrent_kernels<Rnn<Relu>, float>(),
                                                          recurrent_kernels<Rnn<Relu>, double>(),
                                                          recurrent_kernels<Rnn<Relu>, BFloat16>()};

}  // namespace fastseq::FASTSEQ_ISA
