"""A training step of one linear layer: SwitchBack against `nn.Linear` in bfloat16, forward and backward.

The gradients are checked first, against float64. Then both layers take turns, eager, with a step of the
optimizer between any two iterations, so that every iteration quantizes a new weight; the step is timed
apart. "auto" is the layer with its default arguments, which falls back to 16 bit where `qbits.nn.crossover`
says so; "int8" always runs in int8. The last lines are what `crossover.MEASURED` should hold.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import Report, arguments
from qbits.nn import SwitchBackLinear, crossover_table
from torch import nn

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (5120, 1280), (1280, 5120))  # N, K
TOKENS = (64, 256, 1024, 2048, 4096, 8192, 16384, 65536)
FORMS_TOKENS = (16384,)  # of the other forms of the layer
NUM_ITERATIONS = 30
WARM_UP = 5
# least ratio of nn.Linear's time to the layer's, from these tokens on
GOALS = {(4096, 4096): 1.25, (14336, 4096): 1.25, (5120, 1280): 1.18, (1280, 5120): 1.18}
GOAL_TOKENS, FLOOR = 16384, 0.97

FORMS: dict[str, dict[str, Any]] = {
    "auto": {},
    "int8": {"min_rows": 0},
    "kept codes": {"min_rows": 0, "keep_quantized_weight": True},
    "mem-efficient": {"min_rows": 0, "mem_efficient": True},
    "global": {"min_rows": 0, "vectorwise": False},
    "global, mem-efficient": {"min_rows": 0, "vectorwise": False, "mem_efficient": True},
    "threshold 6": {"min_rows": 0, "threshold": 6.0},
}


class Step:
    """One layer with its operands and its optimizer."""

    def __init__(self, layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> None:
        self.layer, self.x, self.grad = layer, x, grad
        self.optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-4, fused=x.is_cuda)

    def forward_and_backward(self) -> None:
        """What is compared."""
        self.x.grad = None
        self.optimizer.zero_grad(set_to_none=True)
        self.layer(self.x).backward(self.grad)


class Clock:
    """Microseconds of a call: between events on a GPU, else on the host."""

    def __init__(self, device: str) -> None:
        self.is_gpu = device == "cuda"

    def time_us(self, call: Callable[[], Any]) -> float:
        """Of one call, nothing else being enqueued."""
        if not self.is_gpu:
            begin = time.perf_counter()
            call()
            return (time.perf_counter() - begin) * 1e6
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin_event.record()
        call()
        end_event.record()
        end_event.synchronize()
        return float(begin_event.elapsed_time(end_event)) * 1e3


def layers_of(N: int, K: int, names: Iterator[str], device: str) -> dict[str, nn.Module]:
    """`nn.Linear` and forms of SwitchBack with the same values."""
    like = {"device": device, "dtype": torch.bfloat16}
    linear = nn.Linear(K, N, **like)
    layers: dict[str, nn.Module] = {"linear": linear}
    for name in names:
        layers[name] = SwitchBackLinear(K, N, **FORMS[name], **like)
        layers[name].load_state_dict(linear.state_dict())
    return layers


def measure(layers: dict[str, nn.Module], M: int, device: str, num_iterations: int) -> dict[str, Any]:
    """Medians of forward and backward, and of the optimizer's step, of layers that take turns."""
    linear = layers["linear"]
    x = torch.randn(M, linear.in_features, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(M, linear.out_features, device=device, dtype=torch.bfloat16) / M
    steps = {name: Step(layer, x, grad) for name, layer in layers.items()}
    clock = Clock(device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    step_times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(num_iterations + WARM_UP):
        for name, step in steps.items():
            both, one = clock.time_us(step.forward_and_backward), clock.time_us(step.optimizer.step)
            if index >= WARM_UP:
                times[name].append(both)
                step_times[name].append(one)
    found: dict[str, Any] = {name: statistics.median(samples) for name, samples in times.items()}
    found["spread"] = max(max(s) / min(s) for s in times.values())
    found["step"] = statistics.median(step_times["linear"])
    return found


def check(report: Report, device: str) -> None:
    """Mean error of each result, as a share of its mean size: at most 2 %, where int8 codes cost 1 %."""
    for name in FORMS:
        layers = layers_of(384, 512, iter([name]), device)
        layer = layers[name].train()
        x = torch.randn(1024, 512, device=device, dtype=torch.bfloat16, requires_grad=True)
        y = layer(x)
        grad = torch.randn_like(y)
        y.backward(grad)
        exact = nn.Linear(512, 384, device=device, dtype=torch.float64)
        exact.load_state_dict({key: value.double() for key, value in layer.state_dict().items()})
        wide = x.detach().double().requires_grad_()
        want = exact(wide)
        want.backward(grad.double())
        pairs = [(y, want), (x.grad, wide.grad)]
        pairs += [(p.grad, q.grad) for p, q in zip(layer.parameters(), exact.parameters(), strict=True)]
        errors = [float((a.double() - b).abs().mean() / b.abs().mean()) for a, b in pairs]
        report.note(f"{name}: mean errors of output and gradients {[round(e, 5) for e in errors]}")
        if not max(errors) < 0.02:
            raise SystemExit(f"{name}: a mean error of {max(errors):.3f}")


def main() -> None:
    """All shapes at all numbers of tokens, then the other forms at one."""
    options = arguments(__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes, tokens, iterations = SHAPES, TOKENS, NUM_ITERATIONS
    if options.quick:
        shapes, tokens, iterations = ((256, 128),), (16, 64), 3
    report = Report("switchback", device)
    check(report, device)
    where, crossings = torch.cuda.get_device_name() if device == "cuda" else "cpu", []
    for N, K in shapes:
        wins: dict[int, float] = {}
        for M in tokens:
            with_forms = M in FORMS_TOKENS or (options.quick and tokens[-1] == M)
            layers = layers_of(N, K, iter(FORMS if with_forms else ("auto", "int8")), device)
            found = measure(layers, M, device, iterations)
            linear_us, step_us, spread = (found.pop(key) for key in ("linear", "step", "spread"))
            wins[M] = linear_us / found["int8"]
            goal = GOALS.get((N, K), FLOOR) if M >= GOAL_TOKENS else FLOOR
            speed = linear_us / found["auto"]
            columns = {name.replace(", ", "_").replace(" ", "_") + "_us": us for name, us in found.items()}
            report.add(
                N=N,
                K=K,
                M=M,
                linear_us=linear_us,
                **columns,
                step_us=step_us,
                spread=spread,
                speed=speed,
                int8_speed=wins[M],
                goal=goal,
                met=speed >= goal,
            )
        # the fewest tokens from which on int8 is never slower
        since = [M for M in tokens if all(win >= 1 for m, win in wins.items() if m >= M)]
        crossings.append(f"Crossover({where!r}, N={N}, K={K}, rows={since[0] if since else 'NEVER'})")
    for line in crossings:
        report.note(line)
    print(crossover_table())
    report.write(options)


if __name__ == "__main__":
    main()
