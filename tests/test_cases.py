"""The rule that accepts a kernel's result, and the table of cases: what the other tests stand on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import VARIANTS, Shape, Variant, error_rule, random_lengths, random_reset


def test_error_rule_takes_the_maximum_over_all_tensors():
    ref = {"y": np.zeros(3), "dx": np.full(3, 100.0), "unused": np.full(3, 1e9)}
    exact = {"y": np.zeros(3), "dx": np.full(3, 100.0)}
    far = {"y": np.array([0, 0, 1e-3]), "dx": np.full(3, 100.0)}
    slack = 4 * 100.0 * 2.0**-23
    assert error_rule(exact, exact, ref, "float32") == (True, 0.0, 0.0, slack)
    assert error_rule(far, exact, ref, "float32") == (False, 1e-3, 0.0, slack)
    assert error_rule(far, far, ref, torch.float32) == (True, 1e-3, 1e-3, 2e-3 + slack)
    assert error_rule(far, exact, ref, torch.bfloat16).ok
    assert not error_rule(far, exact, ref, "float64").ok


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_error_rule_fails_on_values_that_are_not_finite(value):
    good, bad = {"y": np.ones(2), "dx": np.ones(2)}, {"y": np.array([1.0, value]), "dx": np.ones(2)}
    assert not error_rule(bad, good, good, "float32").ok
    assert not error_rule(bad, bad, good, "float32").ok
    with np.errstate(invalid="ignore"):
        assert not error_rule(bad, bad, bad, "float32").ok


def test_error_rule_refuses_what_it_cannot_compare():
    one, two = {"y": np.ones(1)}, {"y": np.ones(2)}
    for ours, torch_, ref in [({}, {}, one), (one, {}, one), (one, one, {}), (one, one | {"dx": np.ones(1)}, one)]:
        with pytest.raises(ValueError, match="tensors do not match"):
            error_rule(ours, torch_, ref, "float32")
    with pytest.raises(ValueError, match=r"y has shape \(1,\), the reference \(2,\)"):
        error_rule(one, two, two, "float32")
    with pytest.raises(ValueError, match="dtype must be one of float32, float64, bfloat16, float16, got int8"):
        error_rule(one, one, one, "int8")


def test_error_rule_sees_float64_errors_below_float64_s_resolution():
    """The difference is taken in the reference's dtype, so an exact double is not charged for the rounding of ref."""
    third = np.array([1.0], np.longdouble) / 3
    worst = error_rule({"y": np.float64(third)}, {"y": np.float64(third)}, {"y": third}, "float64").worst_ours
    assert worst == float(abs(np.float64(third) - third)[0])
    assert np.finfo(np.longdouble).eps >= 2.0**-52 or 0 < worst < 2.0**-54


def test_random_cases_cover_the_ends():
    shape = Shape(B=7, T=63, I=1, H=1)
    lengths, reset = random_lengths(shape), random_reset(shape)
    assert lengths.min() == 0
    assert lengths.max() == 63
    assert not np.all(np.diff(lengths) <= 0)
    assert random_lengths(shape, shortest=1).min() == 1
    assert reset[0].any()
    assert 0.1 < reset.mean() < 0.4
    assert len({variant.id for variant in VARIANTS}) == 8
    assert Variant(reset=True, reverse=True).id == "reset-reverse"
