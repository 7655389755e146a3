// Philox4x32-7 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): 128 random bits of a counter and a
// key, so that a draw belongs to a place and not to a moment.
//
// W is a lane type of 32-bit words, made from one, with ^ and, found by argument-dependent lookup,
// multiply_words(a, b, high, low).
#pragma once

#include <cstdint>

#include "step.h"

namespace fastseq {

template <class W>
FASTSEQ_CELL void philox(W (&x)[4], uint32_t key_0, uint32_t key_1) {
  constexpr int kRounds = 7;  // the fewest that pass all tests of BigCrush
  for (int round = 0; round < kRounds; ++round) {
    W high_0 = x[0], low_0 = x[0], high_1 = x[0], low_1 = x[0];
    multiply_words(x[0], 0xD2511F53u, high_0, low_0);
    multiply_words(x[2], 0xCD9E8D57u, high_1, low_1);
    x[0] = high_1 ^ x[1] ^ W(key_0);
    x[1] = low_1;
    x[2] = high_0 ^ x[3] ^ W(key_1);
    x[3] = low_0;
    key_0 += 0x9E3779B9u;  // the golden ratio, and the square root of 3 less 1
    key_1 += 0xBB67AE85u;
  }
}

// Draws below this are dropped by a dropout of probability p, in [0, 1).
FASTSEQ_CELL uint32_t dropout_threshold(double p) {
  const double scaled = p * 4294967296.0 + 0.5;
  return scaled >= 4294967295.0 ? 0xffffffffu : uint32_t(scaled);
}

}  // namespace fastseq
