"""The packed weights that modules keep for inference: when they are made, when they are seen to be old."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from models import MODULES, assert_close, flat, make
from torch import nn

import fastseq
from fastseq import backends

native = backends.select("recurrent")
pytestmark = pytest.mark.skipif(native is None, reason="the kernels are not built")

X = torch.randn(6, 5, 3, dtype=torch.float64)


@pytest.fixture
def calls(monkeypatch):
    """The names of the calls of pack and checksum."""
    names = []
    for name in ("pack", "checksum"):
        function = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *args, f=function, n=name: names.append(n) or f(*args))
    return names


def agrees(rnn, x=X):
    """Without gradients the result is that of the weights as they are now, which calls with gradients always take."""
    with torch.enable_grad():
        wanted = [t.detach() for t in flat(rnn(x.clone().requires_grad_()))]
    with torch.no_grad():
        result = flat(rnn(x))
    assert_close(result, wanted)


@pytest.mark.parametrize("cell", MODULES)
def test_packed_once(cell, calls):
    rnn = make(cell, 3, 4, 2, bidirectional=True)
    with torch.no_grad():
        rnn(X)
        assert calls.count("pack") == 4
        calls.clear()
        rnn(X)
        rnn(X[:3], lengths=[1, 2, 3, 2, 1])
        assert calls == ["checksum"] * 8  # one for the weights that are packed together
        calls.clear()
        fastseq.freeze(rnn)
        rnn(X)
        assert calls == ["pack"] * 4
        rnn(X)
        assert calls == ["pack"] * 4
        fastseq.unfreeze(rnn)
        rnn(X)
        assert "checksum" in calls
    calls.clear()
    rnn(X)  # with gradients
    assert calls == []


@pytest.mark.parametrize("cell", MODULES)
def test_a_single_row_keeps_no_panels(cell, calls):
    """One step of one row reads the weights themselves, in every layout; frozen ones are packed all the same."""
    rnn = make(cell, 3, 4, 2, bidirectional=True)
    row = X[:1, :1]
    with torch.no_grad():
        for x in (row, row[0], nn.utils.rnn.pack_sequence([row[0]])):
            rnn(x)
        agrees(rnn, row)
        rnn.weight_hh_l0.data.mul_(2)
        agrees(rnn, row)
        assert calls == []
        fastseq.freeze(rnn)(row)
        assert calls == ["pack"] * 4


CHANGES = {
    "in place": lambda rnn: rnn.weight_hh_l0.mul_(2),
    ".data": lambda rnn: rnn.weight_hh_l0.data.mul_(2),
    "one element of .data": lambda rnn: rnn.bias_hh_l0.data[3].add_(1),
    "two elements swapped": lambda rnn: rnn.weight_ih_l0.data.copy_(rnn.weight_ih_l0.data.flip(0)),
    "numpy": lambda rnn: rnn.weight_hh_l0.detach().numpy().__imul__(2),
    "new memory": lambda rnn: setattr(rnn.weight_hh_l0, "data", rnn.weight_hh_l0.data * 2),
    "other strides": lambda rnn: setattr(rnn.weight_hh_l0, "data", rnn.weight_hh_l0.data.view(4, -1).T),
    "new parameter": lambda rnn: setattr(rnn, "weight_hh_l0", nn.Parameter(rnn.weight_hh_l0 * 2)),
    "load_state_dict": lambda rnn: rnn.load_state_dict({k: v * 2 for k, v in rnn.state_dict().items()}),
    "assign": lambda rnn: rnn.load_state_dict({k: v * 2 for k, v in rnn.state_dict().items()}, assign=True),
    "to and back": lambda rnn: rnn.float().double(),
    "apply": lambda rnn: rnn._apply(lambda t: t * 2),
    "copy_": lambda rnn: torch._foreach_mul_(list(rnn.parameters()), 0.5),
}


@pytest.mark.parametrize("cell", MODULES)
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(cell, change):
    rnn = make(cell, 3, 4)
    agrees(rnn)
    with torch.no_grad():
        before = flat(rnn(X))[0]
        CHANGES[change](rnn)
    agrees(rnn)
    with torch.no_grad():
        assert not torch.equal(flat(rnn(X))[0], before)


def test_optimizer_steps_are_seen():
    rnn = make("lstm", 3, 4)
    optimizer = torch.optim.Adam(rnn.parameters(), 0.1)
    for _ in range(3):
        rnn(X)[0].sum().backward()
        optimizer.step()
        agrees(rnn)


def test_frozen_modules_see_replaced_and_moved_parameters():
    for change in ("new parameter", "assign", "new memory", "to and back"):
        rnn = fastseq.freeze(make("gru", 3, 4))
        agrees(rnn)
        with torch.no_grad():
            CHANGES[change](rnn)
        agrees(rnn)
    rnn = fastseq.freeze(make("gru", 3, 4))
    agrees(rnn)
    rnn.float()
    with torch.no_grad():
        assert rnn(X.float())[0].dtype is torch.float32


def test_frozen_modules_see_load_state_dict():
    """Also where torch swaps tensors to load, which its own sequence modules do not bear."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    for module, x, swap in (
        (make("lstm", 3, 4, 2), X, False),
        (fastseq.GRUCell(3, 4).double(), X[0], False),
        (fastseq.GRUCell(3, 4).double(), X[0], True),
    ):
        agrees(fastseq.freeze(module), x)
        torch.__future__.set_swap_module_params_on_conversion(swap)
        try:
            module.load_state_dict({name: 2 * weight for name, weight in module.state_dict().items()})
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)
        agrees(module, x)


def test_frozen_modules_do_not_look():
    """What freeze promises not to see, it does not; frozen again, it does."""
    rnn = fastseq.freeze(make("gru", 3, 4))
    with torch.no_grad():
        before = rnn(X)[0]
        rnn.weight_hh_l0.mul_(2)
        assert torch.equal(rnn(X)[0], before)
        fastseq.freeze(rnn)
        assert not torch.equal(rnn(X)[0], before)
    agrees(rnn)


def test_models_freeze_as_a_whole(calls):
    model = fastseq.fuse(nn.ModuleList([nn.LSTM(3, 4), nn.Linear(3, 4), nn.GRUCell(3, 4)]))
    assert fastseq.freeze(model) is model
    with torch.no_grad():
        for _ in range(2):
            model[0](X.float())
            model[2](X[0].float())
    assert calls == ["pack", "pack"]
    fastseq.unfreeze(model)
    with torch.no_grad():
        model[2](X[0].float())
    assert calls == ["pack", "pack"]


def test_no_part_of_state_and_copies():
    rnn = fastseq.freeze(make("lstm", 3, 4))
    agrees(rnn)
    keys = list(rnn.state_dict())
    assert keys == [name for name, _ in rnn.named_parameters()]
    other = copy.deepcopy(rnn)
    assert not other._packed_weights().frozen
    with torch.no_grad():
        other.weight_hh_l0.mul_(2)
    agrees(other)
    weight = weakref.ref(rnn.weight_hh_l0)
    rnn.weight_hh_l0 = nn.Parameter(torch.zeros(16, 4, dtype=torch.float64))
    gc.collect()
    assert weight() is None  # packed weights keep no old parameter alive
    agrees(rnn)


def test_parameters_that_are_computed():
    rnn = make("gru", 3, 4)
    nn.utils.parametrizations.weight_norm(rnn, "weight_hh_l0")
    agrees(rnn)
    with torch.no_grad():
        rnn.parametrizations.weight_hh_l0.original0.mul_(2)
    agrees(rnn)
    weights = {k: v * 2 for k, v in make("gru", 3, 4).state_dict().items()}
    rnn = make("gru", 3, 4)
    agrees(rnn)
    with torch.no_grad():
        wanted = flat(rnn(X))
        torch.func.functional_call(rnn, weights, (X,))
        assert_close(flat(rnn(X)), wanted)


def test_weights_in_other_layouts():
    rnn = make("lstm", 3, 4)
    rnn.weight_hh_l0 = nn.Parameter(rnn.weight_hh_l0.detach().T.contiguous().T)
    assert not rnn.weight_hh_l0.is_contiguous()
    agrees(rnn)
    with torch.no_grad():
        rnn.weight_hh_l0.mul_(2)
    agrees(rnn)
    fastseq.freeze(rnn)
    agrees(rnn)


def test_another_instruction_set():
    rnn = fastseq.freeze(make("lstm", 3, 4))
    for isa in (*native.isas(), *native.isas()):
        with native.use_isa(isa):
            agrees(rnn)
    with backends.use_backend("torch"):
        agrees(rnn)


def test_threads_share_a_module():
    rnn = make("lstm", 3, 33)
    wanted = flat(rnn(X))
    failures = []

    def run():
        try:
            with torch.no_grad():
                for _ in range(50):
                    assert_close(flat(rnn(X)), wanted)
                    rnn._packed_weights().clear()
        except Exception as error:
            failures.append(error)

    wanted = [t.detach() for t in wanted]
    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
