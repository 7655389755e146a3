// What turns a product of query and key into a score, piece by piece: values in, values out.
//
// V is a lane type as in step.h, with abs besides.
#pragma once

#include <cstdint>

#include "step.h"

namespace fastseq {

// cap * tanh(s / cap) keeps scores within (-cap, cap) (Gemma Team 2024, "Gemma 2").
template <class V>
struct Softcap {
  V cap, inverse;

  FASTSEQ_CELL V forward(V s, V& derivative) const {
    const V t = tanh(s * inverse);
    derivative = V(1) - t * t;
    return cap * t;
  }
};

// A penalty that grows with the distance of query and key (Press et al. 2022, "Train short, test long": ALiBi).
template <class V>
FASTSEQ_CELL V alibi(V s, V slope, V distance) {
  return s - slope * abs(distance);
}

struct Range {
  int64_t begin, end;
  FASTSEQ_CELL bool empty() const { return begin >= end; }
};

// A sliding window: query i may see the keys j < keys with -left <= j - (i + shift) <= right. Causal: right is 0.
struct Window {
  static constexpr int64_t kUnlimited = int64_t(1) << 60;  // sums of a few of them do not overflow

  int64_t left, right, shift, queries, keys;

  static FASTSEQ_CELL int64_t clamp(int64_t x, int64_t low, int64_t high) {
    return x < low ? low : x > high ? high : x;
  }
  FASTSEQ_CELL Window(int64_t left, int64_t right, int64_t shift, int64_t queries, int64_t keys)
      : left(clamp(left, -kUnlimited, kUnlimited)),
        right(clamp(right, -kUnlimited, kUnlimited)),
        shift(shift),
        queries(queries),
        keys(keys) {}

  FASTSEQ_CELL bool sees(int64_t i, int64_t j) const {
    const int64_t ahead = j - i - shift;
    return -left <= ahead && ahead <= right;
  }
  // The keys that one or more of the queries [first, first + count) may see.
  FASTSEQ_CELL Range keys_of(int64_t first, int64_t count) const {
    return {clamp(first + shift - left, 0, keys), clamp(first + count + shift + right, 0, keys)};
  }
  // The queries that may see one or more of the keys [first, first + count).
  FASTSEQ_CELL Range queries_of(int64_t first, int64_t count) const {
    return {clamp(first - shift - right, 0, queries), clamp(first + count - shift + left, 0, queries)};
  }
};

}  // namespace fastseq
