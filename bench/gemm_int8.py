"""gemm_int8 on a GPU against torch's int8 and fp8 products, cuBLAS in 16 bits and bitsandbytes' int8 linear.

Correctness comes first: each shape is compared with float64 sums of the same codes, which are exact. Then
graph replay over weights that rotate through more than the L2, all peers in turn. Codes are Gaussian rows,
quantized by their largest magnitude. The floor is the bytes at 4.40 TB/s, or the multiplications at 1828
TOPS, which the tensor cores of an H200 sustain on such codes. `--sustained` also runs ten seconds each from
1024 rows on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import Replay, Report, arguments, interleaved, num_sets, peer, sustained
from qbits import _core, ops

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (5120, 1280), (1280, 5120))  # N, K
TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
NUM_OUTLIERS = (0, 7, 64)
READ_TB_PER_S = 4.40
TOPS = 1828.0
SUSTAINED_TOKENS, SUSTAINED_SECONDS = 1024, 10.0

Calls = list[Callable[[], Any]]


def quantized(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of Gaussian rows."""
    x = torch.randn(rows, columns, device="cuda")
    scales = x.abs().amax(dim=1)
    return (x * (127 / scales)[:, None]).round().to(torch.int8), scales


class Problem:
    """One product: a warm input, and weights of which each is found cold."""

    def __init__(self, M: int, N: int, K: int) -> None:
        self.M, self.N, self.K = M, N, K
        self.input, self.input_scales = quantized(M, K)
        self.weights = [quantized(N, K) for _ in range(num_sets(N * K))]
        self.x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
        self.outputs = [torch.empty(M, N, device="cuda", dtype=torch.bfloat16) for _ in self.weights]

    def multiply(self, index: int) -> torch.Tensor:
        """The scaled product with one of the weights."""
        weight, scales = self.weights[index]
        operands = (self.input, weight, torch.bfloat16, self.input_scales, scales)
        return ops.gemm_int8(*operands, out=self.outputs[index])

    def calls(self) -> Calls:
        """Of every weight in turn."""
        return [lambda i=i: self.multiply(i) for i in range(len(self.weights))]

    def with_outliers(self, num: int) -> Calls:
        """The same with so many unquantized columns."""
        mask = torch.zeros(self.K, dtype=torch.bool, device="cuda")
        mask[torch.randperm(self.K, device="cuda")[:num]] = True
        codes = self.input.masked_fill(mask, 0)
        return [
            lambda w=w, s=s, o=o: ops.gemm_int8_outliers(codes, self.input_scales, self.x, mask, w, s, out=o)
            for (w, s), o in zip(self.weights, self.outputs, strict=True)
        ]


def check(problem: Problem) -> None:
    """The sums bit for bit, the scaled product within its rounding."""
    weight, scales = problem.weights[0]
    sums = problem.input.double() @ weight.double().T
    raw = ops.gemm_int8(problem.input, weight, torch.int32)
    if not torch.equal(raw.double(), sums):
        raise SystemExit(f"bench: gemm_int8 of {problem.M} x {problem.N} x {problem.K} must be exact")
    want = sums * problem.input_scales.double()[:, None] * scales.double() / 127**2
    error = (problem.multiply(0).double() - want).abs()
    # one rounding to bfloat16, and four of float32
    if not bool((error <= want.abs() * (2.0**-8 + 2.0**-21)).all()):
        raise SystemExit(f"bench: gemm_int8 of {problem.M} x {problem.N} x {problem.K} must be rounded once")


def fp8_calls(problem: Problem) -> Calls:
    """Torch's product of e4m3 operands with scales by row and column."""
    e4m3 = torch.float8_e4m3fn
    left = torch.randn(problem.M, problem.K, device="cuda").to(e4m3)
    rows = problem.input_scales.reshape(-1, 1) / 448
    calls: Calls = []
    for _, scales in problem.weights:
        right = torch.randn(problem.N, problem.K, device="cuda").to(e4m3).t()
        columns = scales.reshape(1, -1) / 448
        calls.append(
            lambda b=right, s=columns: torch._scaled_mm(
                left, b, scale_a=rows, scale_b=s, out_dtype=torch.bfloat16, use_fast_accum=True
            )
        )
    return calls


def linear_calls(problem: Problem, dtype: torch.dtype) -> Calls:
    """CuBLAS over rotating 16-bit weights."""
    x, N, K = problem.x.to(dtype), problem.N, problem.K
    matrices = [torch.randn(N, K, device="cuda", dtype=dtype) for _ in range(num_sets(2 * N * K))]
    return [lambda m=m: torch.nn.functional.linear(x, m) for m in matrices]


def bitsandbytes_calls(bnb: Any, problem: Problem) -> Calls:
    """Its whole linear: quantization of the rows, product, scaling."""
    half, calls = problem.x.half(), []
    for weight, scales in problem.weights:
        state = bnb.MatmulLtState()
        state.CB, state.SCB, state.has_fp16_weights, state.threshold = weight, scales, False, 0.0
        calls.append(lambda w=weight, s=state: bnb.matmul(half, w, state=s))
    return calls


def peer_makers(problem: Problem, bnb: Any) -> dict[str, Callable[[], Calls]]:
    """By name; some refuse a shape."""
    makers: dict[str, Callable[[], Calls]] = {
        "fp16": lambda: linear_calls(problem, torch.float16),
        "bf16": lambda: linear_calls(problem, torch.bfloat16),
        "int_mm": lambda: [lambda w=w: torch._int_mm(problem.input, w.t()) for w, _ in problem.weights],
        "fp8": lambda: fp8_calls(problem),
    }
    if bnb:
        makers["bitsandbytes"] = lambda: bitsandbytes_calls(bnb, problem)
    return makers


def measure(report: Report, problem: Problem, bnb: Any, repeats: int, is_sustained: bool) -> None:
    """One row of the table."""
    M, N, K = problem.M, problem.N, problem.K
    replays = {"ours": Replay(problem.calls())}
    for num in NUM_OUTLIERS:
        replays[f"outliers_{num}"] = Replay(problem.with_outliers(num))
    for name, make in peer_makers(problem, bnb).items():
        try:
            replays[name] = Replay(make())
        except Exception as error:
            report.note(f"{name} at {M} x {N} x {K}: {type(error).__name__}: {str(error).splitlines()[0]}")
    times = interleaved(replays, repeats)
    ours = times["ours"]
    num_bytes, num_ops = N * K + M * K + 2 * M * N, 2 * M * N * K
    floor_us = max(num_bytes / READ_TB_PER_S, num_ops / TOPS) * 1e-6
    more: dict[str, float | None] = {}
    if is_sustained and M >= SUSTAINED_TOKENS:
        for name in ("ours", "int_mm"):
            run = sustained(replays[name], SUSTAINED_SECONDS)
            more |= {f"sustained_{name}_us": run.us, f"{name}_sm_mhz": run.sm_mhz, f"{name}_watts": run.watts}
    report.add(
        op="gemm_int8",
        dtype="bfloat16",
        M=M,
        N=N,
        K=K,
        path=_core.plan_gemm_int8(M, N, K, torch.bfloat16, 0),
        us=ours.us,
        low_us=ours.low_us,
        high_us=ours.high_us,
        tops=num_ops / ours.us * 1e-6,
        num_bytes=num_bytes,
        floor_us=floor_us,
        share_of_floor=floor_us / ours.us,
        **{f"{name}_us": timing.us for name, timing in times.items() if name != "ours"},
        **more,
    )


def main() -> None:
    """Checks, then times every shape."""
    options = arguments(__doc__, sustained="also run ten seconds each from 1024 rows on")
    torch.manual_seed(0)
    report = Report("gemm_int8", "cuda")
    bnb = peer("bitsandbytes")
    shapes, repeats = (((512, 1024),), 2) if options.quick else (SHAPES, 7)
    for N, K in shapes:
        for M in TOKENS:
            if options.only in f"{M} x {N} x {K}":
                problem = Problem(M, N, K)
                check(problem)
                measure(report, problem, bnb, repeats, options.sustained)
    report.write(options)


if __name__ == "__main__":
    main()
