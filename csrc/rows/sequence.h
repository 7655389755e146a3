// Where the rows of a padded sequence lie, for every operator that reads one.
#pragma once

#include "kernels.h"
#include "math/step.h"

namespace fastseq {

// Row b at time t.
template <class S>
FASTSEQ_CELL S* row_at(const Sequence& sequence, int64_t t, int64_t b) {
  return (S*)sequence.data + t * sequence.step_stride + b * sequence.row_stride;
}

// Row r of all T * B.
template <class S>
FASTSEQ_CELL S* nth_row(const Sequence& sequence, int64_t batch, int64_t r) {
  return row_at<S>(sequence, r / batch, r % batch);
}

}  // namespace fastseq
