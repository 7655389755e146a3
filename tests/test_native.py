"""The binding: how it reads and allocates. What it refuses is tested beside, that the kernels are right elsewhere."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from binding_calls import B, H, I, T, backward, forward, make_inputs, make_weights, same
from cases import each_dtype
from models import assert_close
from torch import nn

from fastseq.backends.contract import Refused
from fastseq.ops import CELLS

native = pytest.importorskip("fastseq.backends.native", reason="the extension is not built")

each_cell = pytest.mark.parametrize("cell", CELLS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- what comes back


@each_cell
@each_dtype
@pytest.mark.usefixtures("reader")
def test_outputs(cell, dtype):
    x, h, c = make_inputs(cell, dtype)
    weights = make_weights(cell, dtype)
    y, h_n, c_n, c_all, saved = native.recurrent_forward(cell, x, h, c, weights, return_c=True, save=True)
    lstm = cell == "lstm"
    assert (y.shape, y.dtype) == ((T, B, H), dtype)
    assert (h_n.shape, h_n.dtype) == ((B, H), dtype)
    assert torch.equal(h_n, y[-1])
    assert (c_n is not None, c_all is not None) == (lstm, lstm)
    if lstm:
        assert torch.equal(c_n, c_all[-1])
    assert (saved.dtype, saved.dim()) == (torch.uint8, 1)

    shapes = (T, B, I), (B, H), (B, H) if lstm else None, *(w.shape for w in weights)
    gradients = native.recurrent_backward(
        cell, x, h, c, weights, y, saved, native.active_isa(), dy=y, dh_n=None, dc_n=None, dc_all=None, needs=[True] * 7
    )
    assert [None if g is None else (g.shape, g.dtype) for g in gradients] == [s and (s, dtype) for s in shapes]


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_against_torch(cell):
    module = {"lstm": nn.LSTM, "gru": nn.GRU}[cell](I, H)
    x, h, c = make_inputs(cell)
    expected, _ = module(x, h[None] if c is None else (h[None], c[None]))
    weights = module.weight_ih_l0, module.weight_hh_l0, module.bias_ih_l0, module.bias_hh_l0
    y = native.recurrent_forward(cell, x, h, c, weights)[0]
    assert_close(y, expected.detach(), "float32")


@each_cell
def test_both_readers_agree(cell):
    inputs, weights = make_inputs(cell), make_weights(cell)
    expected = native.recurrent_forward(cell, *inputs, weights, save=True)
    step = native.recurrent_step(cell, inputs[0][0], *inputs[1:], *weights, 1)
    native.attach(exchange=False)
    try:
        same(native.recurrent_forward(cell, *inputs, weights, save=True)[:4], expected[:4])
        same(native.recurrent_step(cell, inputs[0][0], *inputs[1:], *weights, 1), step)
    finally:
        native.attach()


@each_cell
@each_dtype
def test_step_is_a_sequence_of_one(cell, dtype):
    (x, h, c), weights = make_inputs(cell, dtype), make_weights(cell, dtype)
    panels = native.pack(cell, weights)
    expected = native.recurrent_forward(cell, x[:1], h, c, weights)
    for packed in (None, panels):
        y, h_n, c_n, saved = native.recurrent_step(cell, x[0], h, c, *weights, 1, panels=packed)
        assert h_n is y
        assert saved is None
        if packed is None:  # the rows of the weights where they lie: another order of sums
            torch.testing.assert_close((y, c_n), (expected[0][0], expected[2]))
        else:
            same((y, c_n), (expected[0][0], expected[2]))


def test_step_gives_new_tensors():
    (x, h, c), weights = make_inputs("lstm"), make_weights("lstm")
    first = native.recurrent_step("lstm", x[0], h, c, *weights, 1)
    copies = first[0].clone(), first[2].clone()
    second = native.recurrent_step("lstm", x[1], first[0], first[2], *weights, 1)
    same((first[0], first[2]), copies)
    assert len({t.data_ptr() for t in (first[0], first[2], second[0], second[2])}) == 4
    assert type(first[0]) is torch.Tensor
    assert not first[0].requires_grad


@each_cell
def test_states_of_bfloat16_in_float32(cell):
    (x, h, c), weights = make_inputs(cell, torch.bfloat16), make_weights(cell, torch.bfloat16)
    h, c = h.float(), None if c is None else c.float()
    whole = native.recurrent_forward(cell, x, h, c, weights, float_state=True)
    assert (whole[0].dtype, whole[1].dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(whole[1].bfloat16(), whole[0][-1])
    y, h_n, c_n, _ = native.recurrent_step(cell, x[0], h, c, *weights, 1, float_state=True)
    one = native.recurrent_forward(cell, x[:1], h, c, weights, float_state=True)
    same((y, h_n, c_n), (one[0][0], one[1], one[2]))


@each_cell
def test_absent_states_are_zero(cell):
    (x, h, c), weights = make_inputs(cell), make_weights(cell)
    zeros = torch.zeros_like(h), None if c is None else torch.zeros_like(c)
    same(native.recurrent_forward(cell, x, None, None, weights), native.recurrent_forward(cell, x, *zeros, weights))


def test_memory_goes_with_the_tensors():
    (x, h, c), weights = make_inputs("lstm"), make_weights("lstm")
    results = [
        *native.recurrent_step("lstm", x[0], h, c, *weights, 1, save=True),
        *native.recurrent_forward("lstm", x, h, c, weights, save=True),
    ]
    alive = [weakref.ref(t.untyped_storage()) for t in results if t is not None]
    tensors = [weakref.ref(t) for t in results if t is not None]
    results.clear()
    gc.collect()
    assert not any(reference() for reference in alive + tensors)


# ---- how tensors may lie in memory


@each_cell
@pytest.mark.usefixtures("reader")
def test_strides(cell):
    (x, h, c), weights = make_inputs(cell), make_weights(cell)
    expected = native.recurrent_forward(cell, x, h, c, weights)
    wide = torch.full((B, T, 2 * I), torch.nan)
    wide[..., :I] = x.transpose(0, 1)
    states = torch.stack([h, h if c is None else c], dim=1)  # rows of h and c take turns
    views = wide[..., :I].transpose(0, 1), states[:, 0], None if c is None else states[:, 1]
    same(native.recurrent_forward(cell, *views, weights), expected)
    step = native.recurrent_step(cell, x[0], h, c, *weights, 1)
    same(native.recurrent_step(cell, views[0][0], *views[1:], *weights, 1), step)


def test_offset_and_expanded_inputs():
    (x, h, c), weights = make_inputs("lstm"), make_weights("lstm")
    rows = torch.cat([torch.full((1, B, I), torch.nan), x])[1:]
    same(forward(x=rows, h_0=h, c_0=c, weights=weights), forward(x=x, h_0=h, c_0=c, weights=weights))
    one = x[:1, :1].expand(T, B, I)
    same(forward(x=one, h_0=h, c_0=c, weights=weights), forward(x=one.contiguous(), h_0=h, c_0=c, weights=weights))


def test_parameters_are_read():
    weights = make_weights("lstm")
    parameters = tuple(nn.Parameter(w) for w in weights)
    x = torch.randn(T, B, I)
    same(forward(x=x, h_0=None, c_0=None, weights=parameters), forward(x=x, h_0=None, c_0=None, weights=weights))


def test_output_into_a_view():
    (x, h, c), weights = make_inputs("gru"), make_weights("gru")
    expected = native.recurrent_forward("gru", x, h, c, weights)
    both = torch.full((B, T, 2 * H), torch.nan)
    y = both[..., H:].transpose(0, 1)
    assert native.recurrent_forward("gru", x, h, c, weights, y=y)[0] is y
    assert torch.equal(y, expected[0])
    assert both[..., :H].isnan().all()


def test_padding_is_zero_in_new_outputs_and_untouched_in_given_ones():
    (x, h, c), weights = make_inputs("lstm"), make_weights("lstm")
    sizes, order = torch.tensor([5, 5, 3, 3, 1, 1, 1]), torch.tensor([4, 0, 2, 1, 3])
    lengths = torch.tensor([4, 2, 4, 2, 7])
    padding = torch.arange(T)[:, None] >= lengths
    x[padding] = torch.nan
    y, _, _, c_all, _ = forward(x=x, h_0=h, c_0=c, weights=weights, batch_sizes=sizes, order=order, return_c=True)
    for output in (y, c_all):
        assert (output[padding] == 0).all()
        assert output[~padding].isfinite().all()
    given = torch.full((T, B, H), torch.nan)
    forward(x=x, h_0=h, c_0=c, weights=weights, batch_sizes=sizes, order=order, y=given)
    assert given[padding].isnan().all()
    assert torch.equal(given[~padding], y[~padding])


def test_packed_rows_equal_padded_rows():
    (x, h, c), weights = make_inputs("lstm"), make_weights("lstm")
    sizes = torch.tensor([5, 4, 4, 2, 1, 1, 1])
    rows = torch.cat([x[t, :n] for t, n in enumerate(sizes)])
    padded = forward(x=x, h_0=h, c_0=c, weights=weights, batch_sizes=sizes)
    packed = forward(x=rows, h_0=h, c_0=c, weights=weights, batch_sizes=sizes, packed=True)
    assert torch.equal(packed[0], torch.cat([padded[0][t, :n] for t, n in enumerate(sizes)]))
    same(packed[1:3], padded[1:3])
    alone = forward(x=rows, h_0=None, c_0=None, weights=weights, batch_sizes=sizes, packed=True)
    zeros = torch.zeros(B, H)
    same(alone, forward(x=rows, h_0=zeros, c_0=zeros, weights=weights, batch_sizes=sizes, packed=True))


def test_input_gradient_given():
    dy = torch.randn(T, B, H)
    torch.manual_seed(1)
    dx = backward(dy=dy)[0]
    wide = torch.full((B, T, I + 1), torch.nan)
    torch.manual_seed(1)
    view = wide[..., :I].transpose(0, 1)
    assert backward(dy=dy, dx=view)[0] is view
    assert torch.equal(view, dx)
    assert wide[..., I].isnan().all()
    torch.manual_seed(1)
    backward(dy=dy, dx=view, accumulate_dx=True)
    assert torch.equal(view, dx + dx)


def test_only_the_gradients_that_are_needed():
    for index in range(7):
        gradients = backward(needs=[i == index for i in range(7)])
        assert [g is not None for g in gradients] == [i == index for i in range(7)]
    assert backward(weights=make_weights("lstm", bias=False))[5:] == (None, None)


# ---- panels


@each_cell
@each_dtype
def test_panels(cell, dtype):
    (x, h, c), weights = make_inputs(cell, dtype), make_weights(cell, dtype)
    panels = native.pack(cell, weights)
    assert panels.isa == native.active_isa()
    assert panels.nbytes >= sum(w.nbytes for w in weights)
    same(
        native.recurrent_forward(cell, x, h, c, weights, panels=panels),
        native.recurrent_forward(cell, x, h, c, weights),
    )


def test_panels_of_other_weights():
    panels = native.pack("gru", make_weights("gru"))
    with pytest.raises(Refused, match="another cell, dtype or shape"):
        forward("lstm", panels=panels)
    with pytest.raises(Refused, match="another cell, dtype or shape"):
        forward("gru", panels=native.pack("gru", make_weights("gru", torch.float64)))
    with pytest.raises(TypeError):
        forward("gru", panels=b"panels")


@pytest.mark.skipif(len(native.isas()) < 2, reason="this machine runs one instruction set only")
def test_panels_of_another_isa():
    panels = native.pack("gru", make_weights("gru"))
    other = next(isa for isa in native.isas() if isa != native.active_isa())
    with native.use_isa(other), pytest.raises(Refused, match="packed for"):
        forward("gru", panels=panels)


# ---- poisoned memory


@each_cell
def test_every_element_is_written(cell):
    with native.filled_with_nan():
        results = forward(cell, save=True, return_c=True)[:4] + tuple(backward(cell))
        (x, h, c), weights = make_inputs(cell), make_weights(cell)
        results += native.recurrent_step(cell, x[0], h, c, *weights, 1)
    assert all(result.isfinite().all() for result in results if result is not None)
