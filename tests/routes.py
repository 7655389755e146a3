"""Fixtures that run a test on every route: torch's own ops, the test double, the kernels where they are built."""

import double
import pytest

from fastseq import backends

NATIVE = backends.select()


@pytest.fixture(params=["torch", "double", "native"], autouse=True)
def route(request, monkeypatch):
    if request.param == "native":
        if NATIVE is None:
            pytest.skip("the kernels are not built")
        return "native"
    backend = double if request.param == "double" else None
    monkeypatch.setattr(backends, "select", lambda: backend)
    double.CALLS.clear()
    return request.param
