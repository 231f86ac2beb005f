"""Ways to break a valid call, derived from the declarations, each with the sentence that is due then."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from calls import SPECS, Call, names, valid_call
from compare import POISON, dtype_of
from qbits import errors

WRONG_DTYPES = ("float64", "float16", "float32", "int8", "uint8", "int32", "int64", "bool")


class Breach(NamedTuple):
    """How to break a valid call, and what must be said then."""

    op: str
    argument: str
    how: str
    kind: type[Exception]
    apply: Callable[[Call], str]  # changes the call; returns `must <rule>, got <value>`
    with_optional: bool = False
    wanted: str = ""  # the optional argument that the call must have

    def __repr__(self) -> str:
        return f"{self.op}-{self.argument}-{self.how}"


def text(shape: Any) -> str:
    """A shape as messages print it."""
    return "[" + ", ".join(str(size) for size in shape) + "]"


def set_argument(name: str, value: Any, sentence: str) -> Callable[[Call], str]:
    """Replaces an argument by a value."""

    def apply(call: Call) -> str:
        call.args[name] = value
        return sentence

    return apply


def change_tensor(
    name: str, change: Callable[[torch.Tensor], Any], sentence: Callable[[Call, torch.Tensor], str]
) -> Callable[[Call], str]:
    """Replaces a tensor, in or out, by a changed one."""

    def apply(call: Call) -> str:
        place = call.args if name in call.args else call.outputs
        before = place[name]
        place[name] = change(before)
        return sentence(call, before)

    return apply


def longer(tensor: torch.Tensor) -> torch.Tensor:
    """One element more, flat."""
    return torch.cat([tensor.reshape(-1), tensor.new_zeros(1)])


def wider(tensor: torch.Tensor) -> torch.Tensor:
    """One element more in the last dimension."""
    return torch.cat([tensor, tensor[..., :1]], dim=-1)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, every second element of a larger tensor."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def value_breaches(op: str, arg: dict[str, Any]) -> Iterator[Breach]:
    """Numbers, words and dtypes."""
    name, role, choices = arg["name"], arg["role"], arg.get("choices", [])
    due = {"int": "an int", "float": "a float", "str": "a str", "dtype": "a dtype"}[role]
    number = ("1.5",) if role == "float" else (1.5, "64" if role == "int" else 64)
    for value in (None, *number, [64], True, object()):
        got = "None" if value is None else type(value).__name__
        sentence = f"must be {due}, got {got}"
        yield Breach(op, name, f"is {got}", errors.ArgumentTypeError, set_argument(name, value, sentence))
    if role == "int" and choices:
        for value in (0, -64, 16, 48, 100, 8192):
            sentence = f"must be one of {choices}, got {value}"
            yield Breach(
                op, name, f"is {value}", errors.ArgumentValueError, set_argument(name, value, sentence)
            )
    elif role == "int":
        sentence = "must be at least 0, got -1"
        yield Breach(op, name, "is negative", errors.ArgumentValueError, set_argument(name, -1, sentence))
    elif role == "float":
        for value, got in (
            (0.0, "0.0"),
            (-1, "-1.0"),
            (math.nan, "NaN"),
            (math.inf, "inf"),
            (1e-50, "1e-50"),
            (1e39, "1e39"),
        ):
            sentence = f"must be finite and above 0 as a float32, got {got}"
            yield Breach(
                op, name, f"is {got}", errors.ArgumentValueError, set_argument(name, value, sentence)
            )
    elif role == "str":
        listed = "[" + ", ".join(f'"{choice}"' for choice in choices) + "]"
        for value in ("int4", "", "NF4", "nf4 "):
            sentence = f'must be one of {listed}, got "{value}"'
            yield Breach(
                op, name, f"is {value!r}", errors.ArgumentValueError, set_argument(name, value, sentence)
            )
    else:
        for value in (torch.float64, torch.uint8, "float64"):
            got = str(value).removeprefix("torch.")
            sentence = f"must be {names(choices)}, got {got}"
            yield Breach(op, name, f"is {value!r}", errors.DtypeError, set_argument(name, value, sentence))
        yield Breach(
            op,
            name,
            "is no dtype",
            errors.ArgumentTypeError,
            set_argument(name, "float33", "must be a dtype, got str"),
        )


def tensor_breaches(op: str, arg: dict[str, Any]) -> Iterator[Breach]:
    """What is wrong with a tensor that is read."""
    name, optional = arg["name"], arg["role"] == "optional"

    def breach(how: str, kind: type[Exception], apply: Callable[[Call], str]) -> Breach:
        return Breach(op, name, how, kind, apply, optional, name)

    for value in ([1, 2], "tensor", 3, *(() if optional else (None,))):
        got = "None" if value is None else type(value).__name__
        sentence = f"must be a tensor, got {got}"
        yield breach(f"is {got}", errors.ArgumentTypeError, set_argument(name, value, sentence))
    for dtype in WRONG_DTYPES:
        if dtype not in arg["dtypes"]:
            yield breach(
                f"is {dtype}",
                errors.DtypeError,
                wrong_dtype(name, dtype, f"have dtype {names(arg['dtypes'])}"),
            )
    unknown = "must have a dtype that qbits knows, got DLPack type code 5 with 64 bits and 1 lanes"
    apply = change_tensor(name, lambda t: t.to(torch.complex64), lambda *_: unknown)
    yield breach("is complex", errors.DtypeError, apply)
    if arg["shape"] not in ("1", ""):  # the strides of a single element say nothing
        yield breach("is strided", errors.ArgumentValueError, change_tensor(name, strided, strided_sentence))
    if not arg["flat"]:
        leads = arg["shape"].startswith("*")
        yield breach(
            "has no dimension" if leads else "has a dimension more",
            errors.ShapeError,
            change_tensor(name, lambda t: t.sum().to(t.dtype) if leads else t[None], rank_sentence(arg)),
        )
        if not binds_width(op, arg):
            yield breach("is too wide", errors.ShapeError, change_tensor(name, wider, shape_sentence(arg)))
    elif not arg["shape"].isidentifier() or op in LENGTH_FROM_INT.get(arg["shape"], ()):
        yield breach("is too long", errors.ShapeError, wrong_length(arg))


def binds_width(op: str, arg: dict[str, Any]) -> bool:
    """Whether the last dimension of the argument is what others are compared with."""
    symbol = arg["shape"].split(",")[-1].strip()
    if any(other["name"] == symbol for other in SPECS[op]["args"]):
        return False
    shapes = {other["name"]: other.get("shape", "").replace(",", " ").split() for other in SPECS[op]["args"]}
    return next(name for name, symbols in shapes.items() if symbol in symbols) == arg["name"]


def wrong_dtype(name: str, dtype: str, rule: str) -> Callable[[Call], str]:
    """The same values in another dtype."""
    return change_tensor(name, lambda t: t.to(dtype_of(dtype)), lambda *_: f"must {rule}, got {dtype}")


def strided_sentence(_: Call, before: torch.Tensor) -> str:
    """What is said of a view with gaps."""
    return f"must be contiguous, got a strided view of shape {text(before.shape)}"


def rank_sentence(arg: dict[str, Any]) -> Callable[[Call, torch.Tensor], str]:
    """What is said of one dimension too many, or of none where there may be many."""
    rank, leads = arg["shape"].count(",") + 1, arg["shape"].startswith("*")
    rank -= leads
    due = f"{'at least ' * leads}{rank} dimension{'' if rank == 1 else 's'} [{arg['shape']}]"
    return lambda _, before: f"must have {due}, got shape {[] if leads else text((1, *before.shape))}"


def shape_sentence(arg: dict[str, Any]) -> Callable[[Call, torch.Tensor], str]:
    """What is said of one element too many in the last dimension."""

    def sentence(_: Call, before: torch.Tensor) -> str:
        got = text((*before.shape[:-1], before.shape[-1] + 1))
        return f"must have shape [{arg['shape']}] = {text(before.shape)}, got {got}"

    return sentence


LENGTH_FROM_INT = {
    symbol: {
        op
        for op, spec in SPECS.items()
        if any(a["name"] == symbol and a["role"] == "int" for a in spec["args"])
    }
    for symbol in ("n", "N", "K")
}
"""Ops in which a number, not the length of a tensor, binds the symbol."""


def wrong_length(arg: dict[str, Any]) -> Callable[[Call], str]:
    """One element too many for the shape expression."""

    def sentence(call: Call, before: torch.Tensor) -> str:
        return f"must have {length_text(arg['shape'], before.numel())}, got {before.numel() + 1}"

    return change_tensor(arg["name"], longer, sentence)


def length_text(expression: str, length: int) -> str:
    """How a message names the length that is due."""
    noun = "element" if length == 1 else "elements"
    prefix = f"{expression} = " if expression and not expression.isdigit() else ""
    return f"{prefix}{length} {noun}"


def output_breaches(op: str, arg: dict[str, Any]) -> Iterator[Breach]:
    """What is wrong with a tensor that is written."""
    name = arg["name"]

    def int32_sentence(_: Call, before: torch.Tensor) -> str:
        return f"must have dtype {str(before.dtype).removeprefix('torch.')}, got int32"

    apply = change_tensor(name, lambda _: [1], lambda *_: "must be a tensor, got list")
    yield Breach(op, name, "is a list", errors.ArgumentTypeError, apply)
    apply = change_tensor(name, lambda t: torch.zeros_like(t, dtype=torch.int32), int32_sentence)
    yield Breach(op, name, "is int32", errors.DtypeError, apply)
    yield Breach(op, name, "is too long", errors.ShapeError, wrong_length(arg))
    if arg["shape"] not in ("1", ""):
        apply = change_tensor(name, strided, strided_sentence)
        yield Breach(op, name, "is strided", errors.ArgumentValueError, apply)
    for other in SPECS[op]["args"]:
        if other["role"] in ("input", "optional", "output") and other["name"] != name:
            how, optional = f"overlaps {other['name']}", other["role"] == "optional"
            apply = overlap(op, name, other["name"])
            yield Breach(op, name, how, errors.ArgumentValueError, apply, optional, other["name"])


def overlap(op: str, output: str, other: str) -> Callable[[Call], str]:
    """Puts both tensors at the start of one piece of memory. Of two outputs the first is named first."""
    order = [arg["name"] for arg in SPECS[op]["args"]]
    is_output = {arg["name"]: arg["role"] == "output" for arg in SPECS[op]["args"]}

    def apply(call: Call) -> str:
        places = {name: call.args if name in call.args else call.outputs for name in (output, other)}
        sizes = {name: place[name].numel() * place[name].element_size() for name, place in places.items()}
        memory = torch.full(
            (max(sizes.values()) + 8,), POISON, dtype=torch.uint8, device=places[output][output].device
        )
        for name, place in places.items():
            before = place[name]
            place[name] = memory[: sizes[name]].view(before.dtype).view(before.shape)
        first, second = output, other
        if is_output[other] and order.index(other) < order.index(output):
            first, second = other, output
        return f"{first}: must not share memory with {second}, got {min(sizes.values())} common bytes"

    return apply


def rule_breaches(op: str) -> Iterator[Breach]:
    """Relations between arguments."""
    for rule in SPECS[op]["rules"]:
        if rule[0] == "needs":
            _, given, missing = rule
            sentence = f"must come together with {missing}, got no {missing}"
            yield Breach(
                op,
                given,
                f"without {missing}",
                errors.ArgumentValueError,
                lone_argument(given, sentence),
                True,
            )
        elif rule[0] == "excludes":
            _, given, other = rule
            apply = both_arguments(given, other)
            yield Breach(op, given, f"beside {other}", errors.ArgumentValueError, apply, True, given)
        elif rule[0] == "none_for":
            _, given, of, dtype = rule
            apply = set_argument(of, dtype_of(dtype), f"must be None for {of} {dtype}, got a tensor")
            yield Breach(
                op, given, f"for {dtype}", errors.ArgumentValueError, alone(given, apply), True, given
            )
        else:
            _, name, given, then, otherwise = rule
            for dtype, due, word, optional in (
                (then, otherwise, "without", False),
                (otherwise, then, "with", True),
            ):
                apply = wrong_dtype(name, dtype, f"have dtype {due} {word} {given}")
                yield Breach(op, name, f"is {dtype} {word} {given}", errors.DtypeError, apply, optional)


def both_arguments(name: str, other: str) -> Callable[[Call], str]:
    """Gives the argument that excludes the one that the call has."""

    def apply(call: Call) -> str:
        call.args[other] = valid_call(call.name, str(call.args[name].device), with_optional=True).args[other]
        return f"must be None with {other}, got a tensor"

    return apply


def alone(kept: str, change: Callable[[Call], str]) -> Callable[[Call], str]:
    """Removes every other optional argument, and changes the call; the outputs follow a changed dtype."""

    def apply(call: Call) -> str:
        lone_argument(kept, "")(call)
        return change(call)

    return apply


def lone_argument(kept: str, sentence: str) -> Callable[[Call], str]:
    """Removes every other optional argument."""

    def apply(call: Call) -> str:
        for arg in call.spec["args"]:
            if arg["role"] == "optional" and arg["name"] != kept:
                call.args[arg["name"]] = None
        return sentence

    return apply


def all_breaches() -> Iterator[Breach]:
    """Every op x argument x way to break it."""
    for op, spec in SPECS.items():
        for arg in spec["args"]:
            if arg["role"] in ("input", "optional"):
                yield from tensor_breaches(op, arg)
            elif arg["role"] in ("int", "float", "str", "dtype"):
                yield from value_breaches(op, arg)
            elif arg["role"] == "output":
                yield from output_breaches(op, arg)
        yield from rule_breaches(op)
