#include "../math/gru.h"
#include "recurrent.cuh"

namespace fastseq::cuda {

extern const RecurrentKernels kGruKernels[kCudaDtypes] = {
    recurrent_kernels<Gru, float>(), recurrent_kernels<Gru, double>(), recurrent_kernels<Gru, __nv_bfloat16>(),
    recurrent_kernels<Gru, __half>()};

}  // namespace fastseq::cuda
