"""The committed stubs are those that the declarations give."""

from __future__ import annotations

import pytest
from stubs import PACKAGE, STUBS


@pytest.mark.parametrize("name", STUBS)
def test_committed_stub_equals_the_generated_one(name: str) -> None:
    assert (PACKAGE / name).read_text() == STUBS[name](), "run: python tests/stubs.py"
