"""Valid calls of the recurrent layers, functions and cells: see malformed_calls.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from malformed_call import DTYPES, Call, odds, some, with_parameters
from models import FUNCTIONS
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq

CELLS = {name.upper(): cell for name, cell in FUNCTIONS.items()}


def recurrent_sizes(rng):
    return [rng.randint(1, most) for most in (6, 5, 9, 9)]  # T, B, I, H


def lengths_of(rng, count, most):
    lengths = [rng.randint(0, most) for _ in range(count)]
    return torch.tensor(lengths) if odds(rng, 0.5) else lengths


def module_call(rng):
    name = some(rng, *CELLS)
    T, B, I, H = recurrent_sizes(rng)  # noqa: E741
    dtype = some(rng, *DTYPES)
    options = {
        "num_layers": rng.randint(1, 2),
        "bias": odds(rng, 0.8),
        "batch_first": odds(rng, 0.5),
        "bidirectional": odds(rng, 0.5),
        "dtype": dtype,
    }
    if name == "LSTM" and H > 1 and odds(rng, 0.3):
        options["proj_size"] = rng.randint(1, H - 1)
    form = some(rng, "padded", "padded", "packed", "unsorted", "unbatched", "step")
    if form == "step":
        options["bidirectional"] = False
    make = torch.Generator().manual_seed(rng.randrange(2**31))
    template = getattr(nn, name)(I, H, **options)
    parameters = {n: torch.randn(p.shape, generator=make).to(dtype) for n, p in template.named_parameters()}

    batch = () if form == "unbatched" else (B,)
    shape = (*batch, T, I) if options["batch_first"] else (T, *batch, I)
    if form == "step":
        shape = (*((B,) if odds(rng, 0.8) else ()), I)
        batch = shape[:-1]
    x = torch.randn(shape, generator=make).to(dtype)
    if form in ("packed", "unsorted"):
        lengths = [rng.randint(1, T) for _ in range(B)] if odds(rng, 0.6) else [T] * B
        lengths = sorted(lengths, reverse=True) if form == "packed" else lengths
        x = pack_padded_sequence(x, lengths, options["batch_first"], form == "packed")
    arguments = {"input": x, "hx": None, "parameters": parameters}
    if odds(rng, 0.5):
        places = options["num_layers"] * (1 + options["bidirectional"])
        h = torch.randn(places, *batch, options.get("proj_size", H), generator=make).to(dtype)
        c = torch.randn(places, *batch, H, generator=make).to(dtype)
        arguments["hx"] = (h, c) if name == "LSTM" else h
    beyond = form in ("padded", "unbatched") and odds(rng, 0.5)
    if beyond:
        if odds(rng, 0.6):
            arguments["lengths"] = lengths_of(rng, B if batch else 1, T)
        if odds(rng, 0.6):
            arguments["reset"] = torch.rand(shape[:-1], generator=make) < 0.3
    elif form != "step" and odds(rng, 0.2):
        arguments["return_states"] = True
    trains, frozen = odds(rng, 0.5), odds(rng, 0.2)

    def ours(a):
        module = getattr(fastseq, name)(I, H, **options).requires_grad_(trains)
        if frozen:
            fastseq.freeze(module)
            with torch.no_grad():
                module(torch.zeros(1, 1, I, dtype=dtype))
        with_parameters(module, a["parameters"])
        if form == "step":
            return module.step(a["input"], a["hx"])
        return module(a["input"], a["hx"], **{n: a[n] for n in ("lengths", "reset", "return_states") if n in a})[:2]

    def torchs(a):
        parameters = a["parameters"]
        if form == "step":  # whose product torch has for a sparse weight, but not that of a sequence
            sparse = {n: p for n, p in parameters.items() if isinstance(p, torch.Tensor) and p.is_sparse}
            parameters = parameters | {n: p.to_dense() for n, p in sparse.items()}
        module = with_parameters(getattr(nn, name)(I, H, **options).requires_grad_(trains), parameters)
        if form == "step":
            hx, x = a["hx"], a["input"]
            if dtype is torch.bfloat16 and hx is not None:
                hx = tuple(s.to(dtype) for s in hx) if isinstance(hx, tuple | list) else hx.to(dtype)
            axis = 0 if x.dim() == 1 or not options["batch_first"] else 1
            y, hx = module(x.unsqueeze(axis), hx)
            return y.squeeze(axis), hx
        if not beyond:
            return module(a["input"], a["hx"])
        return unrolled_module(name, module, a["input"], a["hx"], a.get("lengths"), a.get("reset"))

    return Call(f"{name} {form}", arguments, ours, torchs)


def unrolled(name, x, h, c, weights, lengths, reset, reverse):
    """One direction of a layer, step by step, with what torch's lacks."""
    w_ih, w_hh, b_ih, b_hh, *projection = (w if w is None or not w.is_sparse else w.to_dense() for w in weights)
    T, B, _ = x.shape
    h = x.new_zeros(B, projection[0].shape[0] if projection else w_hh.shape[1]) if h is None else h
    c = x.new_zeros(B, w_hh.shape[0] // 4) if c is None else c
    out = [None] * T
    lengths = torch.full((B,), T) if lengths is None else torch.as_tensor(lengths).reshape(B)
    for t in reversed(range(T)) if reverse else range(T):
        live = (t < lengths).unsqueeze(1)
        begin = t + 1 if reverse else t
        if reset is not None and begin < T:
            cut = reset[begin].unsqueeze(1) & (begin < lengths).unsqueeze(1)
            h, c = h.masked_fill(cut, 0), c.masked_fill(cut, 0)
        x_t = x[t].masked_fill(~live, 0)
        if name == "LSTM":
            i, f, g, o = (F.linear(x_t, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, 1)
            c_t = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h_t = o.sigmoid() * c_t.tanh()
            h_t = F.linear(h_t, projection[0]) if projection else h_t
        else:
            step = torch.rnn_tanh_cell if name == "RNN" else torch.gru_cell
            c_t, h_t = c, step(x_t, h, w_ih, w_hh, b_ih, b_hh)
        h, c = torch.where(live, h_t, h), torch.where(live, c_t, c)
        out[t] = h_t.masked_fill(~live, 0)
    return torch.stack(out), h, c


def unrolled_module(name, module, x, hx, lengths, reset):
    unbatched = x.dim() == 2
    turn = (lambda t: t.unsqueeze(1)) if unbatched else (lambda t: t.transpose(0, 1) if module.batch_first else t)
    x, reset = turn(x), None if reset is None else turn(reset)
    states = (None, None) if hx is None else tuple(hx) if name == "LSTM" else (hx, None)
    if unbatched:
        states = [None if s is None else s.unsqueeze(1) for s in states]
    directions, last = 1 + module.bidirectional, []
    for place, names in enumerate(module._all_weights):
        weights = [getattr(module, n) for n in names]
        if not module.bias:
            weights[2:2] = None, None
        if place % directions == 0:
            below, sides = x, []
        h, c = (None if s is None else s[place] for s in states)
        side, h, c = unrolled(name, below, h, c, weights, lengths, reset, place % directions == 1)
        sides.append(side)
        x = torch.cat(sides, -1)
        last.append((h, c))
    h, c = (torch.stack(s) for s in zip(*last, strict=True))
    if unbatched:
        x, h, c = x.squeeze(1), h.squeeze(1), c.squeeze(1)
    elif module.batch_first:
        x = x.transpose(0, 1)
    return x, (h, c) if name == "LSTM" else h


def function_call(rng):
    name = some(rng, *CELLS)
    T, B, I, H = recurrent_sizes(rng)  # noqa: E741
    dtype, gates = some(rng, *DTYPES), len(CELLS[name].gates)
    make = torch.Generator().manual_seed(rng.randrange(2**31))

    def normal(*shape):
        return torch.randn(shape, generator=make).to(dtype)

    state = None
    if odds(rng, 0.5):
        state = (normal(B, H), normal(B, H)) if name == "LSTM" else normal(B, H)
    arguments = {"input": normal(T, B, I), "hx": state, "w_ih": normal(gates * H, I), "w_hh": normal(gates * H, H)}
    if odds(rng, 0.7):
        arguments |= {"b_ih": normal(gates * H), "b_hh": normal(gates * H)}
    if odds(rng, 0.5):
        arguments["lengths"] = lengths_of(rng, B, T)
    if odds(rng, 0.5):
        arguments["reset"] = torch.rand(T, B, generator=make) < 0.3
    reverse, trains = odds(rng, 0.3), odds(rng, 0.5)

    def ours(a):
        options = {n: a[n] for n in ("lengths", "reset") if n in a}
        positional = [a["input"], a["hx"], a["w_ih"], a["w_hh"], a.get("b_ih"), a.get("b_hh")]
        return getattr(fastseq, name.lower())(*track(positional, trains), reverse=reverse, **options)

    def torchs(a):
        h, c = (a["hx"], None) if name != "LSTM" or a["hx"] is None else a["hx"]
        weights = a["w_ih"], a["w_hh"], a.get("b_ih"), a.get("b_hh")
        y, h, c = unrolled(name, a["input"], h, c, weights, a.get("lengths"), a.get("reset"), reverse)
        return y, (h, c) if name == "LSTM" else h

    return Call(f"{name.lower()}()", arguments, ours, torchs)


def track(arguments, trains):
    """Floats of them as leaves that want gradients."""
    if not trains:
        return arguments
    return [
        a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments
    ]


def cell_call(rng):
    name, as_module = some(rng, *CELLS), odds(rng, 0.5)
    _, B, I, H = recurrent_sizes(rng)  # noqa: E741
    dtype, gates = some(rng, *DTYPES), len(CELLS[name].gates)
    make = torch.Generator().manual_seed(rng.randrange(2**31))

    def normal(*shape):
        return torch.randn(shape, generator=make).to(dtype)

    batch = (B,) if not as_module or odds(rng, 0.8) else ()
    state = (normal(*batch, H), normal(*batch, H)) if name == "LSTM" else normal(*batch, H)
    arguments = {"input": normal(*batch, I), "hx": None if as_module and odds(rng, 0.3) else state}
    weights = {"weight_ih": normal(gates * H, I), "weight_hh": normal(gates * H, H)}
    bias, trains, frozen = odds(rng, 0.7), odds(rng, 0.5), odds(rng, 0.2)
    if bias:
        weights |= {"bias_ih": normal(gates * H), "bias_hh": normal(gates * H)}
    arguments["parameters"] = weights

    def module(library, a):
        cell = getattr(library, name + "Cell")(I, H, bias=bias, dtype=dtype).requires_grad_(trains)
        if frozen and library is fastseq:
            fastseq.freeze(cell)
            with torch.no_grad():
                cell(torch.zeros(1, I, dtype=dtype))
        return with_parameters(cell, a["parameters"])(a["input"], a["hx"])

    def function(op, a):
        p = a["parameters"]
        weights = [p["weight_ih"], p["weight_hh"], p.get("bias_ih"), p.get("bias_hh")]
        x, hx, *weights = track([a["input"], a["hx"], *weights], trains)
        return op(x, hx, *weights)

    if as_module:
        return Call(f"{name}Cell", arguments, lambda a: module(fastseq, a), lambda a: module(nn, a))
    ours = getattr(fastseq, f"{name.lower()}_cell")
    torchs = torch.rnn_tanh_cell if name == "RNN" else getattr(torch, f"{name.lower()}_cell")
    return Call(f"{name.lower()}_cell()", arguments, lambda a: function(ours, a), lambda a: function(torchs, a))
