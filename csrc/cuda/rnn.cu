#include "../math/rnn.h"
#include "recurrent.cuh"

namespace fastseq::cuda {

extern const RecurrentKernels kRnnTanhKernels[kCudaDtypes] = {
    recurrent_kernels<Rnn<Tanh>, float>(), recurrent_kernels<Rnn<Tanh>, double>(),
    recurrent_kernels<Rnn<Tanh>, __nv_bfloat16>(), recurrent_kernels<Rnn<Tanh>, __half>()};
extern const RecurrentKernels kRnnReluKernels[kCudaDtypes] = {
    recurrent_kernels<Rnn<Relu>, float>(), recurrent_kernels<Rnn<Relu>, double>(),
    recurrent_kernels<Rnn<Relu>, __nv_bfloat16>(), recurrent_kernels<Rnn<Relu>, __half>()};

}  // namespace fastseq::cuda
