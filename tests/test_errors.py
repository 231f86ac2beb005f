"""The exception classes: what each derives from, which native kind it stands for, the form of messages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import qbits
import torch
from qbits import errors, ops

BASES = {
    "ShapeError": (ValueError,),
    "DtypeError": (TypeError,),
    "ArgumentTypeError": (TypeError,),
    "ArgumentValueError": (ValueError,),
    "DeviceError": (ValueError, RuntimeError),
    "TracedTensorError": (errors.ArgumentTypeError, TypeError),
    "NotQuantizedError": (RuntimeError,),
    "UnsupportedHardwareError": (RuntimeError,),
    "DriverError": (RuntimeError,),
    "CheckpointFormatError": (ValueError,),
    "FP8MatmulError": (errors.ShapeError, ValueError),
}


@pytest.mark.parametrize("name", BASES)
def test_error_derives_from_qbits_error_and_its_builtin(name):
    cls = getattr(errors, name)
    assert issubclass(cls, errors.QbitsError)
    assert all(issubclass(cls, base) for base in BASES[name])


def test_every_error_class_is_listed_here_and_exported():
    classes = {name for name in errors.__all__ if name not in ("KINDS", "QbitsError", "QbitsWarning")}
    assert classes == set(BASES)
    assert qbits.QbitsError is errors.QbitsError
    assert issubclass(errors.QbitsWarning, UserWarning)


def test_every_kind_of_the_native_module_has_a_class():
    assert set(errors.KINDS) >= {"shape", "dtype", "type", "value", "device", "traced", "driver"}
    assert all(issubclass(cls, errors.QbitsError) for cls in errors.KINDS.values())


REFUSALS = {
    "shape": (
        lambda: ops.unpack_4bit(torch.zeros(3, dtype=torch.uint8), 4),
        "ceil_div(n, 2) = 2 elements, got 3",
    ),
    "dtype": (lambda: ops.pack_4bit(torch.zeros(3), "nf4"), "must have dtype uint8, got float32"),
    "type": (lambda: ops.pack_4bit([1, 2], "nf4"), "must be a tensor, got list"),
    "value": (lambda: ops.quantize_4bit(torch.zeros(64), "nf4", 100), "must be one of [32, 64,"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refusal_of_the_native_module_has_the_class_of_its_kind(kind):
    call, words = REFUSALS[kind]
    with pytest.raises(errors.KINDS[kind], match=re.escape(words)) as caught:
        call()
    assert re.match(r"^qbits::[a-z0-9_]+: [a-z_]+ must .+, got .+$", str(caught.value))


def raised_messages() -> Iterator[tuple[str, str]]:
    """Text of every literal message that the package gives to one of its errors, with the file's name."""
    for path in Path(qbits.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else None
            if not isinstance(call, ast.Call) or ast.unparse(call.func).rpartition(".")[2] not in BASES:
                continue
            if isinstance(call.args[0], ast.Constant | ast.JoinedStr) and "{rule}" not in ast.unparse(call):
                yield path.name, ast.unparse(call.args[0]).lstrip("f").strip("'\"")


def test_messages_of_the_package_have_one_form():
    messages = list(raised_messages())
    assert len(messages) > 20
    form = re.compile(r"qbits::[^ ]+: .+ must .+(, got:? |; )")
    wrong = [f"{name}: {message}" for name, message in messages if not form.match(message)]
    assert not wrong, "\n".join(wrong)
