"""torch's own samples of its recurrent modules, and its own wrong inputs, through our classes."""

import pytest
import torch
from torch_samples import INFOS, build, each_recurrent, leaves, samples, samples_agree

pytestmark = pytest.mark.usefixtures("route")


@each_recurrent
def test_samples(ours, torchs):
    samples_agree(ours, torchs, "cpu")


@each_recurrent
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


@each_recurrent
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
