"""What is not served is refused by one exception, which sends a call to torch; every other one is seen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from binding_calls import B, H, I, T, backward, forward, make_weights
from models import assert_close, flat, pair
from torch import nn
from torch._subclasses import FakeTensorMode

import fastseq
from fastseq.backends.contract import Refused

native = pytest.importorskip("fastseq.backends.native", reason="the extension is not built")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- the binding


class Subclass(torch.Tensor):
    pass


def freed(*shape):
    tensor = torch.randn(shape)
    tensor.untyped_storage().resize_(0)
    return tensor


GOOD = torch.randn(T, B, I)
BAD_INPUTS = {
    "none": lambda x: None,
    "array": lambda x: x.numpy(),
    "subclass": lambda x: x.as_subclass(Subclass),
    "float16": lambda x: x.half(),
    "complex": lambda x: x.to(torch.complex64),
    "integer": lambda x: x.long(),
    "bool": lambda x: x > 0,
    "bits": lambda x: torch.empty(x.shape, dtype=torch.bits8),
    "negative bit": lambda x: torch._neg_view(x),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "zeros without memory": lambda x: torch._efficientzerotensor(x.shape),
    "strided": lambda x: x.mT.contiguous().mT,
    "empty": lambda x: x[:0],
    "no rows": lambda x: x[..., :0, :],
    "no columns": lambda x: x[..., :0],
    "a dimension less": lambda x: x[0],
    "a dimension more": lambda x: x[None],
    "scalar": lambda x: x.flatten()[0],
    "other size": lambda x: x[..., 1:],
    "other dtype": lambda x: x.double(),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
@pytest.mark.usefixtures("reader")
def test_bad_input(name):
    bad = BAD_INPUTS[name]
    with pytest.raises(Refused):
        forward(x=bad(GOOD))
    with pytest.raises(Refused):
        native.recurrent_step("lstm", bad(GOOD[0]), None, None, *make_weights("lstm"), 1)


@pytest.mark.usefixtures("reader")
def test_freed_memory_is_a_mistake():
    with pytest.raises(RuntimeError, match="x has no memory behind it"):
        forward(x=freed(T, B, I))
    with pytest.raises(RuntimeError, match="x has no memory behind it"):
        native.recurrent_step("lstm", freed(B, I), None, None, *make_weights("lstm"), 1)


@pytest.mark.usefixtures("reader")
def test_fake_tensors_never_reach_a_pointer():
    weights = make_weights("lstm")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake, step = torch.randn(T, B, I), torch.randn(B, I)
        fake_weights = tuple(mode.from_tensor(w) for w in weights)
        for arguments in ({"x": fake}, {"weights": fake_weights}, {"h_0": torch.randn(B, H)}):
            with pytest.raises(Refused, match="FakeTensor"):
                forward(**{"x": GOOD, "h_0": None, "c_0": None, "weights": weights} | arguments)
        with pytest.raises(Refused, match="FakeTensor"):
            native.recurrent_step("lstm", step, None, None, *weights, 1)
        with pytest.raises(Refused, match="FakeTensor"):
            native.checksum(fake)
        with pytest.raises(Refused, match="FakeTensor"):
            native.pack("lstm", fake_weights)


@pytest.mark.usefixtures("reader")
def test_transformed_tensors_never_reach_a_pointer():
    weights = make_weights("lstm")
    with pytest.raises(Refused, match="no plain memory"):
        torch.func.vmap(lambda x: native.recurrent_forward("lstm", x, None, None, weights)[0])(GOOD[None])
    with pytest.raises(Refused, match="no plain memory"):
        torch.func.grad(lambda x: native.recurrent_forward("lstm", x, None, None, weights)[0].sum())(GOOD)


def changed_weights(index, change):
    weights = list(make_weights("lstm"))
    weights[index] = change(weights[index])
    return tuple(weights)


LONG = torch.tensor([B] * T)
BAD_ARGUMENTS = {
    "h_0 rows": ({"h_0": torch.zeros(B + 1, H)}, "h_0"),
    "h_0 of 1 row": ({"h_0": torch.zeros(1, H)}, "h_0"),
    "h_0 layers": ({"h_0": torch.zeros(1, B, H)}, "h_0"),
    "h_0 dtype": ({"h_0": torch.zeros(B, H, dtype=torch.float64)}, "h_0"),
    "h_0 stride": ({"h_0": torch.zeros(H, B).T}, "h_0"),
    "c_0 columns": ({"c_0": torch.zeros(B, H - 1)}, "c_0"),
    "float_state of float32": ({"float_state": True}, "float_state"),
    "w_ih rows": ({"weights": changed_weights(0, lambda w: w[1:])}, "w_ih"),
    "w_ih strides": ({"weights": changed_weights(0, lambda w: w.T.contiguous().T)}, "w_ih"),
    "w_ih missing": ({"weights": changed_weights(0, lambda w: None)}, "w_ih"),
    "w_hh missing": ({"weights": changed_weights(1, lambda w: None)}, "w_hh"),
    "w_hh rows": ({"weights": changed_weights(1, lambda w: w[: 3 * H])}, "w_hh"),
    "w_hh empty": ({"weights": changed_weights(1, lambda w: w[:, :0])}, "w_hh"),
    "w_hh dtype": ({"weights": changed_weights(1, lambda w: w.double())}, "w_hh"),
    "b_ih only": ({"weights": changed_weights(3, lambda w: None)}, "both"),
    "b_hh strides": ({"weights": changed_weights(3, lambda w: w[:1].expand(4 * H))}, "b_hh"),
    "y shape": ({"y": torch.zeros(T, B, H + 1)}, "y"),
    "y expanded": ({"y": torch.zeros(1, B, H).expand(T, B, H)}, "overlap"),
    "y windows": ({"y": torch.zeros(T + 1, B * H).as_strided((T, B, H), (B * H - 1, H, 1))}, "overlap"),
    "sizes dtype": ({"batch_sizes": LONG.int()}, "batch_sizes"),
    "sizes length": ({"batch_sizes": LONG[1:]}, "batch_sizes"),
    "sizes scalar": ({"batch_sizes": LONG[0]}, "batch_sizes"),
    "sizes of 0": ({"batch_sizes": torch.tensor([5, 4, 3, 2, 1, 1, 0])}, "batch_sizes"),
    "sizes above B": ({"batch_sizes": LONG + 1}, "batch_sizes"),
    "sizes that grow": ({"batch_sizes": torch.tensor([5, 4, 3, 4, 2, 1, 1])}, "batch_sizes"),
    "order above B": ({"batch_sizes": LONG, "order": torch.tensor([0, 1, 2, 3, 5])}, "order"),
    "order below 0": ({"batch_sizes": LONG, "order": torch.tensor([0, 1, 2, 3, -1])}, "order"),
    "order twice": ({"batch_sizes": LONG, "order": torch.tensor([0, 1, 2, 3, 3])}, "order"),
    "order length": ({"batch_sizes": LONG, "order": torch.tensor([0, 1, 2, 3])}, "order"),
    "reset dtype": ({"reset": torch.zeros(T, B)}, "reset"),
    "reset shape": ({"reset": torch.zeros(B, T, dtype=torch.bool)}, "reset"),
    "packed without sizes": ({"x": torch.zeros(T * B, I), "packed": True}, "batch_sizes"),
    "packed rows": ({"x": torch.zeros(T * B - 1, I), "packed": True, "batch_sizes": LONG}, "x"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(name):
    changes, message = BAD_ARGUMENTS[name]
    with pytest.raises(Refused, match=message):
        forward(**changes)


BAD_GRADIENTS = {
    "dy shape": ({"dy": torch.zeros(T, B, H + 1)}, "dy"),
    "dy stride": ({"dy": torch.zeros(()).expand(T, B, H)}, "dy"),
    "dh_n shape": ({"dh_n": torch.zeros(B, H + 1)}, "dh_n"),
    "y missing": ({"y": None}, "y"),
    "saved size": ({"saved": torch.zeros(64, dtype=torch.uint8)}, "saved"),
    "saved missing": ({"saved": None}, "saved"),
    "dx expanded": ({"dx": torch.zeros(1, B, I).expand(T, B, I)}, "dx"),
}


@pytest.mark.parametrize("name", BAD_GRADIENTS)
def test_bad_gradients(name):
    changes, message = BAD_GRADIENTS[name]
    with pytest.raises(Refused, match=message):
        backward(**changes)


def test_unknown_cell_and_wrong_states():
    with pytest.raises(Refused, match="cell"):
        native.pack("elman", make_weights("gru"))
    with pytest.raises(Refused, match="c_0"):
        forward("gru", c_0=torch.zeros(B, H))


def test_an_unknown_isa_is_a_mistake():
    with pytest.raises(ValueError, match="sse9"):
        backward(isa="sse9")


def test_huge_sizes_are_refused():
    # A view of one element has any size, its results do not.
    huge = torch.zeros(1, 1, 1).expand(1 << 40, 1 << 20, 1)
    weights = torch.zeros(4 * H, 1), torch.zeros(4 * H, H), None, None
    with pytest.raises(Refused, match="too many"):
        native.recurrent_forward("lstm", huge, None, None, weights)
    with pytest.raises(RuntimeError):  # more than an address space holds
        native.recurrent_forward("lstm", huge[: 1 << 28], None, None, weights)


# ---- what becomes of a call


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def recurrent(ours, torchs):
    module, reference = pair(ours, torchs, I, H)
    x = random(B, I) if isinstance(module, nn.RNNCellBase) else random(T, B, I)
    return lambda: module(x), lambda: reference(x)


def attention(mask=None, **options):
    q, k, v = (random(2, 3, rows, 8).requires_grad_() for rows in (5, 7, 7))
    return (
        lambda: fastseq.scaled_dot_product_attention(q, k, v, mask, **options),
        lambda: F.scaled_dot_product_attention(q, k, v, mask),
    )


def layer_norm():
    x, residual = random(512, 2049).requires_grad_(), random(512, 2049)
    return lambda: fastseq.layer_norm(x, (2049,), residual=residual)[0], lambda: F.layer_norm(x + residual, (2049,))


def projections():
    modules = [m.eval() for m in pair(fastseq.MultiheadAttention, nn.MultiheadAttention, 128, 2, batch_first=True)]
    x = random(2, 32, 128)
    return tuple(lambda m=m: m(x, x, x, need_weights=False)[0] for m in modules)


# The function of the binding that a call runs on, and the call, ours and torch's.
CALLS = {
    "step": ("recurrent_step", lambda: recurrent(fastseq.GRUCell, nn.GRUCell)),
    "sequence": ("recurrent_forward", lambda: recurrent(fastseq.LSTM, nn.LSTM)),
    "attention": ("attention_forward", attention),
    "masked attention": ("attention_forward", lambda: attention(torch.rand(5, 7) < 0.7)),
    "attention beyond torch": ("attention_forward", lambda: attention(window=(9, 9))),
    "layer norm": ("layer_norm_forward", layer_norm),
    "projections": ("linear_forward", projections),
}
# Small projections are torch's where gradients are recorded.
WAYS = [(name, record) for name in CALLS for record in (False, True) if not (record and name == "projections")]
each_way = pytest.mark.parametrize(("name", "record"), WAYS, ids=[f"{n}-{'training' * r}" for n, r in WAYS])


@each_way
@pytest.mark.parametrize("error", [RuntimeError, TypeError, ValueError, AttributeError, IndexError, MemoryError])
def test_a_kernel_that_fails_is_seen(name, record, error, monkeypatch):
    function, make = CALLS[name]
    ours, _ = make()

    def fails(*args, **kwargs):
        raise error("the kernel failed")

    monkeypatch.setattr(native, function, fails)
    with torch.set_grad_enabled(record), pytest.raises(error, match="the kernel failed"):
        ours()


@each_way
def test_what_is_refused_is_torchs(name, record, monkeypatch):
    function, make = CALLS[name]
    ours, torchs = make()
    refused = []

    def refuses(*args, **kwargs):
        refused.append(function)
        raise Refused("not served")

    monkeypatch.setattr(native, function, refuses)
    with torch.set_grad_enabled(record):
        assert_close(flat(ours()), flat(torchs()))
    assert refused
