#include "cpu/attention/backward-inl.h"
#include "cpu/attention/forward-inl.h"

namespace fastseq::FASTSEQ_ISA {

Status attention_forward_bfloat16(const AttentionParams& p) { return AttentionForward<BFloat16>::run(p); }
Status attention_backward_bfloat16(const AttentionParams& p) { return AttentionBackward<BFloat16>::run(p); }

}  // namespace fastseq::FASTSEQ_ISA
