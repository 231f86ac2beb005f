"""LLM.int8() layers on a GPU against cuBLAS in float16 and bitsandbytes: by graph replay, and on the host.

Correctness comes first: each case is compared with float64. Activations are normal; with outliers some
columns hold values of 20 to 60 on a quarter of the tokens, as large language models' do (Dettmers et al.,
LLM.int8(), arXiv:2208.07339, section 4). Weights rotate through more than the L2. bitsandbytes cannot be
captured with a threshold, so that it is timed eagerly, its waits for the device included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import Eager, Replay, Report, arguments, host_ns, interleaved, num_sets, peer
from qbits import functional
from qbits.nn import Linear8bit

SHAPES = ((8192, 8192), (4096, 4096), (14336, 4096), (4096, 14336))  # N, K; the first is the goals'
TOKENS = (1, 16, 64, 256, 1024, 4096)
OUTLIERS = {"none": 0, "few": 7, "many": 64, "all": -1}  # columns that hold some
THRESHOLD = 6.0
# of 8192 x 8192: 4096 tokens against cuBLAS, a threshold against none, microseconds of one token
GOAL_SPEEDUP, GOAL_THRESHOLD_COST, GOAL_ONE_TOKEN_US = 1.9, 1.15, 20.0


def activations(M: int, K: int, num_columns: int) -> torch.Tensor:
    """Normal values, and ``num_columns`` (-1: all) with outliers on a quarter of the rows."""
    x = torch.randn(M, K, device="cuda", dtype=torch.float16).clamp_(-5, 5)
    columns = torch.randperm(K, device="cuda")[: K if num_columns < 0 else num_columns]
    rows = torch.randperm(M, device="cuda")[: max(M // 4, 1)]
    sizes = 20 + 40 * torch.rand(len(rows), len(columns), device="cuda")
    x[rows[:, None], columns] = (sizes * torch.randn_like(sizes).sign()).half()
    return x


def layers_of(N: int, K: int, count: int) -> list[Linear8bit]:
    """Copies of one layer."""
    linear = torch.nn.Linear(K, N, device="cuda", dtype=torch.float16)
    return [Linear8bit.from_linear(linear) for _ in range(count)]


def forward(layer: Linear8bit, x: torch.Tensor, threshold: float) -> Callable[[], torch.Tensor]:
    """The layer's product, at a threshold that is not its own."""
    record = layer.record()
    return lambda: functional.multiply_int8(x, record.values, record.scales, layer.bias, threshold)[0]


def check(report: Report, layer: Linear8bit, x: torch.Tensor, threshold: float, name: str) -> None:
    """No further from float64 than 2 % of its norm; without a threshold there must be no outliers."""
    got = forward(layer, x, threshold)()
    want = x.double() @ layer.dequantize(torch.float32).double().T + layer.bias.double()
    error = float((got.double() - want).norm() / want.norm())
    if not error <= 0.02:
        raise SystemExit(f"bench: linear_8bit {name} must be within 0.02 of float64, got {error:.4f}")
    report.note(f"{name}: relative error {error:.4f} at threshold {threshold:g}")


def bnb_layer(bnb: Any, layer: Linear8bit, threshold: float) -> torch.nn.Module:
    """The same weight in bitsandbytes' layer."""
    K, N = layer.in_features, layer.out_features
    theirs = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False, threshold=threshold, device="meta")
    weight = layer.dequantize(torch.float16)
    theirs.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    theirs.bias = layer.bias
    return theirs.cuda().eval()


def replays(
    layers: Sequence[Linear8bit], x: torch.Tensor, outliers: torch.Tensor, bnb: Any
) -> dict[str, Replay | Eager]:
    """What is timed side by side: cuBLAS, ours without and with a threshold, theirs."""
    dense = [layer.dequantize(torch.float16) for layer in layers]
    bias = layers[0].bias
    found: dict[str, Replay | Eager] = {
        "cublas_float16": Replay([lambda w=w: torch.nn.functional.linear(x, w, bias) for w in dense]),
        "int8": Replay([forward(layer, x, 0.0) for layer in layers]),
        "llm_int8": Replay([forward(layer, outliers, THRESHOLD) for layer in layers]),
    }
    if bnb is not None:
        plain, mixed = bnb_layer(bnb, layers[0], 0.0), bnb_layer(bnb, layers[0], THRESHOLD)
        found["bnb_int8"] = Eager([lambda: plain(x)])
        found["bnb_llm_int8"] = Eager([lambda: mixed(outliers)])
    return found


def measure(report: Report, options: argparse.Namespace, N: int, K: int, bnb: Any) -> None:
    """All token counts and kinds of outliers of one shape."""
    layers = layers_of(N, K, num_sets(N * K))  # enough to find each weight cold
    tokens = (1, 16) if options.quick else TOKENS
    for M in tokens:
        for kind, num_columns in OUTLIERS.items():
            name = f"{N} x {K}, {M} tokens, outliers {kind}"
            if options.only not in name or (kind in ("many", "all") and M not in (1, 4096)):
                continue
            x, outliers = activations(M, K, 0), activations(M, K, num_columns)
            check(report, layers[0], outliers, THRESHOLD, name)
            check(report, layers[0], x, 0.0, name)
            times = interleaved(replays(layers, x, outliers, bnb))
            row = {f"{who}_us": timing.us for who, timing in times.items()}
            speedup = times["cublas_float16"].us / times["int8"].us
            cost = times["llm_int8"].us / times["int8"].us
            report.add(name=name, **row, speedup=speedup, threshold_cost=cost)
            if SHAPES[0] == (N, K) and kind == "few":
                judge(report, M, speedup, cost, times["llm_int8"].us)


def judge(report: Report, M: int, speedup: float, cost: float, one_token_us: float) -> None:
    """A note for each goal that this case decides."""
    goals = []
    if M == 4096:
        goals = [
            (speedup >= GOAL_SPEEDUP, f"{speedup:.2f} times cuBLAS in float16, {GOAL_SPEEDUP} wanted"),
            (
                cost <= GOAL_THRESHOLD_COST,
                f"threshold costs {cost:.2f}, at most {GOAL_THRESHOLD_COST} wanted",
            ),
        ]
    elif M == 1:
        goals = [(one_token_us <= GOAL_ONE_TOKEN_US, f"{one_token_us:.1f} us, {GOAL_ONE_TOKEN_US} wanted")]
    for holds, text in goals:
        report.note(f"{'ok    ' if holds else 'MISSED'} {M} tokens: {text}")


def measure_host(report: Report, options: argparse.Namespace, bnb: Any) -> None:
    """What one eager call of a small layer costs the host, where the device is never the limit."""
    layer = layers_of(1024, 1024, 1)[0]
    linear, x = layer.to_linear(), activations(1, 1024, 7)
    calls: dict[str, Callable[[], Any]] = {
        "nn.Linear": lambda: linear(x),
        "int8": forward(layer, x, 0.0),
        "llm_int8": forward(layer, x, THRESHOLD),
    }
    if bnb is not None:
        mixed = bnb_layer(bnb, layer, THRESHOLD)
        calls["bnb_llm_int8"] = lambda: mixed(x)
    num_calls = 20 if options.quick else 1000
    report.add(name="host, 1 token", **{f"{who}_ns": host_ns(call, num_calls) for who, call in calls.items()})


def main() -> None:
    """Times every shape and writes the result file."""
    options = arguments(__doc__)
    torch.manual_seed(0)
    report, bnb = Report("linear_8bit", "cuda"), peer("bitsandbytes")
    with torch.inference_mode():
        for N, K in SHAPES[:1] if options.quick else SHAPES:
            measure(report, options, N, K, bnb)
        measure_host(report, options, bnb)
    report.write(options)


if __name__ == "__main__":
    main()
