"""A backend without kernels: the contract of fastseq.backends.native, computed by tests/loop.py.

It lets the modules' and functions' own work (routes, layouts, autograd, packed weights) be tested where no kernel is built, and it is
strict where the kernels may not be: it refuses what a kernel must never see, and knows a `saved` that was used before.
"""

import loop
import torch

CALLS = []  # names of the functions called


def active_isa():
    return "double"


def checksum(tensor):
    assert tensor.is_contiguous()
    CALLS.append("checksum")
    bits = tensor.detach().contiguous().flatten().view(torch.uint8).to(torch.int64)
    return int(bits.sum()), int((bits * torch.arange(1, len(bits) + 1)).sum())


class Panels:
    def __init__(self, weights):
        self.weights = tuple(None if w is None else w.detach().clone() for w in weights)


def pack(cell, weights):
    CALLS.append("pack")
    return Panels(weights)


def _check(*tensors):
    for tensor in tensors:
        if tensor is not None:
            if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or not tensor.is_cpu or tensor.is_neg():
                raise TypeError(f"not a plain tensor: {type(tensor)}")
            if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
                raise ValueError("the last axis must be contiguous")


def _layout(x, batch_sizes, order, packed, batch):
    """x as (T, B, I), the lengths in the order of the batch, and the places (T, B) that are active."""
    steps = x.shape[0] if batch_sizes is None else len(batch_sizes)
    batch = x.shape[1] if not packed else int(batch_sizes[0])
    if batch_sizes is None:
        lengths = torch.full((batch,), steps)
    else:
        assert batch_sizes.dtype is torch.int64
        assert steps == (steps if packed else x.shape[0])
        assert batch_sizes[-1] >= 1
        assert (batch_sizes[1:] <= batch_sizes[:-1]).all()
        by_row = (batch_sizes[:, None] > torch.arange(batch)).sum(0)
        lengths = torch.empty_like(by_row)
        lengths[torch.arange(batch) if order is None else order] = by_row
    active = torch.arange(steps)[:, None] < lengths
    if packed:
        padded = x.new_zeros(steps, batch, x.shape[-1])
        padded[active] = x
        x = padded
    return x, lengths.tolist(), active


def _run(cell, x, h_0, c_0, weights, batch_sizes, order, packed, reverse, reset, float_state):
    x, lengths, active = _layout(x, batch_sizes, order, packed, None)
    dtype = x.dtype
    if float_state:
        assert dtype is torch.bfloat16
        x, weights = x.float(), [None if w is None else w.float() for w in weights]
    if h_0 is not None and h_0.dtype is not x.dtype:
        raise ValueError("h_0 has another dtype")
    y, h_n, c_n, c_all = loop.layer(cell, x, h_0, c_0, weights, lengths, reset, reverse)
    y, c_all = (None if s is None else (s[active] if packed else s).to(dtype) for s in (y, c_all))
    return y, h_n, c_n, c_all, active


def recurrent_forward(
    cell, x, h_0, c_0, weights, *, panels=None, batch_sizes=None, order=None, packed=False, reverse=False, reset=None,
    save=False, y=None, return_c=False, float_state=False,
):  # fmt: skip
    CALLS.append("recurrent_forward")
    _check(x, h_0, c_0, *weights, y)
    weights = weights if panels is None else panels.weights
    with torch.no_grad():
        out, h_n, c_n, c_all, active = _run(
            cell, x, h_0, c_0, weights, batch_sizes, order, packed, reverse, reset, float_state
        )
        if y is None:
            y = out
        elif packed:
            y.copy_(out)
        else:
            y[active] = out[active]
    saved = torch.zeros(1, dtype=torch.uint8) if save else None
    return y, h_n, c_n, c_all if return_c else None, saved


def recurrent_step(cell, x, h, c, w_ih, w_hh, b_ih, b_hh, threads, save=False, panels=None, float_state=False):
    CALLS.append("recurrent_step")
    weights = (w_ih, w_hh, b_ih, b_hh)
    _check(x, h, c, *weights)
    _check_step_shapes(cell, x, h, c, weights)
    weights = weights if panels is None else panels.weights
    with torch.no_grad():
        y, h_n, c_n, _, _ = _run(cell, x[None], h, c, weights, None, None, False, False, None, float_state)
    saved = torch.zeros(1, dtype=torch.uint8) if save else None
    return y[0], h_n if float_state else y[0], c_n, saved


def _check_step_shapes(cell, x, h, c, weights):
    w_ih, w_hh, b_ih, b_hh = weights
    gates = {"lstm": 4, "gru": 3}.get(cell, 1)
    rows, hidden = w_hh.shape
    fits = x.dim() == 2 and x.shape[0] > 0 and hidden > 0 and rows == gates * hidden
    fits = fits and w_ih.shape == (rows, x.shape[1]) and (b_ih is None) == (b_hh is None)
    fits = fits and all(b is None or b.shape == (rows,) for b in (b_ih, b_hh))
    fits = fits and all(s is None or s.shape == (x.shape[0], hidden) for s in (h, c))
    fits = fits and all(t is None or t.dtype == x.dtype for t in weights)
    if not fits:
        raise ValueError("shapes do not fit")


def recurrent_backward(
    cell, x, h_0, c_0, weights, y, saved, isa, *, dy, dh_n, dc_n, dc_all, needs, batch_sizes=None, order=None,
    packed=False, reverse=False, reset=None, float_state=False, dx=None, accumulate_dx=False,
):  # fmt: skip
    CALLS.append("recurrent_backward")
    _check(x, h_0, c_0, *weights, y, dy, dh_n, dc_n, dc_all, dx)
    assert isa == "double"
    assert saved.item() == 0, "saved was used before"
    saved.fill_(1)
    inputs = [None if t is None else t.detach().clone().requires_grad_() for t in (x, h_0, c_0, *weights)]
    with torch.enable_grad():
        out, h_n, c_n, c_all, active = _run(
            cell, *inputs[:3], inputs[3:], batch_sizes, order, packed, reverse, reset, float_state
        )
    # A state that came in as None may be wanted by nobody; outputs that no gradient reaches count as zero.
    pairs = [
        (o, g) for o, g in ((out, dy), (h_n, dh_n), (c_n, dc_n), (c_all, dc_all)) if g is not None and o is not None
    ]
    grads = [None] * 7
    wanted = [i for i in range(7) if needs[i] and inputs[i] is not None]
    if pairs and wanted:
        found = torch.autograd.grad(
            [o for o, _ in pairs], [inputs[i] for i in wanted], [g.to(o.dtype) for o, g in pairs], allow_unused=True
        )
        for i, grad in zip(wanted, found, strict=True):
            grads[i] = torch.zeros_like(inputs[i]) if grad is None else grad
    if dx is not None and grads[0] is not None:
        where = slice(None) if packed else active
        dx[where] = dx[where] + grads[0][where] if accumulate_dx else grads[0][where]
        grads[0] = dx
    return tuple(grads)
