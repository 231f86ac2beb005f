"""One callable per declared op: the direct path into `qbits._core`, ``torch.ops.qbits`` for all that traces.

Everything here is derived from the declarations (`qbits._core.specs()`): signatures, the ``torch.library``
schema, the fake kernels and the docstrings. Ops take contiguous tensors of any framework that speaks DLPack
and return tensors of the same one (`qbits.Buffer` where the framework has no exchange API); they reshape
nothing and record no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from qbits import _core
from qbits.errors import DeviceError, DtypeError, ShapeError, UnsupportedHardwareError

_core.set_num_threads_source(torch.get_num_threads)

SPECS: dict[str, dict[str, Any]] = {spec["name"]: spec for spec in _core.specs()}
__all__ = [*SPECS]

_LIBRARY = torch.library.Library("qbits", "DEF")
_SCHEMA_TYPES = {"input": "Tensor", "optional": "Tensor?", "int": "int"}
_SCHEMA_TYPES |= {"float": "float", "str": "str", "dtype": "ScalarType"}


def _arguments(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [arg for arg in spec["args"] if arg["role"] in _SCHEMA_TYPES]


def _outputs(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [arg for arg in spec["args"] if arg["role"] == "output"]


def _schema_type(arg: dict[str, Any]) -> str:
    """Sizes may be symbolic, so that one compiled graph serves all; choices are constants of the graph."""
    return "SymInt" if arg["role"] == "int" and "choices" not in arg else _SCHEMA_TYPES[arg["role"]]


def _schema(spec: dict[str, Any]) -> str:
    """The functional schema, for example ``pack_4bit(Tensor codes, str codebook) -> Tensor``."""
    arguments = ", ".join(
        f"{_schema_type(arg)} {arg['name']}{'=None' if arg['role'] == 'optional' else ''}"
        for arg in _arguments(spec)
    )
    tensors = ", ".join(["Tensor"] * len(_outputs(spec)))
    return f"{spec['name']}({arguments}) -> {tensors if len(_outputs(spec)) == 1 else f'({tensors})'}"


def _ceil_div(a: Any, b: Any) -> Any:
    return (a + b - 1) // b


def _compiled(expression: str) -> CodeType:
    return compile(f"({expression},)" if expression else "()", f"<shape {expression!r}>", "eval")


def _fake(spec: dict[str, Any]) -> Callable[..., Any]:
    """Shapes and dtypes of the outputs, from the shape expressions; symbolic sizes pass through."""
    arguments, outputs = _arguments(spec), _outputs(spec)
    shapes = [_compiled(output["shape"]) for output in outputs]

    def fake(*args: Any) -> Any:
        values = dict(zip((arg["name"] for arg in arguments), args, strict=False))
        symbols: dict[str, Any] = {"ceil_div": _ceil_div}
        symbols.update((arg["name"], values[arg["name"]]) for arg in arguments if arg["role"] == "int")
        for arg in arguments:
            if arg["role"] != "input":
                continue
            tensor = values[arg["name"]]
            sizes = [tensor.numel()] if arg["flat"] else list(tensor.shape)
            names = [name.strip() for name in arg["shape"].split(",")]
            if names[0].startswith("*"):  # any dimensions before the others
                leading = len(sizes) - (len(names) - 1)
                symbols.setdefault(names.pop(0)[1:], sizes[:leading])
                sizes = sizes[leading:]
            for symbol, size in zip(names, sizes, strict=False):
                if symbol.isidentifier():
                    symbols.setdefault(symbol, size)
        first = next(values[arg["name"]] for arg in arguments if arg["role"] == "input")
        results = []
        for output, shape in zip(outputs, shapes, strict=True):
            source = values.get(output["dtype_of"]) if output["dtype_of"] else None
            dtype = (
                getattr(torch, output["dtypes"][0]) if source is None else getattr(source, "dtype", source)
            )
            results.append(first.new_empty(eval(shape, {}, symbols), dtype=dtype))
        return results[0] if len(results) == 1 else tuple(results)

    return fake


def _implementation(spec: dict[str, Any]) -> Callable[..., Any]:
    """What the dispatcher calls with real tensors: the direct path without a way back."""
    direct, composed = getattr(_core, spec["name"]), globals().get("_composed_" + spec["name"])
    num_arguments, num_outputs = len(_arguments(spec)), len(_outputs(spec))

    def implementation(*args: Any) -> Any:
        args = (*args, *(None,) * (num_arguments - len(args) + num_outputs))
        result = direct(*args)
        if composed is not None and result is NotImplemented:
            return composed(*args[:num_arguments], None)
        return result

    return implementation


def _docstring(spec: dict[str, Any]) -> str:
    """The declaration's text, then one line per argument and output."""
    lines = [spec["doc"].split("\n\nReference:")[0], "", "Args:"]
    for arg in spec["args"]:
        if arg["role"] == "scratch":
            continue
        if "shape" in arg:
            dtypes = " or ".join(arg["dtypes"]) or f"dtype of {arg['dtype_of']}"
            shape = f"[{arg['shape']}]" + (", any shape" if arg["flat"] and arg["role"] != "output" else "")
            what = f"{arg['role']} {shape}, {dtypes}"
        else:
            what = arg["role"] + (f", one of {arg['choices']}" if "choices" in arg else "")
        lines.append(f"    {arg['name']}: {what}.")
    lines += ["    out: the output, or a tuple of the outputs, to be written; allocated when None.", ""]
    lines += ["Raises:", "    QbitsError: an argument breaks its rule; nothing was written then.", ""]
    return "\n".join([*lines, "Reference:" + spec["doc"].split("\n\nReference:")[1]])


def _find_increment_version() -> Callable[[tuple[Tensor, ...]], None]:
    """Torch's own call for several tensors at once, where this release has it: a fifth of the time."""
    try:
        torch._C._increment_version((torch.empty(0),))
    except TypeError:
        return _increment_versions_singly
    return torch._C._increment_version


# Dynamo traces the second function in the place of the first, as it does for every function with this
# attribute; so nothing is left in eager mode that tells the two apart.
_TEMPLATE = """
def {name}({signature}, *, out=None):
    {body}

def _traced_{name}({signature}, *, out=None):
    return _traced({name!r}, ({arguments},), out)

{name}._torchdynamo_inline = _traced_{name}
"""
_BODY = "return _eager_{name}({arguments}, out)"
_BODY_THAT_MAY_DECLINE = """result = _eager_{name}({arguments}, out)
    return _composed_{name}({arguments}, out) if result is NotImplemented else result"""


def _define(spec: dict[str, Any]) -> None:
    """Defines the callable of an op here, with the signature of its declaration.

    In this module's own globals: Dynamo guards a function's globals by the name of its module.
    """
    name, names = spec["name"], [arg["name"] for arg in _arguments(spec)]
    defaults = {arg["name"] for arg in _arguments(spec) if arg["role"] == "optional"}
    body = _BODY_THAT_MAY_DECLINE if f"_composed_{name}" in globals() else _BODY
    arguments = ", ".join(names)
    source = _TEMPLATE.format(
        name=name,
        signature=", ".join(f"{name}=None" if name in defaults else name for name in names),
        arguments=arguments,
        body=body.format(name=name, arguments=arguments),
    )
    exec(compile(source, f"<qbits.ops.{name}>", "exec"), globals())
    globals()[name].__doc__ = _docstring(spec)


def _traced(name: str, args: tuple[Any, ...], out: Any) -> Any:
    """The op through the dispatcher; ``out=`` becomes a copy, which tracing understands.

    Dynamo traces what is here, so outputs are checked in Python: it cannot look into `qbits._core`.
    """
    result = getattr(torch.ops.qbits, name)(*args)
    return result if out is None else _copied(name, result, out)


def _copied(name: str, result: Any, out: Any) -> Any:
    """The given outputs, filled with the result."""
    names = [f"{output['name']}" for output in _outputs(SPECS[name])]
    targets, values = (x if isinstance(x, tuple | list) else (x,) for x in (out, result))
    for argument, target, value in zip(names, targets, values, strict=True):
        if target.dtype != value.dtype:
            rule = f"{argument} must have dtype {value.dtype}, got {target.dtype}".replace("torch.", "")
            raise DtypeError(f"qbits::{name}: {rule}")
        if target.device != value.device:
            rule = f"{argument} must be on {value.device} like the inputs, got {target.device}"
            raise DeviceError(f"qbits::{name}: {rule}")
        if target.numel() != value.numel():
            rule = f"{argument} must have {value.numel()} elements, got {target.numel()}"
            raise ShapeError(f"qbits::{name}: {rule}")
        target.copy_(value.view(target.shape))
    return out


def _written(tensors: tuple[Any, ...]) -> None:
    """Tells autograd that the given outputs have changed."""
    try:
        _increment_version(tensors)
    except (RuntimeError, TypeError):  # inference tensors have no version, foreign arrays no autograd
        for tensor in tensors:
            if isinstance(tensor, Tensor) and not tensor.is_inference():
                _increment_version((tensor,))


def _increment_versions_singly(tensors: tuple[Tensor, ...]) -> None:
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)


def _on_triton(name: str) -> Callable[..., Any]:
    """The op by Triton's kernels, with checked arguments; the last is an output, a tuple of them, or None."""

    def composed(*arguments: Any) -> Any:
        *inputs, out = arguments
        inputs = [getattr(torch, x.removeprefix("torch.")) if isinstance(x, str) else x for x in inputs]
        try:
            from qbits import triton_kernels
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            rule = (
                "triton must be installed where none of qbits' own kernels fits or runs, got no such module"
            )
            raise UnsupportedHardwareError(f"qbits::{name}: {rule}") from error
        with torch.no_grad():
            result = getattr(triton_kernels, name)(*inputs)
            return result if out is None else _copied(name, result, out)

    return composed


def _composed_gemm_4bit(
    input: Any,
    packed: Any,
    absmax: Any,
    N: int,
    K: int,
    codebook: str,
    block_size: int,
    bias: Any,
    absmax_scale: Any,
    absmax_offset: Any,
    absmax_codebook: Any,
    output: Any,
) -> Any:
    """Decode, then torch's GEMM; all arguments are checked."""
    statistics = (absmax_scale, absmax_offset, absmax_codebook)
    weight = _decoded_weight(packed, absmax, N, K, codebook, block_size, input.dtype, *statistics)
    return _dense_product(input, weight, bias, output)


def _composed_gemm_4bit_transposed(
    input: Any,
    packed: Any,
    absmax: Any,
    N: int,
    K: int,
    codebook: str,
    block_size: int,
    absmax_scale: Any,
    absmax_offset: Any,
    absmax_codebook: Any,
    output: Any,
) -> Any:
    """Decode, then torch's GEMM; all arguments are checked."""
    statistics = (absmax_scale, absmax_offset, absmax_codebook)
    weight = (packed, absmax, N, K, codebook, block_size)
    return _dense_product(input, _decoded_weight(*weight, input.dtype, *statistics).t(), None, output)


def _decoded_weight(
    packed: Any, absmax: Any, N: int, K: int, codebook: str, block_size: int, *dtype_and_statistics: Any
) -> Tensor:
    """The weight [N, K]."""
    flat = _core.dequantize_4bit(packed, absmax, N * K, codebook, block_size, *dtype_and_statistics, None)
    matrix: Tensor = flat.view(N, K)
    return matrix


def _dense_product(input: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor | None) -> Tensor:
    """``input @ weight.T + bias``: the bias in its own dtype is added in float32, as in the fused kernels."""
    with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
        if bias is None or bias.dtype == input.dtype:
            result = torch.nn.functional.linear(input, weight, bias)
        else:
            result = (torch.mm(input, weight.t()).float() + bias.float()).to(input.dtype)
        return result if output is None else output.copy_(result.view(output.shape))


_increment_version = _find_increment_version()

_core.set_eager_hooks(torch._C._len_torch_dispatch_stack, _traced, _increment_version, _written)

for _spec in SPECS.values():
    if _spec["has_triton"]:
        globals()["_composed_" + _spec["name"]] = _on_triton(_spec["name"])
    globals()["_eager_" + _spec["name"]] = getattr(_core, "eager_" + _spec["name"])
    _define(_spec)
    _LIBRARY.define(_schema(_spec), tags=(torch.Tag.pt2_compliant_tag,))
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_spec["name"], _implementation(_spec), _key)
    torch.library.register_fake(f"qbits::{_spec['name']}", _fake(_spec), lib=_LIBRARY)
