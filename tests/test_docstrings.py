"""The shape of public docstrings: sections, entries and wraps that a reader, and `help()`, can follow."""

from __future__ import annotations

import inspect
import re

import pytest

import fastseq
from fastseq import compat, nn, ops, reference
from fastseq.backends import contract

SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Source", "Sources", "Example")  # in this order
# How an entry begins: "name, name: what", "KindOfError: when".
ENTRY = {
    "Args": r"[\w*]+(, [\w*]+)*: \S",
    "Attributes": r"\w+(, \w+)*: \S",
    "Raises": r"\w*(Error|Refused)(, \w+Error)*: \S",
}
PLAIN_ENTRY = r"\w+(, \w+)*( \(.*\))?: "  # outside sections, as the reference writes them


def public(module):
    """Every class and function of a module's __all__, and the public methods and properties of the classes and of
    their bases.
    """
    for thing in (getattr(module, name) for name in module.__all__):
        for cls in thing.__mro__ if inspect.isclass(thing) else ():
            members = (getattr(m, "__func__", getattr(m, "fget", m)) for n, m in vars(cls).items() if n[0] != "_")
            yield from (m for m in members if inspect.isfunction(m) and is_ours(m) and m.__doc__)
        if (inspect.isclass(thing) or inspect.isfunction(thing)) and is_ours(thing):
            yield thing


def is_ours(thing):
    return thing.__module__.startswith("fastseq.")


MODULES = (fastseq, compat, nn, ops, contract, reference)
DOCSTRINGS = {
    f"{thing.__module__}.{thing.__qualname__}": thing.__doc__ for module in MODULES for thing in public(module)
}
DOCSTRINGS |= {module.__name__: module.__doc__ for module in MODULES}


def indentation(line):
    return len(line) - len(line.lstrip())


def faults(docstring):
    """What is wrong with the shape of a docstring."""
    blocks = re.split(r"\n(?: *\n)+", inspect.cleandoc(docstring))
    heads = [block.partition(":")[0] for block in blocks if re.match(rf"({'|'.join(SECTIONS)}):", block)]
    if heads != sorted(heads, key=SECTIONS.index):
        yield f"sections in another order: {', '.join(heads)}"
    for block in blocks:
        first, *rest = block.splitlines()
        section = first.partition(":")[0] if first.partition(":")[0] in SECTIONS else None
        if section == "Example" and not (rest and re.match("    >>> ", rest[0])):
            yield f"no example under {first!r}"
        if ">>>" in block:
            continue
        if section and first == f"{section}:" and not rest:
            yield f"nothing under {first!r}"
        entries = PLAIN_ENTRY if section is None else ENTRY.get(section) if first == f"{section}:" else None
        edge = 0 if section is None else 4
        for before, line in zip((first, *rest), rest, strict=False):
            if re.match(r"[A-Z]\w+:( |$)", line) and line.partition(":")[0] in SECTIONS:
                yield f"no empty line before {line!r}"
            elif section and indentation(line) < edge:
                yield f"falls out of its section: {line!r}"
            elif section and entries and indentation(line) == edge and not re.match(entries, line.strip()):
                yield f"neither an entry of {section} nor indented below one: {line!r}"
            elif section or before.endswith(":") or re.match(PLAIN_ENTRY, before.strip()):
                pass
            elif indentation(line) > indentation(before):
                yield f"indented for no reason: {line!r}"
            if re.search(r"\w$", before) and re.match(r" *[a-z]", line) and len(f"{before} {line.split()[0]}") <= 100:
                yield f"broken early: {before!r}"


@pytest.mark.parametrize("name", DOCSTRINGS)
def test_shape(name):
    assert DOCSTRINGS[name], "no docstring"
    assert not list(faults(DOCSTRINGS[name]))


def test_many_are_looked_at():
    assert len(DOCSTRINGS) > 100
    assert {"fastseq.nn.lstm.LSTM", "fastseq.nn.sequences.SequenceModule.step"} <= set(DOCSTRINGS)


@pytest.mark.parametrize(
    ("docstring", "fault"),
    [
        ("What.\n\nReturns:\n    A.\n\nArgs:\n    x: what", "sections in another order"),
        ("What.\n\nArgs:\n    x: what\nReturns: A.", "no empty line before"),
        ("What.\n\nArgs:\n\nReturns: A.", "nothing under"),
        ("What.\n\nExample:\n    f()", "no example under"),
        ("What.\n\nSources: Gers, Schmidhuber and\n    Cummins;\nhttps://a.b", "falls out of its section"),
        ("What.\n\nArgs:\n    x: what it\n    is", "neither an entry of Args"),
        ("What.\n\nRaises:\n    what f raises.", "neither an entry of Raises"),
        ("What it is,\n    and why.\nSo.", "indented for no reason"),
        ("What it\nis.", "broken early"),
    ],
)
def test_a_fault_is_seen(docstring, fault):
    assert any(found.startswith(fault) for found in faults(docstring))
