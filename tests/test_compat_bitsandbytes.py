"""The bitsandbytes forms: signatures, tuples, `QuantState`, `matmul_4bit`, `gemv_4bit`, parametrization."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import pickle
import warnings

import pytest
import torch
from qbits import errors, functional
from qbits.compat import bitsandbytes as bnb
from qbits.compat.bitsandbytes.nn.modules import maybe_rearrange_weight
from qbits.compat.bitsandbytes.nn.parametrize import (
    replace_parameter_4bit,
    replace_parameter_4bit_prequantized,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

F = bnb.functional
QuantState = F.QuantState

SIGNATURES = {
    F.quantize_4bit: (
        "A absmax=None out=None blocksize=None compress_statistics=False quant_type='fp4' "
        "quant_storage=torch.uint8"
    ),
    F.dequantize_4bit: "A quant_state=None absmax=None out=None blocksize=None quant_type='fp4'",
    F.quantize_blockwise: "A code=None absmax=None out=None blocksize=4096 nested=False",
    F.dequantize_blockwise: "A quant_state=None absmax=None code=None out=None blocksize=4096 nested=False",
    F.quantize: "A code=None out=None",
    F.dequantize: "A state=None absmax=None code=None out=None",
    F.quantize_no_absmax: "A code out=None",
    F.dequantize_no_absmax: "A code out=None",
    F.get_4bit_type: "typename device=None blocksize=64",
    F.create_dynamic_map: "signed=True max_exponent_bits=7 total_bits=8",
    F.create_fp8_map: "signed=True exponent_bits=5 precision_bits=2 total_bits=8",
    F.create_linear_map: "signed=True total_bits=8 add_zero=True",
    F.create_normal_map: "offset=0.9677083 use_extra_value=True",
    F.gemv_4bit: "A B out=None transposed_A=False transposed_B=False state=None",
    bnb.matmul_4bit: "A B quant_state out=None bias=None",
    bnb.MatMul4Bit.apply: "A B out=None bias=None quant_state=None",
    bnb.matmul: "A B out=None state=None threshold=0.0 bias=None",
    bnb.MatMul8bitLt.apply: "A B out=None bias=None state=None",
    bnb.nn.Int8Params.__new__: (
        "cls data=None requires_grad=True has_fp16_weights=False CB=None SCB=None ignored"
    ),
    bnb.nn.Linear8bitLt: (
        "input_features output_features bias=True has_fp16_weights=True threshold=0.0 index=None device=None "
        "early memory_efficient_backward=False"
    ),
    maybe_rearrange_weight: (
        "state_dict prefix local_metadata strict missing_keys unexpected_keys error_msgs"
    ),
    bnb.nn.Linear4bit: (
        "input_features output_features bias=True compute_dtype=None compress_statistics=True "
        "quant_type='fp4' quant_storage=torch.uint8 device=None"
    ),
    bnb.nn.LinearNF4: (
        "input_features output_features bias=True compute_dtype=None compress_statistics=True "
        "quant_storage=torch.uint8 device=None"
    ),
    replace_parameter_4bit: "module param_name compress_statistics=False quant_type='nf4' blocksize=None",
    replace_parameter_4bit_prequantized: "module param_name qs_dict device",
}


@pytest.mark.parametrize("call", SIGNATURES, ids=lambda call: getattr(call, "__qualname__", str(call)))
def test_signature_is_the_reference_s(call):
    parameters = inspect.signature(call).parameters.values()
    words = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    assert " ".join(words) == SIGNATURES[call]


@pytest.mark.parametrize(
    "path, name",
    [
        ("nn.modules", "Params4bit"),
        ("nn.modules", "Int8Params"),
        ("nn.modules", "Linear8bitLt"),
        ("nn.modules", "maybe_rearrange_weight"),
        ("autograd._functions", "MatmulLtState"),
        ("autograd._functions", "MatMul8bitLt"),
        ("autograd._functions", "GlobalOutlierPooler"),
        ("autograd._functions", "get_tile_inds"),
        ("autograd._functions", "undo_layout"),
        ("nn.modules", "LinearFP4"),
        ("nn.parametrize", "Bnb4bitParametrization"),
        ("autograd._functions", "MatMul4Bit"),
        ("functional", "QuantState"),
    ],
)
def test_module_paths_are_the_reference_s(path, name):
    assert hasattr(importlib.import_module(f"qbits.compat.bitsandbytes.{path}"), name)


def test_absent_names_say_so():
    with pytest.raises(AttributeError, match="no attribute 'optim': qbits has no optimizers yet"):
        bnb.optim  # noqa: B018


@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nested", [False, True])
def test_quantize_4bit_packs_the_same_bytes_in_every_storage(storage, nested, device):
    x = torch.randn(6, 96, device=device, dtype=torch.float16)
    packed, state = F.quantize_nf4(x, compress_statistics=nested, quant_storage=storage)
    q = functional.quantize_4bit(x, double_quant=nested)
    assert packed.shape == (288 // storage.itemsize, 1) and packed.dtype == storage
    assert torch.equal(packed.view(-1).view(torch.uint8), q.packed)
    assert (state.shape, state.dtype, state.blocksize) == (torch.Size([6, 96]), torch.float16, 64)
    assert (state.quant_type, state.nested) == ("nf4", nested)
    want = functional.dequantize_4bit(q)
    assert torch.equal(F.dequantize_4bit(packed, state), want)
    assert torch.equal(F.dequantize_4bit(packed.t(), state), want.t())


def test_buffers_are_filled_and_used(device):
    """[D3]"""
    x = torch.randn(4, 64, device=device)
    absmax, out = torch.zeros(4, device=device), torch.zeros(128, 1, dtype=torch.uint8, device=device)
    packed, state = F.quantize_4bit(x, absmax=absmax, out=out)
    assert packed is out and state.absmax.data_ptr() == absmax.data_ptr() and absmax.all()
    target = torch.zeros(4, 64, device=device)
    assert F.dequantize_fp4(packed, absmax=absmax, out=target) is target
    assert torch.equal(target, F.dequantize_4bit(packed, state))
    codes = torch.zeros(4, 64, dtype=torch.uint8, device=device)
    scales = torch.zeros(1, device=device)
    got, state8 = F.quantize_blockwise(x, absmax=scales, out=codes)
    assert got is codes and state8.absmax is scales and scales.item() == x.abs().max().item()


@pytest.mark.parametrize("nested", [False, True])
def test_blockwise_8bit_round_trip(nested, device):
    x = torch.randn(33, 70, device=device, dtype=torch.bfloat16)
    codes, state = F.quantize_blockwise(x, blocksize=64, nested=nested)
    q = functional.quantize_blockwise(x, block_size=64)
    assert torch.equal(codes, q.codes) and state.nested == nested
    got = F.dequantize_blockwise(codes, state)
    assert got.dtype == torch.bfloat16 and got.shape == x.shape
    want = functional.dequantize_blockwise(q)
    if nested:  # the absmax of 37 blocks, themselves in 8 bits: half a step of the map is below 2 %
        torch.testing.assert_close(got.float(), want.float(), rtol=0.03, atol=0.03)
    else:
        assert torch.equal(got, want)
        plain = F.dequantize_blockwise(codes, absmax=state.absmax, code=state.code, blocksize=64)
        assert torch.equal(plain, functional.dequantize_blockwise(q, dtype=torch.float32))


def test_whole_tensor_forms(device):
    x = torch.randn(5, 7, device=device, dtype=torch.float16)
    codes, (absmax, code) = F.quantize(x)
    assert absmax.shape == () and absmax.item() == x.abs().max().item() and code.shape == (256,)
    y = F.dequantize(codes, (absmax, code))
    assert y.dtype == torch.float32 and torch.equal(y, F.dequantize(codes, absmax=absmax, code=code))
    assert torch.equal(F.quantize_no_absmax(x.float() / absmax, code), codes)
    assert torch.equal(F.dequantize_no_absmax(codes, code), code[codes.long()])


REFUSALS = {
    "type": (
        lambda x: F.quantize_4bit(x, quant_type="int4"),
        "quantize_4bit: quant_type must be one of ['nf4', 'fp4'], got 'int4'",
    ),
    "storage": (
        lambda x: F.quantize_4bit(x, quant_storage=torch.int8),
        "quantize_4bit: quant_storage must be uint8, float16, bfloat16 or float32, got torch.int8",
    ),
    "bytes": (
        lambda x: F.quantize_4bit(x[:, :33], quant_storage=torch.float32),
        "quantize_4bit: quant_storage must divide 66 packed bytes, got torch.float32",
    ),
    "no state": (
        lambda x: F.dequantize_4bit(F.quantize_4bit(x)[0]),
        "dequantize_4bit: quant_state must be given, or absmax and out, got neither",
    ),
    "no state, 8 bits": (
        lambda x: F.dequantize_blockwise(x),
        "dequantize_blockwise: quant_state or absmax must be given, got neither",
    ),
    "no state, whole": (lambda x: F.dequantize(x), "dequantize: state or absmax must be given, got neither"),
    "matmul state": (
        lambda x: bnb.matmul_4bit(x, x, None),
        "matmul_4bit: quant_state must be a QuantState, got None",
    ),
    "matmul shape": (
        lambda x: bnb.matmul_4bit(x, *F.quantize_4bit(x.reshape(-1))),
        "matmul_4bit: quant_state.shape must have 2 dimensions, got torch.Size([256])",
    ),
    "matmul K": (
        lambda x: bnb.matmul_4bit(x[:, :63], *F.quantize_4bit(x)),
        "linear_4bit: input must have shape [*, 64], got [4, 63]",
    ),
    "gemv state": (lambda x: F.gemv_4bit(x[:1], x), "gemv_4bit: state must be a QuantState, got None"),
    "gemv flag": (
        lambda x: F.gemv_4bit(x[:1], x, transposed_B=True),
        "gemv_4bit: transposed_A and transposed_B must be False, got False and True",
    ),
    "gemv rows": (
        lambda x: F.gemv_4bit(x, F.quantize_4bit(x)[0], state=F.quantize_4bit(x)[1]),
        "gemv_4bit: A must be one row, got shape [4, 64]",
    ),
    "buffer": (
        lambda x: F.quantize_4bit(x, absmax=torch.zeros(3)),
        "quantize_4bit: absmax must have 4 elements of torch.float32, got [3] of torch.float32",
    ),
    "short bytes": (
        lambda x: F.dequantize_4bit(F.quantize_4bit(x)[0][:-1], F.quantize_4bit(x)[1]),
        "dequantize_4bit: packed must have ceil_div(n, 2) = 128 elements, got 127",
    ),
    "blocksize": (
        lambda x: F.quantize_blockwise(x, blocksize=32),
        "quantize_blockwise: block_size must be one of [64, 128, 256, 512, 1024, 2048, 4096], got 32",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_bad_argument_is_refused(case):
    call, words = REFUSALS[case]
    with pytest.raises(ValueError) as caught:
        call(torch.randn(4, 64))
    assert str(caught.value) == f"qbits::{words}"


def test_matmul_takes_the_orientation_of_the_state(device):
    """Both shapes of the packed tensor mean the same; a square weight is [N, K]; more rows change no rule."""
    for N, K in ((24, 64), (64, 64)):
        packed, state = F.quantize_nf4(torch.randn(N, K, device=device))
        weight = F.dequantize_4bit(packed, state)
        for rows in (1, 5):
            x = torch.randn(2, rows, K, device=device)
            want = functional.linear_4bit(x, state.record(packed))
            for B in (packed, packed.t()):
                assert torch.equal(bnb.matmul_4bit(x, B, state), want)
                assert torch.equal(bnb.MatMul4Bit.apply(x, B, None, None, state), want)
            # 64 terms of size 4 at most, summed in float32 in another order: 64 * 4 * 2^-24 = 1.5e-5
            torch.testing.assert_close(want, x @ weight.t(), rtol=0, atol=3e-5)


def test_legacy_orientation_is_served_with_a_warning(device):
    """The early layout [K, N], also for one row without a gradient, with bias, out and gradients."""
    packed, state = F.quantize_nf4(torch.randn(64, 24, device=device), compress_statistics=True)
    weight = F.dequantize_4bit(packed, state)
    bias = torch.randn(24, device=device, requires_grad=True)
    for rows in (1, 3):
        x = torch.randn(rows, 64, device=device, requires_grad=True)
        with pytest.warns(DeprecationWarning, match="quant_state.shape must be"):
            y = bnb.matmul_4bit(x, packed, state, bias=bias)
        torch.testing.assert_close(y, x @ weight + bias)
        grads = [torch.autograd.grad(out.pow(2).sum(), (x, bias)) for out in (y, x @ weight + bias)]
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
        with torch.no_grad(), pytest.warns(DeprecationWarning):
            out = torch.zeros(rows, 24, device=device)
            assert bnb.matmul_4bit(x, packed, state, out=out, bias=bias) is out
        assert torch.equal(out, y)


def test_a_weight_that_requires_a_gradient_warns_and_gets_none(device):
    packed, state = F.quantize_nf4(torch.randn(8, 64, device=device), quant_storage=torch.float32)
    packed.requires_grad_()
    x = torch.randn(2, 64, device=device, requires_grad=True)
    with pytest.warns(errors.QbitsWarning, match="B must not require a gradient"):
        bnb.matmul_4bit(x, packed, state).sum().backward()
    assert packed.grad is None and x.grad is not None


def test_reference_error_bars_hold(device):
    x, w = torch.randn(2048, 256, device=device), torch.randn(64, 256, device=device) / 16
    packed, state = F.quantize_nf4(w)
    error = (bnb.matmul_4bit(x, packed, state) - x @ w.t()).abs().mean()
    assert error < 0.115


@pytest.mark.parametrize("nested_block_size", [64, 256, 1024])
def test_nested_statistics_of_any_block_size_multiply(nested_block_size, device):
    packed, state = F.quantize_nf4(torch.randn(300, 64, device=device))
    offset = state.absmax.mean()
    codes, state2 = F.quantize_blockwise(state.absmax - offset, blocksize=nested_block_size)
    nested = QuantState(codes, state.shape, state.code, 64, "nf4", state.dtype, offset, state2)
    absmax = F.dequantize_blockwise(codes, state2) + offset
    plain = QuantState(absmax, state.shape, state.code, 64, "nf4", state.dtype)
    x = torch.randn(3, 64, device=device)
    assert torch.equal(bnb.matmul_4bit(x, packed, nested), bnb.matmul_4bit(x, packed, plain))


def test_gemv_is_one_row_of_matmul_and_changes_no_state(device):
    packed, state = F.quantize_nf4(torch.randn(8, 64, device=device, dtype=torch.bfloat16))
    row = torch.randn(1, 1, 64, device=device, dtype=torch.float16)
    y = F.gemv_4bit(row, packed, state=state)
    assert torch.equal(y, bnb.matmul_4bit(row, packed, state)) and y.dtype == torch.float16
    assert state.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------ QuantState


def state_of(nested: bool = True) -> QuantState:
    return F.quantize_nf4(torch.randn(20, 64), compress_statistics=nested)[1]


def test_state_items_have_the_reference_s_order():
    state = state_of()
    assert state[0] is state.absmax and state[1] == torch.Size([20, 64]) and state[2] == torch.float32
    assert state[3] == 64 and state[4] == [state.offset, state.state2] and state[5] == "nf4"
    assert state_of(False)[4] is None


@pytest.mark.parametrize("nested", [False, True])
def test_state_dictionaries_round_trip_and_stay_as_they_are(nested):
    state = state_of(nested)
    unpacked = state.as_dict()
    names = ["quant_type", "absmax", "blocksize", "quant_map", "dtype", "shape"]
    inner = ["nested_absmax", "nested_blocksize", "nested_quant_map", "nested_dtype", "nested_offset"]
    assert list(unpacked) == names + (inner if nested else [])
    if nested:  # safetensors refuses tensors that share memory, as the maps of all layers may
        assert unpacked["nested_quant_map"].data_ptr() != state.state2.code.data_ptr()
    packed = {f"model.layer.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    assert all(isinstance(v, torch.Tensor) for v in packed.values())
    for described in (unpacked, packed):
        keys = list(described)
        again = QuantState.from_dict(described, "cpu")
        assert again == state and list(described) == keys
    header = json.loads(bytes(state.bitsandbytes__nf4.tolist()))
    assert header["shape"] == [20, 64] and list(header)[:2] == ["quant_type", "blocksize"]
    with pytest.raises(AttributeError):
        state.bitsandbytes__fp4  # noqa: B018


def test_states_compare_by_value():
    state = state_of()
    other = copy.deepcopy(state)
    assert other == state and other.absmax is not state.absmax
    other.state2.absmax += 1
    assert other != state
    assert pickle.loads(pickle.dumps(state)) == state
    assert state != "nf4"
    moved = state.to("meta")
    assert moved is state and state.absmax.is_meta and state.state2.absmax.is_meta and state.offset.is_meta


@pytest.mark.parametrize("change", ["two headers", "unknown", "shape", "duplicate"])
def test_a_bad_dictionary_is_refused(change):
    """Shapes from a checkpoint never drive a read out of range."""
    entries = state_of().as_dict(packed=True)
    if change == "two headers":
        entries["quant_state.bitsandbytes__fp4"] = entries["quant_state.bitsandbytes__nf4"]
    elif change == "unknown":
        entries["zero_point"] = torch.zeros(1)
    elif change == "duplicate":
        entries["a.absmax"] = entries["absmax"]
    else:
        header = (
            bytes(entries["quant_state.bitsandbytes__nf4"].tolist())
            .decode()
            .replace("[20, 64]", "[9999, 64]")
        )
        entries["quant_state.bitsandbytes__nf4"] = torch.tensor(list(header.encode()), dtype=torch.uint8)
    with pytest.raises(errors.CheckpointFormatError, match=r"^qbits::load: .+ must .+, got .+$"):
        QuantState.from_dict(entries, "cpu")


# -------------------------------------------------------------------------------------------- parametrization


class Experts(nn.Module):
    """Two uses of one 3-D weight in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.weight
        assert self.weight is first or torch.compiler.is_compiling()  # decoded once
        return torch.einsum("eok,bk->beo", first, x)


@pytest.mark.parametrize("compress", [False, True])
def test_parametrized_weight_decodes_and_saves_under_its_own_name(compress):
    module = Experts()
    packed, state = F.quantize_nf4(module.weight.detach(), compress_statistics=compress)
    replace_parameter_4bit(module, "weight", compress_statistics=compress)
    want = F.dequantize_4bit(packed, state)
    assert torch.equal(module.weight, want) and module.weight is not module.weight
    x = torch.randn(2, 64)
    y = module(x)
    assert torch.equal(y, torch.einsum("eok,bk->beo", want, x))
    names = ["absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if compress else [])]
    saved = module.state_dict()
    assert list(saved) == ["weight", *(f"weight.{n}" for n in names), "weight.quant_state.bitsandbytes__nf4"]
    other = Experts()
    replace_parameter_4bit(other, "weight", compress_statistics=compress)
    other.load_state_dict(saved)
    assert torch.equal(other(x), y)
    third = Experts()
    third.weight = nn.Parameter(saved.pop("weight"), requires_grad=False)
    replace_parameter_4bit_prequantized(third, "weight", saved, "cpu")
    assert torch.equal(third(x), y)
    assert torch.equal(copy.deepcopy(third)(x), y)
    checkpointed = checkpoint(module, x.clone().requires_grad_(), use_reentrant=False)
    checkpointed.sum().backward()
    decoder = module.parametrizations["weight"][0]
    assert not decoder._running  # nothing stays alive, although the recompute stops early


def test_parametrize_refuses_what_is_no_parameter():
    module = nn.Linear(64, 8, bias=False)
    with pytest.raises(AttributeError, match="param_name must name a parameter of Linear, got 'w'"):
        replace_parameter_4bit(module, "w")
    with pytest.raises(TypeError, match="in_features must be a Parameter, got int"):
        replace_parameter_4bit(module, "in_features")


def test_nothing_warns_on_a_plain_call(device):
    """[D32] Neither shapes nor dtypes warn: K below a block, float32 input, one row."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = bnb.nn.LinearNF4(40, 8).to(device)
        layer(torch.randn(1, 40, device=device))
        layer(torch.randn(2, 40, device=device, dtype=torch.float16))
