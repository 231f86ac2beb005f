"""Triton's kernels: their ops' suites on them, interpreted on the CPU, compiled on a GPU; what compiles."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import SPECS

TESTS = Path(__file__).parent
OPS = sorted(name for name, spec in SPECS.items() if spec["has_triton"])
# The interpreter takes a minute for a million elements: of long products two tell, matrices are small.
TOO_LONG = ("65536", "200003", "300000", "rows_of_every_kernel", "several_threads")


def on_triton(device: str, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process in which the ops of that device run on Triton."""
    interpret = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    environment = {**os.environ, "QBITS_BACKEND": "triton", **interpret, **variables}
    environment = {name: value for name, value in environment.items() if value}
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


def run_suite(selection: str, *files: str) -> None:
    """Every selected test of these files passes on Triton, and there are some."""
    device = selection.split()[0].split("-")[0]
    options = ["-m", "pytest", "-p", "no:cacheprovider", "-k", selection]
    done = on_triton(device, *options, *(str(TESTS / file) for file in files))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("file", ["test_gemm_int8.py", "test_int8.py", "test_compat_triton.py"])
def test_ops_pass_their_suite_on_triton(device, file):
    too_long = " or ".join(TOO_LONG) if device == "cpu" else "none"
    run_suite(f"{device} and not outlier and not ({too_long})", file)


def test_refusals_are_those_of_the_native_ops(device):
    run_suite(" or ".join(f"{device}-{op}-" for op in OPS), "test_refusals.py")


def test_tracing_is_that_of_the_native_ops(device):
    run_suite(f"{device}-gemm_int8]", "test_traced.py")


def test_every_op_that_has_one_runs_its_triton_kernel(device):
    code = """
import sys
from unittest import mock
sys.path.insert(0, "tests")
from calls import valid_call
from qbits import triton_kernels
for op in sys.argv[2:]:
    call = valid_call(op, sys.argv[1])
    for run in (call.run, call.run_allocating, call.run_traced):
        with mock.patch.object(triton_kernels, op, wraps=getattr(triton_kernels, op)) as kernel:
            run()
        print(op, kernel.call_count)
"""
    done = on_triton(device, "-c", code, device, *OPS)
    assert done.stdout.split("\n")[:-1] == [f"{op} 1" for op in OPS for _ in range(3)], done.stderr


CALL = """
import sys, torch
sys.modules.update(dict.fromkeys(sys.argv[2:]))
from qbits import errors, functional
codes = torch.ones(1, 2, dtype=torch.int8, device=sys.argv[1])
try:
    print(functional.gemm_int8(codes, codes, out_dtype=torch.int32).item())
except errors.QbitsError as error:
    print(type(error).__name__, error)
print("triton" in sys.modules)
"""


def test_without_triton_the_error_says_what_to_install(device):
    done = on_triton(device, "-c", CALL, device, "triton")  # None in sys.modules is a module that is missing
    expected = (
        "UnsupportedHardwareError qbits::gemm_int8: triton must be installed where none of qbits' own "
        "kernels fits or runs, got no such module"
    )
    assert done.stdout.split("\n")[0] == expected, done.stderr


def test_an_unknown_backend_is_refused(device):
    done = on_triton(device, "-c", CALL, device, QBITS_BACKEND="cuda")
    assert 'gemm_int8: QBITS_BACKEND must be unset or triton, got "cuda"' in done.stdout, done.stderr


def test_on_the_cpu_only_the_interpreter_is_forced():
    done = on_triton("cpu", "-c", CALL, "cpu", TRITON_INTERPRET="")
    assert done.stdout.split() == ["2", "False"], done.stderr


def compiled(kernel: str, arch: int, dtype: str, exact_tiles: int = 0, **changes: str) -> str:
    """PTX of a kernel with aligned arguments and one of its tiles."""
    import triton
    from qbits.triton_kernels import device
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    float_type = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}[dtype]
    types = dict.fromkeys(("input", "output", "bias"), float_type)
    types |= dict.fromkeys(("values", "weight"), "*i8")
    types |= dict.fromkeys(("scales", "input_scales", "weight_scales"), "*fp32") | {"largest": "*i32"}
    types |= dict.fromkeys(("M", "N", "K", "n", "row_stride", "column_stride"), "i32")
    constants = {"ROWS": 4, "COLUMNS": 1024, "TILE": 64, "STEPS": 8, "ELEMENTS": 4096, "IS_GLOBAL": False}
    constants |= {
        "TILE_M": 64,
        "TILE_N": 64,
        "TILE_K": 64,
        "EXACT_TILES": exact_tiles,
        "HAS_ONE_WEIGHT_SCALE": False,
    }
    function = getattr(device, kernel)
    names = function.arg_names
    signature = {name: (types | changes).get(name, "constexpr") for name in names}
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={name: constants[name] for name in names if signature[name] == "constexpr"},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants},
    )
    options = {"enable_fp_fusion": False}
    text: str = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"]
    return text


QUANTIZERS = ("quantize_rowwise", "quantize_global", "quantize_transposed")


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kernel", [*QUANTIZERS, "dequantize"])
def test_compiled_quantizers_divide_by_the_standard_and_fuse_nothing(kernel, arch):
    """Read from PTX, where `.rn` forbids the later stages to fuse; so no GPU is needed."""
    text = compiled(kernel, arch, "bfloat16")
    assert "mul.rn.f32" in text
    assert ("div.rn.f32" in text) == (kernel in QUANTIZERS)
    assert not re.search(r"\.ftz|\.approx|\.full|\bfma\.|\bmad\.\w*\.f32|\b(mul|add|sub)\.f32", text)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("arch", [80, 90])
def test_compiled_products_round_as_the_numerics_say(arch, dtype):
    text = compiled("gemm_int8", arch, dtype, input="*i8")
    assert re.search(r"mma.*\.s32\.s8\.s8", text), "the tensor cores sum in int32"
    assert "cvt.rn.f32.s32" in text
    assert "fma.rn.f32" in text
    assert not re.search(r"\.ftz|\.approx|\bmad\.\w*\.f32|\b(mul|add|sub)\.f32", text)
    assert len(re.findall(r"\bmul\.rn\.f32", text)) > len(re.findall(r"\bfma\.rn\.f32", text))
    if dtype != "float32":
        short = {"float16": "f16", "bfloat16": "bf16"}[dtype]
        assert re.search(rf"cvt\.rn\.{short}(x2)?\.f32", text)


def test_compiled_long_products_are_summed_in_64_bits():
    text = compiled("gemm_int8", 80, "float32", exact_tiles=2047, input="*i8")
    assert "cvt.rn.f32.s64" in text and "cvt.rn.f32.s32" not in text


def test_kernels_are_not_compiled_anew_for_every_row_count(monkeypatch):
    """Sizes are arguments, not constants; the constants of a call come from a handful of tiles."""
    from qbits import triton_kernels

    variants: dict[str, set[tuple[tuple[str, int], ...]]] = {}

    def launch(
        kernel: Any, num_programs: int, tensor: torch.Tensor, *arguments: Any, **constants: Any
    ) -> None:
        variants.setdefault(kernel.__name__, set()).add(tuple(sorted(constants.items())))

    monkeypatch.setattr(triton_kernels, "_launch", launch)
    for rows in (*range(1, 300), 5_000, 20_000, 100_001):
        x = torch.empty(rows, 4096, dtype=torch.float16, device="meta")
        codes, scales = triton_kernels.quantize_rowwise(x)
        triton_kernels.quantize_columnwise_and_transpose(x)
        triton_kernels.quantize_global(x)
        triton_kernels.quantize_global_transpose(x)
        triton_kernels.dequantize_rowwise(codes, scales, torch.float16)
        triton_kernels.gemm_int8(codes, codes[:1], torch.float16, scales, scales[:1], None, None)
    counts = {kernel: len(constants) for kernel, constants in variants.items()}
    assert counts.pop("gemm_int8") == 3
    assert counts.pop("quantize_transposed") == 2  # with a scale for each column, and with one
    assert set(counts.values()) == {1}, counts


@pytest.mark.gpu
def test_a_gpu_compiles_few_variants_for_many_row_counts(tmp_path):
    code = """
import torch
from qbits import triton_kernels
for rows in (*range(100, 164), 16_000, 20_001):
    codes, scales = triton_kernels.quantize_rowwise(torch.randn(rows, 256, device="cuda"))
    triton_kernels.quantize_columnwise_and_transpose(torch.randn(rows, 256, device="cuda"))
"""
    done = on_triton("cuda", "-c", code, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    # three kernels; a row count may be a multiple of 16 or not
    assert len([*tmp_path.rglob("*.cubin")]) <= 6
