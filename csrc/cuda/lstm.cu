#include "../math/lstm.h"
#include "recurrent.cuh"

namespace fastseq::cuda {

extern const RecurrentKernels kLstmKernels[kCudaDtypes] = {
    recurrent_kernels<Lstm, float>(), recurrent_kernels<Lstm, double>(), recurrent_kernels<Lstm, __nv_bfloat16>(),
    recurrent_kernels<Lstm, __half>()};

}  // namespace fastseq::cuda
