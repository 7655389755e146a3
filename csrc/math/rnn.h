// Vanilla RNN cell (Elman 1990), torch.nn.RNN: h' = tanh(x + r) or relu(x + r).
// Saved: h'. Both nonlinearities have a derivative in terms of their result.
#pragma once

#include "step.h"

namespace fastseq {

struct Tanh {
  template <class V>
  static FASTSEQ_CELL V forward(V a) {
    return tanh(a);
  }
  template <class V>
  static FASTSEQ_CELL V backward(V y, V dy) {
    return dy * (V(1) - y * y);
  }
};

struct Relu {
  template <class V>
  static FASTSEQ_CELL V forward(V a) {
    return relu(a);
  }
  template <class V>
  static FASTSEQ_CELL V backward(V y, V dy) {
    return relu_backward(y, dy);
  }
};

template <class Nonlinearity>
struct Rnn {
  static constexpr int kSlots = 1, kTerms = 1, kInputSlot = 0, kRecurrentSlot = 0;
  static constexpr Carry kCarry = Carry::kNone;
  static constexpr FASTSEQ_CELL int input_gate(int i) { return i; }
  static constexpr FASTSEQ_CELL int recurrent_gate(int i) { return i; }

  template <class V>
  static FASTSEQ_CELL void forward(ForwardStep<Rnn, V>& s) {
    s.saved[0] = s.h = Nonlinearity::forward(s.x[0] + s.r[0]);
  }

  template <class V>
  static FASTSEQ_CELL void backward(BackwardStep<Rnn, V>& s) {
    s.slot[0] = Nonlinearity::backward(s.slot[0], s.dh);
  }
};

using RnnTanh = Rnn<Tanh>;
using RnnRelu = Rnn<Relu>;

}  // namespace fastseq
