"""Fixtures of every test."""

import pytest

from fastseq import backends


@pytest.fixture(params=["torch", "native"])
def route(request):
    """Runs a test with torch's own operators and with the kernels, which must not make a difference."""
    with backends.use_backend(request.param):
        if request.param == "native" and backends.select() is None:
            pytest.skip("the kernels are not built")
        yield request.param
