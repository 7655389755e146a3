// Minimal gated unit (Zhou 2016), the gate applied after the matrix product as the reset gate is in torch.nn.GRU.
//
//   f = sigmoid(x_f + r_f)    n = tanh(x_n + f * r_n)    h' = n + (1 - f) * (h - n)
//
// x_n and r_n = W_hn h + b_hn meet only after the gate, hence three slots: the terms of the input are n f, those of the
// recurrence f and r_n.
#pragma once

#include "step.h"

namespace fastseq {

struct Mgu {
  enum Slot { kN, kF, kRecurrentN };
  static constexpr int kSlots = 3, kTerms = 2, kInputSlot = kN, kRecurrentSlot = kF;
  static constexpr Carry kCarry = Carry::kHidden;
  static constexpr FASTSEQ_CELL int input_gate(int i) { return 1 - i; }
  static constexpr FASTSEQ_CELL int recurrent_gate(int i) { return i; }

  template <class V>
  static FASTSEQ_CELL void forward(ForwardStep<Mgu, V>& s) {
    const V f = sigmoid(s.x[kF - kInputSlot] + s.r[kF - kRecurrentSlot]);
    const V recurrent_n = s.r[kRecurrentN - kRecurrentSlot];
    const V n = tanh(fma(f, recurrent_n, s.x[kN - kInputSlot]));
    s.saved[kN] = n, s.saved[kF] = f, s.saved[kRecurrentN] = recurrent_n;
    s.carry = s.h = fma(V(1) - f, s.carry - n, n);
  }

  template <class V>
  static FASTSEQ_CELL void backward(BackwardStep<Mgu, V>& s) {
    const V one(1), n = s.slot[kN], f = s.slot[kF], recurrent_n = s.slot[kRecurrentN];
    const V dh = s.dh + s.dcarry;
    const V dn = dh * f * (one - n * n);
    s.slot[kN] = dn;
    s.slot[kF] = (dn * recurrent_n - dh * (s.carry_before - n)) * f * (one - f);
    s.slot[kRecurrentN] = dn * f;
    s.dcarry = dh * (one - f);
  }
};

}  // namespace fastseq
