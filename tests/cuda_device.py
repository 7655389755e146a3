"""What the tests on a GPU share. Importing it skips the module that does, with the reason, where there is none."""

from contextlib import contextmanager

import pytest
import torch

from fastseq import backends

if not torch.cuda.is_available():
    pytest.skip(
        "torch sees no GPU, so test_cuda_attention.py and test_cuda_recurrent.py are left out", allow_module_level=True
    )
if backends.select("recurrent") is None:
    pytest.skip("the kernels are not built", allow_module_level=True)

from fastseq.backends import cuda

if cuda.why_off():
    pytest.skip(f"the CUDA kernels are {cuda.why_off()}", allow_module_level=True)

__all__ = ["DEVICE", "cuda", "ignore_first_use", "tf32"]

DEVICE = "cuda"
ignore_first_use = pytest.mark.filterwarnings("ignore:fastseq's CUDA kernels:RuntimeWarning")


@contextmanager
def tf32(on):
    """TF32 in torch's products and in cuDNN, on or off inside the block."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        # torch.testing's internals, which some tests import, allow cuDNN's flags to be set in this way only.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=on):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
