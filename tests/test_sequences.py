"""lengths=, reset=, return_states= and step() of the sequence modules against a loop of torch's cells."""

import itertools

import loop
import pytest
import torch
from models import MODULES, assert_close, flat, gradients, make, random_hx

import fastseq

pytestmark = pytest.mark.usefixtures("route")


def expected(rnn, x, hx, lengths=None, reset=None):
    y, h_n, c_n, h, c = loop.module(rnn, x, hx, lengths, reset)
    return [t for t in (y, h_n, c_n, h, c) if t is not None]


CASES = list(itertools.product([1, 2], [False, True], [None, [3, 7, 0, 5, 1], [0, 0, 0, 0, 0], [7] * 5], [False, True]))


@pytest.mark.parametrize("cell", MODULES)
@pytest.mark.parametrize(("layers", "bidirectional", "lengths", "cuts"), CASES)
@pytest.mark.parametrize("hx_given", [False, True])
def test_lengths_reset_states(cell, layers, bidirectional, lengths, cuts, hx_given):
    rnn = make(cell, 3, 9, layers, bidirectional=bidirectional)
    x = torch.randn(7, 5, 3, dtype=torch.float64, requires_grad=True)
    hx = random_hx(rnn, 5, requires_grad=True) if hx_given else None
    reset = torch.rand(7, 5) < 0.3 if cuts else None
    result = flat(rnn(x, hx, lengths=lengths, reset=reset, return_states=True))
    wanted = expected(rnn, x, hx, lengths, reset)
    assert_close(result, wanted)
    inputs = [x, *(flat([hx]) if hx_given else []), *rnn.parameters()]
    assert_close(gradients(result, inputs), gradients(wanted, inputs))
    with torch.no_grad():
        assert_close(flat(rnn(x, hx, lengths=lengths, reset=reset, return_states=True)), wanted)


@pytest.mark.parametrize("cell", MODULES)
def test_layouts(cell):
    """batch_first and unbatched give what (T, B) gives, moved."""
    rnn = make(cell, 3, 4, 2, bidirectional=True)
    first = make(cell, 3, 4, 2, bidirectional=True, batch_first=True)
    x, hx, lengths = torch.randn(7, 5, 3, dtype=torch.float64), random_hx(rnn, 5), torch.tensor([4, 7, 0, 2, 6])
    reset = torch.rand(7, 5) < 0.3
    y, h_n, *states = flat(rnn(x, hx, lengths=lengths, reset=reset, return_states=True))
    options = {"lengths": lengths, "reset": reset.T, "return_states": True}
    y_first, h_n_first, *states_first = flat(first(x.transpose(0, 1), hx, **options))
    assert_close(y_first.transpose(0, 1), y)
    assert_close(h_n_first, h_n)
    c_n, c_n_first = (states.pop(0), states_first.pop(0)) if cell == "lstm" else (h_n, h_n_first)
    assert_close(c_n_first, c_n)
    for state, moved in zip(states, states_first, strict=True):
        assert moved.shape == (5, 7, 4, 4)
        assert_close(moved.movedim(0, 2), state)

    row = 3  # of length 2
    hx_row = tuple(s[:, row] for s in hx) if cell == "lstm" else hx[:, row]
    for module in (rnn, first):
        alone = flat(module(x[:, row], hx_row, lengths=[2], reset=reset[:, row], return_states=True))
        y_row, h_n_row, *states_row = alone
        assert_close(y_row, y[:, row])
        assert_close(h_n_row, h_n[:, row])
        if cell == "lstm":
            assert_close(states_row.pop(0), c_n[:, row])
        for state, state_row in zip(states, states_row, strict=True):
            assert_close(state_row, state[:, :, row])


@pytest.mark.parametrize("cell", MODULES)
def test_nothing_but_empty_sequences(cell):
    """States pass through; a loss on the output has a backward, of zeros."""
    rnn = make(cell, 3, 4, 2, bidirectional=True)
    x, hx = torch.randn(7, 2, 3, dtype=torch.float64, requires_grad=True), random_hx(rnn, 2, requires_grad=True)
    y, h_n, *rest = flat(rnn(x, hx, lengths=[0, 0], return_states=True))
    assert torch.equal(h_n, flat([hx])[0])
    assert all((t == 0).all() for t in (y, rest[-1]))
    grads = torch.autograd.grad(y.sum() + rest[-1].sum(), [x, *rnn.parameters()])
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, lambda n: torch.tensor(n, dtype=torch.uint8)])
def test_lengths_kinds(kind):
    rnn, x = make("gru", 3, 4), torch.randn(7, 3, 3, dtype=torch.float64)
    assert_close(rnn(x, lengths=kind([2, 7, 5])), rnn(x, lengths=[2, 7, 5]))


def test_lengths_leave_padding_out():
    """NaN in the padding reaches neither the results nor a gradient."""
    for cell in MODULES:
        rnn = make(cell, 3, 4, bidirectional=True)
        x = torch.randn(7, 3, 3, dtype=torch.float64)
        x[4:, 0], x[2:, 2] = torch.nan, torch.nan
        x.requires_grad_()
        y, *_ = rnn(x, lengths=[4, 7, 2])
        grads = torch.autograd.grad(y.sum(), [x, *rnn.parameters()])
        assert all(t.isfinite().all() for t in (y, *grads))
        assert (grads[0][4:, 0] == 0).all()
        assert (y[2:, 2] == 0).all()


@pytest.mark.parametrize(
    ("lengths", "error", "text"),
    [
        ([1.0, 2.0, 3.0], TypeError, "lengths must be integers"),
        ([1, float("nan"), 3], TypeError, "lengths must be integers"),
        ([True, False, True], TypeError, "lengths must be integers"),
        ([1, None, 3], TypeError, "lengths must be integers"),
        ([[1], [2, 3], 4], TypeError, "lengths must be integers"),
        ("abc", TypeError, "lengths must be integers"),
        (torch.tensor([1.0, 2.0, 3.0]), TypeError, "got torch.float32"),
        (torch.tensor([True, True, True]), TypeError, "got torch.bool"),
        (torch.tensor([1, 2, 3], dtype=torch.bfloat16), TypeError, "lengths must be integers"),
        ([1, 2, 8], ValueError, r"lengths must lie in \[0, 7\].*got 8"),
        ([1, -1, 3], ValueError, r"lengths must lie in \[0, 7\].*got -1"),
        ([1, 2, 2**70], ValueError, "lengths must"),
        ([1, 2], ValueError, r"shape \(3,\), got shape \(2,\)"),
        ([[1, 2, 3]], ValueError, r"shape \(3,\), got shape \(1, 3\)"),
        ([], ValueError, r"shape \(3,\), got shape \(0,\)"),
        (3, ValueError, r"shape \(3,\), got shape \(\)"),
    ],
)
def test_bad_lengths(lengths, error, text):
    for rnn in (make("lstm", 3, 4), make("gru", 3, 4), make("rnn_tanh", 3, 4)):
        with pytest.raises(error, match=text):
            rnn(torch.randn(7, 3, 3, dtype=torch.float64), lengths=lengths)


@pytest.mark.parametrize(
    ("reset", "error", "text"),
    [
        (torch.zeros(7, 3), TypeError, "reset must be a bool Tensor, got dtype torch.float32"),
        (torch.zeros(7, 3, dtype=torch.uint8), TypeError, "got dtype torch.uint8"),
        ([[True] * 3] * 7, TypeError, "got list"),
        (torch.zeros(3, 7, dtype=torch.bool), ValueError, r"\(7, 3\), got \(3, 7\)"),
        (torch.zeros(7, dtype=torch.bool), ValueError, r"\(7, 3\), got \(7,\)"),
        (torch.zeros(7, 3, dtype=torch.bool, device="meta"), RuntimeError, "not at the same device"),
    ],
)
def test_bad_reset(reset, error, text):
    with pytest.raises(error, match=text):
        make("lstm", 3, 4)(torch.randn(7, 3, 3, dtype=torch.float64), reset=reset)


def test_reset_cuts_the_gradient():
    rnn = make("lstm", 3, 4)
    x = torch.randn(7, 2, 3, dtype=torch.float64, requires_grad=True)
    reset = torch.zeros(7, 2, dtype=torch.bool)
    reset[3, 0] = True
    rnn(x, reset=reset)[0][-1].sum().backward()
    assert (x.grad[:3, 0] == 0).all()
    assert (x.grad[3:, 0] != 0).any()
    assert (x.grad[:3, 1] != 0).any()


@pytest.mark.parametrize("cell", MODULES)
@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_packed_states(cell, enforce_sorted, bidirectional):
    """A PackedSequence gives what lengths= give on the padded input, states included, and passes gradients."""
    rnn = make(cell, 3, 9, 2, bidirectional=bidirectional)
    lengths = [7, 5, 5, 1] if enforce_sorted else [5, 1, 7, 5]
    x = torch.randn(7, 4, 3, dtype=torch.float64, requires_grad=True)
    hx = random_hx(rnn, 4, requires_grad=True)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
    y, *rest = rnn(packed, hx, return_states=True)
    assert y.sorted_indices is packed.sorted_indices
    y, got = torch.nn.utils.rnn.pad_packed_sequence(y)
    assert got.tolist() == lengths
    result, wanted = [y, *flat(rest)], expected(rnn, x, hx, lengths)
    assert_close(result, wanted)
    inputs = [x, *flat([hx]), *rnn.parameters()]
    assert_close(gradients(result, inputs), gradients(wanted, inputs))


def test_packed_refuses_lengths_and_reset():
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    for rnn in (fastseq.LSTM(3, 4), fastseq.GRU(3, 4), fastseq.RNN(3, 4)):
        with pytest.raises(ValueError, match="lengths cannot be given with a PackedSequence"):
            rnn(packed, lengths=[4, 2])
        with pytest.raises(ValueError, match="reset cannot be given with a PackedSequence"):
            rnn(packed, reset=torch.zeros(4, 2, dtype=torch.bool))


def test_results_share_no_memory():
    for cell, requires_grad, batch_first in itertools.product(MODULES, [False, True], [False, True]):
        rnn = make(cell, 3, 4, batch_first=batch_first)
        x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=requires_grad)
        for result in (rnn(x, return_states=True), rnn(x), rnn(x[:1], return_states=True)):
            tensors = flat(result)
            copies = [t.detach().clone() for t in tensors]
            for i, tensor in enumerate(tensors):
                tensor.add_(1)  # also: autograd allows it
                copies[i] += 1
                assert all(torch.equal(t, c) for t, c in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("cell", MODULES)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("frozen", [False, True])
def test_steps_give_the_sequence(cell, layers, frozen):
    rnn = make(cell, 3, 9, layers)
    if frozen:
        fastseq.freeze(rnn)
    x = torch.randn(7, 5, 3, dtype=torch.float64, requires_grad=True)
    hx = random_hx(rnn, 5, requires_grad=True)
    y, h_n, *_ = flat(rnn(x, hx))
    state, outputs = hx, []
    for x_t in x:
        output, state = rnn.step(x_t, state)
        outputs.append(output)
    assert_close(torch.stack(outputs), y)
    assert_close(flat([state])[0], h_n)
    inputs = [x, *flat([hx]), *rnn.parameters()]
    assert_close(gradients(outputs, inputs), gradients(list(y), inputs))
    with torch.no_grad():
        state = hx
        for x_t, output in zip(x, outputs, strict=True):
            again, state = rnn.step(x_t, state)
            assert_close(again, output)
        alone, state = rnn.step(x[0, 0])
        assert alone.shape == (9,)
        assert flat([state])[0].shape == (layers, 9)
        assert_close(alone, rnn.step(x[0])[0][0])
        alone, _ = rnn.step(x[1, 0], state)
        assert_close(alone, rnn(x[:2, 0])[0][1])


def test_step_keeps_a_float32_state_for_bfloat16():
    for cell in MODULES:
        rnn = make(cell, 3, 4, 2).bfloat16()
        output, state = rnn.step(torch.randn(5, 3, dtype=torch.bfloat16))
        assert output.dtype is torch.bfloat16
        assert all(s.dtype is torch.float32 for s in flat([state]))
        assert rnn.step(torch.randn(5, 3, dtype=torch.bfloat16), state)[0].dtype is torch.bfloat16
        halves = tuple(s.bfloat16() for s in state) if cell == "lstm" else state.bfloat16()
        _, state = rnn.step(torch.randn(5, 3, dtype=torch.bfloat16), halves)
        assert all(s.dtype is torch.float32 for s in flat([state]))


def test_step_with_projection():
    lstm = fastseq.LSTM(3, 6, 2, proj_size=4, dtype=torch.float64)
    x = torch.randn(7, 5, 3, dtype=torch.float64)
    y, state = lstm(x)[0], None
    for x_t, y_t in zip(x, y, strict=True):
        output, state = lstm.step(x_t, state)
        assert_close(output, y_t)
    assert_close(lstm(x, lengths=[7, 3, 0, 7, 7])[0][:, 0], y[:, 0])


def test_step_errors():
    lstm, gru = make("lstm", 3, 4), make("gru", 3, 4)
    x = torch.randn(5, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="step: a bidirectional LSTM"):
        make("lstm", 3, 4, bidirectional=True).step(x)
    with pytest.raises(ValueError, match="GRU: Expected input to be 1D or 2D, got 3D instead"):
        gru.step(x[None])
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 3, got 2"):
        gru.step(x[:, :2])
    with pytest.raises(ValueError, match="RNN input dtype"):
        gru.step(x.float())
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(1, 5, 4\), got \[1, 4, 4\]"):
        gru.step(x, torch.zeros(1, 4, 4, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(1, 5, 4\), got \[5, 4\]"):
        lstm.step(x, (torch.zeros(1, 5, 4, dtype=torch.float64), torch.zeros(5, 4, dtype=torch.float64)))
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(1, 4\), got \[\]"):
        gru.step(x[0], torch.tensor(0.0, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="not the same dtype"):
        gru.step(x, torch.zeros(1, 5, 4))
    with pytest.raises(RuntimeError, match="state must be what LSTM returns"):
        lstm.step(x, torch.zeros(1, 5, 4, dtype=torch.float64))
    with pytest.raises(TypeError, match="x_t must be a Tensor, got list"):
        gru.step([1.0, 2.0, 3.0])


def needs_kernels(route):
    if route != "native":
        pytest.skip("about the kernels")


@pytest.mark.parametrize("cell", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_are_bitwise_the_whole(cell, dtype, route):
    needs_kernels(route)
    for inputs, hidden, batch in [(3, 9, 1), (65, 63, 7), (300, 129, 2)]:
        rnn = make(cell, inputs, hidden, 2).to(dtype)
        x = torch.randn(9, batch, inputs, dtype=dtype)
        with torch.no_grad():
            whole, last = rnn(x)
            for sizes in ([4, 5], [1, 7, 1]):
                hx, chunks = None, []
                for chunk in x.split(sizes):
                    y, hx = rnn(chunk, hx)
                    chunks.append(y)
                assert torch.equal(torch.cat(chunks), whole)
                assert all(map(torch.equal, flat([hx]), flat([last])))
            fastseq.freeze(rnn)
            state = None
            for x_t, y in zip(x, whole, strict=True):
                output, state = rnn.step(x_t, state)
                assert torch.equal(output, y)
        assert torch.equal(rnn(x)[0], whole)  # with gradients
        assert torch.equal(rnn(x, lengths=[9] * batch, return_states=True)[0], whole)


@pytest.mark.parametrize("cell", MODULES)
def test_bfloat16_steps_are_bitwise_each_other(cell, route):
    """The state passed on in float32: all steps at once, or one by one."""
    needs_kernels(route)
    rnn = fastseq.freeze(make(cell, 65, 63, 2).bfloat16())
    x = torch.randn(9, 3, 65, dtype=torch.bfloat16)
    with torch.no_grad():
        whole, _ = rnn(x)
        state = None
        for x_t, y in zip(x, whole, strict=True):
            output, state = rnn.step(x_t, state)
            assert torch.equal(output, y)


def test_kernels_run(route, monkeypatch):
    """Every call that the table says is served reaches the kernels: nothing takes torch's path unseen."""
    needs_kernels(route)
    from fastseq.backends import native

    calls = []
    forward = native.recurrent_forward
    monkeypatch.setattr(native, "recurrent_forward", lambda *a, **k: calls.append(a) or forward(*a, **k))
    for cell, dtype, grad in itertools.product(MODULES, [torch.float32, torch.float64, torch.bfloat16], [False, True]):
        rnn = make(cell, 3, 4, 2, bidirectional=True, batch_first=True).to(dtype).requires_grad_(grad)
        x = torch.randn(5, 7, 3, dtype=dtype)
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, [7, 5, 4, 4, 1], batch_first=True)
        for inputs, options in [
            (x, {}),
            (x[0], {}),
            (x[:1, :1], {}),
            (packed, {}),
            (packed, {"return_states": True}),
            (x.transpose(1, 2).contiguous().transpose(1, 2), {}),
            (x, {"lengths": [1, 2, 0, 3, 7], "reset": torch.rand(5, 7) < 0.3, "return_states": True}),
        ]:
            y, hx, *_ = rnn(inputs, **options)
            if options or inputs is x:
                rnn(inputs, hx, **options)
                assert len(calls) == 8
            assert len(calls) in (4, 8)
            calls.clear()
            assert flat(y)[0].requires_grad is grad
