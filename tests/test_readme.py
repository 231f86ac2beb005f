"""The README's examples run as they stand, and its generated tables are up to date."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.splitlines()[0])
def test_example_runs(example: str, tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_array_example_never_imports_torch() -> None:
    assert any("numpy" in example and "torch" not in example for example in EXAMPLES)


def test_tables_are_those_of_the_result_files() -> None:
    command = [sys.executable, str(ROOT / "bench" / "readme_tables.py"), "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
