"""The layers of the NumPy reference against torch.nn.functional and its autograd."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import assert_close

from fastseq import reference


def leaf(array):
    return torch.tensor(array, requires_grad=True)


def assert_layer_equals_torch(outputs, gradients, torch_outputs, leaves, dout):
    torch_outputs.backward(torch.from_numpy(np.asarray(dout)))
    assert_close({"out": outputs}, {"out": torch_outputs.detach().numpy()})
    assert_close(dict(enumerate(gradients)), {n: tensor.grad.numpy() for n, tensor in enumerate(leaves)})


def random_arrays(*shapes, dtype=np.float64):
    rng = np.random.default_rng(5)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def test_affine_equals_torch():
    x, w, b, dout = random_arrays((7, 3, 5), (15, 9), (9,), (7, 9))
    out, cache = reference.affine_forward(x, w, b)
    leaves = [leaf(a) for a in (x, w, b)]
    expected = F.linear(leaves[0].flatten(1), leaves[1].T, leaves[2])
    assert_layer_equals_torch(out, reference.affine_backward(dout, cache), expected, leaves, dout)


def test_temporal_affine_equals_torch():
    x, w, b, dout = random_arrays((7, 3, 5), (5, 9), (9,), (7, 3, 9))
    out, cache = reference.temporal_affine_forward(x, w, b)
    leaves = [leaf(a) for a in (x, w, b)]
    expected = F.linear(leaves[0], leaves[1].T, leaves[2])
    assert_layer_equals_torch(out, reference.temporal_affine_backward(dout, cache), expected, leaves, dout)


def test_word_embedding_equals_torch():
    W, dout = random_arrays((5, 3), (4, 7, 3))
    x = np.random.default_rng(6).integers(0, 5, (4, 7))  # 28 places, 5 words: every gradient is a sum
    out, cache = reference.word_embedding_forward(x, W)
    leaves = [leaf(W)]
    expected = F.embedding(torch.from_numpy(x), leaves[0])
    assert_layer_equals_torch(out, [reference.word_embedding_backward(dout, cache)], expected, leaves, dout)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_temporal_softmax_loss_equals_torch(scale):
    (x,) = random_arrays((4, 7, 5))
    x *= scale
    rng = np.random.default_rng(6)
    y, mask = rng.integers(0, 5, (4, 7)), rng.random((4, 7)) < 0.6
    loss, dx = reference.temporal_softmax_loss(x, y, mask)
    leaves = [leaf(x)]
    targets = torch.from_numpy(np.where(mask, y, -100)).flatten()
    expected = F.cross_entropy(leaves[0].flatten(0, 1), targets, reduction="sum", ignore_index=-100) / 4
    assert_layer_equals_torch(loss, [dx], expected, leaves, 1.0)


def test_temporal_softmax_loss_ignores_words_that_the_mask_excludes():
    (x,) = random_arrays((1, 2, 5))
    mask = np.array([[1, 0]])
    loss, dx = reference.temporal_softmax_loss(x, np.array([[3, -1]]), mask)
    other_loss, other_dx = reference.temporal_softmax_loss(x, np.array([[3, 99]]), mask)
    assert loss == other_loss
    assert np.array_equal(dx, other_dx)
    assert np.all(dx[0, 1] == 0)


def test_temporal_softmax_loss_verbose_prints_the_shape(capsys):
    reference.temporal_softmax_loss(np.zeros((1, 2, 3)), np.zeros((1, 2), int), np.ones((1, 2)), verbose=True)
    assert "(1, 2, 3)" in capsys.readouterr().out


@pytest.mark.parametrize("shape", [(7, 9), (4, 3, 63)])
def test_layernorm_equals_torch(shape):
    x, gamma, beta, dout = random_arrays(shape, shape[-1:], shape[-1:], shape)
    out, cache = reference.layernorm_forward(x, gamma, beta, 1e-3)
    leaves = [leaf(a) for a in (x, gamma, beta)]
    expected = F.layer_norm(leaves[0], shape[-1:], *leaves[1:], eps=1e-3)
    assert_layer_equals_torch(out, reference.layernorm_backward(dout, cache), expected, leaves, dout)
    course, _ = reference.layernorm_forward(x, gamma, beta, {"eps": 1e-3})
    assert np.array_equal(course, out)
    default, _ = reference.layernorm_forward(x, gamma, beta)
    assert np.array_equal(reference.layernorm_forward(x, gamma, beta, {})[0], default)
    torch_default = F.layer_norm(
        *(torch.from_numpy(a) for a in (x,)), shape[-1:], *map(torch.from_numpy, (gamma, beta))
    )
    assert_close({"out": default}, {"out": torch_default.numpy()})


def test_sigmoid_equals_torch_without_overflow():
    x = np.concatenate([np.linspace(-800, 800, 33), np.linspace(-5, 5, 65), [-np.inf, np.inf, np.nan]])
    with np.errstate(over="raise"):
        assert_close({"out": reference.sigmoid(x)}, {"out": torch.sigmoid(torch.from_numpy(x)).numpy()})


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.longdouble], ids=["float32", "float64", "longdouble"])
def test_layers_compute_in_the_dtype_of_their_arguments(dtype):
    x, w, b = random_arrays((2, 3, 5), (5, 5), (5,), dtype=dtype)
    words, mask = np.array([[0, 1, 4], [2, 2, 2]]), np.array([[True, True, False]] * 2)
    arrays = [reference.sigmoid(x), *reference.temporal_softmax_loss(x, words, mask)]
    for forward, backward, args in [
        (reference.affine_forward, reference.affine_backward, (x.reshape(6, 5), w, b)),
        (reference.temporal_affine_forward, reference.temporal_affine_backward, (x, w, b)),
        (reference.layernorm_forward, reference.layernorm_backward, (x, b, b)),
        (reference.word_embedding_forward, reference.word_embedding_backward, (words, w)),
    ]:
        out, cache = forward(*args)
        gradients = backward(out, cache)
        arrays += [out, *(gradients if isinstance(gradients, tuple) else (gradients,))]
    assert {a.dtype for a in arrays} == {np.dtype(dtype)}


# As the notebooks of CS231n call them: by position and by name.
COURSE = {
    "affine_forward": "x w b",
    "affine_backward": "dout cache",
    "rnn_step_forward": "x prev_h Wx Wh b",
    "rnn_step_backward": "dnext_h cache",
    "rnn_forward": "x h0 Wx Wh b",
    "rnn_backward": "dh cache",
    "word_embedding_forward": "x W",
    "word_embedding_backward": "dout cache",
    "lstm_step_forward": "x prev_h prev_c Wx Wh b",
    "lstm_step_backward": "dnext_h dnext_c cache",
    "lstm_forward": "x h0 Wx Wh b",
    "lstm_backward": "dh cache",
    "temporal_affine_forward": "x w b",
    "temporal_affine_backward": "dout cache",
    "temporal_softmax_loss": "x y mask verbose",
    "layernorm_forward": "x gamma beta ln_param",
    "layernorm_backward": "dout cache",
}
N, T, D, H, V = 2, 3, 4, 5, 6
SHAPES = {
    "affine": {"x": (N, 2, 2), "w": (D, H), "b": (H,), "results": [(N, H)]},
    "rnn_step": {"x": (N, D), "prev_h": (N, H), "Wx": (D, H), "Wh": (H, H), "b": (H,), "results": [(N, H)]},
    "rnn": {"x": (N, T, D), "h0": (N, H), "Wx": (D, H), "Wh": (H, H), "b": (H,), "results": [(N, T, H)]},
    "word_embedding": {"x": None, "W": (V, D), "results": [(N, T, D)]},
    "lstm_step": {
        "x": (N, D), "prev_h": (N, H), "prev_c": (N, H), "Wx": (D, 4 * H), "Wh": (H, 4 * H), "b": (4 * H,),
        "results": [(N, H), (N, H)],
    },
    "lstm": {
        "x": (N, T, D), "h0": (N, H), "Wx": (D, 4 * H), "Wh": (H, 4 * H), "b": (4 * H,), "results": [(N, T, H)],
    },
    "temporal_affine": {"x": (N, T, D), "w": (D, V), "b": (V,), "results": [(N, T, V)]},
    "layernorm": {"x": (N, D), "gamma": (D,), "beta": (D,), "results": [(N, D)]},
}  # fmt: skip


@pytest.mark.parametrize("function", COURSE)
def test_names_and_order_are_the_course_s(function):
    parameters = list(inspect.signature(getattr(reference, function)).parameters.values())
    names = COURSE[function].split()
    assert [p.name for p in parameters[: len(names)]] == names
    assert all(p.default is not p.empty for p in parameters[len(names) :])


@pytest.mark.parametrize("name", SHAPES)
def test_results_are_the_course_s(name):
    """The forward's results and a cache; of the backward a gradient for each argument, in their order."""
    shapes = dict(SHAPES[name])
    results = shapes.pop("results")
    rng = np.random.default_rng(0)
    arguments = {n: rng.standard_normal(s) if s else rng.integers(0, V, (N, T)) for n, s in shapes.items()}
    if name == "layernorm":
        arguments["ln_param"] = {"eps": 1e-12}
    *out, cache = getattr(reference, f"{name}_forward")(*arguments.values())
    *by_name, _ = getattr(reference, f"{name}_forward")(**arguments)
    assert [a.shape for a in out] == results
    assert all(np.array_equal(a, b) for a, b in zip(out, by_name, strict=True))
    gradients = getattr(reference, f"{name}_backward")(*(rng.standard_normal(a.shape) for a in out), cache)
    if name == "word_embedding":
        assert gradients.shape == (V, D)
    else:
        assert [g.shape for g in gradients] == [shapes[n] for n in shapes]


def test_loss_as_the_course_calls_it(capsys):
    x, y, mask = np.zeros((N, T, V)), np.ones((N, T), int), np.ones((N, T))
    loss, dx = reference.temporal_softmax_loss(x, y, mask, verbose=False)
    assert (float(loss), dx.shape) == (pytest.approx(T * np.log(V)), (N, T, V))
    assert capsys.readouterr().out == ""
    reference.temporal_softmax_loss(x, y, mask, True)
    assert capsys.readouterr().out == f"dx: {(N, T, V)}\n"
