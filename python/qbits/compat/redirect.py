"""``import bitsandbytes`` made to mean `qbits.compat.bitsandbytes`, for a process or a block, on request."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from os import PathLike
from types import ModuleType
from typing import Any

__all__ = ["install", "patched", "uninstall"]

_NAME = "bitsandbytes"
_TARGET = "qbits.compat.bitsandbytes"


class _Alias(Loader):
    """Gives a module of qbits under another name; the module keeps its own specification."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(_TARGET + spec.name.removeprefix(_NAME))
        self._own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own


class _Metadata(Distribution):
    """What ``importlib.metadata`` says of the package: name and version, which libraries ask for."""

    def read_text(self, filename: str) -> str | None:
        if filename not in ("METADATA", "PKG-INFO"):
            return None
        version = importlib.import_module(_TARGET).__version__
        return f"Metadata-Version: 2.1\nName: {_NAME}\nVersion: {version}\n"

    def locate_file(self, path: str | PathLike[str]) -> Any:
        raise FileNotFoundError(f"{_NAME} is {_TARGET}: it has no files of its own")


class _Finder(DistributionFinder):
    """The one entry of ``sys.meta_path``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _NAME and not fullname.startswith(f"{_NAME}."):
            return None
        own = importlib.util.find_spec(_TARGET + fullname.removeprefix(_NAME))
        if own is None:
            return None
        return ModuleSpec(fullname, _Alias(), is_package=own.submodule_search_locations is not None)

    def find_distributions(self, context: Any = None) -> Iterator[Distribution]:
        name = None if context is None else context.name
        if name in (None, _NAME):
            yield _Metadata()


def install() -> None:
    """Make ``import bitsandbytes`` resolve to qbits from here on; a second call changes nothing.

    Raises: RuntimeError where the real package is imported already: two would be mixed.

    >>> with patched():
    ...     import bitsandbytes
    ...     bitsandbytes.__name__
    'qbits.compat.bitsandbytes'
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if _NAME in sys.modules:
        raise RuntimeError(
            "qbits::install: bitsandbytes must not be imported before, got a module that is; "
            "call qbits.compat.install() first"
        )
    sys.meta_path.insert(0, _Finder())


def uninstall() -> None:
    """Undo `install`; modules that were imported through it keep working under the names they were given."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    for name, module in list(sys.modules.items()):
        ours = getattr(module, "__name__", "").startswith(_TARGET)
        if ours and (name == _NAME or name.startswith(f"{_NAME}.")):
            del sys.modules[name]


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Install for a block.

    Raises: RuntimeError as `install`.
    """
    before = any(isinstance(finder, _Finder) for finder in sys.meta_path)
    install()
    try:
        yield
    finally:
        if not before:
            uninstall()
