"""gemm_4bit on a GPU against cuBLAS in bfloat16 and bitsandbytes, at the weights of real models.

Correctness comes first: each shape is compared with float64. Then graph replay over weights that rotate
through more than the L2, with warm activations, as in decoding; the floor is the bytes at 4.40 TB/s, which an
H200 reads.
"""

from __future__ import annotations

from typing import Any

import torch
from common import Replay, Report, arguments, interleaved, num_sets, peer
from qbits import _core, ops

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192))  # N, K
TOKENS = (1, 2, 4, 8, 16, 32, 64)
PEER_TOKENS = (1, 8)
READ_TB_PER_S = 4.40


class Weights:
    """Copies of one quantized weight, enough to find each of them cold."""

    def __init__(self, N: int, K: int, codebook: str, nested: bool) -> None:
        self.N, self.K, self.codebook = N, K, codebook
        self.packed_bytes = N * K * (0.5 + (1 + 4 / 256 if nested else 4) / 64)
        self.parts = [self.quantized(nested) for _ in range(num_sets(self.packed_bytes))]

    def quantized(self, nested: bool) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """packed, absmax, keywords of nested statistics."""
        weight = torch.randn(self.N, self.K, device="cuda", dtype=torch.bfloat16) / self.K**0.5
        packed, absmax = ops.quantize_4bit(weight, self.codebook, 64)
        if not nested:
            return packed, absmax, {}
        codes, scale, offset = ops.quantize_absmax(absmax)
        return packed, codes, {"absmax_scale": scale, "absmax_offset": offset}

    def multiply(self, x: torch.Tensor, index: int, out: torch.Tensor) -> torch.Tensor:
        """The product with one of the copies."""
        packed, absmax, keywords = self.parts[index]
        return ops.gemm_4bit(x, packed, absmax, self.N, self.K, self.codebook, 64, out=out, **keywords)

    def decoded(self, index: int, dtype: torch.dtype) -> torch.Tensor:
        """One of the copies as a matrix."""
        packed, absmax, keywords = self.parts[index]
        num_elements = self.N * self.K
        flat = ops.dequantize_4bit(packed, absmax, num_elements, self.codebook, 64, dtype, **keywords)
        return flat.view(self.N, self.K)


def check(report: Report, weights: Weights, dtype: torch.dtype) -> None:
    """No further from float64 than twice dequantize and cuBLAS."""
    matrix = weights.decoded(0, torch.float32)
    for M in TOKENS:
        x = torch.randn(M, weights.K, device="cuda", dtype=dtype)
        out = torch.empty(M, weights.N, device="cuda", dtype=dtype)
        want = x.double() @ matrix.double().T
        error = (weights.multiply(x, 0, out).double() - want).abs()
        dense = ((x @ matrix.to(dtype).T).double() - want).abs()
        if not (error.max() <= 2 * dense.max() and error.mean() <= 2 * dense.mean()):
            raise SystemExit(
                f"bench: gemm_4bit of M {M}, N {weights.N}, K {weights.K} must be within twice cuBLAS' error "
                f"{dense.max():.3g}, got {error.max():.3g}"
            )
    report.note(f"{weights.codebook} {weights.N} x {weights.K} {dtype}: error at most twice that of cuBLAS")


def dense_replays(weights: Weights, x: torch.Tensor) -> Replay:
    """CuBLAS over rotating bfloat16 copies of the weight."""
    matrices = [
        torch.randn(weights.N, weights.K, device="cuda", dtype=x.dtype) / weights.K**0.5
        for _ in range(num_sets(weights.N * weights.K * x.itemsize))
    ]
    return Replay([lambda m=m: torch.nn.functional.linear(x, m) for m in matrices])


def peer_replay(bnb: Any, weights: Weights, x: torch.Tensor) -> Replay:
    """Bitsandbytes' product with the same weights."""
    state_class = bnb.functional.QuantState
    code = bnb.functional.get_4bit_type(weights.codebook, device="cuda")
    calls = []
    for packed, absmax, _ in weights.parts:
        shape = torch.Size((weights.N, weights.K))
        state = state_class(absmax, shape, code, 64, weights.codebook, x.dtype)
        packed = packed.view(-1, 1)
        calls.append(lambda p=packed, s=state: bnb.matmul_4bit(x, p.t(), s))
    return Replay(calls)


def measure(
    report: Report, weights: Weights, M: int, dtype: torch.dtype, nested: bool, bnb: Any, repeats: int
) -> None:
    """One row."""
    N, K = weights.N, weights.K
    x = torch.randn(M, K, device="cuda", dtype=dtype)
    outputs = [torch.empty(M, N, device="cuda", dtype=dtype) for _ in weights.parts]
    calls = [lambda i=i: weights.multiply(x, i, outputs[i]) for i in range(len(outputs))]
    replays = {"ours": Replay(calls), "cublas": dense_replays(weights, x)}
    if bnb and not nested and M in PEER_TOKENS:
        try:
            replays["peer"] = peer_replay(bnb, weights, x)
        except Exception as error:
            report.note(f"peer of {M} x {N} x {K}: {type(error).__name__}: {str(error).splitlines()[0]}")
    times = interleaved(replays, repeats)
    ours, cublas, other = times["ours"], times["cublas"], times.get("peer")
    num_bytes = weights.packed_bytes + (M * K + M * N) * dtype.itemsize
    report.add(
        op=f"gemm_4bit {weights.codebook}{' nested' if nested else ''}",
        dtype=str(dtype).removeprefix("torch."),
        M=M,
        N=N,
        K=K,
        path=_core.plan_gemm_4bit(M, N, K, dtype, 64, 0),
        us=ours.us,
        low_us=ours.low_us,
        high_us=ours.high_us,
        num_bytes=round(num_bytes),
        tb_per_s=num_bytes / ours.us * 1e-6,
        floor_us=num_bytes / READ_TB_PER_S * 1e-6,
        share_of_floor=num_bytes / READ_TB_PER_S * 1e-6 / ours.us,
        cublas_us=cublas.us,
        speedup_over_cublas=cublas.us / ours.us,
        peer_us=other.us if other else None,
        speedup=other.us / ours.us if other else None,
        num_sets=len(outputs),
    )


def main() -> None:
    """Checks, then times every shape."""
    options = arguments(__doc__)
    torch.manual_seed(0)
    report = Report("gemm_4bit", "cuda")
    bnb = peer("bitsandbytes")
    shapes, repeats = (((512, 1024),), 2) if options.quick else (SHAPES, 7)
    for N, K in shapes:
        for codebook, nested, dtype in (
            ("nf4", False, torch.bfloat16),
            ("nf4", True, torch.bfloat16),
            ("fp4", False, torch.bfloat16),
            ("nf4", False, torch.float16),
        ):
            is_main = (codebook, nested, dtype) == ("nf4", False, torch.bfloat16)
            if options.only not in f"{codebook} {N} {K} {dtype} {'nested' if nested else ''}":
                continue
            weights = Weights(N, K, codebook, nested)
            check(report, weights, dtype)
            for M in TOKENS if is_main else (1, 8):
                measure(report, weights, M, dtype, nested, bnb, repeats)
    report.write(options)


if __name__ == "__main__":
    main()
