#include "attention_backward-inl.h"
#include "attention_forward-inl.h"

namespace fastseq::FASTSEQ_ISA {

extern const AttentionKernels kAttentionKernels[kDtypes] = {
    {AttentionForward<float>::run, AttentionBackward<float>::run, nullptr},
    {AttentionForward<double>::run, AttentionBackward<double>::run, nullptr},
    {AttentionForward<BFloat16>::run, AttentionBackward<BFloat16>::run, nullptr}};

}  // namespace fastseq::FASTSEQ_ISA
