#include "cpu/layer_norm/backward-inl.h"
#include "cpu/layer_norm/forward-inl.h"

namespace fastseq::FASTSEQ_ISA {

extern const LayerNormKernels kLayerNormKernels[kDtypes] = {
    {LayerNormForward<float>::run, LayerNormBackward<float>::run},
    {LayerNormForward<double>::run, LayerNormBackward<double>::run},
    {LayerNormForward<BFloat16>::run, LayerNormBackward<BFloat16>::run}};

}  // namespace fastseq::FASTSEQ_ISA
