"""torch's own samples of its modules, through ours and through torch's."""

import copy

import pytest
import torch
from models import CELLS, SEQUENCES
from torch.testing._internal.common_modules import module_db

INFOS = {info.module_cls: info for info in module_db}
each_recurrent = pytest.mark.parametrize(
    ("ours", "torchs"),
    [*SEQUENCES, *CELLS],
    ids=[f"{ours.__module__}.{ours.__name__}" for ours, _ in (*SEQUENCES, *CELLS)],
)


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
    """Outputs as torch's and as the sample's reference function, gradients, state in and out."""
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
