"""What must hold of the attention kernels of every backend, each a function of it."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import torch
from attention_calls import NAMES, arguments, make, run
from torch.nn.functional import scaled_dot_product_attention

from fastseq.backends.contract import Attention, Refused
from fastseq.tools.verify import attention
from fastseq.tools.verify.attention import Case

# ---- the error rule


def check(backend, case: Case, dtype: torch.dtype, **replaced: torch.Tensor) -> None:
    """Every instruction set on a case, with some of its inputs replaced."""
    found = cases.check(attention.FAMILY, backend, case, dtype, **replaced)
    for inference, training in zip(found[::2], found[1::2], strict=True):
        assert np.array_equal(inference.results["out"], training.results["out"]), f"{training.isa}, {case}"


# ---- values that are not ordinary


def masked_rows(backend, L, dtype):
    """A query that sees nothing: 0, -inf, no gradient."""
    inputs, options = make(1, 1, 1, L, 129, 16, 16, dtype)
    allowed = torch.ones(1, 1, L, 129, dtype=torch.bool)
    allowed[:, :, 1] = False
    bias = torch.zeros(1, 1, L, 129, dtype=dtype).masked_fill(~allowed, -torch.inf)
    for mask in ({"allowed": allowed}, {"bias": bias}):
        results = run(inputs, options | mask, backend)
        assert (results["out"][:, :, 1] == 0).all()
        assert (results["lse"][:, :, 1] == -torch.inf).all()
        assert (results["dq"][:, :, 1] == 0).all()
        assert all(t.isfinite().all() for name, t in results.items() if name != "lse")


def not_finite(backend, L, name, value):
    """NaN and inf come out where torch has them."""
    (q, k, v, dout, _), options = make(1, 1, 1, L, 129, 16, 16, torch.float32, bias_shape=(1, 1, L, 129))
    tensors = {"q": q, "k": k, "v": v, "bias": options.pop("bias").clone()}
    tensors[name][0, 0, 1, 3] = value
    bias = tensors.pop("bias")
    inputs = *tensors.values(), dout, torch.zeros(1, 1, L, dtype=torch.float64)
    results = run(inputs, options | {"bias": bias}, backend)
    leaves = [t.requires_grad_() for t in (*tensors.values(), bias)]
    expected = scaled_dot_product_attention(*leaves[:3], attn_mask=leaves[3])
    gradients = torch.autograd.grad(expected, leaves, dout)
    assert torch.equal(results["out"].isnan(), expected.isnan())
    if value is not torch.inf:  # torch's backward of an infinite score depends on the kernel it takes
        for n, g in zip(NAMES, gradients, strict=True):
            assert torch.equal(results[n].isnan(), g.isnan()), n


# ---- layouts


def strides(backend, L, dtype):
    """(B, L, N, D) storage, slices of a wider tensor, expanded heads: the same bits, and q's order of axes."""
    inputs, options = make(2, 3, 3, L, 70, 20, 12, dtype, right=0)
    expected = run(inputs, options, backend)
    transposed = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs)
    wide = tuple(torch.nn.functional.pad(t, (0, 3, 1, 2), value=torch.nan)[:, :, 1:-2, :-3] for t in inputs[:4])
    for other in (transposed, (*wide, inputs[4])):
        results = run(other, options, backend)
        for name in expected:
            assert torch.equal(results[name], expected[name]), name
    assert run(transposed, options, backend)["dq"].transpose(1, 2).is_contiguous()
    one = tuple(t[:, :1].expand_as(t) for t in inputs)
    results = run(one, options, backend)
    for name, result in run(tuple(t.contiguous() for t in one), options, backend).items():
        assert torch.equal(results[name], result), name


def output_into_a_view(backend):
    call = arguments(*make(2, 3, 3, 65, 65, 16, 16, torch.float32))
    out = torch.full((2, 65, 3, 20), torch.nan)
    view = out[..., :16].transpose(1, 2)
    assert backend.attention_forward(*call, out=view)[0] is view
    assert torch.equal(view, backend.attention_forward(*call)[0])
    assert out[..., 16:].isnan().all()


def packed_batch(backend, most, dtype):
    """Sequences after each other give the bits of a padded batch, with the same draws of dropout."""
    lengths_q, lengths_k = torch.tensor([most, 0, 2, most - 1]), torch.tensor([5, 129, 0, 64])
    inputs, options = make(
        4, 4, 2, most, 129, 16, 24, dtype, lengths_q=lengths_q, lengths_k=lengths_k, right=0, lower_right=True,
        dropout_p=0.1, seed=7,
    )  # fmt: skip
    expected = run(inputs, options, backend)

    def pack(t, lengths):
        return torch.cat([row[:, :length] for row, length in zip(t, lengths, strict=True)], dim=1)[None]

    q, k, v, dout, dlse = inputs
    packed = pack(q, lengths_q), pack(k, lengths_k), pack(v, lengths_k), pack(dout, lengths_q), pack(dlse, lengths_q)
    starts = {"starts_q": lengths_q.cumsum(0) - lengths_q, "starts_k": lengths_k.cumsum(0) - lengths_k}
    results = run(packed, options | starts | {"max_q": most, "max_k": 129}, backend)
    for name, result in results.items():
        assert torch.equal(result, pack(expected[name], lengths_k if name in ("dk", "dv") else lengths_q)), name


def rows_of_no_sequence_are_zero(backend):
    inputs, options = make(1, 2, 2, 10, 10, 16, 16, torch.float32)
    lengths, starts = torch.tensor([3, 2]), torch.tensor([1, 6])
    keywords = {"lengths_q": lengths, "lengths_k": lengths, "starts_q": starts, "starts_k": starts}
    results = run(inputs, options | keywords | {"max_q": 4, "max_k": 4}, backend)
    for result in results.values():
        assert (result[:, :, [0, 4, 5, 8, 9]] == 0).all()
        assert (result[:, :, [1, 2, 3, 6, 7]] != 0).all()


# ---- what comes back


def only_the_gradients_that_are_needed(backend):
    inputs, options = make(1, 2, 2, 65, 65, 16, 16, torch.float32, bias_shape=(1, 1, 65, 65))
    expected = run(inputs, options, backend)
    *_, dout, dlse = inputs
    call = arguments(inputs, options)
    for index in range(4):
        gradients = backend.attention_backward(
            *call, expected["out"], expected["lse"], dout, dlse, [i == index for i in range(4)]
        )
        assert [g is not None for g in gradients] == [i == index for i in range(4)]
        assert torch.equal(gradients[index], expected[NAMES[index]])


def lse_of_padding(backend, L):
    lengths = torch.tensor([L, 0, 1])
    inputs, options = make(3, 2, 1, L, 65, 20, 12, torch.float32, lengths_q=lengths, lengths_k=lengths)
    with backend.filled_with_nan():
        lse = run(inputs, options, backend)["lse"]
    assert lse[0].isfinite().all()
    assert (lse[1] == -torch.inf).all()
    assert lse[2, :, 0].isfinite().all()
    assert (lse[2, :, 1:] == -torch.inf).all()


# ---- what is refused


B, N, L, S, D = 2, 4, 5, 7, 8
LENGTHS = torch.tensor([3, 5])
PACKED = {"q": torch.zeros(1, N, 8, D), "lengths_q": LENGTHS, "starts_q": torch.tensor([0, 3]), "max_q": 5}
BAD_ARGUMENTS = {
    "q none": ({"q": None}, "q must"),
    "q dtype": ({"q": torch.zeros(B, N, L, D, dtype=torch.float16)}, "q must"),
    "q dimensions": ({"q": torch.zeros(N, L, D)}, "q must"),
    "q 5 dimensions": ({"q": torch.zeros(1, B, N, L, D)}, "q must"),
    "q stride": ({"q": torch.zeros(B, N, D, L).mT}, "q must"),
    "q empty": ({"q": torch.zeros(B, N, 0, D)}, "q must"),
    "k dtype": ({"k": torch.zeros(B, N, S, D).double()}, "k must"),
    "k width": ({"k": torch.zeros(B, N, S, D + 1)}, "k must"),
    "k batch": ({"k": torch.zeros(B + 1, N, S, D)}, "batch"),
    "k heads": ({"k": torch.zeros(B, 3, S, D), "v": torch.zeros(B, 3, S, D)}, "heads of k"),
    "v rows": ({"v": torch.zeros(B, N, S - 1, D)}, "v must"),
    "v stride": ({"v": torch.zeros(B, N, D, S).mT}, "v must"),
    "bias dtype": ({"bias": torch.zeros(B, N, L, S).double()}, "bias"),
    "bias shape": ({"bias": torch.zeros(B, N, 2, S)}, "bias"),
    "allowed dtype": ({"allowed": torch.zeros(B, N, L, S)}, "allowed"),
    "allowed shape": ({"allowed": torch.zeros(L, 2, dtype=torch.bool)}, "allowed"),
    "slopes dtype": ({"alibi_slopes": torch.zeros(B, N).double()}, "alibi_slopes"),
    "slopes shape": ({"alibi_slopes": torch.zeros(N)}, "alibi_slopes"),
    "lengths dtype": ({"lengths_q": LENGTHS.int()}, "lengths_q"),
    "lengths shape": ({"lengths_q": LENGTHS[:1]}, "lengths_q"),
    "lengths stride": ({"lengths_k": LENGTHS[:1].expand(2)}, "lengths_k"),
    "lengths above L": ({"lengths_q": LENGTHS + 1}, "lengths_q"),
    "lengths below 0": ({"lengths_k": LENGTHS - 4}, "lengths_k"),
    "softcap": ({"softcap": -1.0}, "softcap"),
    "softcap nan": ({"softcap": float("nan")}, "softcap"),
    "dropout of 1": ({"dropout_p": 1.0}, "dropout_p"),
    "dropout nan": ({"dropout_p": float("nan")}, "dropout_p"),
    "max_q": ({"max_q": L - 1}, "max_q"),
    "out shape": ({"out": torch.zeros(B, N, L, D + 1)}, "out"),
    "out expanded": ({"out": torch.zeros(B, 1, L, D).expand(B, N, L, D)}, "overlap"),
    "packed without lengths": (PACKED | {"lengths_q": None}, "lengths_q"),
    "packed without max_q": (PACKED | {"max_q": None}, "max_q"),
    "packed max_q": (PACKED | {"max_q": 9}, "max_q"),
    "packed lengths": (PACKED | {"max_q": 4}, "lengths_q"),
    "packed batch": (PACKED | {"q": torch.zeros(2, N, 8, D)}, "q must"),
    "packed beyond": (PACKED | {"starts_q": torch.tensor([0, 4])}, "starts_q"),
    "packed below": (PACKED | {"starts_q": torch.tensor([-1, 3])}, "starts_q"),
    "packed overlap": (PACKED | {"starts_q": torch.tensor([0, 2])}, "starts_q"),
}


def bad_arguments(backend, name):
    changes, message = BAD_ARGUMENTS[name]
    good = {"q": torch.zeros(B, N, L, D), "k": torch.zeros(B, N, S, D), "v": torch.zeros(B, N, S, D), "scale": 1.0}
    with pytest.raises(Refused, match=message):
        backend.attention_forward(**with_call(good | changes))


def with_call(keywords):
    """Those of `Attention` become one."""
    options = {name: keywords.pop(name) for name in Attention._fields if name in keywords}
    return {"call": Attention(**options), **keywords}


def options_of_another_type(backend):
    q = torch.zeros(B, N, L, D)
    for call in (None, 1.0, (1.0,), (1.0, *Attention._field_defaults.values())):
        with pytest.raises((TypeError, AttributeError), match="Attention|attribute"):
            backend.attention_forward(call, q, q, q)
        with pytest.raises((TypeError, AttributeError), match="Attention|attribute"):
            backend.attention_backward(call, q, q, q, None, None, q, q, q, None, [True] * 4)
    for name in ("scale", "softcap", "left", "right", "dropout_p", "seed", "max_q"):
        with pytest.raises((TypeError, Refused)):
            backend.attention_forward(Attention(1.0)._replace(**{name: "1"}), q, q, q)


BAD_GRADIENTS = {
    "out shape": ({"out": torch.zeros(B, N, L, D + 1)}, "out"),
    "lse none": ({"lse": None}, "lse"),
    "lse shape": ({"lse": torch.zeros(B, N, L - 1).double()}, "lse"),
    "lse dtype": ({"lse": torch.zeros(B, N, L)}, "lse"),
    "dout stride": ({"dout": torch.zeros(()).expand(B, N, L, D)}, "dout"),
    "dlse shape": ({"dlse": torch.zeros(B, N, L, 1).double()}, "dlse"),
}


def bad_gradients(backend, name):
    changes, message = BAD_GRADIENTS[name]
    rows = torch.zeros(B, N, L, D)
    good = {"q": rows, "k": torch.zeros(B, N, S, D), "v": torch.zeros(B, N, S, D), "out": rows, "dout": rows}
    good |= {"lse": torch.zeros(B, N, L).double(), "bias": torch.zeros(B, N, L, S), "needs": [True] * 4, "scale": 1.0}
    good |= {"allowed": None, "dlse": None}
    with pytest.raises(Refused, match=message):
        backend.attention_backward(**with_call(good | changes))
