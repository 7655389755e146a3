// GRU cell (Cho 2014), reset after the matrix product, as torch.nn.GRU (whose gate order is r z n).
//
//   r, z = sigmoid(x + r)    n = tanh(x_n + r * r_n)    h' = n + z * (h - n)
//
// x_n and r_n = W_hn h + b_hn meet only after the reset gate, hence four slots: the terms of the input are n r z, those
// of the recurrence r z and r_n.
#pragma once

#include "step.h"

namespace fastseq {

struct Gru {
  enum Slot { kN, kR, kZ, kRecurrentN };
  static constexpr int kSlots = 4, kTerms = 3, kInputSlot = kN, kRecurrentSlot = kR;
  static constexpr Carry kCarry = Carry::kHidden;
  static constexpr FASTSEQ_CELL int input_gate(int i) { return i == 0 ? 2 : i - 1; }
  static constexpr FASTSEQ_CELL int recurrent_gate(int i) { return i; }

  template <class V>
  static FASTSEQ_CELL void forward(ForwardStep<Gru, V>& s) {
    const V r = sigmoid(s.x[kR - kInputSlot] + s.r[kR - kRecurrentSlot]);
    const V z = sigmoid(s.x[kZ - kInputSlot] + s.r[kZ - kRecurrentSlot]);
    const V recurrent_n = s.r[kRecurrentN - kRecurrentSlot];
    const V n = tanh(fma(r, recurrent_n, s.x[kN - kInputSlot]));
    s.saved[kN] = n, s.saved[kR] = r, s.saved[kZ] = z, s.saved[kRecurrentN] = recurrent_n;
    s.carry = s.h = fma(z, s.carry - n, n);
  }

  template <class V>
  static FASTSEQ_CELL void backward(BackwardStep<Gru, V>& s) {
    const V one(1), n = s.slot[kN], r = s.slot[kR], z = s.slot[kZ], recurrent_n = s.slot[kRecurrentN];
    const V dh = s.dh + s.dcarry;
    const V dn = dh * (one - z) * (one - n * n);
    s.slot[kN] = dn;
    s.slot[kR] = dn * recurrent_n * r * (one - r);
    s.slot[kZ] = dh * (s.carry_before - n) * z * (one - z);
    s.slot[kRecurrentN] = dn * r;
    s.dcarry = dh * z;
  }
};

}  // namespace fastseq
