#include "attention_backward-inl.h"
#include "attention_forward-inl.h"

namespace fastseq::FASTSEQ_ISA {

extern const AttentionKernels kAttentionKernels[kDtypes] = {
    {AttentionForward<float>::run, AttentionBackward<float>::run},
    {AttentionForward<double>::run, AttentionBackward<double>::run},
    {AttentionForward<BFloat16>::run, AttentionBackward<BFloat16>::run}};

}  // namespace fastseq::FASTSEQ_ISA
