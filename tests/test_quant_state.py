"""bitsandbytes' statistics as checkpoints store them: written byte for byte, read back, every lie refused."""

from __future__ import annotations

import json
from typing import Any

import golden
import numpy as np
import pytest
import torch
from compare import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from qbits import functional, quant_state
from qbits.errors import CheckpointFormatError

HEADER = "w.quant_state.bitsandbytes__nf4"
GOLDEN_HEADER = (
    "7b227175616e745f74797065223a20226e6634222c2022626c6f636b73697a65223a2036342c20226474797065223a2022"
    "62666c6f61743136222c20227368617065223a205b322c2036345d7d"
)


def packed(double_quant: bool = False, shape: tuple[int, ...] = (40, 64)) -> dict[str, torch.Tensor]:
    """A weight ``w`` in bitsandbytes' layout."""
    x = torch.randn(shape, dtype=torch.bfloat16)
    return quant_state.pack_quant_state(functional.quantize_4bit(x, double_quant=double_quant), "w")


def json_tensor(text: str | bytes) -> torch.Tensor:
    data = text.encode() if isinstance(text, str) else text
    return torch.tensor(list(data), dtype=torch.uint8)


def with_fields(tensors: dict[str, torch.Tensor], **changes: Any) -> dict[str, torch.Tensor]:
    """The same tensors with other values in the JSON; None removes a field."""
    fields = {**json.loads(bytes(tensors[HEADER].tolist())), **changes}
    fields = {name: value for name, value in fields.items() if value is not None}
    return {**tensors, HEADER: json_tensor(json.dumps(fields))}


def test_header_has_the_documented_bytes():
    record = functional.quantize_4bit(torch.zeros(2, 64, dtype=torch.bfloat16))
    tensors = quant_state.pack_quant_state(record, "w")
    assert list(tensors) == ["w", "w.absmax", "w.quant_map", HEADER]
    assert bytes(tensors[HEADER].tolist()).hex() == GOLDEN_HEADER


def test_nested_golden_vector_has_the_documented_tensors():
    x = torch.from_numpy(golden.nested_input()).reshape(golden.NESTED_SHAPE)
    tensors = quant_state.pack_quant_state(functional.quantize_4bit(x, double_quant=True), "w")
    assert list(tensors) == ["w", "w.absmax", "w.quant_map", "w.nested_absmax", "w.nested_quant_map", HEADER]
    assert golden.sha256(tensors["w"].numpy()) == golden.NESTED_PACKED_SHA256
    assert golden.sha256(tensors["w.absmax"].numpy()) == golden.NESTED_CODES_SHA256
    assert_same_bits(tensors["w.nested_absmax"], golden.float32_of(golden.NESTED_SCALE))
    fields = json.loads(bytes(tensors[HEADER].tolist()))
    assert list(fields) == [
        "quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset",
    ]  # fmt: skip
    assert fields["nested_offset"] == 0.9705515503883362
    decoded = functional.dequantize_4bit(quant_state.read_quantized(tensors, "w"))
    assert golden.sha256(decoded.numpy()) == golden.NESTED_DECODED_SHA256


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(40, 64), (7, 3), (129,), (2, 3, 5, 7), (1,)])
def test_writing_what_was_read_gives_the_same_bytes(double_quant, shape):
    tensors = packed(double_quant, shape)
    record = quant_state.read_quantized(tensors, "w")
    assert (record.shape, record.dtype) == (shape, torch.bfloat16)
    again = quant_state.pack_quant_state(record, "w")
    assert list(again) == list(tensors)
    for key, tensor in tensors.items():
        assert again[key].dtype == tensor.dtype and torch.equal(again[key], tensor)


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
def test_packed_bytes_are_read_in_every_storage_dtype(storage, transposed):
    tensors = packed()
    want = quant_state.read_quantized(tensors, "w")
    stored = tensors["w"].view(-1).view(storage).reshape(-1, 1)
    tensors["w"] = stored.t() if transposed else stored
    assert torch.equal(quant_state.read_quantized(tensors, "w").packed, want.packed)


def test_nested_statistics_of_another_block_size_are_decoded():
    """The reference refuses them in products; here they become plain float32 ones of the same values."""
    tensors = packed(double_quant=True, shape=(300, 64))
    record = quant_state.read_quantized(tensors, "w")
    plain = functional.dequantize_4bit(record, dtype=torch.float32)
    scale = tensors["w.nested_absmax"].repeat_interleave(4)[:5]  # 300 blocks in 2 groups of 256, 5 of 64
    other = with_fields({**tensors, "w.nested_absmax": scale}, nested_blocksize=64)
    read = quant_state.read_quantized(other, "w")
    assert not read.nested and read.absmax.dtype == torch.float32
    assert torch.equal(functional.dequantize_4bit(read, dtype=torch.float32), plain)


def test_a_nested_map_of_its_own_is_used_as_read():
    tensors = packed(double_quant=True)
    table = tensors["w.nested_quant_map"].clone()
    table[200:] = torch.linspace(float(table[200]), 1, 56)
    tensors["w.nested_quant_map"] = table
    record = quant_state.read_quantized(tensors, "w")
    assert torch.equal(record.absmax_codebook, table)
    again = quant_state.pack_quant_state(record, "w")
    assert torch.equal(again["w.nested_quant_map"], table)
    assert quant_state.read_quantized(packed(double_quant=True), "w").absmax_codebook is None


def test_names_of_quantized_weights_are_found_by_their_headers():
    keys = ["a.weight", "a.weight.absmax", f"a.{HEADER}", "b.bias", f"c.d.{HEADER}", f"a.{HEADER}"]
    assert quant_state.quantized_names(keys) == ["a.w", "c.d.w"]


def test_af4_is_not_written_in_this_format():
    record = functional.quantize_4bit(torch.zeros(64), codebook="af4")
    with pytest.raises(CheckpointFormatError) as caught:
        quant_state.pack_quant_state(record, "w")
    assert str(caught.value) == (
        "qbits::load: w must be nf4 or fp4 to be written in bitsandbytes' format, got af4"
    )


def test_corrupt_scales_are_let_through_on_request():
    tensors = packed()
    tensors["w.absmax"][3] = torch.nan
    assert torch.isnan(quant_state.read_quantized(tensors, "w", allow_nonfinite=True).absmax[3])


FIELDS = "['quant_type', 'blocksize', 'dtype', 'shape']"
SIZES = "[32, 64, 128, 256, 512, 1024, 2048, 4096]"
BAD_HEADERS: dict[str, tuple[Any, str]] = {
    "no such type": (
        {"quant_type": "nf5"},
        "quant_type of {key} must be one of ['nf4', 'fp4', 'af4'], got 'nf5'",
    ),
    "another type": ({"quant_type": "fp4"}, "quant_type of {key} must equal the key's, got 'fp4'"),
    "af4": ({"quant_type": "af4"}, "quant_type of {key} must equal the key's, got 'af4'"),
    "block size": ({"blocksize": 100}, "blocksize of {key} must be one of " + SIZES + ", got 100"),
    "negative block size": ({"blocksize": -64}, "blocksize of {key} must be one of " + SIZES + ", got -64"),
    "text block size": ({"blocksize": "64"}, "blocksize of {key} must be one of " + SIZES + ", got '64'"),
    "float block size": ({"blocksize": 64.0}, "blocksize of {key} must be one of " + SIZES + ", got 64.0"),
    "dtype load": (
        {"dtype": "load"},
        "dtype of {key} must be one of ['float16', 'bfloat16', 'float32'], got 'load'",
    ),
    "list dtype": (
        {"dtype": [1]},
        "dtype of {key} must be one of ['float16', 'bfloat16', 'float32'], got [1]",
    ),
    "negative shape": ({"shape": [-40, -64]}, "shape of {key} must hold integers >= 1, got [-40, -64]"),
    "bool shape": ({"shape": [True, 64]}, "shape of {key} must hold integers >= 1, got [True, 64]"),
    "huge shape": (
        {"shape": [2**21, 2**20]},
        "shape of {key} must have at most 2^40 elements, got [2097152, 1048576]",
    ),
    "no shape": ({"shape": []}, "shape of {key} must be 1 to 8 integers, got []"),
    "missing field": (
        {"shape": None},
        "{key} must have exactly the fields " + FIELDS + ", got ['blocksize', 'dtype', 'quant_type']",
    ),
    "unknown field": (
        {"x": 1},
        "{key} must have exactly the fields "
        + FIELDS
        + ", got ['blocksize', 'dtype', 'quant_type', 'shape', 'x']",
    ),
    "larger shape": (
        {"shape": [2**20, 2**20]},
        "w.absmax must be contiguous float32 with 17179869184 elements, got float32 [40]",
    ),
    "not utf-8": (
        b"\xff\xfe{}",
        "{key} must be strict JSON, got 'utf-8' codec can't decode byte 0xff in position 0: invalid "
        "start byte",
    ),
    "array": ("[1]", "{key} must be one JSON object, got list"),
    "twice": ('{"shape": [1], "shape": [2]}', "{key} must be strict JSON, got a field that occurs twice"),
    "nan": ('{"shape": NaN}', "{key} must be strict JSON, got the literal NaN"),
    "one byte": ("{", "{key} must hold 2 to 4096 bytes, got 1"),
    "too long": (" " * 4097, "{key} must hold 2 to 4096 bytes, got 4097"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_header_is_refused(case):
    change, words = BAD_HEADERS[case]
    tensors = packed()
    tensors = (
        with_fields(tensors, **change)
        if isinstance(change, dict)
        else {**tensors, HEADER: json_tensor(change)}
    )
    with pytest.raises(CheckpointFormatError) as caught:
        quant_state.read_quantized(tensors, "w")
    assert str(caught.value) == "qbits::load: " + words.replace("{key}", HEADER)


def test_deeply_nested_json_is_refused():
    with pytest.raises(CheckpointFormatError, match="must be strict JSON"):
        quant_state.read_quantized({**packed(), HEADER: json_tensor("[" * 4096)}, "w")


def changed(name: str, change: Any) -> Any:
    return lambda tensors: {**tensors, name: change(tensors[name])}


def without(name: str) -> Any:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


ENTRIES = "['absmax', 'quant_map']"
NESTED_ENTRIES = "['absmax', 'nested_absmax', 'nested_quant_map', 'quant_map']"
BAD_TENSORS: dict[str, tuple[bool, Any, str]] = {
    "no weight": (False, without("w"), "w must stand beside its statistics, got no such key"),
    "no header": (
        False,
        without(HEADER),
        "w must have exactly one entry quant_state.bitsandbytes__nf4 or "
        "quant_state.bitsandbytes__fp4, got none",
    ),
    "two headers": (
        False,
        lambda t: {**t, HEADER.replace("nf4", "fp4"): t[HEADER]},
        "w must have exactly one entry quant_state.bitsandbytes__nf4 or "
        "quant_state.bitsandbytes__fp4, got ['quant_state.bitsandbytes__nf4', "
        "'quant_state.bitsandbytes__fp4']",
    ),
    "no absmax": (
        False,
        without("w.absmax"),
        f"w must have exactly the entries {ENTRIES} beside the header, got ['quant_map']",
    ),
    "unknown entry": (
        False,
        lambda t: {**t, "w.zero": t["w"]},
        f"w must have exactly the entries {ENTRIES} beside the header, got ['absmax', 'quant_map', 'zero']",
    ),
    "half nested": (
        True,
        without("w.nested_absmax"),
        f"w must have exactly the entries {NESTED_ENTRIES} beside the header, got ['absmax', "
        f"'nested_quant_map', 'quant_map']",
    ),
    "short absmax": (
        False,
        changed("w.absmax", lambda t: t[:1]),
        "w.absmax must be contiguous float32 with 40 elements, got float32 [1]",
    ),
    "empty absmax": (
        False,
        changed("w.absmax", lambda t: t[:0]),
        "w.absmax must be contiguous float32 with 40 elements, got float32 [0]",
    ),
    "half absmax": (
        False,
        changed("w.absmax", lambda t: t.half()),
        "w.absmax must be contiguous float32 with 40 elements, got float16 [40]",
    ),
    "2-D absmax": (
        False,
        changed("w.absmax", lambda t: t.view(8, 5)),
        "w.absmax must have 1 dimension, got float32 [8, 5]",
    ),
    "strided absmax": (
        False,
        changed("w.absmax", lambda t: t.repeat(2)[::2]),
        "w.absmax must be contiguous float32 with 40 elements, got float32 [40]",
    ),
    "short packed": (
        False,
        changed("w", lambda t: t[:-1]),
        "w must hold 1280 bytes in one row or column for shape [40, 64], got uint8 [1279, 1]",
    ),
    "square packed": (
        False,
        changed("w", lambda t: t.view(40, 32)),
        "w must hold 1280 bytes in one row or column for shape [40, 64], got uint8 [40, 32]",
    ),
    "int packed": (
        False,
        changed("w", lambda t: t.to(torch.int8)),
        "w must be packed bytes in uint8, float16, bfloat16 or float32, got int8 [1280, 1]",
    ),
    "short map": (
        False,
        changed("w.quant_map", lambda t: t[:3]),
        "w.quant_map must be contiguous float32 with 16 elements, got float32 [3]",
    ),
    "nested float absmax": (
        True,
        changed("w.absmax", lambda t: t.float()),
        "w.absmax must be contiguous uint8 with 40 elements, got float32 [40]",
    ),
    "nested map": (
        True,
        changed("w.nested_quant_map", lambda t: t.flip(0).contiguous()),
        "w.nested_quant_map must ascend within [-1, 1], got other values",
    ),
    "wide nested map": (
        True,
        changed("w.nested_quant_map", lambda t: t * 2),
        "w.nested_quant_map must ascend within [-1, 1], got other values",
    ),
    "negative absmax": (
        False,
        changed("w.absmax", lambda t: t.index_fill(0, torch.tensor(7), -1)),
        "w.absmax must be finite and >= 0, got -1.0 at 7",
    ),
    "infinite absmax": (
        False,
        changed("w.absmax", lambda t: t.index_fill(0, torch.tensor(7), torch.inf)),
        "w.absmax must be finite and >= 0, got inf at 7",
    ),
    "nested nan": (
        True,
        changed("w.nested_absmax", lambda t: t * torch.nan),
        "w.nested_absmax must be finite and >= 0, got nan at 0",
    ),
    "repacked by a CPU forward": (
        False,
        changed("w.absmax", lambda t: t.view(1, 40).bfloat16()),
        "w.absmax must be 1-D float32; bitsandbytes' CPU forward repacks weights in place and then "
        "saves wrong ones: save the model anew, before any forward, got bfloat16 [1, 40]",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused(case):
    nested, change, words = BAD_TENSORS[case]
    with pytest.raises(CheckpointFormatError) as caught:
        quant_state.read_quantized(change(packed(nested)), "w")
    assert str(caught.value) == f"qbits::load: {words}"


def test_a_foreign_code_table_is_refused():
    tensors = packed()
    tensors["w.quant_map"] = torch.linspace(-1, 1, 16)
    with pytest.raises(
        CheckpointFormatError, match=r"^qbits::load: w\.quant_map must be the table of nf4 to 1e-6"
    ):
        quant_state.read_quantized(tensors, "w")


@pytest.mark.parametrize("offset", ["1e999", '"0.5"', "true", "1e39"])
def test_a_nested_offset_that_is_no_float32_is_refused(offset):
    tensors = packed(double_quant=True)
    text = bytes(tensors[HEADER].tolist()).decode()
    start = text.index('"nested_offset": ') + len('"nested_offset": ')
    tensors[HEADER] = json_tensor(text[:start] + offset + "}")
    with pytest.raises(
        CheckpointFormatError, match=r"nested_offset of w\.quant_state.* must be a finite float32"
    ):
        quant_state.read_quantized(tensors, "w")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FIELD_NAMES = st.sampled_from(
    ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_offset", "y"]
)


@settings(max_examples=300, deadline=None)
@given(changes=st.dictionaries(FIELD_NAMES, JSON, max_size=3), cut=st.integers(0, 60), nested=st.booleans())
def test_any_header_is_read_or_refused_and_nothing_else_is_raised(changes, cut, nested):
    tensors = packed(nested, (4, 64))
    fields = {**json.loads(bytes(tensors[HEADER].tolist())), **changes}
    text = json.dumps(fields).encode()
    tensors[HEADER] = json_tensor(text[: max(0, len(text) - (cut if cut > 50 else 0))])
    try:
        record = quant_state.read_quantized(tensors, "w")
    except CheckpointFormatError as error:
        assert str(error).startswith("qbits::load: ")
    else:
        assert np.prod(record.shape) == 256 and record.packed.numel() == 128 and record.block_size == 64
