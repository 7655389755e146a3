// Layer normalization (Ba et al. 2016) of an element, once the moments of its row are known: values in, values out.
//
// V is a lane type as in step.h.
#pragma once

#include "step.h"

namespace fastseq {

template <class V>
struct LayerNorm {
  V mean, rstd;  // rstd = 1 / sqrt(variance + eps)

  FASTSEQ_CELL V normalize(V z) const { return (z - mean) * rstd; }

  // d = dy * weight; mean_d and mean_projection are the means over the row of d and of d * normalize(z).
  FASTSEQ_CELL V backward(V normalized, V d, V mean_d, V mean_projection) const {
    return rstd * ((d - mean_d) - normalized * mean_projection);
  }
};

}  // namespace fastseq
