"""Valid calls of any op, made from its declaration alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from compare import Guarded, dtype_of
from qbits import _core, ops

SPECS: dict[str, dict[str, Any]] = {spec["name"]: spec for spec in _core.specs()}
SIZES = {
    "n": 17_001,
    "M": 3,
    "N": 130,
    "K": 131,
    "block_size": 64,
}  # more than 256 blocks, none of them whole
FLOAT = 1.5
SCHEMA_ROLES = ("input", "optional", "int", "float", "str", "dtype")


def ceil_div(a: int, b: int) -> int:
    """Quotient rounded up."""
    return -(-a // b)


def shape_of(arg: dict[str, Any], sizes: dict[str, int]) -> tuple[int, ...]:
    """The dimensions that the shape expression of an argument stands for."""
    if not arg["shape"]:
        return ()
    leading = {"M": (sizes["M"],)} if arg["shape"].startswith("*M,") else {}
    shape: tuple[int, ...] = eval(f"({arg['shape']},)", {"ceil_div": ceil_div}, {**sizes, **leading})
    return shape


def names(words: list[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


@dataclass
class Call:
    """One call of an op: its arguments by name, in the order of the schema, and its guarded outputs."""

    spec: dict[str, Any]
    sizes: dict[str, int]
    args: dict[str, Any]
    outputs: dict[str, Any] = field(default_factory=dict)
    guards: list[Guarded] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the op."""
        return str(self.spec["name"])

    def arg(self, name: str) -> dict[str, Any]:
        """Declaration of an argument."""
        found: dict[str, Any] = next(arg for arg in self.spec["args"] if arg["name"] == name)
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor that goes in, by name."""
        return {name: value for name, value in self.args.items() if isinstance(value, torch.Tensor)}

    def run(self) -> Any:
        """Calls `qbits.ops` with the outputs given."""
        out = tuple(self.outputs.values())
        return getattr(ops, self.name)(*self.args.values(), out=out[0] if len(out) == 1 else out)

    def run_allocating(self) -> tuple[torch.Tensor, ...]:
        """Calls `qbits.ops` without outputs."""
        result = getattr(ops, self.name)(*self.args.values())
        return result if isinstance(result, tuple) else (result,)

    def run_core(self) -> Any:
        """Calls `qbits._core` with all arguments by position."""
        return getattr(_core, self.name)(*self.args.values(), *self.outputs.values())

    def run_traced(self) -> Any:
        """Calls the operator of the dispatcher."""
        return getattr(torch.ops.qbits, self.name)(*self.args.values())


def content(name: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> torch.Tensor:
    """Numbers that make sense for an argument of that name: ascending maps, positive scales, normal data."""
    if dtype == torch.bool:
        return torch.rand(shape, device=device) < 0.25
    if not dtype.is_floating_point:
        return torch.randint(0, 256, shape, device=device).to(dtype)
    if name.endswith("codebook"):
        return torch.linspace(-1, 1, math.prod(shape), device=device).to(dtype).view(shape)
    if name.startswith("absmax"):
        return (torch.rand(shape, device=device) + 0.25).to(dtype)
    return torch.randn(shape, device=device).to(dtype)


def valid_call(
    op: str,
    device: str = "cpu",
    *,
    with_optional: bool = False,
    wanted: str = "",
    float_dtype: str = "float32",
    **sizes: int,
) -> Call:
    """A call that must succeed. `with_optional` gives every optional argument, so statistics are nested.

    Of two that exclude each other it gives the `wanted` one, else the second.
    """
    spec, bound = SPECS[op], {**SIZES, **sizes}
    conditional = {
        rule[1]: rule[3 if with_optional else 4] for rule in spec["rules"] if rule[0] == "dtype_if_given"
    }
    excluded = {rule[2 if rule[1] == wanted else 1] for rule in spec["rules"] if rule[0] == "excludes"}
    args: dict[str, Any] = {}
    for arg in spec["args"]:
        name, role = arg["name"], arg["role"]
        if role == "int":
            args[name] = bound[name]
        elif role == "float":
            args[name] = FLOAT
        elif role in ("str", "dtype"):
            args[name] = dtype_of(float_dtype) if role == "dtype" else arg["choices"][0]
        elif role == "optional" and (not with_optional or name in excluded):
            args[name] = None
        elif role in ("input", "optional"):
            dtype = conditional.get(name, float_dtype if float_dtype in arg["dtypes"] else arg["dtypes"][0])
            args[name] = content(name, dtype_of(dtype), shape_of(arg, bound), device)
    call = Call(spec, bound, args)
    for arg in spec["args"]:
        if arg["role"] == "output":
            source = call.args[arg["dtype_of"]] if arg["dtype_of"] else dtype_of(arg["dtypes"][0])
            guard = Guarded(shape_of(arg, bound), getattr(source, "dtype", source), device)
            call.guards.append(guard)
            call.outputs[arg["name"]] = guard.tensor
    return call


def valid_calls(op: str, device: str = "cpu", **sizes: Any) -> list[Call]:
    """The call without optional arguments, and, where there are any, the one with all of them."""
    has_optional = any(arg["role"] == "optional" for arg in SPECS[op]["args"])
    variants = (False, True) if has_optional else (False,)
    return [valid_call(op, device, with_optional=variant, **sizes) for variant in variants]
