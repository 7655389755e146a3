#include "cpu/attention/backward-inl.h"
#include "cpu/attention/forward-inl.h"

namespace fastseq::FASTSEQ_ISA {

// In attention_bfloat16.cpp, so that two cores compile the instances.
Status attention_forward_bfloat16(const AttentionParams& p);
Status attention_backward_bfloat16(const AttentionParams& p);

extern const AttentionKernels kAttentionKernels[kDtypes] = {
    {AttentionForward<float>::run, AttentionBackward<float>::run, nullptr},
    {AttentionForward<double>::run, AttentionBackward<double>::run, nullptr},
    {attention_forward_bfloat16, attention_backward_bfloat16, nullptr}};

}  // namespace fastseq::FASTSEQ_ISA
