"""The CPU backend with one and two threads against torch and bitsandbytes; outputs given, memory warm.

Correctness comes first: the vector path must equal the scalar one, run by a process with `QBITS_CPU=scalar`.
bitsandbytes takes no outputs on the CPU, so it allocates.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from common import Report, arguments, peer, wall_us
from qbits import ops
from qbits.codebooks import create_dynamic_map, create_linear_map

NUM_ELEMENTS = 4 * 2**20
N = K = 4096


def fingerprint() -> str:
    """Hash of what every timed op gives for the same inputs."""
    generator = torch.Generator().manual_seed(7)
    digest = hashlib.sha256()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(2**18 + 37, generator=generator).to(dtype)
        results = []
        for codebook in ("nf4", "fp4"):
            packed, absmax = ops.quantize_4bit(x, codebook, 64)
            results += [packed, absmax, ops.dequantize_4bit(packed, absmax, x.numel(), codebook, 64, dtype)]
            results += ops.quantize_absmax(absmax)
        for table in (create_dynamic_map(), create_linear_map()):
            codes, absmax = ops.quantize_blockwise(x, table, 256)
            results += [codes, absmax, ops.dequantize_blockwise(codes, absmax, table, 256, dtype)]
        codes = torch.randint(-128, 128, (37, 517), dtype=torch.int8, generator=generator)
        scales = torch.rand(37, generator=generator)
        results.append(ops.gemm_int8(codes, codes, dtype, scales, scales))
        for result in results:
            digest.update(result.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check(report: Report) -> None:
    """The path of this machine against the scalar one; gemm_4bit against float64."""
    command = [sys.executable, os.path.abspath(__file__), "--fingerprint"]
    scalar = subprocess.run(
        command, env={**os.environ, "QBITS_CPU": "scalar"}, capture_output=True, text=True, check=True
    ).stdout.split()[-1]
    if fingerprint() != scalar:
        raise SystemExit("bench: the vector path must equal the scalar path, got other bits")
    weight = torch.randn(256, 1024) / 32
    packed, absmax = ops.quantize_4bit(weight, "nf4", 64)
    x = torch.randn(3, 1024)
    matrix = ops.dequantize_4bit(packed, absmax, weight.numel(), "nf4", 64, torch.float32).view(256, 1024)
    want = x.double() @ matrix.double().T
    error = (ops.gemm_4bit(x, packed, absmax, 256, 1024, "nf4", 64).double() - want).abs().max()
    dense = ((x @ matrix.T).double() - want).abs().max()
    if error > 2 * dense:
        raise SystemExit(f"bench: gemm_4bit must be within twice torch's error {dense:.3g}, got {error:.3g}")
    report.note("the vector path equals the scalar path bit for bit; gemm_4bit is within twice torch's error")


@dataclass(frozen=True)
class Case:
    """One row: bytes that must move, our call, torch's and the peer's where they have one."""

    name: str
    num_bytes: int
    run: Callable[[], Any]
    torch: Callable[[], Any] | None = None
    peer: Callable[[], Any] | None = None


def cases_4bit(bnb: Any) -> Iterator[Case]:
    """NF4 with block 64."""
    n = NUM_ELEMENTS
    x, coded = torch.randn(n), n // 2 + n // 16
    packed, absmax = ops.quantize_4bit(x, "nf4", 64)
    out = (packed.clone(), absmax.clone())

    def quantize_peer() -> Any:
        return bnb.functional.quantize_4bit(x, blocksize=64, quant_type="nf4")

    peers = (quantize_peer, decoding_peer(bnb, x)) if bnb else (None, None)
    yield Case(
        "quantize nf4 64, float32",
        4 * n + coded,
        lambda: ops.quantize_4bit(x, "nf4", 64, out=out),
        peer=peers[0],
    )
    for dtype in (torch.bfloat16, torch.float32):
        y = torch.empty(n, dtype=dtype)
        yield Case(
            f"dequantize nf4 64 to {str(dtype).removeprefix('torch.')}",
            coded + n * dtype.itemsize,
            lambda y=y: ops.dequantize_4bit(packed, absmax, n, "nf4", 64, y.dtype, out=y),  # type: ignore[misc]
            peer=peers[1](dtype) if peers[1] else None,
        )


def decoding_peer(bnb: Any, x: torch.Tensor) -> Callable[[torch.dtype], Callable[[], Any]]:
    """Bitsandbytes' decoder to a dtype; the dtype comes from what was quantized."""

    def peer_for(dtype: torch.dtype) -> Callable[[], Any]:
        packed, state = bnb.functional.quantize_4bit(x.to(dtype), blocksize=64, quant_type="nf4")
        return lambda: bnb.functional.dequantize_4bit(packed, state)

    return peer_for


def cases_8bit(bnb: Any) -> Iterator[Case]:
    """The signed dynamic map with block 256."""
    n, table = NUM_ELEMENTS, create_dynamic_map()
    x, coded = torch.randn(n), n + n // 64
    codes, absmax = ops.quantize_blockwise(x, table, 256)
    out, y = (codes.clone(), absmax.clone()), torch.empty(n, dtype=torch.bfloat16)

    def quantize_peer() -> Any:
        return bnb.functional.quantize_blockwise(x, code=table, blocksize=256)

    state = bnb.functional.quantize_blockwise(x.bfloat16(), code=table, blocksize=256) if bnb else None
    yield Case(
        "quantize 8-bit dynamic 256, float32",
        4 * n + coded,
        lambda: ops.quantize_blockwise(x, table, 256, out=out),
        peer=quantize_peer if bnb else None,
    )
    yield Case(
        "dequantize 8-bit dynamic 256 to bfloat16",
        coded + 2 * n,
        lambda: ops.dequantize_blockwise(codes, absmax, table, 256, torch.bfloat16, out=y),
        peer=(lambda: bnb.functional.dequantize_blockwise(*state)) if state else None,
    )


def cases_gemm(bnb: Any) -> Iterator[Case]:
    """gemm_4bit in float32 against torch's float32 linear and bitsandbytes."""
    weight = torch.randn(N, K) / K**0.5
    packed, absmax = ops.quantize_4bit(weight, "nf4", 64)
    theirs = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4") if bnb else None

    def case(M: int) -> Case:
        x, y = torch.randn(M, K), torch.empty(M, N)
        return Case(
            f"gemm_4bit nf4, M = {M}, {N} x {K}, float32",
            N * K // 2 + N * K // 16 + 4 * M * (N + K),
            lambda: ops.gemm_4bit(x, packed, absmax, N, K, "nf4", 64, out=y),
            lambda: torch.nn.functional.linear(x, weight),
            (lambda: bnb.matmul_4bit(x, theirs[0].t(), theirs[1])) if theirs else None,
        )

    yield from (case(M) for M in (1, 4, 16))


def cases_int8(bnb: Any) -> Iterator[Case]:
    """gemm_int8 with scales against torch's float32 linear; bitsandbytes' gives raw sums."""

    def case(M: int, n: int, k: int) -> Case:
        codes, weight = (torch.randint(-127, 128, (rows, k), dtype=torch.int8) for rows in (M, n))
        rows, columns, y = torch.rand(M), torch.rand(n), torch.empty(M, n)
        x, dense = torch.randn(M, k), torch.randn(n, k)
        return Case(
            f"gemm_int8, M = {M}, {n} x {k}, float32",
            (M + n) * k + 4 * M * n,
            lambda: ops.gemm_int8(codes, weight, torch.float32, rows, columns, out=y),
            lambda: torch.nn.functional.linear(x, dense),
            (lambda: bnb.functional.int8_linear_matmul(codes, weight)) if bnb else None,
        )

    yield from (case(*shape) for shape in ((1, N, K), (16, N, K), (1024, 1024, 1024)))


def measure(report: Report, options: Any, num_threads: int, alone: dict[str, float], bnb: Any) -> None:
    """All rows with one number of threads; `alone` keeps the times of one thread."""
    torch.set_num_threads(num_threads)
    min_ms = 5.0 if options.quick else 100.0

    def timed(call: Callable[[], Any] | None) -> float | None:
        if call is None:
            return None
        try:
            return wall_us(call, min_ms).us
        except Exception as error:
            report.note(f"peer: {type(error).__name__}: {str(error).splitlines()[0]}")
            return None

    for case in (*cases_4bit(bnb), *cases_8bit(bnb), *cases_gemm(bnb), *cases_int8(bnb)):
        if options.only not in case.name:
            continue
        time = wall_us(case.run, min_ms)
        torch_us, peer_us = timed(case.torch), timed(case.peer)
        alone.setdefault(case.name, time.us)
        report.add(
            op=case.name,
            num_threads=num_threads,
            us=time.us,
            low_us=time.low_us,
            high_us=time.high_us,
            num_bytes=case.num_bytes,
            gb_per_s=case.num_bytes / time.us * 1e-3,
            scaling=alone[case.name] / time.us,
            torch_us=torch_us,
            peer_us=peer_us,
            speedup=peer_us / time.us if peer_us else None,
        )


def main() -> None:
    """Checks, then one thread, then two."""
    if "--fingerprint" in sys.argv:
        print(fingerprint())
        return
    options = arguments(__doc__)
    torch.manual_seed(0)
    report = Report("cpu", "cpu")
    check(report)
    bnb = peer("bitsandbytes")
    alone: dict[str, float] = {}
    for num_threads in (1, 2):
        measure(report, options, num_threads, alone, bnb)
    report.write(options)


if __name__ == "__main__":
    main()
