#include "cuda/attention_backward.cuh"
#include "cuda/attention_forward.cuh"

namespace fastseq::cuda {

template <class S>
constexpr AttentionKernels attention_kernels() {
  return {AttentionForward<S>::run, AttentionBackward<S>::run, AttentionForward<S>::parts_bytes};
}

extern const AttentionKernels kAttentionKernels[kCudaDtypes] = {attention_kernels<float>(), attention_kernels<double>(),
                                                                attention_kernels<__nv_bfloat16>(),
                                                                attention_kernels<__half>()};

}  // namespace fastseq::cuda
