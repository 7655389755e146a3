"""fuse and unfuse on living models."""

import copy
import pickle

import pytest
import torch
from models import SEQUENCES, assert_close, flat
from torch import nn

import fastseq

pytestmark = pytest.mark.usefixtures("route")


class OwnForward(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(input * 2, hx)


class OwnInit(nn.GRU):
    pass


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4)
        self.alias = self.lstm
        self.stack = nn.ModuleList([nn.GRU(4, 4), nn.RNN(4, 4, nonlinearity="relu"), nn.LSTMCell(4, 4)])
        self.cells = nn.ModuleDict({"gru": nn.GRUCell(4, 4), "rnn": nn.RNNCell(4, 4)})
        self.norm = nn.utils.parametrizations.weight_norm(nn.LSTM(4, 4), "weight_hh_l0")
        self.own = OwnForward(4, 4)
        self.derived = OwnInit(4, 4)
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        x, _ = self.lstm(x)
        x, _ = self.stack[0](x)
        x, _ = self.stack[1](x)
        h, _ = self.stack[2](x[0])
        h = self.cells["rnn"](self.cells["gru"](h))
        x, _ = self.norm(x + h)
        x, _ = self.own(x)
        return self.linear(self.derived(x)[0])


def make_model():
    torch.manual_seed(0)
    return Model().double()


def run(model, x):
    y = model(x)
    return [y, *torch.autograd.grad(y.sin().sum(), [x, *model.parameters()])]


@pytest.mark.parametrize("compilable", [False, True])
def test_a_model_stays_itself(compilable):
    model = make_model()
    x = torch.randn(7, 5, 3, dtype=torch.float64, requires_grad=True)
    wanted = run(model, x)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen = []
    model.lstm.register_forward_hook(lambda module, args, output: seen.append(module))
    before = {name: (id(module), type(module)) for name, module in model.named_modules()}
    parameters, keys, text = list(map(id, model.parameters())), list(model.state_dict()), repr(model)

    assert fastseq.fuse(model, compilable=compilable) is model
    family = fastseq if compilable else fastseq.compat
    assert type(model.lstm) is family.LSTM
    assert type(model.stack[0]) is family.GRU
    assert type(model.stack[1]) is family.RNN
    assert type(model.stack[2]) is fastseq.LSTMCell
    assert type(model.cells["gru"]) is fastseq.GRUCell
    assert type(model.cells["rnn"]) is fastseq.RNNCell
    assert isinstance(model.norm, family.LSTM)
    assert isinstance(model.lstm, nn.LSTM) is not compilable
    assert type(model.own) is OwnForward
    assert type(model.derived) is OwnInit
    assert {name: id(module) for name, module in model.named_modules()} == {n: i for n, (i, _) in before.items()}
    assert list(map(id, model.parameters())) == parameters
    assert list(model.state_dict()) == keys
    assert repr(model) == text
    assert_close(run(model, x), wanted)
    assert seen == [model.lstm]
    model(x).sum().backward()
    optimizer.step()
    with torch.no_grad():
        after = model(x)

    assert fastseq.unfuse(model) is model
    assert {name: type(module) for name, module in model.named_modules() if name != "norm"} == {
        name: cls for name, (_, cls) in before.items() if name != "norm"
    }
    assert isinstance(model.norm, nn.LSTM)
    assert not any("fastseq" in key for module in model.modules() for key in vars(module))
    assert not any("fastseq" in cls.__module__ for module in model.modules() for cls in type(module).__mro__)
    assert_close(model(x), after)


def test_report():
    model = make_model()
    assert fastseq.fuse_report(model).rows == ()
    fastseq.fuse(model)
    report = fastseq.fuse_report(model)
    rows = {row.name: row for row in report.rows}
    assert rows["lstm"].after == "fastseq.compat.LSTM"
    assert rows["norm"].before == "parametrized torch.nn.LSTM"
    assert rows["norm"].after == "parametrized fastseq.compat.LSTM"
    assert [row.name for row in report.left] == ["own", "derived"]
    assert rows["own"].reason == "a subclass of torch.nn.LSTM with its own forward"
    assert rows["derived"].reason == "a subclass of torch.nn.GRU"
    assert "linear" not in rows
    assert "alias" not in rows
    text = repr(report)
    assert text.startswith("fastseq.fuse: 7 of 9 layers swapped\n")
    assert "lstm       torch.nn.LSTM -> fastseq.compat.LSTM" in text
    assert "a subclass of torch.nn.GRU" in text
    fastseq.fuse(model)
    assert {row.reason for row in fastseq.fuse_report(model).left if row.name not in ("own", "derived")} == {
        "has the kernels already"
    }
    fastseq.unfuse(model)
    assert fastseq.fuse_report(model).rows == ()
    model = fastseq.fuse(nn.Sequential(nn.LSTM(3, 4)))
    assert fastseq.fuse_report(copy.deepcopy(model)).rows == ()
    assert repr(fastseq.fuse_report(nn.Linear(1, 1))) == "fastseq.fuse: 0 of 0 layers swapped"


@pytest.mark.parametrize(("ours", "torchs"), SEQUENCES)
def test_the_model_itself(ours, torchs):
    compilable = ours.__module__ != "fastseq.compat"
    rnn = fastseq.fuse(torchs(3, 4), compilable=compilable)
    assert type(rnn) is ours
    assert fastseq.fuse_report(rnn).rows[0].name == ""
    assert "(the model)" in repr(fastseq.fuse_report(rnn))
    assert type(fastseq.fuse(rnn)) is ours  # a class of ours is left as it is
    assert type(fastseq.fuse(rnn, compilable=True)) is getattr(fastseq, ours.__name__)
    assert type(fastseq.unfuse(rnn)) is torchs
    rnn(torch.randn(7, 5, 3))
    assert type(fastseq.unfuse(ours(3, 4))) is torchs


def test_pickles_need_fastseq_until_unfused():
    model = fastseq.fuse(nn.Sequential(nn.LSTM(3, 4)))
    assert b"fastseq" in pickle.dumps(model)
    assert type(pickle.loads(pickle.dumps(model))[0]) is fastseq.compat.LSTM
    with torch.no_grad():
        fastseq.freeze(model)(torch.randn(7, 5, 3))
    assert b"fastseq" not in pickle.dumps(fastseq.unfuse(model))
    script = torch.jit.script(model)
    x = torch.randn(7, 5, 3)
    assert_close(flat(script(x)), flat(model(x)), "float32")


def test_parametrizations_come_and_go():
    model = nn.LSTM(3, 4, dtype=torch.float64)
    nn.utils.parametrizations.weight_norm(model, "weight_hh_l0")
    frozen = fastseq.freeze(fastseq.fuse(copy.deepcopy(model)))
    assert not copy.deepcopy(frozen)._packed_weights().frozen
    x = torch.randn(7, 5, 3, dtype=torch.float64)
    wanted = flat(model(x))
    fastseq.fuse(model)
    assert nn.utils.parametrize.is_parametrized(model, "weight_hh_l0")
    assert_close(flat(model(x)), wanted)
    nn.utils.parametrize.remove_parametrizations(model, "weight_hh_l0")
    assert type(model) is fastseq.compat.LSTM
    assert_close(flat(model(x)), wanted)
    nn.utils.parametrizations.weight_norm(model, "weight_ih_l0")  # on a class of ours
    assert_close(flat(model(x)), wanted)
    fastseq.unfuse(model)
    nn.utils.parametrize.remove_parametrizations(model, "weight_ih_l0")
    assert type(model) is nn.LSTM
    assert_close(flat(model(x)), wanted)


def test_wrong_arguments():
    for function in (fastseq.fuse, fastseq.unfuse, fastseq.fuse_report, fastseq.freeze, fastseq.unfreeze):
        with pytest.raises(TypeError, match=f"{function.__name__}: model must be a torch.nn.Module, got list"):
            function([nn.LSTM(3, 4)])


def test_a_forward_on_the_instance_is_left_alone():
    model = nn.Sequential(nn.LSTM(3, 4), nn.GRUCell(3, 4))
    for layer in model:
        layer.forward = layer.forward  # bound to torch's class, as wrappers and patches do
    fastseq.fuse(model)
    assert [type(layer) for layer in model] == [nn.LSTM, nn.GRUCell]
    assert {row.reason for row in fastseq.fuse_report(model).left} == {"its forward was replaced on the instance"}


class OwnAttention(nn.MultiheadAttention):
    def forward(self, query, key, value, **options):
        return super().forward(query * 2, key, value, **options)


class OwnLayer(nn.TransformerEncoderLayer):
    def forward(self, src, *args, **kwargs):
        return super().forward(src, *args, **kwargs) + 1


def make_transformer():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "whole": nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True),
            "attention": nn.MultiheadAttention(8, 2),
            "norm": nn.utils.parametrizations.weight_norm(nn.MultiheadAttention(8, 2), "in_proj_weight"),
            "own": OwnAttention(8, 2),
            "layer": OwnLayer(8, 2, 16, 0.0),
            "gru": nn.GRU(8, 8),
        }
    ).double()


def run_transformer(model, x, memory):
    y = model["whole"](x, memory).transpose(0, 1)
    for name in ("attention", "norm", "own"):
        y, _ = model[name](y, y, y)
    return model["gru"](model["layer"](y))[0]


@pytest.mark.parametrize("compilable", [False, True])
def test_attention_layers(compilable):
    model = make_transformer()
    x, memory = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(3, 7, 8, dtype=torch.float64)
    wanted = run_transformer(model, x, memory)
    with torch.no_grad():
        in_evaluation = run_transformer(model.eval(), x, memory)
    classes = {name: type(module) for name, module in model.named_modules()}
    keys, text = list(model.state_dict()), repr(model)

    fastseq.fuse(model.train(), compilable=compilable)
    assert type(model["whole"].encoder.layers[0]) is fastseq.TransformerEncoderLayer
    assert type(model["whole"].decoder.layers[0]) is fastseq.TransformerDecoderLayer
    assert type(model["whole"].decoder.layers[0].multihead_attn) is fastseq.MultiheadAttention
    assert type(model["attention"]) is fastseq.MultiheadAttention
    assert isinstance(model["norm"], fastseq.MultiheadAttention)
    assert type(model["layer"].self_attn) is fastseq.MultiheadAttention  # inside a layer that is left alone
    assert (type(model["own"]), type(model["layer"])) == (OwnAttention, OwnLayer)
    assert (list(model.state_dict()), repr(model)) == (keys, text)
    assert_close(run_transformer(model, x, memory), wanted)
    with torch.no_grad():
        assert_close(run_transformer(model.eval(), x, memory), in_evaluation)

    report = fastseq.fuse_report(model)
    rows = {row.name: row for row in report.rows}
    assert rows["attention"].after == "fastseq.MultiheadAttention"
    assert rows["norm"].after == "parametrized fastseq.MultiheadAttention"
    assert rows["whole.encoder.layers.0"].before == "torch.nn.TransformerEncoderLayer"
    assert {row.name: row.reason for row in report.left} == {
        "own": "a subclass of torch.nn.MultiheadAttention with its own forward",
        "layer": "a subclass of torch.nn.TransformerEncoderLayer with its own forward",
    }
    fastseq.unfuse(model)
    classes.pop("norm")
    assert {name: type(module) for name, module in model.named_modules() if name != "norm"} == classes
    nn.utils.parametrize.remove_parametrizations(model["norm"], "in_proj_weight")
    assert type(model["norm"]) is nn.MultiheadAttention
    assert_close(run_transformer(model.train(), x, memory), wanted)


def test_type_checks_of_models_hold():
    model = fastseq.fuse(nn.Sequential(nn.TransformerEncoderLayer(8, 2), nn.GRU(8, 8)))
    assert isinstance(model[0], nn.TransformerEncoderLayer)
    assert isinstance(model[0].self_attn, nn.MultiheadAttention)
    assert isinstance(model[1], nn.GRU)
    assert model[1].mode == "GRU"
    assert [row.name for row in fastseq.fuse_report(model).swapped] == ["0", "0.self_attn", "0.norm1", "0.norm2", "1"]
    assert type(fastseq.unfuse(fastseq.TransformerDecoderLayer(8, 2)).self_attn) is nn.MultiheadAttention


def test_a_projection_is_left_alone():
    """No kernel would run, and the report must not say otherwise."""
    for compilable in (False, True):
        model = fastseq.fuse(nn.Sequential(nn.LSTM(3, 4), nn.LSTM(3, 4, proj_size=2)), compilable=compilable)
        assert type(model[1]) is nn.LSTM
        assert [row.reason for row in fastseq.fuse_report(model).left] == ["proj_size: the kernels have no projection"]
