"""torch's own samples of its recurrent modules, and its own wrong inputs, through our classes."""

import copy

import pytest
import torch
from models import CELLS, SEQUENCES
from torch.testing._internal.common_modules import module_db

pytestmark = pytest.mark.usefixtures("route")

OURS = [(ours, torchs) for ours, torchs in (*SEQUENCES, *CELLS)]
INFOS = {info.module_cls: info for info in module_db}
each = pytest.mark.parametrize(("ours", "torchs"), OURS, ids=[f"{ours.__module__}.{ours.__name__}" for ours, _ in OURS])


def samples(info, dtype=torch.float64, training=True, device="cpu"):
    return info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=True, training=training)


def build(cls, sample, dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    arguments = sample.constructor_input
    return cls(*arguments.args, **{"dtype": dtype, "device": device, **arguments.kwargs})


def leaves(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, tuple | list) else []


def samples_agree(ours, torchs, device):
    count = 0
    for sample in samples(INFOS[torchs], device=device):
        forward = sample.forward_input
        module, reference = build(ours, sample, device=device), build(torchs, sample, device=device)
        assert repr(module) == repr(reference)
        results = []
        for m in (module, reference):
            arguments = copy.deepcopy(forward.args), copy.deepcopy(forward.kwargs)
            outputs = leaves(m(*arguments[0], **arguments[1]))
            sum(o.sum() for o in outputs).backward()
            inputs = [t for t in leaves([*arguments[0], *arguments[1].values()]) if t.requires_grad]
            results.append([*outputs, *(t.grad for t in inputs), *(p.grad for p in m.parameters())])
        torch.testing.assert_close(*results)
        if sample.reference_fn is not None:
            wanted = leaves(sample.reference_fn(module, *forward.args, **forward.kwargs))
            torch.testing.assert_close(leaves(module(*forward.args, **forward.kwargs)), wanted)
        count += 1
    assert count > 0


@each
def test_samples(ours, torchs):
    """Outputs as torch's and as the sample's reference function, gradients, state in and out."""
    samples_agree(ours, torchs, "cpu")


@each
def test_gradcheck(ours, torchs):
    for sample in list(samples(INFOS[torchs]))[::5]:
        module, forward = build(ours, sample), sample.forward_input
        inputs = [t for t in leaves([*forward.args, *forward.kwargs.values()]) if t.requires_grad]

        def run(*tensors, module=module, forward=forward):
            return tuple(leaves(module(*forward.args, **forward.kwargs)))

        assert torch.autograd.gradcheck(run, (*inputs, *module.parameters()))
        assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def run(cls, sample):
    return build(cls, sample)(*sample.forward_input.args, **sample.forward_input.kwargs)


@each
def test_error_inputs(ours, torchs):
    info = INFOS[torchs]
    if info.module_error_inputs_func is None:
        pytest.skip("torch has no wrong inputs for it")
    count = 0
    for error_input in info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=False, training=True
    ):
        sample = error_input.module_error_input
        with pytest.raises(error_input.error_type, match=error_input.error_regex):
            run(ours, sample)
        count += 1
    assert count > 0
