"""What torch's tools make of models with layers of ours: the same as of torch's own."""

import copy
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from models import assert_close, flat
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_fx

import fastseq

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.(ao.quantization|jit).*:DeprecationWarning")
scripts = pytest.mark.skipif(sys.version_info >= (3, 14), reason="torch.jit.script ends with Python 3.13")


class One(nn.Module):
    """A model with one layer, whose tensor is given once."""

    def __init__(self, layer):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layer = layer

    def forward(self, x: Tensor):
        return self.layer(self.first(x))


class Two(One):
    def forward(self, x: Tensor):
        return self.layer(self.first(x), x)


class Three(One):
    def forward(self, x: Tensor):
        return self.layer(x, x, self.first(x), need_weights=False)[0]


class Constant(One):
    """The layer sees no input of the model: traced, its values are at hand."""

    def forward(self, x: Tensor):
        y = self.layer(*(torch.eye(8),) * self.count)
        return x, y


LAYERS = {
    "rnn": (One, lambda: nn.RNN(8, 8)),
    "lstm": (One, lambda: nn.LSTM(8, 8, 2, bidirectional=True)),
    "gru": (One, lambda: nn.GRU(8, 8, batch_first=True)),
    "rnn_cell": (One, lambda: nn.RNNCell(8, 8, nonlinearity="relu")),
    "lstm_cell": (One, lambda: nn.LSTMCell(8, 8)),
    "gru_cell": (One, lambda: nn.GRUCell(8, 8)),
    "attention": (Three, lambda: nn.MultiheadAttention(8, 2)),
    "layer_norm": (One, lambda: nn.LayerNorm(8)),
    "encoder_layer": (One, lambda: nn.TransformerEncoderLayer(8, 2, 16)),
    "decoder_layer": (Two, lambda: nn.TransformerDecoderLayer(8, 2, 16)),
}
CASES = [(name, False) for name in LAYERS] + [(name, True) for name in ("rnn", "lstm", "gru")]
each = pytest.mark.parametrize(("name", "compilable"), CASES, ids=[f"{name}{'-compilable' * c}" for name, c in CASES])


def make(name, compilable):
    """A model, fused; torch's; an input."""
    holder, layer = LAYERS[name]
    torch.manual_seed(0)
    torchs = holder(layer()).eval()
    ours = fastseq.fuse(copy.deepcopy(torchs), compilable=compilable)
    assert type(ours.layer) is not type(torchs.layer)
    return ours, torchs, torch.randn((5, 8) if "cell" in name else (5, 3, 8))


@each
def test_symbolic_trace(name, compilable):
    ours, torchs, x = make(name, compilable)
    graph = fx.symbolic_trace(ours)
    assert str(graph.graph) == str(fx.symbolic_trace(torchs).graph)
    assert graph.layer is ours.layer
    assert_close(flat(graph(x)), flat(torchs(x)), "float32")


@each
def test_symbolic_trace_of_constants(name, compilable):
    """What has values while it is traced must not become a constant of the graph: it depends on weights."""
    models = []
    for model in make(name, compilable)[:2]:
        constant = Constant(model.layer)
        constant.count = {Two: 2, Three: 3}.get(type(model), 1)
        models.append(constant)
    ours, torchs = models
    graph = fx.symbolic_trace(ours)
    graph.graph.eliminate_dead_code()
    assert str(graph.graph) == str(fx.symbolic_trace(torchs).graph)
    x = torch.zeros(1)
    before = flat(graph(x)[1])
    with torch.no_grad():
        for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
            q.copy_(p.mul_(2))
    after = flat(graph(x)[1])
    assert not torch.equal(before[0], after[0])
    assert_close(after, flat(torchs(x)[1]), "float32")


def test_symbolic_trace_beyond_torch():
    """What torch's class has no argument for is in the graph by its name."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.norm = fastseq.GRU(8, 8), fastseq.LayerNorm(8)

        def forward(self, x, lengths):
            y, h = self.gru(x, lengths=lengths)
            return self.norm(y, residual=x)[0] + h

    model, x = Model(), torch.randn(5, 3, 8)
    graph = fx.symbolic_trace(model)
    assert "%gru : [num_users=2] = call_module[target=gru](args = (%x,), kwargs = {lengths: %lengths})" in str(
        graph.graph
    )
    lengths = torch.tensor([5, 2, 0])
    assert torch.equal(graph(x, lengths), model(x, lengths))


class OwnForward(nn.LayerNorm):
    def forward(self, input):
        return super().forward(input + 1)


class OursWithOwnForward(fastseq.LayerNorm):
    def forward(self, input):
        return super().forward(input + 1)


def test_symbolic_trace_sees_through_a_forward_of_its_own():
    graphs = [fx.symbolic_trace(One(layer(8))) for layer in (OursWithOwnForward, OwnForward)]
    assert "call_module[target=layer]" not in str(graphs[0].graph)
    assert str(graphs[0].graph) == str(graphs[1].graph)
    on_instance = One(fastseq.LayerNorm(8))
    on_instance.layer.forward = lambda input: nn.functional.layer_norm(input, (8,))
    assert "call_module[target=layer]" not in str(fx.symbolic_trace(on_instance).graph)


@pytest.mark.parametrize("name", LAYERS)
def test_symbolic_trace_of_the_layer_alone(name):
    """The root is never a leaf: what torch does with its own class, or the error that it raises."""
    ours, torchs, _ = make(name, False)
    found = []
    for layer in (ours.layer, torchs.layer):
        try:
            nodes = fx.symbolic_trace(layer).graph.nodes
            found.append([(node.op, node.target) for node in nodes if node.op != "placeholder"])
        except (fx.proxy.TraceError, RuntimeError, TypeError) as error:
            found.append(type(error))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["lstm", "gru_cell", "attention", "encoder_layer"])
def test_prepare_fx(name):
    ours, torchs, x = make(name, False)
    prepared = prepare_fx(ours, get_default_qconfig_mapping(), (x,))
    assert type(prepared.layer) is type(ours.layer)
    assert_close(flat(prepared(x)), flat(torchs(x)), "float32")


@scripts
@each
def test_script(name, compilable):
    ours, torchs, x = make(name, compilable)
    layer, cls = ours.layer, type(ours.layer)
    wanted = flat(torchs(x))
    scripted = torch.jit.script(ours)
    results = flat(scripted(x))
    assert_close(results, wanted, "float32")
    for first in (results[0], wanted[0]):
        first.sin().sum().backward()
    for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
        assert_close(p.grad, q.grad, "float32")
    # The model stays what it was.
    assert ours.layer is layer
    assert repr(ours) == repr(torchs)
    assert_close(flat(ours(x)), wanted, "float32")
    assert type(ours.layer) is cls


@scripts
@pytest.mark.parametrize("name", ["lstm", "attention"])
def test_a_scripted_model_stays_itself(name):
    ours, torchs, _ = make(name, False)
    layer, cls = ours.layer, type(ours.layer)
    for use in (
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        fastseq.fuse,
        lambda model: fastseq.fuse(fastseq.unfuse(model)),
    ):
        torch.jit.script(ours)
        assert type(use(ours).layer) is cls
        assert ours.layer is layer
        assert type(ours.layer) is cls
    torch.jit.script(ours)
    assert type(fastseq.unfuse(ours).layer) is type(torchs.layer)


class OwnBlock(nn.TransformerEncoderLayer):
    def _ff_block(self, x: Tensor) -> Tensor:
        return self.linear2(self.linear1(x))


class OursWithOwnBlock(fastseq.TransformerEncoderLayer):
    def _ff_block(self, x: Tensor) -> Tensor:
        return self.linear2(self.linear1(x))


class Derived(nn.TransformerDecoderLayer):
    pass


class DerivedFromOurs(fastseq.TransformerDecoderLayer):
    def __init__(self, *args):
        super().__init__(*args)


@scripts
@pytest.mark.parametrize(
    ("holder", "ours", "torchs"), [(One, OursWithOwnBlock, OwnBlock), (Two, DerivedFromOurs, Derived)]
)
def test_script_of_subclasses(holder, ours, torchs):
    models = []
    for layer in (ours, torchs):
        torch.manual_seed(0)
        models.append(holder(layer(8, 2, 16)).train(False))
    scripted = [torch.jit.script(model) for model in models]
    x = torch.randn(5, 3, 8)
    assert_close(scripted[0](x), scripted[1](x), "float32")
    assert_close(models[0](x), models[1](x), "float32")
    assert type(models[0].layer) is ours


@scripts
def test_a_failed_script_leaves_the_model_whole():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = fastseq.GRU(8, 8)

        def forward(self, x):
            return self.gru(x, lengths=[3, 5])

    model, x = Model(), torch.randn(5, 2, 8)
    wanted = flat(model(x))
    with pytest.raises(RuntimeError, match="lengths"):
        torch.jit.script(model)
    assert_close(flat(model(x)), wanted, "float32")
    assert type(model.gru) is fastseq.GRU


@scripts
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@each
def test_jit_trace(name, compilable):
    ours, torchs, x = make(name, compilable)
    traced = torch.jit.trace(ours, (x,))
    assert_close(flat(traced(x)), flat(torchs(x)), "float32")
    assert not any("fastseq::" in str(node) for node in traced.inlined_graph.nodes())


def test_our_classes_under_torchs_names():
    """Whoever calls a class of torch by its name at call time meets our own, for ever."""
    text = """
        import torch
        import torch.nn.functional as F
        from torch import nn
        import fastseq

        names = [name for name in fastseq.nn.__all__ if hasattr(nn, name)]
        assert len(names) == 10
        functions = "layer_norm", "scaled_dot_product_attention"
        for family in (fastseq, fastseq.compat):
            for place in (nn, nn.modules, nn.modules.rnn, nn.modules.activation, nn.modules.normalization,
                          nn.modules.transformer):
                for name in names:
                    if hasattr(place, name) and hasattr(family, name):
                        setattr(place, name, getattr(family, name))
            for name in functions:
                setattr(F, name, getattr(fastseq, name))
            for dtype in (torch.float32, torch.float16):  # by kernels, and by torch
                torch.set_default_dtype(dtype)
                x = torch.randn(5, 3, 8)
                calls = [
                    (nn.LSTM(8, 8), x), (nn.LSTM(8, 8, proj_size=3), x), (nn.GRU(8, 8), x), (nn.RNN(8, 8), x),
                    (nn.LSTMCell(8, 8), x[0]), (nn.GRUCell(8, 8), x[0]), (nn.RNNCell(8, 8), x[0]),
                    (nn.LayerNorm(8), x), (nn.MultiheadAttention(8, 2), x, x, x),
                    (nn.TransformerEncoderLayer(8, 2, 16), x), (nn.TransformerEncoderLayer(8, 2, 16).eval(), x),
                    (nn.TransformerDecoderLayer(8, 2, 16), x, x), (nn.Transformer(8, 2, 1, 1, 16), x, x),
                ]
                for module, *arguments in calls:
                    module(*arguments)
                    with torch.no_grad():
                        module(*arguments)
                    fastseq.unfuse(fastseq.fuse(module))(*arguments)
                F.scaled_dot_product_attention(x, x, x)
                F.layer_norm(x, (8,))
                with fastseq.sdpa_kernels():
                    F.scaled_dot_product_attention(x, x, x)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(text)], check=True)


PER_SAMPLE = {
    "rnn_cell": lambda: nn.RNNCell(8, 8),
    "gru_cell": lambda: nn.GRUCell(8, 8),
    "lstm_cell": lambda: nn.LSTMCell(8, 8),
}


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_per_sample_gradients_of_cells(name):
    """With the states given. Where none is, torch's cells raise, and a tool may have left it out."""
    torch.manual_seed(0)
    torchs = PER_SAMPLE[name]().double()
    ours = fastseq.fuse(copy.deepcopy(torchs))
    paired = name == "lstm_cell"
    x, h, c = torch.randn(3, 4, 8, dtype=torch.float64)

    def loss(parameters, x, *states):
        states = tuple(s.unsqueeze(0) for s in states)
        hx = () if not states else (states,) if paired else states
        return flat(torch.func.functional_call(ours, parameters, (x.unsqueeze(0), *hx)))[0].sin().sum()

    parameters = dict(ours.named_parameters())
    states = (h, c) if paired else (h,)
    found = torch.func.vmap(torch.func.grad(loss), (None, 0, *(0 for _ in states)))(parameters, x, *states)
    for i in range(4):
        out = torchs(x[i : i + 1], (h[i : i + 1], c[i : i + 1]) if paired else h[i : i + 1])
        wanted = torch.autograd.grad(flat(out)[0].sin().sum(), list(torchs.parameters()))
        assert_close([g[i] for g in found.values()], list(wanted))
    without = torch.func.vmap(torch.func.grad(loss), (None, 0))
    if paired:
        assert without(parameters, x)["weight_ih"].shape == (4, 32, 8)
    else:
        with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
            without(parameters, x)


@pytest.mark.parametrize("name", LAYERS)
def test_hooks_see_activations_and_their_gradients(name):
    """What tools for per-sample gradients, pruning or attribution compute from."""
    seen = []
    for model in make(name, False)[:2]:
        kept = []
        layer = model.train(False).layer

        def after(_, args, out, kept=kept):
            kept.extend(flat([t for t in (*args, *(out if isinstance(out, tuple) else (out,))) if t is not None]))

        def back(_, dx, dy, kept=kept):
            kept.extend(t for t in dx + dy if t is not None)

        layer.register_forward_hook(after)
        layer.register_full_backward_hook(back)
        flat(model(make(name, False)[2]))[0].sin().sum().backward()
        seen.append(kept)
    assert_close(*seen, "float32")


class Stepped(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        h = torch.zeros(x.shape[0], 8)
        for x_t in x.unbind(1):
            h = self.cell(x_t, h)
        return h


@pytest.mark.parametrize("name", ["rnn_cell", "gru_cell"])
def test_opacus(name):
    """Its gradients of modules of its own are right or torch's error is seen: it calls a cell with its first input."""
    grad_sample = pytest.importorskip("opacus.grad_sample", reason="opacus is not installed")
    for cell in (PER_SAMPLE[name](), fastseq.fuse(PER_SAMPLE[name]())):
        model = grad_sample.GradSampleModule(Stepped(cell))
        with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
            model(torch.randn(4, 3, 8)).sum().backward()


def test_what_a_graph_keeps_can_be_read():
    """By tools that draw it: no None among the tensors."""
    x, mask = torch.randn(5, 3, 8), torch.zeros(5, 5)
    large = torch.randn(1024, 1024, requires_grad=True)
    calls = [
        lambda: fastseq.LSTM(8, 8, bias=False)(x),
        lambda: fastseq.GRU(8, 8)(x, lengths=[5, 2, 3]),
        lambda: fastseq.RNN(8, 8)(x, torch.zeros(1, 3, 8)),
        lambda: fastseq.GRUCell(8, 8)(x[0]),
        lambda: fastseq.GRUCell(8, 8, bias=False)(x[0], x[1]),
        lambda: fastseq.LSTMCell(8, 8)(x[0]),
        lambda: fastseq.LSTMCell(8, 8)(x[0], (x[1], x[2])),
        lambda: fastseq.MultiheadAttention(8, 2)(x, x, x, attn_mask=mask, need_weights=False)[0],
        lambda: fastseq.TransformerEncoderLayer(8, 2, 16)(x),
        lambda: fastseq.LayerNorm(1024, elementwise_affine=False)(large),
        lambda: fastseq.layer_norm(large, (1024,), residual=large),
        lambda: fastseq.scaled_dot_product_attention(*[large[None, None]] * 3, softcap=9.0),
    ]
    for call in calls:
        nodes, seen = [t.grad_fn for t in flat(call())], set()
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                nodes += [after for after, _ in node.next_functions]
                assert all(isinstance(t, Tensor) for t in getattr(node, "saved_tensors", ()))


def test_torchviz():
    torchviz = pytest.importorskip("torchviz", reason="torchviz is not installed")
    for model, _, x in (make(name, False) for name in LAYERS):
        torchviz.make_dot(flat(model(x))[0], show_saved=True, show_attrs=True)
