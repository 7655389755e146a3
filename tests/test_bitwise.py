"""The promises in bits: any number of threads, any cut into chunks, any other rows, any run gives the same result."""

from functools import partial

import pytest
import torch
from cases import DTYPES, each_dtype

import fastseq
from fastseq import backends, ops
from fastseq.ops import CELLS
from fastseq.tools.verify.recurrent import Case, make_inputs

native = backends.select("recurrent")
if native is None:
    pytest.skip("the kernels are not built", allow_module_level=True)

MODULES = {name: partial(fastseq.nn.Recurrent, cell) for name, cell in ops.CELLS.items()} | {
    "rnn_tanh": lambda *sizes, **options: fastseq.RNN(*sizes, **options),
    "rnn_relu": lambda *sizes, **options: fastseq.RNN(*sizes, nonlinearity="relu", **options),
    "lstm": fastseq.LSTM,
    "gru": fastseq.GRU,
}


@pytest.fixture(params=native.isas())
def isa(request):
    with native.use_isa(request.param):
        yield request.param


def forward_and_backward(cell, case, inputs, threads, panels=None):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    batch_sizes = order = None
    if inputs.lengths is not None:
        batch_sizes, order = inputs.active.sum(1), inputs.order
    options = {"batch_sizes": batch_sizes, "order": order, "reverse": case.reverse, "reset": inputs.reset}
    forward = (cell, inputs.x, inputs.h_0, inputs.c_0, inputs.weights)
    y, h_n, c_n, _, saved = native.recurrent_forward(*forward, save=True, panels=panels, **options)
    gradients = native.recurrent_backward(
        *forward, y, saved, native.active_isa(), dy=inputs.dy, dh_n=inputs.dh_n, dc_n=inputs.dc_n, dc_all=None,
        needs=(True,) * 7, dx=torch.zeros_like(inputs.x), **options,
    )  # fmt: skip
    torch.set_num_threads(before)
    return [a for a in (y, h_n, c_n, *gradients) if a is not None]


def all_equal(results, expected):
    assert len(results) == len(expected)
    return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@each_dtype
@pytest.mark.parametrize("cell", CELLS)
def test_threads(cell, dtype, isa):
    """Split by units, by rows (B = 70, small weights), by rows because there are more threads than panels (the last
    two), with lengths and resets; all large enough for a team.
    """
    for case in (
        Case(20, 5, 130, 129),
        Case(9, 70, 65, 96),
        Case(12, 33, 65, 127, lengths=True, reset=True, reverse=True),
        Case(3, 900, 40, 16),
        Case(12, 400, 40, 8, lengths=True, reset=True, reverse=True),
    ):
        inputs = make_inputs(cell, case, dtype)
        alone = forward_and_backward(cell, case, inputs, 1)
        for threads in (2, 3, 4):
            assert all_equal(forward_and_backward(cell, case, inputs, threads), alone), (case, threads)


@pytest.mark.parametrize("cell", CELLS)
def test_runs(cell, isa):
    case = Case(16, 9, 96, 192)
    inputs = make_inputs(cell, case, torch.float32)
    first = forward_and_backward(cell, case, inputs, 4)
    for _ in range(30):
        assert all_equal(forward_and_backward(cell, case, inputs, 4), first)


def flat(state):
    return list(state) if isinstance(state, tuple) else [state]


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_chunks(cell, dtype, training, isa):
    """A module run on a sequence in chunks gives the bits of the full run: also across hoisted input projections."""
    for B, I, H in ((1, 65, 63), (3, 300, 33), (9, 7, 260)):  # noqa: E741
        torch.manual_seed(0)
        module = MODULES[cell](I, H, num_layers=2, dtype=dtype)
        x = torch.randn(67, B, I, dtype=dtype)
        with torch.set_grad_enabled(training):
            y, state = module(x)
            for size in (1, 3, 64):
                parts, hx = [], None
                for chunk in x.split(size):
                    part, hx = module(chunk, hx)
                    parts.append(part)
                assert torch.equal(torch.cat(parts), y), (B, size)
                assert all_equal(flat(hx), flat(state)), (B, size)


@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16_chunks_with_a_float32_state(cell, isa):
    T, B, I, H = 23, 5, 33, 65  # noqa: E741
    inputs = make_inputs(cell, Case(T, B, I, H), torch.bfloat16)
    h, c = inputs.h_0.float(), None if inputs.c_0 is None else inputs.c_0.float()
    y, h_n, c_n, _, _ = native.recurrent_forward(cell, inputs.x, h, c, inputs.weights, float_state=True)
    parts = []
    for chunk in inputs.x.split(4):
        part, h, c, _, _ = native.recurrent_forward(cell, chunk, h, c, inputs.weights, float_state=True)
        parts.append(part)
    assert torch.equal(torch.cat(parts), y)
    assert torch.equal(h, h_n)
    assert c is None or torch.equal(c, c_n)


@each_dtype
@pytest.mark.parametrize("cell", CELLS)
def test_frozen_steps(cell, dtype):
    """`step` of a frozen module is the sequence, bit by bit; in bfloat16 because it passes the state on in float32."""
    torch.manual_seed(0)
    module = fastseq.freeze(MODULES[cell](33, 65, dtype=dtype))
    x = torch.randn(11, 5, 33).to(dtype)
    with torch.no_grad():
        y, _ = module(x)
        state, parts = None, []
        for x_t in x:
            part, state = module.step(x_t, state)
            parts.append(part)
    assert torch.equal(torch.stack(parts), y)


@each_dtype
@pytest.mark.parametrize("cell", CELLS)
def test_rows_do_not_see_each_other(cell, dtype, isa):
    inputs = make_inputs(cell, Case(6, 65, 63, 33), dtype)
    y = native.recurrent_forward(cell, inputs.x, inputs.h_0, inputs.c_0, inputs.weights)[0]
    for rows in (slice(0, 1), slice(3, 10), slice(64, 65)):
        c_0 = None if inputs.c_0 is None else inputs.c_0[rows]
        part = native.recurrent_forward(cell, inputs.x[:, rows], inputs.h_0[rows], c_0, inputs.weights)[0]
        assert torch.equal(part, y[:, rows])


@each_dtype
@pytest.mark.parametrize("cell", CELLS)
def test_a_single_row_in_place(cell, dtype, isa):
    """Weights that are read in place for a single row give the bits of packed ones: blocks, units and terms cut off."""
    for I, H in ((1, 7), (33, 65), (64, 32), (513, 259), (1031, 130), (1024, 48)):  # noqa: E741
        case = Case(1, 1, I, H)
        inputs = make_inputs(cell, case, dtype)
        packed = forward_and_backward(cell, case, inputs, 1, native.pack(cell, inputs.weights))
        for threads in (1, 2):
            assert all_equal(forward_and_backward(cell, case, inputs, threads), packed), (I, H, threads)
