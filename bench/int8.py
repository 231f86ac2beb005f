"""int8 quantizers on a GPU against a copy of the same bytes and ratio, and against bitsandbytes.

Correctness comes first: every op is compared with the CPU backend, bit for bit. Then each is timed by graph
replay over rotating buffers of random normal data, interleaved with the copy and the peer. An op that reads
its input twice counts the second time only where the input is larger than the L2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from common import EqualToCpu, Report, arguments, peer
from qbits import ops
from quantizers import FLOATS, Case, measure, measure_long_copy
from yardstick import Yardstick

SHAPES = ((8192, 8192), (14336, 4096), (4096, 4096), (16384, 1280), (5120, 1280))
QUICK_SHAPES = ((512, 1280),)
THRESHOLD = 6.0
# share of the copy that is due, by op; dual codes of 4096 x 4096 and less: 0.85
GOALS = {
    "quantize_rowwise": 0.97,
    "dequantize_rowwise": 0.97,
    "quantize_columnwise": 0.94,
    "quantize_columnwise_and_transpose": 0.94,
    "quantize_global": 0.94,
    "quantize_global_transpose": 0.94,
    "quantize_dual_rowwise": 0.90,
    "quantize_dual_global": 0.90,
}
SMALL_DUAL_GOAL = 0.85


def with_outliers(x: torch.Tensor) -> torch.Tensor:
    """Seven columns of 20 to 60 in a quarter of the rows."""
    x = x.clamp(-5, 5)
    for column in torch.randperm(x.shape[1])[:7].tolist():
        hit = torch.rand(x.shape[0], device=x.device) < 0.25
        x[:, column] = torch.where(hit, torch.rand_like(x[:, column]) * 40 + 20, x[:, column])
    return x


def outputs_of(op: str, *args: Any) -> tuple[torch.Tensor, ...]:
    """Uninitialized outputs."""
    result = getattr(ops, op)(*args)
    return tuple(map(torch.empty_like, result))


def cases(shape: tuple[int, int], dtype: torch.dtype, l2_bytes: int, bnb: Any) -> Iterator[Case]:
    """Every op on one matrix."""
    rows, columns = shape
    n, size = rows * columns, dtype.itemsize
    label = f"{rows}x{columns}"
    twice = n * size if n * size > l2_bytes else 0  # the second read

    def quantizer(op: str, read: float, written: float, run_peer: Any = None) -> Case:
        def make(x: torch.Tensor) -> Any:
            matrix = x.view(shape)
            return matrix, outputs_of(op, matrix)

        return Case(
            f"{op} {label}", dtype, read, written, make, lambda o: getattr(ops, op)(o[0], out=o[1]), run_peer
        )

    has_peer = bnb is not None and dtype == torch.float16
    vectorwise = bnb.functional.int8_vectorwise_quant if has_peer else None
    double = bnb.functional.int8_double_quant if has_peer else None
    scales = 4 * rows
    plain = n * size
    yield quantizer("quantize_rowwise", plain, n + scales, vectorwise and (lambda o: vectorwise(o[0])))
    for op in ("quantize_columnwise", "quantize_columnwise_and_transpose"):
        yield quantizer(op, plain + twice, n + 4 * columns)
    for op in ("quantize_global", "quantize_global_transpose"):
        yield quantizer(op, plain + twice, n)
    run_double = double and (lambda o: double(o[0]))
    yield quantizer("quantize_dual_rowwise", plain + twice, 2 * n + scales + 4 * columns, run_double)
    yield quantizer("quantize_dual_global", plain + twice, 2 * n)

    def make_outliers(x: torch.Tensor) -> Any:
        matrix = with_outliers(x.view(shape))
        return matrix, outputs_of("quantize_rowwise_outliers", matrix, THRESHOLD)

    yield Case(
        f"quantize_rowwise_outliers {label}",
        dtype,
        plain,
        n + scales + columns,
        make_outliers,
        lambda o: ops.quantize_rowwise_outliers(o[0], THRESHOLD, out=o[1]),
        vectorwise and (lambda o: vectorwise(o[0], THRESHOLD)),
    )

    def decoder(quantize: str, decode: str, num_scales: int) -> Case:
        def make(x: torch.Tensor) -> Any:
            matrix = x.view(shape)
            return *getattr(ops, quantize)(matrix), torch.empty_like(matrix)

        def run(o: Any) -> Any:
            return getattr(ops, decode)(o[0], o[1], dtype, out=o[2])

        return Case(f"{decode} {label}", dtype, n + 4 * num_scales, plain, make, run)

    yield decoder("quantize_rowwise", "dequantize_rowwise", rows)
    yield decoder("quantize_columnwise", "dequantize_columnwise", columns)
    yield decoder("quantize_global", "dequantize_global", 1)


def check(report: Report) -> None:
    """Every op on the GPU equals the CPU backend bit for bit, with tails and without."""
    same = EqualToCpu()
    for dtype in FLOATS:
        for shape in ((1024, 1024), (513, 777), (1, 40_000), (40_000, 3)):
            x = torch.randn(shape).to(dtype)
            for op in GOALS:
                if op.startswith("quantize"):
                    same(getattr(ops, op), x)
            same(ops.quantize_rowwise_outliers, with_outliers(x) if shape[1] > 7 else x, THRESHOLD)
            for name in ("rowwise", "columnwise", "global"):
                values, scales = getattr(ops, f"quantize_{name}")(x)
                same(getattr(ops, f"dequantize_{name}"), values, scales, dtype)
    report.note(f"{same.num_checks} calls equal the CPU backend bit for bit")


def compare_with_goal(report: Report, case: Case, n: int) -> None:
    """Says which goals the last row has missed."""
    op = case.name.split()[0]
    goal = GOALS.get(op)
    if goal is not None and op.startswith("quantize_dual") and n <= 4096 * 4096:
        goal = SMALL_DUAL_GOAL
    share = report.rows[-1]["share_of_copy"]
    if goal is not None and share < goal:
        report.note(f"{case.key}: {share:.3f} of the copy, below {goal}")


def main() -> None:
    """Checks, then times everything."""
    options = arguments(__doc__)
    torch.manual_seed(0)
    report = Report("int8", "cuda")
    check(report)
    bnb = peer("bitsandbytes")
    yardstick = Yardstick()
    num_repeats = 2 if options.quick else 7
    measure_long_copy(report, yardstick, num_repeats)
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    for shape in QUICK_SHAPES if options.quick else SHAPES:
        # other dtypes than bfloat16 at the largest shape only
        for dtype in FLOATS if shape in (SHAPES[0], *QUICK_SHAPES) else FLOATS[:1]:
            for case in cases(shape, dtype, l2_bytes, bnb):
                if options.only in case.key:
                    n = shape[0] * shape[1]
                    measure(report, yardstick, case, n, num_repeats)
                    compare_with_goal(report, case, n)
    report.write(options)


if __name__ == "__main__":
    main()
