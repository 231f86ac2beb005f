"""Greedy decoding of a Llama-shaped decoder with random weights: bfloat16, bitsandbytes and qbits in NF4.

Layers have the shapes of Llama 3 8B. Four of its 32 layers stand for all: the vocabulary has an eighth of its
size, so that the output head, which stays in bfloat16, has its share of the bytes. Correctness comes first:
the logits are compared with those of the decoded weights, and a graph must choose the same tokens as eager
calls. Then a step is timed, eager and as a CUDA graph, all models in turn.

Reference: Grattafiori et al., The Llama 3 Herd of Models, arXiv:2407.21783, table 3.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import qbits
import torch
from common import Eager, Replay, Report, arguments, interleaved, peer
from torch import Tensor, nn
from torch.nn import functional

BATCHES = (1, 8)
STEPS = 16  # decoded one after the other by one timed call of a graph
PROMPT = 128  # positions that are filled when the first token is decoded
READ_TB_PER_S = 4.40
LEAST_COSINE = 0.999  # of logits, fused products against decoded weights


@dataclass(frozen=True)
class Sizes:
    """What a decoder is made of."""

    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    key_value_heads: int = 8
    layers: int = 4
    vocabulary: int = 128256 // 8
    positions: int = PROMPT + 64

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden // self.heads


class Attention(nn.Module):
    """Grouped queries over a cache of fixed length, with rotary positions."""

    def __init__(self, sizes: Sizes, batch: int) -> None:
        super().__init__()
        self.sizes = sizes
        width = sizes.key_value_heads * sizes.head_dim
        self.q_proj = nn.Linear(sizes.hidden, sizes.hidden, bias=False)
        self.k_proj = nn.Linear(sizes.hidden, width, bias=False)
        self.v_proj = nn.Linear(sizes.hidden, width, bias=False)
        self.o_proj = nn.Linear(sizes.hidden, sizes.hidden, bias=False)
        shape = (batch, sizes.key_value_heads, sizes.positions, sizes.head_dim)
        self.register_buffer("keys", torch.randn(shape), persistent=False)
        self.register_buffer("values", torch.randn(shape), persistent=False)

    def forward(self, x: Tensor, position: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """One position, `x` [batch, 1, hidden]."""
        batch = x.shape[0]

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, 1, -1, self.sizes.head_dim).transpose(1, 2)

        query, key = rotated(heads(self.q_proj(x)), rotation), rotated(heads(self.k_proj(x)), rotation)
        self.keys.index_copy_(2, position, key)
        self.values.index_copy_(2, position, heads(self.v_proj(x)))
        y = functional.scaled_dot_product_attention(query, self.keys, self.values, mask, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, 1, -1))


class Layer(nn.Module):
    """Attention and the gated feed-forward part, each behind a norm."""

    def __init__(self, sizes: Sizes, batch: int) -> None:
        super().__init__()
        self.attention = Attention(sizes, batch)
        self.gate_proj = nn.Linear(sizes.hidden, sizes.intermediate, bias=False)
        self.up_proj = nn.Linear(sizes.hidden, sizes.intermediate, bias=False)
        self.down_proj = nn.Linear(sizes.intermediate, sizes.hidden, bias=False)
        self.attention_norm = nn.RMSNorm(sizes.hidden)
        self.feed_forward_norm = nn.RMSNorm(sizes.hidden)

    def forward(self, x: Tensor, position: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """One position, `x` [batch, 1, hidden]."""
        x = x + self.attention(self.attention_norm(x), position, rotation, mask)
        y = self.feed_forward_norm(x)
        return x + self.down_proj(functional.silu(self.gate_proj(y)) * self.up_proj(y))


class Decoder(nn.Module):
    """One step: the next token of each sequence of the batch, left in `tokens`."""

    def __init__(self, sizes: Sizes, batch: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.embed_tokens = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.layers = nn.ModuleList(Layer(sizes, batch) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.hidden)
        self.lm_head = nn.Linear(sizes.hidden, sizes.vocabulary, bias=False)
        self.register_buffer("tokens", torch.arange(batch).view(batch, 1), persistent=False)
        self.register_buffer("position", torch.tensor([PROMPT]), persistent=False)
        angles = torch.arange(sizes.positions)[:, None] * 500000.0 ** -torch.arange(
            0, 1, 2 / sizes.head_dim, dtype=torch.float32
        )
        self.register_buffer("cosine", angles.cos().repeat(1, 2).bfloat16(), persistent=False)
        self.register_buffer("sine", angles.sin().repeat(1, 2).bfloat16(), persistent=False)

    def logits(self) -> Tensor:
        """Of the token after `tokens`, [batch, vocabulary]."""
        x = self.embed_tokens(self.tokens)
        rotation = (self.cosine[self.position], self.sine[self.position])
        mask = torch.arange(self.sizes.positions, device=x.device) <= self.position[:, None]
        for layer in self.layers:
            x = layer(x, self.position, rotation, mask)
        return self.lm_head(self.norm(x))[:, 0]

    @torch.no_grad()
    def step(self) -> None:
        """Decodes a token; behind the last position the cache is written from the prompt's end again."""
        self.tokens.copy_(self.logits().argmax(-1, keepdim=True))
        self.position.copy_(PROMPT + (self.position + 1 - PROMPT) % (self.sizes.positions - PROMPT))

    def restart(self) -> None:
        """Back to the first step."""
        self.tokens.copy_(torch.arange(self.tokens.shape[0]).view(-1, 1))
        self.position.fill_(PROMPT)


def rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding (Su et al., RoFormer, arXiv:2104.09864, section 3.4)."""
    cosine, sine = rotation
    low, high = x.chunk(2, -1)
    return x * cosine + torch.cat((-high, low), -1) * sine


def make(sizes: Sizes, batch: int) -> Decoder:
    """In bfloat16, weights of variance 1 / in_features."""
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = Decoder(sizes, batch)
        finally:
            torch.set_default_dtype(torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model.eval()


def bitsandbytes_model(bnb: Any, model: Decoder) -> Decoder:
    """A copy whose layers' weights are NF4 in blocks of 64, as there."""
    model = copy.deepcopy(model)
    for parent in [module for layer in model.layers for module in layer.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                layer = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, False, torch.bfloat16, False, "nf4"
                )
                layer.weight = bnb.nn.Params4bit(
                    child.weight.data.cpu(), False, quant_type="nf4", compress_statistics=False
                )
                setattr(parent, name, layer.cuda())
    return model


def weight_bytes(model: Decoder) -> int:
    """What a step reads of the weights, with the block scales that bitsandbytes keeps beside them."""
    parameters = [*model.layers.parameters(), *model.lm_head.parameters()]
    states = [parameter.quant_state for parameter in parameters if hasattr(parameter, "quant_state")]
    return sum(tensor.nbytes for tensor in [*parameters, *(state.absmax for state in states)])


def check(report: Report, model: Decoder, batch: int) -> None:
    """Logits against those of the decoded weights; tokens of a graph against those of eager calls."""
    decoded = qbits.dequantize_(copy.deepcopy(model))
    with torch.no_grad():
        got, wanted = model.logits().double(), decoded.logits().double()
    cosine = float(functional.cosine_similarity(got, wanted).min())
    if not cosine >= LEAST_COSINE:
        raise SystemExit(f"bench: logits must have a cosine of at least {LEAST_COSINE}, got {cosine}")
    chosen: list[list[list[int]]] = []
    for step in (model.step, Replay([model.step]).replay):
        model.restart()
        chosen.append([])
        for _ in range(STEPS):
            step()
            chosen[-1].append(model.tokens.flatten().tolist())
    if chosen[0] != chosen[1]:
        raise SystemExit("bench: a graph must choose the tokens that eager calls choose")
    report.note(f"batch {batch}: least cosine to the logits of decoded weights {cosine:.6f}")


def measure(report: Report, sizes: Sizes, batch: int, bnb: Any, repeats: int) -> None:
    """One row for each model and mode."""
    reference = make(sizes, batch)
    models = {
        "bfloat16": reference,
        "qbits": qbits.quantize_(copy.deepcopy(reference), "nf4", progress=False),
    }
    if bnb:
        models["bitsandbytes"] = bitsandbytes_model(bnb, reference)
    check(report, models["qbits"], batch)
    bytes_read = {name: weight_bytes(model) for name, model in models.items()}
    replays: dict[str, Replay | Eager] = {}
    for name, model in models.items():
        replays[f"{name}, eager"] = Eager([model.step])
        replays[f"{name}, graph"] = Replay([model.step] * STEPS)
    with qbits.dependent_launch(models["qbits"]):
        replays["qbits, dependent graph"] = Replay([models["qbits"].step] * STEPS)
    times = interleaved(replays, repeats)
    for key, timing in times.items():
        name, mode = key.split(", ")
        us, base = timing.us, times[f"bfloat16, {mode.removeprefix('dependent ')}"].us
        report.add(
            op="greedy decoding",
            model=name,
            mode=mode,
            batch=batch,
            us=us,
            tokens_per_s=batch / us * 1e6,
            speedup_over_bfloat16=base / us,
            weight_bytes=bytes_read[name],
            floor_us=bytes_read[name] / READ_TB_PER_S * 1e-6,
        )


def main() -> None:
    """Every batch size, on a GPU."""
    options = arguments(__doc__)
    torch.manual_seed(0)
    report = Report("decoder", "cuda")
    bnb = peer("bitsandbytes")
    sizes = (
        Sizes(hidden=1024, intermediate=2048, heads=8, layers=2, vocabulary=512) if options.quick else Sizes()
    )
    for batch in BATCHES:
        measure(report, sizes, batch, bnb, 2 if options.quick else 7)
    report.write(options)


if __name__ == "__main__":
    main()
