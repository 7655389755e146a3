// The softmax of scores that come in parts (Milakov & Gimelshein 2018, "Online normalizer calculation for softmax").
//
// V is a lane type as in step.h, with max, exp_vanishing and select(a == b, ...) besides.
#pragma once

#include "step.h"

namespace fastseq {

// What is subtracted from scores before exp: their largest, but 0 where all of them are -inf.
template <class V>
FASTSEQ_CELL V softmax_pivot(V largest) {
  return select(largest == V(-__builtin_inff()), V(0), largest);
}

// Of the scores seen so far: the largest, -inf for none, and the sum of exp(score - softmax_pivot(largest)). A score of
// NaN does not change the largest; it gets into the sum.
template <class V>
struct OnlineSoftmax {
  V largest, sum;

  // Prepares for more scores, the largest of which is given. Returns the factor for all that was summed before.
  FASTSEQ_CELL V raise(V other) {
    const V before = largest;
    largest = max(other, before);
    const V factor = exp_vanishing(before - softmax_pivot(largest));
    sum = sum * factor;
    return factor;
  }

  // Adds the scores of another part. Returns the factor for what was summed there; `own` becomes that for here.
  FASTSEQ_CELL V merge(OnlineSoftmax part, V& own) {
    own = raise(part.largest);
    const V factor = exp_vanishing(part.largest - softmax_pivot(largest));
    sum = fma(part.sum, factor, sum);
    return factor;
  }
};

}  // namespace fastseq
