"""The rule that accepts a kernel's result, and the table of cases: what the other tests stand on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import (
    COMPUTATIONS,
    VARIANTS,
    Shape,
    Variant,
    assert_close,
    error_rule,
    permutations,
    random_lengths,
    random_reset,
)

from fastseq.tools.verify import FAMILIES, attention, compare, layer_norm, linear, recurrent

SLACK = 4 * 2.0**-23  # of float32, beside a largest value of 1
REF = {"y": np.ones(3)}


def off(*errors):
    """A computation for each error, which errs by that."""
    return [{"y": np.array([1, 1 + error, 1])} for error in errors]


def test_error_rule_compares_medians():
    """Two units are allowed, and one lucky or unlucky rounding on either side changes nothing."""
    u = 2.0**-13
    for ours, torch_, ok in (
        ((2, 2, 2, 2, 2), (1, 1, 1, 1, 1), True),
        ((2.125, 2.125, 2.125, 1, 1), (1, 1, 1, 1, 1), False),
        ((2, 2, 2, 3.875, 3.875), (1, 1, 1, 1, 1), True),  # unlucky twice
        ((2, 2, 2, 2, 2), (0, 0, 1, 1, 1), True),  # torch was lucky twice
        ((3, 3, 3, 3, 3), (1, 1, 1, 9, 9), False),  # torch was unlucky twice
        ((0, 0, 0, 0, 4), (1, 1, 1, 1, 1), True),
        ((0, 0, 0, 0, 4.125), (1, 1, 1, 1, 1), False),  # one that is far off
    ):
        verdict = error_rule(off(*(n * u for n in ours)), off(*(n * u for n in torch_)), REF, "float32")
        assert verdict.ok == ok, verdict
        assert verdict.slack == SLACK
        assert verdict.bound == 2 * np.median(torch_) * u + SLACK
        assert verdict.error == np.median(ours) * u


def test_error_rule_allows_the_last_bits_where_torch_is_exact():
    exact = off(0, 0, 0, 0, 0)
    assert error_rule(exact, exact, REF, "float32") == ((0.0,) * 5, (0.0,) * 5, SLACK)
    assert error_rule(off(*[SLACK] * 5), exact, REF, torch.float32).ok
    assert not error_rule(off(*[SLACK * 1.25] * 5), exact, REF, "float32").ok
    assert error_rule(off(*[1e-3] * 5), exact, REF, torch.bfloat16).ok
    assert not error_rule(off(*[SLACK] * 5), exact, REF, "float64").ok
    zero = {"y": np.zeros(3)}
    assert error_rule([zero], [zero], zero, "float32").share == 0


def test_error_rule_takes_the_maximum_over_all_tensors():
    ref = {"y": np.zeros(3), "dx": np.full(3, 100.0), "unused": np.full(3, 1e9)}
    exact = [{"y": np.zeros(3), "dx": np.full(3, 100.0)}]
    far = [{"y": np.array([0, 0, 1e-3]), "dx": np.full(3, 100.0)}]
    assert error_rule(far, exact, ref, "float32") == ((1e-3,), (0.0,), 100 * SLACK)
    assert not error_rule(far, exact, ref, "float32").ok
    assert error_rule(far, far, ref, "float32").ok


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_error_rule_fails_on_values_that_are_not_finite(value):
    good, bad = [{"y": np.ones(2), "dx": np.ones(2)}] * 5, [{"y": np.array([1.0, value]), "dx": np.ones(2)}] * 5
    for ours, torch_, ref in ((bad, good, good), (bad, bad, good), (bad[:1] + good[1:], good, good), (bad, bad, bad)):
        with np.errstate(invalid="ignore"):
            verdict = error_rule(ours, torch_, ref[0], "float32")
        assert not verdict.ok
        assert verdict.share == np.inf


def test_error_rule_refuses_what_it_cannot_compare():
    one, two = {"y": np.ones(1)}, {"y": np.ones(2)}
    for ours, torch_, ref in [({}, {}, one), (one, {}, one), (one, one, {}), (one, one | {"dx": np.ones(1)}, one)]:
        with pytest.raises(ValueError, match="tensors do not match"):
            error_rule([ours], [torch_], ref, "float32")
    with pytest.raises(ValueError, match="tensors do not match"):
        error_rule([one, one | {"dx": np.ones(1)}], [one, one], one, "float32")
    with pytest.raises(ValueError, match=r"y has shape \(1,\), the reference \(2,\)"):
        error_rule([one], [two], two, "float32")
    with pytest.raises(ValueError, match="dtype must be one of float32, float64, bfloat16, float16, got int8"):
        error_rule([one], [one], one, "int8")
    for ours, torch_ in (([], []), ([one], []), ([one] * 4, [one] * 5)):
        with pytest.raises(ValueError, match="as many computations of ours as of torch, at least one, got"):
            error_rule(ours, torch_, one, "float32")


def test_error_rule_sees_float64_errors_below_float64_s_resolution():
    """The difference is taken in the reference's dtype, so an exact double is not charged for the rounding of ref."""
    third = np.array([1.0], np.longdouble) / 3
    rounded = [{"y": np.float64(third)}]
    error = error_rule(rounded, rounded, {"y": third}, "float64").error
    assert error == float(abs(np.float64(third) - third)[0])
    assert np.finfo(np.longdouble).eps >= 2.0**-52 or 0 < error < 2.0**-54


# ---- the five computations


def test_permutations_are_undone():
    """Gates part by part, a broadcast axis not at all; the first changes nothing."""
    axes = {"w": "HI", "b": "H", "mask": "BH"}
    values = {
        "w": np.arange(24.0).reshape(12, 2),
        "b": torch.arange(12),
        "mask": np.arange(5.0)[:, None],
        "other": None,
    }
    forms = list(permutations({"H": 4, "I": 2, "B": 5}))
    assert len(forms) == COMPUTATIONS
    seen = set()
    for form in forms:
        given = form.apply(values, axes)
        seen.add(tuple(given["b"].tolist()))
        assert sorted(given["b"][4:8].tolist()) == [4, 5, 6, 7]
        assert (given["b"][4:8] - given["b"][:4] == 4).all()
        assert given["mask"].shape == (5, 1)
        undone = form.undo(given, axes)
        assert undone["other"] is None
        for name in axes:
            assert np.array_equal(undone[name], values[name])
    assert len(seen) == COMPUTATIONS
    assert all(forms[0].apply(values, axes)[name] is values[name] for name in values)


@pytest.mark.parametrize("op", FAMILIES)
def test_computations_are_equivalent(op):
    """In all cases the reference gives the same results for permuted inputs, put back: what is wrong with a letter of
    the axes, or with an axis that is not free, would show.
    """
    family = FAMILIES[op]
    for seed, case in enumerate(family.cases("float64")):
        if max(family.free_axes(case).values()) > 300:
            continue  # takes longer and has no more to say
        inputs = family.make_inputs(case, torch.float64, seed)
        expected = family.reference_results(case, inputs, np.float64)
        form = list(permutations(family.free_axes(case)))[-1]
        permuted = replace(inputs, **form.apply(vars(inputs), family.axes))
        results = form.undo(family.reference_results(case, permuted, np.float64), family.axes)
        assert_close(results, expected)


def test_free_axes_are_those_of_the_case():
    """What has an order is left in it: keys behind a causal mask, rows of unequal length."""
    plain = attention.Case(2, 4, 2, 7, 9, 5, 3, bool_mask="BLS", float_mask="S", softcap=2.0, lse=True)
    assert attention.FAMILY.free_axes(plain) == {"D": 5, "E": 3, "L": 7, "S": 9}
    for option in ({"is_causal": True}, {"window": (3, None)}, {"lengths": "k"}, {"alibi": True}, {"dropout_p": 0.1}):
        assert attention.FAMILY.free_axes(replace(plain, **option)) == {"D": 5, "E": 3}
    assert recurrent.family("gru").free_axes(recurrent.Case(3, 4, 5, 6)) == {"I": 5, "H": 6, "B": 4}
    assert recurrent.family("gru").free_axes(recurrent.Case(3, 4, 5, 6, lengths=True)) == {"I": 5, "H": 6}


@pytest.mark.parametrize("first_may_settle", [False, True])
@pytest.mark.parametrize(
    ("op", "case"),
    [
        ("lstm", recurrent.Case(40, 2, 17, 24, scale=40.0)),
        ("attention", attention.Case(1, 2, 2, 63, 129, 64, 64, logits=60.0)),
        ("layer_norm", layer_norm.Case(2, 3, 4096, offset=100.0)),
    ],
)
def test_three_times_the_error_of_torch_is_seen(native, op, case, first_may_settle):
    """Results that err in one tensor, that where torch errs most, three times as much as torch's do are caught, by all
    five computations and where the first may settle it. Those that err as much as torch's pass.
    """
    family = FAMILIES[op]

    def planted(factor):
        def results(backend, case, inputs, isa):
            exact, theirs = family.reference_results(case, inputs, np.float64), family.torch_results(case, inputs)
            errors = {name: a - exact[name] for name, a in theirs.items()}
            worst = max(errors, key=lambda name: np.abs(errors[name]).max())
            yield "planted", {name: exact[name] + (factor * errors[name] if name == worst else 0) for name in theirs}

        return family._replace(kernel_results=results)

    for factor, ok in ((1, True), (3, False)):
        (found,) = compare(
            planted(factor), native, case, torch.float32, [native.active_isa()], first_may_settle=first_may_settle
        )
        assert found.ok == ok, (factor, found.verdict)
        if factor == 3 or not first_may_settle:
            assert len(found.verdict.ours) == COMPUTATIONS


def test_no_absurd_yardstick_is_trusted(native):
    family = FAMILIES["linear"]
    absurd = family._replace(torch_results=lambda case, inputs: {"y": 2 * family.torch_results(case, inputs)["y"]})
    case = linear.Case(1, 1, 64, 65)
    assert all(found.ok for found in compare(family, native, case, torch.float32, native.isas()))
    for found in compare(absurd, native, case, torch.float32, native.isas()):
        assert found.verdict.ok
        assert not found.ok


# ---- the table of cases


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
