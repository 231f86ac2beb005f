"""gemm_4bit on a GPU against cuBLAS in bfloat16, bitsandbytes and torch's int4 product, at models' weights.

Correctness comes first: each shape is compared with float64. Then graph replay over weights that rotate
through more than the L2, with warm activations, as in decoding, all peers in turn. The floor is the bytes at
4.40 TB/s, which an H200 reads, or the multiplications at 790 TFLOP/s, which its cuBLAS reaches in short runs.
`--sustained` also runs both for ten seconds each from 1024 rows on, where power limits them, and logs the
clock and the power.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import Replay, Report, Timing, arguments, interleaved, num_sets, peer, sustained
from qbits import _core, dependent_launch, ops
from qbits.functional import QTensor4
from qbits.nn import Linear4bit

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192))  # N, K
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
OTHER_TOKENS = (1, 16, 64, 256)  # of other codebooks, dtypes and nested statistics
SLOW_PEER = 10.0  # times cuBLAS: such a peer is timed once
SUSTAINED_TOKENS, SUSTAINED_SECONDS = 1024, 10.0  # from so many rows on, for so long
TRANSPOSED_TOKENS = (1, 8, 16, 32)
DEPENDENT_TOKENS = (1, 2, 4, 8, 16, 32)
READ_TB_PER_S = 4.40
TFLOP_PER_S = 790.0

# By N, K and M: the best of eight 4-bit kernels and cuBLAS in bfloat16, microseconds on an H200 on another
# day. Compared with today's run by the ratio of the two days' cuBLAS.
EARLIER_US = {
    (4096, 4096): {1: (7.0, 12.5), 16: (9.4, 13.3), 32: (10.7, 13.6), 64: (12.0, 12.0), 128: (15.4, 13.6)}
    | {256: (21.3, 17.1), 512: (29.9, 28.3), 1024: (54.9, 53.4), 4096: (203.2, 204.8)},
    (14336, 4096): {1: (14.3, 30.8), 16: (16.5, 30.5), 32: (20.7, 31.3), 64: (22.5, 33.8), 128: (30.6, 35.2)}
    | {256: (50.3, 50.0), 512: (99.8, 101.6), 1024: (179.2, 176.0), 4096: (712.6, 679.7)},
    (4096, 14336): {1: (14.8, 31.9), 16: (17.1, 32.2), 32: (20.9, 33.3), 64: (22.3, 36.2), 128: (31.4, 37.5)}
    | {256: (52.3, 59.2), 512: (109.7, 93.9), 1024: (193.8, 172.5), 4096: (736.1, 678.1)},
    (8192, 8192): {1: (15.5, 34.1), 16: (16.9, 33.6), 32: (21.6, 34.1), 64: (25.2, 37.2), 128: (34.9, 37.3)}
    | {256: (58.9, 62.4), 512: (105.4, 105.0), 1024: (193.1, 203.3), 4096: (788.7, 798.8)},
    (28672, 8192): {1: (51.6, 107.8), 16: (52.3, 107.7), 32: (57.7, 109.2), 64: (85.2, 115.1)}
    | {
        128: (103.8, 126.1),
        256: (196.0, 200.0),
        512: (360.5, 403.7),
        1024: (665.2, 700.2),
        4096: (2767, 2772),
    },
}


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


def check(report: Report, weights: Weights, dtype: torch.dtype, tokens: Sequence[int]) -> None:
    """Mean error from float64 at most 1.05 times, largest at most 1.5 times that of dequantize and cuBLAS."""
    matrix = weights.decoded(0, torch.float32)
    errors = []
    for M in tokens:
        x = torch.randn(M, weights.K, device="cuda", dtype=dtype)
        out = torch.empty(M, weights.N, device="cuda", dtype=dtype)
        want = x.double() @ matrix.double().T
        error = (weights.multiply(x, 0, out).double() - want).abs()
        dense = ((x @ matrix.to(dtype).T).double() - want).abs()
        mean, largest = float(error.mean() / dense.mean()), float(error.max() / dense.max())
        if not (mean <= 1.05 and largest <= 1.5):
            raise SystemExit(
                f"bench: gemm_4bit of M {M}, N {weights.N}, K {weights.K} must have at most 1.05 times "
                f"(mean) and 1.5 times (largest) cuBLAS' error, got {mean:.3f} and {largest:.3f}"
            )
        errors.append(f"{mean:.2f}/{largest:.2f}")
    name = f"{weights.codebook} {weights.N} x {weights.K} {str(dtype).removeprefix('torch.')}"
    report.note(f"{name}: mean/largest error over cuBLAS' at M = {tokens}: {' '.join(errors)}")


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


def dependent_replay(weights: Weights, calls: list[Callable[[], torch.Tensor]]) -> Replay:
    """The same calls with weights that nobody writes: each is fetched while the call before runs."""
    layers = torch.nn.ModuleList()
    for packed, absmax, _ in weights.parts:
        record = QTensor4(packed, absmax, (weights.N, weights.K), torch.bfloat16, weights.codebook, 64)
        layer = Linear4bit(weights.K, weights.N, bias=False, device="meta")
        layer.load_record(record, adopt=True)
        layers.append(layer)
    with dependent_launch(layers):
        return Replay(calls)


def int4_replay(weights: Weights, x: torch.Tensor) -> Replay:
    """The int4 product of torch, group 64, over random codes of the same shape."""
    N, K = weights.N, weights.K
    scales = torch.randn(K // 64, N, 2, device="cuda", dtype=x.dtype) / K
    calls = []
    for _ in weights.parts:
        codes = torch.randint(0, 256, (N, K // 2), device="cuda", dtype=torch.uint8)
        packed = torch._convert_weight_to_int4pack(codes, 8)
        calls.append(lambda p=packed: torch._weight_int4pack_mm(x, p, 64, scales))
    return Replay(calls)


def peer_replays(report: Report, weights: Weights, x: torch.Tensor, bnb: Any) -> dict[str, Replay]:
    """Of the peers that are installed and take the shape."""
    makers: dict[str, Callable[[], Replay]] = {"int4": lambda: int4_replay(weights, x)}
    if bnb:
        makers["bitsandbytes"] = lambda: peer_replay(bnb, weights, x)
    replays = {}
    for name, make in makers.items():
        try:
            replays[name] = make()
        except Exception as error:
            where = f"{x.shape[0]} x {weights.N} x {weights.K}"
            report.note(f"{name} at {where}: {type(error).__name__}: {str(error).splitlines()[0]}")
    return replays


def sustained_columns(replays: dict[str, Replay]) -> dict[str, float | None]:
    """Of ten seconds of our product and ten of cuBLAS."""
    columns: dict[str, float | None] = {}
    for name in ("ours", "cublas"):
        run = sustained(replays[name], SUSTAINED_SECONDS)
        columns |= {f"sustained_{name}_us": run.us, f"{name}_sm_mhz": run.sm_mhz, f"{name}_watts": run.watts}
    return columns


def measure(
    report: Report,
    weights: Weights,
    M: int,
    dtype: torch.dtype,
    nested: bool,
    bnb: Any,
    repeats: int,
    is_sustained: bool,
) -> None:
    """One row; peers and long runs in NF4, bfloat16, plain absmax."""
    N, K = weights.N, weights.K
    x = torch.randn(M, K, device="cuda", dtype=dtype)
    outputs = [torch.empty(M, N, device="cuda", dtype=dtype) for _ in weights.parts]
    calls = [lambda i=i: weights.multiply(x, i, outputs[i]) for i in range(len(outputs))]
    replays = {"ours": Replay(calls), "cublas": dense_replays(weights, x)}
    is_main = not nested and weights.codebook == "nf4" and dtype == torch.bfloat16
    peers = peer_replays(report, weights, x, bnb) if is_main else {}
    slow = {n: r.first_us for n, r in peers.items() if r.first_us > SLOW_PEER * replays["cublas"].first_us}
    replays |= {name: replay for name, replay in peers.items() if name not in slow}
    if weights.codebook == "nf4" and not nested and M in DEPENDENT_TOKENS:
        replays["dependent"] = dependent_replay(weights, calls)
    times = interleaved(replays, repeats) | {name: Timing(us, us, us) for name, us in slow.items()}
    ours, cublas = times["ours"], times["cublas"]
    others = {name: times[name].us for name in peers}
    best_peer, best_us = min(others.items(), key=lambda item: item[1], default=(None, None))
    earlier = EARLIER_US.get((N, K), {}).get(M)
    num_bytes = weights.packed_bytes + (M * K + M * N) * dtype.itemsize
    floor_us = max(num_bytes / READ_TB_PER_S, 2 * M * N * K / TFLOP_PER_S) * 1e-6
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
        floor_us=floor_us,
        share_of_floor=floor_us / ours.us,
        dependent_us=times["dependent"].us if "dependent" in times else None,
        cublas_us=cublas.us,
        speedup_over_cublas=cublas.us / ours.us,
        peer=best_peer,
        peer_us=best_us,
        speedup=best_us / ours.us if best_us else None,
        earlier_peer_us=earlier[0] * cublas.us / earlier[1] if earlier else None,
        num_sets=len(outputs),
        **{f"{name}_us": us for name, us in sorted(others.items())},
        **(sustained_columns(replays) if is_sustained and is_main and M >= SUSTAINED_TOKENS else {}),
    )


def measure_transposed(report: Report, weights: Weights, M: int, repeats: int) -> None:
    """One row of the input's gradient, beside decoding and cuBLAS."""
    N, K = weights.N, weights.K
    gradient = torch.randn(M, N, device="cuda", dtype=torch.bfloat16)
    outputs = [torch.empty(M, K, device="cuda", dtype=torch.bfloat16) for _ in weights.parts]

    def fused(index: int) -> torch.Tensor:
        packed, absmax, _ = weights.parts[index]
        weight = (packed, absmax, N, K, weights.codebook, 64)
        return ops.gemm_4bit_transposed(gradient, *weight, out=outputs[index])

    def decoded(index: int) -> torch.Tensor:
        return torch.matmul(gradient, weights.decoded(index, torch.bfloat16), out=outputs[index])

    exact = gradient.double() @ weights.decoded(0, torch.float32).double()
    error, dense = ((call(0).double() - exact).abs() for call in (fused, decoded))
    if not (error.mean() <= 1.05 * dense.mean() and error.max() <= 1.5 * dense.max()):
        raise SystemExit(f"bench: gemm_4bit_transposed of M {M}, N {N}, K {K} is less exact than cuBLAS")
    indices = range(len(outputs))
    replays = {
        name.__name__: Replay([lambda i=i, f=name: f(i) for i in indices]) for name in (fused, decoded)
    }
    times = interleaved(replays, repeats)
    num_bytes = weights.packed_bytes + (M * K + M * N) * 2
    report.add(
        op=f"gemm_4bit_transposed {weights.codebook}",
        dtype="bfloat16",
        M=M,
        N=N,
        K=K,
        us=times["fused"].us,
        num_bytes=round(num_bytes),
        floor_us=num_bytes / READ_TB_PER_S * 1e-6,
        decoded_us=times["decoded"].us,
        speedup_over_decoded=times["decoded"].us / times["fused"].us,
    )


def main() -> None:
    """Checks, then times every shape."""
    options = arguments(__doc__, sustained="also run ten seconds each from 1024 rows on")
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
            tokens = TOKENS if is_main else OTHER_TOKENS
            check(report, weights, dtype, tokens)
            for M in tokens:
                measure(report, weights, M, dtype, nested, bnb, repeats, options.sustained)
            for M in TRANSPOSED_TOKENS if is_main else ():
                measure_transposed(report, weights, M, repeats)
    report.write(options)


if __name__ == "__main__":
    main()
