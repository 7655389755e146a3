// LSTM cell (Hochreiter & Schmidhuber 1997 with the forget gate of Gers 2000), gate order i f g o as torch.nn.LSTM.
//
//   i, f, o = sigmoid(x + r)    g = tanh(x + r)
//   c' = f * c + i * g          h' = o * tanh(c')
//
// Saved: i f g o, and c' by the driver. tanh(c') is computed again: one tanh instead of another (T, B, H) buffer.
#pragma once

#include "step.h"

namespace fastseq {

struct Lstm {
  enum Gate { kI, kF, kG, kO };
  static constexpr int kSlots = 4, kTerms = 4, kInputSlot = 0, kRecurrentSlot = 0;
  static constexpr Carry kCarry = Carry::kCell;
  static constexpr FASTSEQ_CELL int input_gate(int i) { return i; }
  static constexpr FASTSEQ_CELL int recurrent_gate(int i) { return i; }

  template <class V>
  static FASTSEQ_CELL void forward(ForwardStep<Lstm, V>& s) {
    const V i = sigmoid(s.x[kI] + s.r[kI]), f = sigmoid(s.x[kF] + s.r[kF]);
    const V g = tanh(s.x[kG] + s.r[kG]), o = sigmoid(s.x[kO] + s.r[kO]);
    s.carry = fma(f, s.carry, i * g);
    s.h = o * tanh(s.carry);
    s.saved[kI] = i, s.saved[kF] = f, s.saved[kG] = g, s.saved[kO] = o;
  }

  template <class V>
  static FASTSEQ_CELL void backward(BackwardStep<Lstm, V>& s) {
    const V one(1), i = s.slot[kI], f = s.slot[kF], g = s.slot[kG], o = s.slot[kO];
    const V tanh_c = tanh(s.carry);
    const V dc = fma(s.dh * o, one - tanh_c * tanh_c, s.dcarry);
    s.slot[kI] = dc * g * i * (one - i);
    s.slot[kF] = dc * s.carry_before * f * (one - f);
    s.slot[kG] = dc * i * (one - g * g);
    s.slot[kO] = s.dh * tanh_c * o * (one - o);
    s.dcarry = dc * f;
  }
};

}  // namespace fastseq
