"""Damages of a checkpoint whose layer "0" is Linear(41, 15): each change, and words of its refusal."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import Tensor

STATE = "0.weight.quant_state.bitsandbytes__nf4"
NAN, INF = float("nan"), float("inf")


def as_text(tensor: Tensor) -> str:
    return bytes(tensor.tolist()).decode()


def as_tensor(text: str | bytes) -> Tensor:
    data = text if isinstance(text, bytes) else text.encode()
    return torch.tensor(list(data), dtype=torch.uint8)


def fields(**changes: object) -> Callable[[dict[str, Tensor]], None]:
    """A change of the JSON's fields; None removes one."""

    def change(tensors: dict[str, Tensor]) -> None:
        state = json.loads(as_text(tensors[STATE])) | changes
        tensors[STATE] = as_tensor(json.dumps({k: v for k, v in state.items() if v is not None}))

    return change


def text(replacement: str | bytes) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({STATE: as_tensor(replacement)})


def tensor(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({key: change(tensors[key]).contiguous()})


def filled(index: int, value: float) -> Callable[[Tensor], Tensor]:
    def change(values: Tensor) -> Tensor:
        values = values.clone()
        values[index] = value
        return values

    return change


PLAIN = '{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [15, 41]%s}'
HALF = torch.float16

# Each damage of a plain or nested file, with the key and the words that the error must hold.
DAMAGES = {
    "state is not uint8": ("nf4", tensor(STATE, lambda t: t.int()), STATE, "1-D uint8"),
    "state is 2-D": ("nf4", tensor(STATE, lambda t: t[None]), STATE, "1-D uint8"),
    "state is too short": ("nf4", text("1"), STATE, "2 to 4096 bytes"),
    "state is too long": ("nf4", text(PLAIN % (" " * 5000)), STATE, "2 to 4096 bytes"),
    "state is not UTF-8": ("nf4", text(b'{"a": "\xff\xfe"}'), STATE, "strict JSON"),
    "state is cut": ("nf4", text(PLAIN[:-4]), STATE, "strict JSON"),
    "state is a list": ("nf4", text("[1, 2]"), STATE, "one JSON object"),
    "state is two objects": ("nf4", text("{} {}"), STATE, "strict JSON"),
    "state has a doubled field": ("nf4", text(PLAIN % ', "blocksize": 32'), STATE, "occurs twice"),
    "state has NaN": ("nf4", text(PLAIN % ', "nested_offset": NaN'), STATE, "NaN"),
    "state nests without end": ("nf4", text("[" * 4000), STATE, "strict JSON"),
    "state lacks a field": ("nf4", fields(blocksize=None), STATE, "exactly the fields"),
    "state has an unknown field": ("nf4", fields(extra=1), STATE, "exactly the fields"),
    "state has half of the nested fields": ("nf4", fields(nested_blocksize=256), STATE, "exactly the fields"),
    "type is unknown": ("nf4", fields(quant_type="nf5"), STATE, "quant_type"),
    "type is no text": ("nf4", fields(quant_type=4), STATE, "quant_type"),
    "type differs from the key": ("nf4", fields(quant_type="fp4"), STATE, "equal the key"),
    "type is af4": ("nf4", fields(quant_type="af4"), STATE, "quant_type"),
    "block size is a text": ("nf4", fields(blocksize="64"), STATE, "blocksize"),
    "block size is negative": ("nf4", fields(blocksize=-64), STATE, "blocksize"),
    "block size is a float": ("nf4", fields(blocksize=64.0), STATE, "blocksize"),
    "block size is true": ("nf4", fields(blocksize=True), STATE, "blocksize"),
    "block size is 16": ("nf4", fields(blocksize=16), STATE, "blocksize"),
    "block size is another": ("nf4", fields(blocksize=128), "0.weight.absmax", "with 5 elements"),
    "dtype is an attribute of torch": ("nf4", fields(dtype="load"), STATE, "dtype"),
    "dtype is float64": ("nf4", fields(dtype="float64"), STATE, "dtype"),
    "shape is empty": ("nf4", fields(shape=[]), STATE, "shape"),
    "shape has nine sizes": ("nf4", fields(shape=[15, 41, *[1] * 7]), STATE, "shape"),
    "shape has a zero": ("nf4", fields(shape=[0, 41]), STATE, "shape"),
    "shape is negative": ("nf4", fields(shape=[-15, -41]), STATE, "shape"),
    "shape holds floats": ("nf4", fields(shape=[15.0, 41.0]), STATE, "shape"),
    "shape is huge": ("nf4", fields(shape=[2**20, 2**20]), "0.weight", ""),
    "shape overflows 64 bits": ("nf4", fields(shape=[2**40, 2**40]), STATE, "2^40"),
    "shape is larger than the bytes": ("nf4", fields(shape=[16, 41]), "0.weight", ""),
    "shape is transposed": ("nf4", fields(shape=[41, 15]), "0.weight", "(15, 41)"),
    "packed is float64": ("nf4", tensor("0.weight", lambda t: t.double()), "0.weight", "uint8"),
    "packed is int8": ("nf4", tensor("0.weight", lambda t: t.view(torch.int8)), "0.weight", "uint8"),
    "packed is too short": ("nf4", tensor("0.weight", lambda t: t[:-1]), "0.weight", "308 bytes"),
    "packed is too long": ("nf4", tensor("0.weight", lambda t: torch.cat([t, t])), "0.weight", "308 bytes"),
    "packed has rows": ("nf4", tensor("0.weight", lambda t: t.view(154, 2)), "0.weight", "one row or column"),
    "absmax is empty": ("nf4", tensor("0.weight.absmax", lambda t: t[:0]), "0.weight.absmax", "10 elements"),
    "absmax is too short": (
        "nf4",
        tensor("0.weight.absmax", lambda t: t[:-1]),
        "0.weight.absmax",
        "10 elements",
    ),
    "absmax is 2-D": ("nf4", tensor("0.weight.absmax", lambda t: t[None]), "0.weight.absmax", "1 dimension"),
    "absmax is float16": (
        "nf4",
        tensor("0.weight.absmax", lambda t: t.to(HALF)),
        "0.weight.absmax",
        "10 elements",
    ),
    "absmax is uint8": (
        "nf4",
        tensor("0.weight.absmax", lambda t: t.byte()),
        "0.weight.absmax",
        "10 elements",
    ),
    "absmax has a NaN": ("nf4", tensor("0.weight.absmax", filled(9, NAN)), "0.weight.absmax", "nan at 9"),
    "absmax has an Inf": ("nf4", tensor("0.weight.absmax", filled(3, INF)), "0.weight.absmax", "inf at 3"),
    "absmax is negative": ("nf4", tensor("0.weight.absmax", filled(0, -1)), "0.weight.absmax", "-1.0 at 0"),
    "absmax is missing": ("nf4", lambda t: t.pop("0.weight.absmax"), "0.weight", "exactly the entries"),
    "quant_map is missing": ("nf4", lambda t: t.pop("0.weight.quant_map"), "0.weight", "exactly the entries"),
    "quant_map has 3 values": (
        "nf4",
        tensor("0.weight.quant_map", lambda t: t[:3]),
        "0.weight.quant_map",
        "16 elements",
    ),
    "quant_map is another": (
        "nf4",
        tensor("0.weight.quant_map", lambda t: t + 1e-5),
        "0.weight.quant_map",
        "the table of nf4",
    ),
    "quant_map has a NaN": (
        "nf4",
        tensor("0.weight.quant_map", filled(2, NAN)),
        "0.weight.quant_map",
        "the table of nf4",
    ),
    "nested offset is missing": ("nf4-dq", fields(nested_offset=None), STATE, "exactly the fields"),
    "nested offset is a text": ("nf4-dq", fields(nested_offset="0.1"), STATE, "nested_offset"),
    "nested offset is true": ("nf4-dq", fields(nested_offset=True), STATE, "nested_offset"),
    "nested offset is huge": ("nf4-dq", fields(nested_offset=1e39), STATE, "nested_offset"),
    "nested dtype is another": ("nf4-dq", fields(nested_dtype="float16"), STATE, "nested_dtype"),
    "nested block size is 32": ("nf4-dq", fields(nested_blocksize=32), STATE, "nested_blocksize"),
    "nested absmax is float32": (
        "nf4-dq",
        tensor("0.weight.absmax", lambda t: t.float()),
        "0.weight.absmax",
        "uint8 with 10 elements",
    ),
    "nested scale is missing": (
        "nf4-dq",
        lambda t: t.pop("0.weight.nested_absmax"),
        "0.weight",
        "exactly the entries",
    ),
    "nested scale is too long": (
        "nf4-dq",
        tensor("0.weight.nested_absmax", lambda t: torch.cat([t, t])),
        "0.weight.nested_absmax",
        "1 elements",
    ),
    "nested scale is NaN": (
        "nf4-dq",
        tensor("0.weight.nested_absmax", filled(0, NAN)),
        "0.weight.nested_absmax",
        "nan at 0",
    ),
    "nested scale decodes to Inf": (
        "nf4-dq",
        lambda t: (fields(nested_offset=3e38)(t), tensor("0.weight.nested_absmax", filled(0, 3e38))(t)),
        "0.weight.nested_absmax",
        "inf at",
    ),
    "nested map is short": (
        "nf4-dq",
        tensor("0.weight.nested_quant_map", lambda t: t[:255]),
        "0.weight.nested_quant_map",
        "256 elements",
    ),
    "nested map descends": (
        "nf4-dq",
        tensor("0.weight.nested_quant_map", lambda t: t.flip(0)),
        "0.weight.nested_quant_map",
        "ascend",
    ),
    "nested map leaves [-1, 1]": (
        "nf4-dq",
        tensor("0.weight.nested_quant_map", lambda t: t * 2),
        "0.weight.nested_quant_map",
        "ascend",
    ),
    "two states": (
        "nf4",
        lambda t: t.update({STATE.replace("nf4", "fp4"): t[STATE].clone()}),
        "0.weight",
        "exactly one entry",
    ),
    "an unknown statistic": (
        "nf4",
        lambda t: t.update({"0.weight.zero_points": torch.zeros(3)}),
        "0.weight",
        "exactly the entries",
    ),
    "the weight is missing": ("nf4", lambda t: t.pop("0.weight"), "0.weight", ""),
}

NATIVE_DAMAGES = {
    "header is cut": ("nf4", tensor("0.weight_quant_state", lambda t: t[:-1]), "0.weight_quant_state"),
    "absmax is too short": ("nf4", tensor("0.weight_absmax", lambda t: t[:-1]), "0.weight_absmax"),
    "absmax is uint8": ("nf4", tensor("0.weight_absmax", lambda t: t.byte()), "0.weight_absmax"),
    "absmax is missing": ("nf4", lambda t: t.pop("0.weight_absmax"), "0.weight_absmax"),
    "absmax has a NaN": ("nf4", tensor("0.weight_absmax", filled(9, NAN)), "0.weight_absmax"),
    "absmax is negative": ("nf4", tensor("0.weight_absmax", filled(9, -1)), "0.weight_absmax"),
    "packed is too short": ("nf4", tensor("0.weight", lambda t: t[:-1]), "0.weight"),
    "scale is missing": ("nf4-dq", lambda t: t.pop("0.weight_absmax_scale"), "0.weight_absmax"),
    "scale has an Inf": ("nf4-dq", tensor("0.weight_absmax_scale", filled(0, INF)), "0.weight_absmax_scale"),
    "offset is missing": ("nf4-dq", lambda t: t.pop("0.weight_absmax_offset"), "0.weight_absmax_offset"),
    "offset is NaN": ("nf4-dq", tensor("0.weight_absmax_offset", filled(0, NAN)), "0.weight_absmax"),
}
