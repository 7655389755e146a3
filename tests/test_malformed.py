"""Calls that do not fit: each ends in an error, whoever computes, and none reaches an op that does not look."""

import pytest
import torch
from models import CELLS, SEQUENCES, pair
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq

pytestmark = pytest.mark.usefixtures("route")

x = torch.randn(7, 5, 3)
padding_free, packed = (pack_padded_sequence(x, lengths) for lengths in ([7] * 5, [7, 6, 5, 4, 3]))
unsorted = pack_padded_sequence(x, [3, 6, 5, 4, 7], enforce_sorted=False)
sizes, order, back = packed.batch_sizes, unsorted.sorted_indices, unsorted.unsorted_indices


@pytest.mark.parametrize(("ours", "torchs"), SEQUENCES[:3])
@pytest.mark.parametrize("features", [1, 2, 4, 64])
def test_features_of_packed_input(ours, torchs, features):
    """20 times, as what torch's op writes beyond its memory shows late."""
    rnn = pair(ours, torchs, 3, 4, dtype=torch.float32)[0]
    message = rf"input.size\(-1\) must be equal to input_size. Expected 3, got {features}"
    for _ in range(20):
        with pytest.raises(RuntimeError, match=message):
            rnn(padding_free._replace(data=torch.randn(35, features)))


@pytest.mark.parametrize(("ours", "torchs"), SEQUENCES[:3])
@pytest.mark.parametrize("bias", [True, False])
def test_parameters(ours, torchs, bias):
    """Of another size, rank, dtype or device: oneDNN's LSTM takes them as they are."""
    options = {"num_layers": 2, "bidirectional": True, "bias": bias}
    calls = [lambda m, data=data: m(data) for data in (x, x[:, 0], packed)]
    calls += [lambda m: m(x, lengths=[1, 2, 3, 4, 5])]
    rnn = pair(ours, torchs, 3, 4, dtype=torch.float32, **options)[0]
    modules = [(rnn, calls)]
    if rnn.mode == "LSTM":
        modules.append((pair(ours, torchs, 3, 4, proj_size=2, dtype=torch.float32, **options)[0], calls))
    options["bidirectional"] = False
    modules.append((pair(ours, torchs, 3, 4, dtype=torch.float32, **options)[0], [*calls, lambda m: m.step(x[0])]))
    for module, calls in modules:
        for name, weight in list(module.named_parameters()):
            size = weight.shape[0]
            wrong = [weight[: size - 1], torch.cat((weight, weight)), weight[..., None], weight[None], weight[..., :0]]
            wrong += [weight[:, :-1]] if weight.dim() == 2 else [weight[0]]
            wrong = [(w, f"{name} must have shape") for w in wrong]
            wrong += [(weight.double(), "dtype"), (weight.to("meta"), "not at the same device")]
            for other, message in wrong:
                setattr(module, name, nn.Parameter(other.detach()))
                for call in calls:
                    with pytest.raises((RuntimeError, ValueError), match=message):
                        call(module)
            setattr(module, name, weight)
            for call in calls:
                call(module)


def test_missing_parameters():
    gru = fastseq.GRU(3, 4)
    gru.bias_hh_l0 = None
    for call in (lambda: gru(x), lambda: gru(packed), lambda: gru(x, lengths=[1, 2, 3, 4, 5])):
        with pytest.raises(TypeError, match="expected Tensor as element 3"):
            call()
    with pytest.raises(RuntimeError, match="bias_hh_l0 of the GRU must be a Tensor, got None"):
        gru.step(x[0])


@pytest.mark.parametrize(("ours", "torchs"), CELLS)
@pytest.mark.parametrize("bias", [True, False])
def test_cells(ours, torchs, bias):
    """Torch's ops take gates apart that are not there, of an hx with three axes or weights with too few rows."""
    cell = pair(ours, torchs, 3, 1, bias, dtype=torch.float32)[0]
    name = ours.__name__.removesuffix("Cell").lower()
    function, x, hx = getattr(fastseq, f"{name}_cell"), torch.randn(1, 3), torch.zeros(1, 1)
    hx = (hx, hx) if name == "lstm" else hx

    def weights():
        return cell.weight_ih, cell.weight_hh, *((cell.bias_ih, cell.bias_hh) if bias else ())

    with pytest.raises(RuntimeError, match="hidden0 must have 2 dimensions, got 3"):
        cell(x[0], hx)
    with pytest.raises(RuntimeError, match="hidden0 must have 2 dimensions, got 3"):
        function(x, tuple(s[None] for s in hx) if name == "lstm" else hx[None], *weights())
    parameters = dict(cell.named_parameters())
    for fewer in (0, 2):  # all of them, so that they fit each other
        for name, weight in parameters.items():
            setattr(cell, name, nn.Parameter(torch.zeros(fewer, *weight.shape[1:])))
        for call in (lambda: cell(x), lambda: cell(x, hx), lambda: function(x, hx, *weights())):
            with pytest.raises(RuntimeError, match="w_ih must have . rows"):
                call()
    for name, weight in parameters.items():
        setattr(cell, name, weight)
    for name, weight in parameters.items():
        for wrong in (weight[None], weight[0], torch.cat((weight, weight)), weight.double(), weight.to("meta")):
            setattr(cell, name, nn.Parameter(wrong.detach()))
            for call in (lambda: cell(x), lambda: cell(x[0]), lambda: function(x, hx, *weights())):
                with pytest.raises(
                    RuntimeError, match=r"(w_ih|w_hh|b_ih|b_hh) must have|input_size|hidden_size|tensors are"
                ):
                    call()
        setattr(cell, name, weight)


PACKED = {
    "rising": packed._replace(batch_sizes=sizes.flip(0)),
    "too many rows": packed._replace(batch_sizes=sizes + 1),
    "too few rows": packed._replace(batch_sizes=sizes[:-1]),
    "int32": packed._replace(batch_sizes=sizes.int()),
    "float": packed._replace(batch_sizes=sizes.float()),
    "zero": packed._replace(batch_sizes=torch.cat((sizes, sizes[:1] * 0))),
    "negative": packed._replace(batch_sizes=torch.cat((sizes, sizes[:1] * 0 - 1))),
    "empty": packed._replace(batch_sizes=sizes[:0]),
    "2-D": packed._replace(batch_sizes=sizes[None]),
    "scalar": packed._replace(batch_sizes=sizes[0]),
    "huge": packed._replace(batch_sizes=sizes * 2**40),
    "on meta": packed._replace(batch_sizes=sizes.to("meta")),
    "list": packed._replace(batch_sizes=sizes.tolist()),
    "none": packed._replace(batch_sizes=None),
    "no data": packed._replace(data=None),
    "3-D data": packed._replace(data=packed.data[None]),
    "order out of range": unsorted._replace(sorted_indices=order + 3),
    "order with negatives": unsorted._replace(sorted_indices=order - 1),
    "order twice": unsorted._replace(sorted_indices=order * 0),
    "short order": unsorted._replace(sorted_indices=order[:2]),
    "2-D order": unsorted._replace(sorted_indices=order[None]),
    "float order": unsorted._replace(sorted_indices=order.float()),
    "order on meta": unsorted._replace(sorted_indices=order.to("meta")),
    "list for an order": unsorted._replace(sorted_indices=order.tolist()),
    "back out of range": unsorted._replace(unsorted_indices=back + 3),
    "short back": unsorted._replace(unsorted_indices=back[:2]),
    "not the inverse": unsorted._replace(unsorted_indices=back.roll(1)),
}
SAID = "batch_sizes|sorted_indices|data|input must have 2 dimensions"


@pytest.mark.parametrize(("ours", "torchs"), SEQUENCES[:3])
@pytest.mark.parametrize("case", PACKED)
def test_packed_sequences(ours, torchs, case):
    rnn = pair(ours, torchs, 3, 4, dtype=torch.float32)[0]
    state = torch.zeros(1, 5, 4)
    for hx in (None, (state, state) if rnn.mode == "LSTM" else state):
        with pytest.raises((RuntimeError, TypeError, ValueError), match=SAID):
            rnn(PACKED[case], hx)


def test_packed_sequences_that_torch_takes():
    """int32 indices, and one of the two alone."""
    gru, reference = pair(fastseq.GRU, nn.GRU, 3, 4, dtype=torch.float32)
    for input in (
        unsorted._replace(sorted_indices=order.int(), unsorted_indices=back.int()),
        unsorted._replace(sorted_indices=None),
        unsorted._replace(unsorted_indices=None),
    ):
        torch.testing.assert_close(gru(input)[1], reference(input)[1])


@pytest.mark.parametrize(("ours", "torchs"), CELLS)
def test_frozen_cells(ours, torchs):
    """Weights are packed before anybody else looks at them."""
    cell = fastseq.freeze(pair(ours, torchs, 3, 4, dtype=torch.float32)[0])
    x = torch.randn(5, 3)
    for name, weight in dict(cell.named_parameters()).items():
        for wrong in (weight[:1], weight[None], weight[..., :0]):
            setattr(cell, name, nn.Parameter(wrong.detach(), requires_grad=False))
            with torch.no_grad(), pytest.raises(RuntimeError):
                cell(x)
        setattr(cell, name, weight)


def test_batch_sizes_without_end():
    """Expanded ones take no memory, but a list of them does."""
    for steps in (36, 2**40):
        with pytest.raises(RuntimeError, match=f"batch_sizes must sum to the 35 rows of data, got {steps} positive"):
            fastseq.GRU(3, 4)(padding_free._replace(batch_sizes=sizes[-1:].expand(steps)))


def test_masks_on_another_device():
    """torch's kernels compute something of them, and of linear layers on meta."""
    x, mask = torch.randn(2, 4, 6), torch.zeros(2, 4, dtype=torch.bool, device="meta")
    attention = fastseq.MultiheadAttention(6, 2, batch_first=True)
    encoder = fastseq.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    for dtype in (torch.bool, torch.float32, torch.float64):
        for call in (
            lambda m: attention(x, x, x, key_padding_mask=m),
            lambda m: attention(x, x, x, key_padding_mask=m, need_weights=False),
            lambda m: attention(x, x, x, attn_mask=m[0].expand(4, 4)),
            lambda m: encoder(x, src_key_padding_mask=m),
            lambda m: encoder(x, m[0].expand(4, 4)),
        ):
            with pytest.raises(RuntimeError, match="on the same device"):
                call(mask.to(dtype))


@pytest.mark.parametrize("part", ["linear1", "linear2"])
def test_feed_forward_on_meta(part):
    x = torch.randn(2, 4, 6)
    for layer in (
        fastseq.TransformerEncoderLayer(6, 2, 8, batch_first=True),
        fastseq.TransformerDecoderLayer(6, 2, 8, batch_first=True),
    ):
        arguments = (x, x)[: 1 + (layer._torch_class is nn.TransformerDecoderLayer)]
        linear = getattr(layer, part)
        linear.to("meta")
        with pytest.raises(RuntimeError, match="on the same device"):
            layer(*arguments)

        def bring(module, _):  # as those who load weights when they are needed
            module.to_empty(device="cpu")

        linear.register_forward_pre_hook(bring)
        layer(*arguments)


def test_residual_without_input():
    for wrong in (2.5, 1, None, [1.0]):
        with pytest.raises(TypeError, match="input must be a Tensor, got"):
            fastseq.layer_norm(wrong, (3,), residual=x)


def test_linear_function(native):
    """What the kernels do not serve is torch's, with its gradients."""
    x, weight, bias = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)
    apply = fastseq.ops.LinearFunction.apply
    for wrong, error in (
        ((x[:, :2], weight, bias), RuntimeError),
        ((x, weight[None], bias), RuntimeError),
        ((x, weight.to("meta"), bias), RuntimeError),
        ((x, weight, bias[:3]), RuntimeError),
        ((x, weight, 2.5), TypeError),
        ((None, weight, bias), TypeError),
    ):
        with pytest.raises(error):
            apply(native, *wrong)
    leaves = [t.half().requires_grad_() for t in (x, weight, torch.randn(1))]
    out = apply(native, *leaves)
    wanted = nn.functional.linear(*leaves)
    torch.testing.assert_close(out, wanted)
    for ours, torchs in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (out, wanted)), strict=True):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize(("ours", "torchs"), CELLS)
def test_cells_without_a_weight(ours, torchs):
    cell = ours(3, 4)
    cell.weight_hh = None
    with pytest.raises((TypeError, RuntimeError), match="w_hh|weight_hh|must be Tensor"):
        cell(torch.randn(5, 3))


def test_attention_of_no_heads():
    """torch's op divides by their number."""
    q, k, none = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 0, 5, 8)
    for key, value in ((none, k), (k, none), (none, none)):
        for options in ({}, {"lengths_k": [5, 2]}, {"attn_mask": torch.ones(3, 5, dtype=torch.bool)}):
            with pytest.raises(RuntimeError, match="Number of heads in key and value must divide"):
                fastseq.scaled_dot_product_attention(q, key, value, enable_gqa=True, **options)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_attention_mask_on_another_device(dtype):
    q, mask = torch.randn(2, 2, 3, 8), torch.zeros(3, 3, dtype=dtype, device="meta")
    for query in (q, q[0], q.clone().requires_grad_()):
        with pytest.raises(RuntimeError, match="attn_mask are not at the same device"):
            fastseq.scaled_dot_product_attention(query, q, q, mask)


def test_fast_path_of_torch():
    """It reads an in_proj_bias of another dtype as it is, past its end, and takes masks of any rank."""
    layer = fastseq.TransformerEncoderLayer(6, 2, 8, batch_first=True, dtype=torch.float64).eval()
    reference = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dtype=torch.float64)  # training: no fast path
    reference.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    with torch.no_grad():
        for part in (layer, layer.self_attn):
            arguments = (x,) if part is layer else (x, x, x)
            with pytest.raises(AssertionError, match="2-D or 3-D but found 5-D"):
                part(*arguments, **{"src_mask" if part is layer else "attn_mask": torch.zeros(1, 1, 1, 3, 3) > 0})
        for module in (layer, reference):
            module.self_attn.in_proj_bias = nn.Parameter(torch.linspace(-1, 1, 18))
            module.dropout.p = module.dropout1.p = module.dropout2.p = module.self_attn.dropout = 0.0
        torch.testing.assert_close(layer(x), reference(x))
        x = x.clone()
        torch.testing.assert_close(layer.self_attn(x, x, x)[0], reference.self_attn(x, x, x)[0])


def test_lengths_of_an_endless_input(native):
    """Expanded steps take no memory, nor does what is known of their lengths."""
    from fastseq.ops.lengths import padded_rows

    rows = padded_rows([2, 0, 3], 2**40, 3, torch.device("cpu"))
    assert rows.batch_sizes.tolist() == [2, 2, 1]
    assert rows.longest == 3
