#include "cpu/linear/linear-inl.h"

namespace fastseq::FASTSEQ_ISA {

template <class S>
constexpr LinearKernels linear_kernels() {
  return {Linear<S>::panels_bytes, Linear<S>::pack, Linear<S>::forward};
}

extern const LinearKernels kLinearKernels[kDtypes] = {linear_kernels<float>(), linear_kernels<double>(),
                                                      linear_kernels<BFloat16>()};

}  // namespace fastseq::FASTSEQ_ISA
