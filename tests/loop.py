"""What the recurrent modules must compute, row by row and step by step with torch's own cells."""

import torch
from torch import _VF

CELL_OPS = {"rnn_tanh": _VF.rnn_tanh_cell, "rnn_relu": _VF.rnn_relu_cell, "lstm": _VF.lstm_cell, "gru": _VF.gru_cell}


def layer(cell, x, h_0, c_0, weights, lengths=None, reset=None, reverse=False):
    """One layer in one direction: y (T, B, H), h_n, c_n, c_all. `lengths` is a list; c is None but for the LSTM."""
    steps, batch = x.shape[:2]
    hidden = weights[1].shape[1]
    lengths = [steps] * batch if lengths is None else lengths
    zero = x.new_zeros(1, hidden)
    y, c_all, h_n, c_n = [[zero] * batch for _ in range(steps)], [[zero] * batch for _ in range(steps)], [], []
    for b in range(batch):
        h = zero if h_0 is None else h_0[b : b + 1]
        c = zero if c_0 is None else c_0[b : b + 1]
        for t in reversed(range(lengths[b])) if reverse else range(lengths[b]):
            start = t + 1 if reverse else t  # the step that may begin a segment
            if reset is not None and start < lengths[b] and reset[start, b]:
                h, c = zero, zero
            if cell == "lstm":
                h, c = _VF.lstm_cell(x[t, b : b + 1], (h, c), *weights)
            else:
                h = CELL_OPS[cell](x[t, b : b + 1], h, *weights)
            y[t][b], c_all[t][b] = h, c
        h_n.append(h)
        c_n.append(c)
    y, c_all = (torch.cat([torch.cat(row) for row in rows]).view(steps, batch, hidden) for rows in (y, c_all))
    h_n, c_n = torch.cat(h_n), torch.cat(c_n)
    return (y, h_n, c_n, c_all) if cell == "lstm" else (y, h_n, None, None)


def module(rnn, x, hx=None, lengths=None, reset=None):
    """A sequence module without dropout, on (T, B, I): y, h_n, c_n, all h (T, L*D, B, H), all c."""
    directions = 2 if rnn.bidirectional else 1
    h_0, c_0 = hx if isinstance(hx, tuple) else (hx, None)
    last, states, outputs = [], [], [x]
    for place, weights in enumerate(rnn.all_weights):
        if place % directions == 0:
            x, outputs = torch.cat(outputs, -1), []
        y, h_n, c_n, c_all = layer(
            rnn.mode.lower(),
            x,
            None if h_0 is None else h_0[place],
            None if c_0 is None else c_0[place],
            weights if rnn.bias else (*weights, None, None),
            lengths,
            reset,
            reverse=place % directions == 1,
        )
        outputs.append(y)
        last.append((h_n, c_n))
        states.append((y, c_all))
    h_n, c_n = zip(*last, strict=True)
    h, c = zip(*states, strict=True)
    h_n, h = torch.stack(h_n), torch.stack(h, 1)
    c_n, c = (None, None) if c[0] is None else (torch.stack(c_n), torch.stack(c, 1))
    return torch.cat(outputs, -1), h_n, c_n, h, c
