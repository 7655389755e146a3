"""The binding of the attention kernels: layouts, packed batches, what is allocated and what is refused."""

from __future__ import annotations

import attention_checks
import pytest
import torch
from cases import each_dtype

from fastseq.backends.contract import Attention, Refused

native = pytest.importorskip("fastseq.backends.native", reason="the extension is not built")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@each_dtype
@pytest.mark.parametrize("L", [2, 65])
def test_strides(L, dtype):
    attention_checks.strides(native, L, dtype)


def test_output_into_a_view():
    attention_checks.output_into_a_view(native)


@each_dtype
@pytest.mark.parametrize("most", [3, 129])
def test_packed_batch(most, dtype):
    attention_checks.packed_batch(native, most, dtype)


def test_rows_of_no_sequence_are_zero():
    attention_checks.rows_of_no_sequence_are_zero(native)


def test_only_the_gradients_that_are_needed():
    attention_checks.only_the_gradients_that_are_needed(native)


@pytest.mark.parametrize("L", [2, 65])
def test_lse_of_padding(L):
    attention_checks.lse_of_padding(native, L)


@pytest.mark.parametrize("name", attention_checks.BAD_ARGUMENTS)
def test_bad_arguments(name):
    attention_checks.bad_arguments(native, name)


@pytest.mark.parametrize("name", attention_checks.BAD_GRADIENTS)
def test_bad_gradients(name):
    attention_checks.bad_gradients(native, name)


def test_options_of_another_type():
    attention_checks.options_of_another_type(native)


def test_huge_sizes_are_refused():
    huge = torch.zeros(1, 1, 1, 1).expand(1 << 20, 1 << 20, 1 << 20, 1)
    with pytest.raises(Refused, match="too many"):
        native.attention_forward(Attention(1.0), huge, huge, huge)
