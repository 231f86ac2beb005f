"""Does SwitchBack train as 16 bit does: a vision transformer on digits, a byte decoder on Python's manual.

Each is trained from several seeds with bfloat16 linear layers and with SwitchBack (`min_rows=0`) in all
blocks, from the same weights on the same batches. The mean of the final validation losses must agree within
1 %. A control repeats an old mistake of int8 training, and must miss that bar: its weight gradient takes
gradients that were quantized by rows for such as were quantized by columns. Each model reports how many int8
products a step runs in each layer. `--draw FILE` draws the curves of the result file instead.
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import Report
from qbits import ops
from qbits.autograd.rules import as_matrix, bias_gradient
from qbits.nn import SwitchBackLinear
from torch import nn

BAR = 0.01  # of the mean of the bfloat16 runs
BLOCK_LAYERS = ("qkv", "projection", "up", "down")


@dataclass(frozen=True)
class Setting:
    """The size of a run."""

    width: int = 256
    num_layers: int = 4
    num_steps: int = 2000
    batch_rows: int = 64  # images, or pieces of text
    seeds: tuple[int, ...] = (0, 1, 2)
    peak_rate: float = 1e-3
    warm_up_steps: int = 100
    validate_every: int = 100


QUICK = Setting(32, 2, num_steps=40, batch_rows=8, seeds=(0,), warm_up_steps=5, validate_every=20)


class WrongWeightGradient(torch.autograd.Function):
    """SwitchBack but for grad_weight, as the control has it.

    The codes of grad_output have one scale per row, a token's; they are decoded with one per column, which
    leaves each token with the weight that its own largest gradient happens to give it.
    """

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        """Multiply as SwitchBack does."""
        rows = as_matrix(input.to(torch.bfloat16)).contiguous()
        codes, scales = ops.quantize_rowwise(rows)
        weight_codes, weight_scales = ops.quantize_rowwise(weight)
        ctx.save_for_backward(rows, weight)
        ctx.input_dtype = input.dtype
        product = ops.gemm_int8(codes, weight_codes, rows.dtype, scales, weight_scales, None, bias)
        return product.view(*input.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        """Return the gradients; that of the weight with the wrong scales."""
        rows, weight = ctx.saved_tensors
        grad = as_matrix(grad_output).contiguous()
        codes, scales = ops.quantize_rowwise(grad)
        columns, column_scales = ops.quantize_columnwise_and_transpose(weight)
        grad_input = ops.gemm_int8(codes, columns, ctx.input_dtype, scales, column_scales)
        inputs, input_scales = ops.quantize_columnwise_and_transpose(rows)
        wrong_scales = grad.abs().amax(0).float()
        grad_weight = ops.gemm_int8(codes.t().contiguous(), inputs, weight.dtype, wrong_scales, input_scales)
        return grad_input.view(*grad_output.shape[:-1], -1), grad_weight, bias_gradient(grad, torch.float32)


class WrongLinear(nn.Linear):
    """The control's layer."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Multiply ``input`` [*, K] by the weight and add the bias."""
        return WrongWeightGradient.apply(input, self.weight, self.bias)


def switchback(in_features: int, out_features: int) -> nn.Linear:
    """The layer under test."""
    return SwitchBackLinear(in_features, out_features, min_rows=0)


ARMS: dict[str, Callable[[int, int], nn.Linear]] = {
    "bfloat16": nn.Linear,
    "switchback": switchback,
    "control": WrongLinear,
}


class Block(nn.Module):
    """Attention and a perceptron, each after a norm and added to what came in."""

    def __init__(self, width: int, is_causal: bool, linear: Callable[[int, int], nn.Linear]) -> None:
        super().__init__()
        self.num_heads, self.is_causal = max(1, width // 64), is_causal
        self.norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = linear(width, 3 * width), linear(width, width)
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x`` [B, T, width] to the same shape."""
        B, T, width = x.shape
        heads = self.qkv(self.norm(x)).view(B, T, 3, self.num_heads, width // self.num_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        x = x + self.projection(mixed.transpose(1, 2).reshape(B, T, width))
        return x + self.down(nn.functional.gelu(self.up(self.second_norm(x))))


class Transformer(nn.Module):
    """Blocks between an embedding and a head that stay in 16 bit, as in the paper."""

    def __init__(
        self,
        embed: nn.Module,
        num_positions: int,
        num_outputs: int,
        setting: Setting,
        linear: Any,
        causal: bool,
    ) -> None:
        super().__init__()
        width = setting.width
        self.embed, self.pools = embed, not causal
        self.positions = nn.Parameter(torch.randn(num_positions, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, causal, linear) for _ in range(setting.num_layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the pooled tokens, or of each token of a decoder."""
        hidden = self.norm(self.blocks(self.embed(x) + self.positions))
        logits: torch.Tensor = self.head(hidden.mean(1) if self.pools else hidden)
        return logits


class Digits:
    """Scikit-learn's digits, 8 x 8 pixels as 16 patches, shifted by up to a pixel and noisy."""

    name, is_causal, num_positions, num_outputs = "vision transformer on digits", False, 16, 10
    label_smoothing = 0.1  # else the loss of this small set tends to that of its few hardest images

    def __init__(self, device: str) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        images = torch.tensor(data.images, dtype=torch.float32, device=device) / 8 - 1
        labels = torch.tensor(data.target, device=device)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(device)
        held = order[: len(labels) // 5]
        self.images, self.labels = images[order[len(held) :]], labels[order[len(held) :]]
        generator = torch.Generator().manual_seed(1)
        self.held = [
            (self.changed(images[held], generator), labels[held]) for _ in range(8)
        ]  # each image eight times

    def embedding(self, width: int) -> nn.Module:
        """Patches of 2 x 2 pixels to vectors."""
        return nn.Linear(4, width)

    def changed(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Patches [B, 16, 4] of shifted, noisy images."""
        padded = nn.functional.pad(images, (1, 1, 1, 1), value=-1.0)
        dy, dx = (int(torch.randint(3, (), generator=generator)) for _ in range(2))
        shifted = padded[:, dy : dy + 8, dx : dx + 8]
        noise = torch.randn(images.shape, generator=generator).to(images.device)
        return (shifted + 0.3 * noise).unfold(1, 2, 2).unfold(2, 2, 2).reshape(len(images), 16, 4)

    def batch(self, num_rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and their digits."""
        chosen = torch.randint(len(self.labels), (num_rows,), generator=generator).to(self.labels.device)
        return self.changed(self.images[chosen], generator), self.labels[chosen]

    def validation(self, setting: Setting) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All held-out images."""
        yield from self.held


class Manual:
    """The text of the standard library's documentation topics, byte by byte; the last tenth is held out."""

    name, is_causal, num_positions, num_outputs = "byte decoder on Python's topics", True, 128, 256
    label_smoothing = 0.0

    def __init__(self, device: str) -> None:
        topics = pydoc_data.topics.topics
        text = "".join(topics[name] for name in sorted(topics)).encode()
        bytes_ = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().to(device)
        self.text, self.held = bytes_[: len(bytes_) * 9 // 10], bytes_[len(bytes_) * 9 // 10 :]

    def embedding(self, width: int) -> nn.Module:
        """Bytes to vectors."""
        return nn.Embedding(256, width)

    def batch(self, num_rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Pieces of 128 bytes, and the bytes that follow each of theirs."""
        starts = torch.randint(len(self.text) - self.num_positions - 1, (num_rows, 1), generator=generator)
        places = (starts + torch.arange(self.num_positions + 1)).to(self.text.device)
        pieces = self.text[places]
        return pieces[:, :-1], pieces[:, 1:]

    def validation(self, setting: Setting) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pieces that lie one after the other."""
        num_pieces = min((len(self.held) - 1) // self.num_positions, 8 * setting.batch_rows)
        for first in range(0, num_pieces, setting.batch_rows):
            last = min(first + setting.batch_rows, num_pieces)
            span = self.held[first * self.num_positions : last * self.num_positions + 1]
            yield span[:-1].view(-1, self.num_positions), span[1:].view(-1, self.num_positions)


@contextmanager
def counted_products(model: Transformer) -> Iterator[dict[str, int]]:
    """Count the calls of the int8 product by the layer whose forward or backward they are in."""
    layers = {f"{i}.{n}": getattr(b, n) for i, b in enumerate(model.blocks) for n in BLOCK_LAYERS}
    counts = dict.fromkeys(layers, 0)
    real, current = ops.gemm_int8, []

    def product(*args: Any, **keywords: Any) -> Any:
        if current:
            counts[current[-1]] += 1
        return real(*args, **keywords)

    def entered(name: str) -> Callable[..., None]:
        return lambda *_: current.append(name)

    def left(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            current.pop()
            if output.grad_fn is not None:
                output.grad_fn.register_prehook(entered(name))
                output.grad_fn.register_hook(lambda *_: current.pop() and None)

        return hook

    handles = [layer.register_forward_pre_hook(entered(name)) for name, layer in layers.items()]
    handles += [layer.register_forward_hook(left(name)) for name, layer in layers.items()]
    ops.gemm_int8 = product
    try:
        yield counts
    finally:
        ops.gemm_int8 = real
        for handle in handles:
            handle.remove()


class Training:
    """One model with its optimizer; on a GPU a step is one graph."""

    def __init__(self, task: Any, arm: str, seed: int, setting: Setting, device: str) -> None:
        torch.manual_seed(seed)
        embed = task.embedding(setting.width)
        shape = (task.num_positions, task.num_outputs, setting, ARMS[arm], task.is_causal)
        self.model = Transformer(embed, *shape).to(device)
        self.task, self.setting, self.device = task, setting, device
        self.rate = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.rate,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            foreach=device == "cuda",
            capturable=device == "cuda",
        )
        self.x, self.y = task.batch(setting.batch_rows, torch.Generator().manual_seed(0))
        self.products: dict[str, int] = {}
        self.graph: torch.cuda.CUDAGraph | None = None

    def loss(self, x: torch.Tensor, y: torch.Tensor, smoothing: float) -> torch.Tensor:
        """Mean cross entropy."""
        with torch.autocast(self.device, dtype=torch.bfloat16, cache_enabled=False):
            logits = self.model(x)
        flat = logits.float().view(-1, logits.shape[-1])
        return nn.functional.cross_entropy(flat, y.reshape(-1), label_smoothing=smoothing)

    def backward_and_step(self) -> None:
        """What the graph holds."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(self.x, self.y, self.task.label_smoothing).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def prepare(self) -> None:
        """Count the products of one step; on a GPU capture a step. The learning rate is zero until then."""
        with counted_products(self.model) as counts:
            self.backward_and_step()
        self.products = dict(counts)
        if self.device == "cuda":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self.backward_and_step()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.backward_and_step()
        with torch.no_grad():  # the moments of those steps would count
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()

    def step(self, index: int, generator: torch.Generator) -> None:
        """One step, with the rate of a cosine after a warm-up."""
        setting = self.setting
        x, y = self.task.batch(setting.batch_rows, generator)
        self.x.copy_(x)
        self.y.copy_(y)
        done = max(0, index - setting.warm_up_steps) / max(1, setting.num_steps - setting.warm_up_steps)
        warm = min(1.0, (index + 1) / setting.warm_up_steps)
        self.rate.fill_(setting.peak_rate * warm * 0.5 * (1 + math.cos(math.pi * done)))
        if self.graph is None:
            self.backward_and_step()
        else:
            self.graph.replay()

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss of what is held out, without smoothing of labels beyond the task's own."""
        self.model.eval()
        losses = [
            (self.loss(x, y, self.task.label_smoothing).item(), y.numel())
            for x, y in self.task.validation(self.setting)
        ]
        self.model.train()
        return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)


@dataclass
class Curve:
    """What one run gave."""

    task: str
    arm: str
    seed: int
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    products: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


def train(task: Any, arm: str, seed: int, setting: Setting, device: str) -> Curve:
    """One run from its seed."""
    begin = time.perf_counter()
    training, curve = Training(task, arm, seed, setting, device), Curve(task.name, arm, seed)
    training.prepare()
    curve.products = training.products
    generator = torch.Generator().manual_seed(seed + 1000)
    for index in range(setting.num_steps):
        training.step(index, generator)
        if (index + 1) % setting.validate_every == 0 or index + 1 == setting.num_steps:
            curve.steps.append(index + 1)
            curve.losses.append(training.validate())
    curve.seconds = time.perf_counter() - begin
    return curve


def judge(report: Report, curves: list[Curve]) -> bool:
    """One row for each task: the means, how far apart they are, and whether all is as it must be."""
    sound = True
    for name in dict.fromkeys(curve.task for curve in curves):
        own = [curve for curve in curves if curve.task == name]
        mean = {arm: statistics.mean(c.losses[-1] for c in own if c.arm == arm) for arm in ARMS}
        off = {arm: mean[arm] / mean["bfloat16"] - 1 for arm in ARMS}
        ran = all(count == 2 for c in own if c.arm == "switchback" for count in c.products.values())
        none = not any(count for c in own if c.arm == "bfloat16" for count in c.products.values())
        agrees, caught = abs(off["switchback"]) <= BAR, abs(off["control"]) > BAR
        sound &= ran and none and agrees and caught
        report.add(
            task=name,
            **{f"{arm}_loss": mean[arm] for arm in ARMS},
            switchback_off=off["switchback"],
            control_off=off["control"],
            agrees=agrees,
            control_is_caught=caught,
            int8_in_every_layer=ran and none,
        )
    return sound


def draw(results: Path, file: str) -> None:
    """The curves of a result file."""
    from matplotlib.figure import Figure

    rows = [row for row in json.loads(results.read_text())["rows"] if "losses" in row]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(5.5 * len(tasks), 4), layout="constrained")
    colors = dict(zip(ARMS, ("#4c72b0", "#dd8452", "#999999"), strict=True))
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for row in (row for row in rows if row["task"] == task):
            label = row["arm"] if row["seed"] == 0 else None
            axes.plot(row["steps"], row["losses"], color=colors[row["arm"]], label=label, linewidth=1)
        axes.set(title=task, xlabel="step", ylabel="validation loss", yscale="log")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def main() -> int:
    """Train all, judge, and write the result file; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument(
        "--quick", action="store_true", help="tiny models, few steps, no bars, no result file"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--draw", metavar="FILE", help="draw the curves of the result file at --out instead")
    for name, default in (("width", 256), ("num-steps", 2000), ("batch-rows", 64), ("num-seeds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    if options.draw:
        newest = max(options.out.glob("switchback_training_*.json"), key=lambda path: path.stat().st_mtime)
        draw(newest, options.draw)
        return 0
    setting = QUICK
    if not options.quick:
        seeds = tuple(range(options.num_seeds))
        setting = Setting(options.width, 4, options.num_steps, options.batch_rows, seeds)
    report, curves = Report("switchback_training", options.device), []
    report.note(str(setting))
    for task in (Digits(options.device), Manual(options.device)):
        for seed in setting.seeds:
            for arm in ARMS:
                curve = train(task, arm, seed, setting, options.device)
                curves.append(curve)
                report.add(**{**vars(curve), "losses": [round(loss, 5) for loss in curve.losses]})
    sound = judge(report, curves)
    report.write(options)
    return 0 if sound or options.quick else 1


if __name__ == "__main__":
    raise SystemExit(main())
