"""The examples in docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import sys

import pytest
import qbits

MODULES = [
    m.name
    for m in pkgutil.walk_packages(qbits.__path__, "qbits.")
    if not m.name.endswith(("._core", ".__main__"))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module_run(name, monkeypatch):
    for loaded in [m for m in sys.modules if m.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, loaded)  # compat.install refuses to stand beside the real one
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert failed == 0


def test_public_functions_have_examples():
    finder = doctest.DocTestFinder()
    for name in ("qbits.functional", "qbits.codebooks", "qbits.compat.bitsandbytes.functional"):
        module = importlib.import_module(name)
        own = {n: getattr(module, n) for n in module.__all__}
        own = {n: v for n, v in own.items() if v.__module__.startswith(name) and not isinstance(v, type)}
        without = {n for n, v in own.items() if not any(t.examples for t in finder.find(v, n))}
        without = {n for n in without if not n.endswith(("_nf4", "_fp4"))}
        assert own and not without
