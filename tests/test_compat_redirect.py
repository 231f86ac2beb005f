"""``import bitsandbytes`` through qbits: in a block, for a process, and never over the real package."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest
from qbits import compat


@pytest.fixture(autouse=True)
def _without_the_real_one(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)


def test_names_resolve_inside_the_block_and_not_behind_it():
    from qbits.compat import bitsandbytes as ours

    own_spec = ours.__spec__
    with compat.patched():
        import bitsandbytes
        from bitsandbytes.nn.modules import Params4bit

        assert bitsandbytes is ours and Params4bit is ours.nn.Params4bit
        assert importlib.util.find_spec("bitsandbytes") is not None
        assert importlib.metadata.version("bitsandbytes") == ours.__version__ == "0.50.0"
        with compat.patched():
            assert importlib.import_module("bitsandbytes.functional") is ours.functional
        assert sys.modules["bitsandbytes"] is ours  # the inner block undoes nothing
    assert "bitsandbytes" not in sys.modules and "bitsandbytes.nn.modules" not in sys.modules
    assert ours.__spec__ is own_spec and own_spec.name == "qbits.compat.bitsandbytes"


def test_a_module_that_qbits_lacks_is_not_found():
    with compat.patched(), pytest.raises(ModuleNotFoundError):
        importlib.import_module("bitsandbytes.optim")


def test_the_real_package_is_not_replaced(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", importlib.util)
    with pytest.raises(RuntimeError) as caught:
        compat.install()
    assert str(caught.value) == (
        "qbits::install: bitsandbytes must not be imported before, got a module that is; "
        "call qbits.compat.install() first"
    )


def test_importing_qbits_installs_nothing_and_imports_no_integration():
    code = (
        "import sys, qbits, qbits.functional, qbits.nn, qbits.compat.bitsandbytes\n"
        "others = {'bitsandbytes', 'transformers', 'triton', 'scipy', 'jax', 'cupy'}\n"
        "print(sorted(others & set(sys.modules)))\n"
        "qbits.compat.install(); qbits.compat.install(); import bitsandbytes\n"
        "print(bitsandbytes.nn.Linear4bit.__module__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:2] == ["[]", "qbits.compat.bitsandbytes.nn.modules"]
