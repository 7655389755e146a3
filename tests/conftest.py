"""Fixtures of every test."""

import attention_stand_in
import pytest

from fastseq import backends

if (_kernels := backends.select()) is not None and not hasattr(_kernels, "attention_forward"):
    _kernels.attention_forward = attention_stand_in.attention_forward
    _kernels.attention_backward = attention_stand_in.attention_backward


@pytest.fixture(params=["torch", "native"])
def route(request):
    """Runs a test with torch's own operators and with the kernels, which must not make a difference."""
    with backends.use_backend(request.param):
        if request.param == "native" and backends.select() is None:
            pytest.skip("the kernels are not built")
        yield request.param
