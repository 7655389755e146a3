"""The NumPy reference against torch, against finite differences, and against the course's conventions."""

from __future__ import annotations

import doctest
import importlib
import inspect
import itertools
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from cases import (
    SMALL_SHAPES,
    VARIANTS,
    Shape,
    assert_close,
    central_differences,
    random_inputs,
    random_lengths,
    random_reset,
)

from fastseq import reference
from fastseq.reference.torch_layout import torch_layers

SHAPES = (*SMALL_SHAPES, Shape(7, 5, 63, 65))
each_cell = pytest.mark.parametrize("cell", torch_layers())
each_cell_of_torch = pytest.mark.parametrize("cell", [c for c in torch_layers() if hasattr(torch._VF, f"{c}_cell")])
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.id)
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.id)


def options(variant, shape):
    return {
        "lengths": random_lengths(shape) if variant.lengths else None,
        "reset": random_reset(shape) if variant.reset else None,
        "reverse": variant.reverse,
    }


def run(cell, inputs, **options):
    inputs = dict(inputs)
    weights = [inputs.pop(name) for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    inputs.setdefault("c_0", None)
    return reference.recurrent_forward_backward(cell, weights=weights, **inputs, **options)


def leaf(array):
    return torch.tensor(array, requires_grad=True)


# Against torch


def torch_module(cell, shape, directions):
    """A torch module in float64 that runs the given random inputs, one per direction, with lengths or without."""
    kwargs = {"nonlinearity": cell.removeprefix("rnn_")} if cell.startswith("rnn") else {}
    cls = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}.get(cell, torch.nn.RNN)
    module = cls(shape.I, shape.H, bidirectional=len(directions) == 2, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        for inputs, suffix in zip(directions, ("_l0", "_l0_reverse"), strict=False):
            for torch_name, name in (
                ("weight_ih", "w_ih"),
                ("weight_hh", "w_hh"),
                ("bias_ih", "b_ih"),
                ("bias_hh", "b_hh"),
            ):
                getattr(module, torch_name + suffix).copy_(torch.from_numpy(inputs[name]))
    return module


def run_torch_module(cell, shape, directions, lengths=None):
    module = torch_module(cell, shape, directions)
    x = leaf(directions[0]["x"])
    names = ("h_0", "c_0") if cell == "lstm" else ("h_0",)
    states = [leaf(np.stack([inputs[name] for inputs in directions])) for name in names]
    state = tuple(states) if cell == "lstm" else states[0]
    if lengths is None:
        y, final = module(x, state)
    else:
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.from_numpy(lengths), enforce_sorted=False)
        y, final = module(packed, state)
        y, _ = torch.nn.utils.rnn.pad_packed_sequence(y, total_length=shape.T)
    finals = final if cell == "lstm" else (final,)

    gradients = [torch.from_numpy(np.concatenate([inputs["dy"] for inputs in directions], axis=2))]
    gradients += [
        torch.from_numpy(np.stack([inputs[name] for inputs in directions])) for name in ("dh_n", "dc_n")[: len(finals)]
    ]
    torch.autograd.backward([y, *finals], gradients)

    results = []
    for d, suffix in enumerate(("_l0", "_l0_reverse")[: len(directions)]):
        result = {"y": y[..., d * shape.H : (d + 1) * shape.H], "h_n": finals[0][d], "dh_0": states[0].grad[d]}
        if cell == "lstm":
            result |= {"c_n": finals[1][d], "dc_0": states[1].grad[d]}
        result |= {
            "dw_ih": getattr(module, "weight_ih" + suffix).grad,
            "dw_hh": getattr(module, "weight_hh" + suffix).grad,
            "db_ih": getattr(module, "bias_ih" + suffix).grad,
            "db_hh": getattr(module, "bias_hh" + suffix).grad,
        }
        results.append({name: tensor.detach().numpy() for name, tensor in result.items()})
    return results, x.grad.numpy()


@each_shape
@each_cell_of_torch
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_equals_torch_modules_in_both_directions(cell, shape, packed):
    directions = [random_inputs(cell, shape, seed) for seed in (1, 2)]
    directions[1]["x"] = directions[0]["x"]
    for inputs in directions:
        inputs.pop("dc_all", None)  # torch's modules do not give all cell states
    lengths = random_lengths(shape, shortest=1) if packed else None
    expected, dx = run_torch_module(cell, shape, directions, lengths)
    results = [run(cell, inputs, lengths=lengths, reverse=d == 1) for d, inputs in enumerate(directions)]
    assert_close({"dx": sum(result.pop("dx") for result in results)}, {"dx": dx})
    for result, torch_result in zip(results, expected, strict=True):
        result.pop("c_all", None)
        assert_close(result, torch_result)


def run_torch_cells_by_segment(cell, shape, inputs, lengths, reset, reverse):
    """Every row alone, split into its segments, each segment a loop of torch's cells: knows no masks."""
    leaves = {name: leaf(array) for name, array in inputs.items() if not name.startswith("d")}
    weights = [leaves[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    zero = torch.zeros(shape.H, dtype=torch.float64)
    names = ("h_0", "c_0") if cell == "lstm" else ("h_0",)

    def step(x, state):
        if cell == "lstm":
            h, c = torch._VF.lstm_cell(x[None], [s[None] for s in state], *weights)
            return h[0], c[0]
        return (getattr(torch._VF, f"{cell}_cell")(x[None], state[0][None], *weights)[0],)

    outputs = [[[zero] * shape.B for _ in range(shape.T)] for _ in names]
    finals = []
    for b in range(shape.B):
        length = shape.T if lengths is None else int(lengths[b])
        firsts = [t for t in range(length) if reset is not None and reset[t, b]]
        segments = [range(*ends) for ends in itertools.pairwise(sorted({0, *firsts, length}))]
        state = tuple(leaves[name][b] for name in names)
        for nth, segment in enumerate(reversed(segments) if reverse else segments):
            if nth > 0 or (segment.start in firsts and not reverse):
                state = (zero,) * len(names)
            for t in reversed(segment) if reverse else segment:
                state = step(leaves["x"][t, b], state)
                for output, value in zip(outputs, state, strict=True):
                    output[t][b] = value
        finals.append(state)

    all_states = [torch.stack([torch.stack(row) for row in output]) for output in outputs]
    final_states = [torch.stack(rows) for rows in zip(*finals, strict=True)]
    result = dict(zip(("y", "c_all"), all_states, strict=False)) | dict(zip(("h_n", "c_n"), final_states, strict=False))
    gradient_of = {"y": "dy", "h_n": "dh_n", "c_all": "dc_all", "c_n": "dc_n"}
    sum((tensor * torch.from_numpy(inputs[gradient_of[name]])).sum() for name, tensor in result.items()).backward()
    # A cut at the first step of every row leaves h_0 and c_0 without use: torch's gradient is then None.
    result |= {
        "d" + name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for name, tensor in leaves.items()
    }
    return {name: tensor.detach().numpy() for name, tensor in result.items()}


@each_shape
@each_cell_of_torch
@each_variant
def test_equals_loop_of_torch_cells(cell, shape, variant):
    inputs = random_inputs(cell, shape)
    opts = options(variant, shape)
    assert_close(run(cell, inputs, **opts), run_torch_cells_by_segment(cell, shape, inputs, **opts))


# Against finite differences


@each_cell
@each_variant
def test_gradients_equal_finite_differences(cell, variant):
    shape = Shape(B=4, T=5, I=2, H=3)
    inputs = random_inputs(cell, shape)
    opts = options(variant, shape)
    gradient_of = {"y": "dy", "h_n": "dh_n", "c_all": "dc_all", "c_n": "dc_n"}

    def projected_outputs():
        result = run(cell, inputs, **opts)
        return sum(np.sum(result[name] * inputs[gradient_of[name]]) for name in gradient_of if name in result)

    result = run(cell, inputs, **opts)
    expected = {
        "d" + name: central_differences(projected_outputs, array)
        for name, array in inputs.items()
        if not name.startswith("d")
    }
    assert_close({name: result[name] for name in expected}, expected, "finite difference")


def course_functions(cell, kind=""):
    """The forward and the backward function of a cell, kind "" or "step_", and the keywords that choose the cell."""
    stem = cell.partition("_")[0]
    module = importlib.import_module(f"fastseq.reference.{stem}")
    forward, backward = (getattr(module, f"{stem}_{kind}{direction}") for direction in ("forward", "backward"))
    return forward, backward, {"nonlinearity": "relu"} if cell == "rnn_relu" else {}


def course_inputs(cell, N=4, T=6, D=3, H=5, dtype=np.float64):
    """Random x (N, T, D), states, weights and upstream gradients, by the course's names."""
    rng = np.random.default_rng(3)
    G = torch_layers()[cell].gates
    shapes = {"x": (N, T, D), "prev_h": (N, H), "prev_c": (N, H), "Wx": (D, G * H), "Wh": (H, G * H), "b": (G * H,)}
    shapes |= {"b_hn": (H,), "dh": (N, T, H), "dc": (N, T, H)}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


FIVE = "x", "prev_h", "Wx", "Wh", "b"


def step_arguments(cell):
    """What a step takes: the five arguments of every cell, and a second state or a second bias."""
    taken = inspect.signature(course_functions(cell, "step_")[0]).parameters
    return [name for name in taken if name in (*FIVE, "prev_c", "b_hn")]


def further_arguments(cell):
    return [name for name in step_arguments(cell) if name not in FIVE]


def sequence_arguments(cell, inputs):
    return [inputs[name] for name in (*FIVE, *further_arguments(cell))]


@each_cell
def test_step_gradients_equal_finite_differences(cell):
    forward, backward, extra = course_functions(cell, "step_")
    names = step_arguments(cell)
    inputs = course_inputs(cell)
    inputs["x"] = inputs["x"][:, 0]
    dnext = [inputs["dh"][:, 0], inputs["dc"][:, 0]][: 2 if cell == "lstm" else 1]

    def forward_all():
        return forward(*(inputs[name] for name in names), **extra)

    def projected_outputs():
        return sum(np.sum(out * d) for out, d in zip(forward_all()[:-1], dnext, strict=True))

    expected = {name: central_differences(projected_outputs, inputs[name]) for name in names}
    gradients = backward(*dnext, forward_all()[-1])
    assert_close(dict(zip(names, gradients, strict=True)), expected, "finite difference")


# The course's conventions


@each_cell
def test_sequence_equals_steps_bitwise(cell):
    forward, _, extra = course_functions(cell)
    step_forward, _, _ = course_functions(cell, "step_")
    inputs = course_inputs(cell)
    h, *states, _ = forward(*sequence_arguments(cell, inputs), **extra, return_states=True)
    names = step_arguments(cell)
    step = dict(inputs)
    for t in range(inputs["x"].shape[1]):
        step["x"] = inputs["x"][:, t]
        step["prev_h"], *rest = step_forward(*(step[name] for name in names), **extra)
        if cell == "lstm":
            step["prev_c"] = rest[0]
            assert np.array_equal(states[0][:, t], step["prev_c"])
        assert np.array_equal(h[:, t], step["prev_h"])
    assert np.array_equal(states[-2] if cell == "lstm" else states[-1], step["prev_h"])
    assert cell != "lstm" or np.array_equal(states[-1], step["prev_c"])


@each_cell
def test_five_argument_calls_of_the_course(cell):
    forward, backward, extra = course_functions(cell)
    inputs = course_inputs(cell)
    arguments = sequence_arguments(cell, inputs)[:5]
    h, cache = forward(*arguments, **extra)
    gradients = backward(inputs["dh"], cache)
    zeros = [np.zeros_like(inputs[name]) for name in further_arguments(cell)]
    h_explicit, cache = forward(*arguments, *zeros, **extra)
    assert np.array_equal(h, h_explicit)
    assert [d.shape for d in gradients[:5]] == [a.shape for a in arguments]
    assert len(gradients) == 5 + ("b_hn" in further_arguments(cell))
    for gradient, explicit in zip(gradients, backward(inputs["dh"], cache), strict=True):
        assert np.array_equal(gradient, explicit)


@pytest.mark.parametrize("gate_order", ["".join(order) for order in itertools.permutations("ifog")])
def test_gate_order_permutes_the_columns(gate_order):
    inputs = course_inputs("lstm")
    x, h0, *weights, c0 = sequence_arguments("lstm", inputs)

    def permuted(a):
        blocks = dict(zip("ifog", np.split(a, 4, axis=-1), strict=True))
        return np.concatenate([blocks[gate] for gate in gate_order], axis=-1)

    h, cache = reference.lstm_forward(x, h0, *weights, c0)
    *dstates, dWx, dWh, db = reference.lstm_backward(inputs["dh"], cache, return_dc0=True)
    h_permuted, cache = reference.lstm_forward(x, h0, *map(permuted, weights), c0, gate_order)
    *dstates_permuted, dWx_p, dWh_p, db_p = reference.lstm_backward(inputs["dh"], cache, return_dc0=True)
    assert_close(
        dict(enumerate([h_permuted, *dstates_permuted, dWx_p, dWh_p, db_p])),
        dict(enumerate([h, *dstates, *map(permuted, (dWx, dWh, db))])),
    )


def test_default_gate_order_is_the_course_s():
    """With a large bias on one block of columns only, the state tells which gate the block is."""
    zero, one = np.zeros((1, 1)), np.ones((1, 1))

    def next_c(block, prev_c):
        b = np.zeros(4)
        b[block] = 1000.0
        _, c, _ = reference.lstm_step_forward(zero, zero, prev_c, np.zeros((1, 4)), np.zeros((1, 4)), b)
        return c.item()

    assert next_c(1, one) == 1.0  # f = 1
    assert next_c(3, zero) == 0.5  # i g with i = 0.5, g = 1
    b = np.array([1000.0, 0.0, 1000.0, 1000.0])
    h, _, _ = reference.lstm_step_forward(zero, zero, zero, np.zeros((1, 4)), np.zeros((1, 4)), b)
    assert h.item() == np.tanh(1.0)  # i = o = g = 1


@each_cell
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.longdouble], ids=["float32", "float64", "longdouble"])
def test_computes_in_the_dtype_of_its_arguments(cell, dtype):
    inputs = course_inputs(cell, dtype=dtype)
    forward, backward, extra = course_functions(cell)
    opts = {"lengths": np.array([6, 0, 3, 5]), "reset": np.arange(24).reshape(4, 6) % 5 == 0, "reverse": True}
    *outputs, cache = forward(*sequence_arguments(cell, inputs), **extra, **opts, return_states=True)
    gradients = backward(inputs["dh"], cache)
    assert {a.dtype for a in (*outputs, *gradients)} == {np.dtype(dtype)}
    step_forward, step_backward, _ = course_functions(cell, "step_")
    names = step_arguments(cell)
    inputs["x"] = inputs["x"][:, 0]
    *outputs, cache = step_forward(*(inputs[name] for name in names), **extra)
    gradients = step_backward(*outputs, cache)
    assert {a.dtype for a in (*outputs, *gradients)} == {np.dtype(dtype)}


@pytest.mark.skipif(np.finfo(np.longdouble).eps >= 2.0**-52, reason="longdouble is float64 on this machine")
@each_cell
def test_longdouble_is_more_exact_than_float64(cell):
    """A value rounded to float64 on the way would leave the longdouble result as far from the truth as float64's."""
    inputs = random_inputs(cell, Shape(B=3, T=4, I=2, H=3))
    single, double, extended = (run(cell, inputs, dtype=dtype) for dtype in (np.float32, np.float64, np.longdouble))
    with mpmath.workdps(40):
        exact = mpmath_hidden_states(cell, inputs)
        errors = [np.max(np.abs(to_mpf(result["y"]) - exact)) for result in (single, double, extended)]
    assert 1e-9 < errors[0] < 1e-5
    assert 1e-18 < errors[1] < 1e-14
    assert errors[2] < errors[1] / 100


def to_mpf(array):
    high = array.astype(np.float64)  # a longdouble is the sum of two doubles
    low = (array - high).astype(np.float64)
    exact = np.vectorize(mpmath.mpf, otypes=[object])
    return exact(high) + exact(low)


def mpmath_hidden_states(cell, inputs):
    """All hidden states (T, B, H) in arbitrary precision, written for one unit at a time."""
    exact = {name: to_mpf(array) for name, array in inputs.items()}
    T, B, H = inputs["dy"].shape

    def sigmoid(a):
        return 1 / (1 + mpmath.exp(-a))

    y = np.empty((T, B, H), dtype=object)
    for b in range(B):
        h, c = exact["h_0"][b], exact["c_0"][b] if cell == "lstm" else None
        for t in range(T):
            input_term = exact["w_ih"] @ exact["x"][t, b] + exact["b_ih"]
            hidden_term = exact["w_hh"] @ h + exact["b_hh"]
            if cell == "gru":
                next_h = []
                for u in range(H):
                    r, z = (sigmoid(input_term[k * H + u] + hidden_term[k * H + u]) for k in range(2))
                    n = mpmath.tanh(input_term[2 * H + u] + r * hidden_term[2 * H + u])
                    next_h.append((1 - z) * n + z * h[u])
                h = np.array(next_h)
            elif cell == "mgu":
                next_h = []
                for u in range(H):
                    f = sigmoid(input_term[u] + hidden_term[u])
                    n = mpmath.tanh(input_term[H + u] + f * hidden_term[H + u])
                    next_h.append((1 - f) * h[u] + f * n)
                h = np.array(next_h)
            elif cell == "lstm":
                next_h, next_c = [], []
                for u in range(H):
                    i, f, g, o = (input_term[k * H + u] + hidden_term[k * H + u] for k in range(4))
                    next_c.append(sigmoid(f) * c[u] + sigmoid(i) * mpmath.tanh(g))
                    next_h.append(sigmoid(o) * mpmath.tanh(next_c[-1]))
                h, c = np.array(next_h), np.array(next_c)
            else:
                a = input_term + hidden_term
                h = np.array([mpmath.tanh(v) if cell == "rnn_tanh" else max(v, mpmath.mpf(0)) for v in a])
            y[t, b] = h
    return y


# Lengths and resets


@each_cell
@pytest.mark.parametrize("reverse", [False, True])
def test_padding_is_never_looked_at(cell, reverse):
    shape = Shape(B=7, T=7, I=5, H=9)
    lengths = random_lengths(shape)
    padding = np.arange(shape.T)[:, None] >= lengths
    inputs = random_inputs(cell, shape)
    expected = run(cell, inputs, lengths=lengths, reverse=reverse)
    for name in inputs.keys() & {"x", "dy", "dc_all"}:
        inputs[name][padding] = np.nan
    marked = run(cell, inputs, lengths=lengths, reset=np.broadcast_to(padding, (shape.T, shape.B)), reverse=reverse)
    assert_close(marked, expected)
    for name in marked.keys() & {"y", "c_all", "dx"}:
        assert np.all(marked[name][padding] == 0)
    empty = lengths == 0
    assert np.any(empty)
    assert np.array_equal(marked["h_n"][empty], inputs["h_0"][empty])
    assert np.array_equal(marked["dh_0"][empty], inputs["dh_n"][empty])


@each_cell
def test_nan_does_not_cross_a_cut(cell):
    """A state that overflowed is gone after the cut: it is replaced, not multiplied by 0."""
    shape = Shape(B=1, T=6, I=2, H=3)
    inputs = random_inputs(cell, shape)
    inputs["x"][2] = np.nan
    reset = np.array([[False], [False], [False], [True], [False], [False]])
    with np.errstate(invalid="ignore"):
        result = run(cell, inputs, reset=reset)
    assert np.all(np.isnan(result["y"][2]))
    assert np.all(np.isfinite(result["y"][3:]))


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"lengths": np.array([1.0, 2.0])}, TypeError, "lengths must be integers, got float64"),
        ({"lengths": np.array([True, False])}, TypeError, "lengths must be integers, got bool"),
        ({"lengths": np.array([1])}, ValueError, r"lengths must have shape \(2,\), got \(1,\)"),
        ({"lengths": np.array([1, 4])}, ValueError, r"lengths must lie in \[0, 3\], got \[1, 4\]"),
        ({"lengths": np.array([1, -1])}, ValueError, r"lengths must lie in \[0, 3\], got \[1, -1\]"),
        ({"reset": np.zeros((2, 3))}, TypeError, "reset must be bool, got float64"),
        ({"reset": np.zeros((3, 2), bool)}, ValueError, r"reset must have shape \(2, 3\), got \(3, 2\)"),
    ],
)
@each_cell
def test_bad_lengths_and_resets_are_named(cell, kwargs, error, text):
    forward, _, extra = course_functions(cell)
    with pytest.raises(error, match=text):
        forward(*sequence_arguments(cell, course_inputs(cell, N=2, T=3)), **extra, **kwargs)


def test_unknown_cells_and_gates_are_named():
    inputs = course_inputs("lstm")
    with pytest.raises(ValueError, match="gate_order must name the gates i, f, o, g once each, got 'iffo'"):
        reference.lstm_forward(*sequence_arguments("lstm", inputs), gate_order="iffo")
    with pytest.raises(ValueError, match="Unknown nonlinearity 'gelu'. Select from 'tanh' or 'relu'."):
        reference.rnn_forward(*sequence_arguments("rnn_tanh", course_inputs("rnn_tanh")), nonlinearity="gelu")
    with pytest.raises(ValueError, match=r"cell must be one of .*gru.*, got 'rnn'"):
        run("rnn", random_inputs("rnn_tanh", Shape(1, 1, 1, 1)))
    with pytest.raises(ValueError, match="c_0, dc_n and dc_all are for cells with a state .* for 'gru'"):
        run("gru", random_inputs("gru", Shape(1, 1, 1, 1)) | {"c_0": np.zeros((1, 1))})


@each_cell
def test_absent_biases_states_and_gradients_are_zero(cell):
    shape = Shape(B=4, T=6, I=2, H=8)
    inputs = random_inputs(cell, shape)
    optional = [name for name in inputs if name not in ("x", "w_ih", "w_hh", "dy")]
    zeros = run(cell, inputs | {name: np.zeros_like(inputs[name]) for name in optional})
    absent = run(cell, inputs | dict.fromkeys(optional))
    assert zeros.keys() - absent.keys() == {"db_ih", "db_hh"}
    assert_close(absent, {name: zeros[name] for name in absent})


# The documentation


@pytest.mark.parametrize("name", [path.stem for path in Path(reference.__file__).parent.glob("[!_]*.py")])
def test_docstring_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"fastseq.reference.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


def test_every_public_function_has_an_example():
    for name in reference.__all__:
        thing = getattr(reference, name)
        if not isinstance(thing, (type, dict)):
            assert ">>>" in thing.__doc__, name
