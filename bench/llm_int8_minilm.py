"""LLM.int8() on the real MiniLM, with and without planted outlier features: why there is a threshold.

Large language models have a few hidden features that are up to 60 times as large as the others; a model of
this size has not. They are planted: what enters attention and feed-forward is multiplied by a factor in some
columns, and the weights' columns are divided by it, which changes nothing in float32. Sentences are encoded
in float32 and in int8 at thresholds 0 and 6, and the cosines of the embeddings with float32's are printed.

Reference: Dettmers et al., LLM.int8(), arXiv:2208.07339, sections 3 and 4.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from qbits import quantize_
from qbits.demo import find_model, paragraphs
from torch import nn

NUM_FEATURES, FACTOR = 6, 60.0  # planted: columns, and how much larger each becomes
BATCH = 16


@torch.no_grad()
def plant_outliers(model: Any, num_features: int, factor: float) -> None:
    """Multiply features of what enters each block's attention and feed-forward; the weights take it back."""
    hidden = model.config.hidden_size
    features = torch.randperm(hidden, generator=torch.Generator().manual_seed(0))[:num_features]
    scale = torch.ones(hidden)
    scale[features] = factor
    for layer in model.encoder.layer:
        attention = layer.attention.self
        for linear in (attention.query, attention.key, attention.value, layer.intermediate.dense):
            linear.weight.div_(scale)
            linear.register_forward_pre_hook(lambda module, inputs, s=scale: (inputs[0] * s,))


@torch.no_grad()
def encode(model: Any, tokenizer: Any, sentences: Sequence[str]) -> torch.Tensor:
    """Mean of the last hidden states over each sentence's tokens, scaled to length 1."""
    parts = []
    for first in range(0, len(sentences), BATCH):
        batch = list(sentences[first : first + BATCH])
        inputs = tokenizer(batch, padding=True, truncation=True, max_length=128, return_tensors="pt")
        states = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).float()
        parts.append(nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(parts)


def cosine_of(model: Any, scheme: str, tokenizer: Any, sentences: Sequence[str], due: torch.Tensor) -> float:
    """Mean cosine of the embeddings of a quantized copy with ``due``."""
    quantized = quantize_(copy.deepcopy(model), scheme, progress=False)
    return float((encode(quantized, tokenizer, sentences) * due).sum(1).mean())


def main() -> None:
    """Print a cosine for each model and scheme; fail where the threshold does not repair the harm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sentences", type=int, default=64)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    import transformers

    folder = find_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    sentences = paragraphs(options.sentences)
    due = encode(model, tokenizer, sentences)
    planted = copy.deepcopy(model)
    plant_outliers(planted, NUM_FEATURES, FACTOR)
    same = float((encode(planted, tokenizer, sentences) * due).sum(1).mean())
    print(
        f"{len(sentences)} sentences; {NUM_FEATURES} features of {model.config.hidden_size} times {FACTOR:g}"
    )
    print(f"float32, planted: cosine with the original {same:.6f}")
    found = {}
    for title, which in (("as it is", model), ("planted", planted)):
        for scheme in ("int8", "llm-int8"):
            found[title, scheme] = cosine_of(which, scheme, tokenizer, sentences, due)
            print(f"{scheme:>9}, {title:8}: cosine {found[title, scheme]:.4f}")
    if not (found["planted", "llm-int8"] > 0.99 > 0.98 > found["planted", "int8"] and same > 0.9999):
        raise SystemExit("llm_int8_minilm: the threshold must repair what planted outliers break")


if __name__ == "__main__":
    main()
