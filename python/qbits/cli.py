"""The command ``qbits``: demo, info, quantize, inspect.

Exit codes: 0 all is well; 1 a check failed (the demo's bars, a damaged checkpoint); 2 a mistake in the call,
told in one sentence on stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from qbits import __version__
from qbits.errors import QbitsError
from qbits.schemes import as_scheme, available_schemes

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except (QbitsError, OSError, ImportError, torch.OutOfMemoryError) as error:
        print(f"qbits {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"qbits {arguments.command}: interrupted", file=sys.stderr)
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qbits", description="Quantize PyTorch models to 8 and 4 bits.")
    parser.add_argument("--version", action="version", version=f"qbits {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="quantize a real model and show what it costs and gains")
    demo.add_argument(
        "--scheme",
        default="nf4",
        choices=["nf4", "fp4", "nf4-dq", "fp4-dq", "int8", "llm-int8", "switchback"],
    )
    demo.add_argument(
        "--model", metavar="PATH", help="a model folder for transformers (default: MiniLM, installed)"
    )
    demo.add_argument("--plot", metavar="FILE", help="draw each layer's SQNR into an image")
    demo.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    demo.set_defaults(run=_demo)

    info = commands.add_parser("info", help="versions, GPUs, and which kernels run here")
    info.set_defaults(run=_info)

    quantize = commands.add_parser("quantize", help="quantize a model folder or a .safetensors file")
    quantize.add_argument("source", metavar="IN", help="a model folder, or a .safetensors file")
    quantize.add_argument("target", metavar="OUT", help="the folder to write, or a .safetensors file")
    stored = [name for name in available_schemes() if as_scheme(name).stores_codes]
    quantize.add_argument("--scheme", default="nf4", choices=stored)
    quantize.add_argument(
        "--skip",
        metavar="GLOB",
        action="append",
        help='layers to leave alone, a glob or "re:..."; may be repeated (default: output heads)',
    )
    quantize.add_argument("--format", default="auto", choices=["auto", "bnb", "qbits"])
    quantize.add_argument("--max-shard-size", metavar="SIZE", default="5GB")
    quantize.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    quantize.set_defaults(run=_quantize)

    inspect = commands.add_parser("inspect", help="what a checkpoint holds, and whether its scales are sound")
    inspect.add_argument("path", metavar="FILE", help="a .safetensors file, or a folder of them")
    inspect.set_defaults(run=_inspect)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    from qbits.demo import run

    return run(
        arguments.scheme,
        model_path=arguments.model,
        plot=arguments.plot,
        device=_device(arguments.device),
    )


def _info(arguments: argparse.Namespace) -> int:
    from qbits.info import describe

    print(describe())
    return 0


def _quantize(arguments: argparse.Namespace) -> int:
    from qbits.checkpoint import quantize_checkpoint

    change = quantize_checkpoint(
        arguments.source,
        arguments.target,
        arguments.scheme,
        skip=arguments.skip or "auto",
        format=arguments.format,
        max_shard_size=arguments.max_shard_size,
        device=_device(arguments.device),
    )
    print(
        f"{len(change.schemes)} layers to {arguments.scheme}: {change.bytes_before:,} bytes became "
        f"{change.bytes_after:,} ({change.bytes_after / change.bytes_before:.1%}) in {arguments.target}"
    )
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from qbits.checkpoint.inspect import inspect_checkpoint

    text, sound = inspect_checkpoint(arguments.path)
    print(text)
    return 0 if sound else 1


def _device(name: str) -> torch.device:
    """The device of an argument; "auto" is the GPU where a kernel runs on one, else the CPU."""
    from qbits import is_available
    from qbits.errors import ArgumentValueError, DeviceError

    has_gpu = torch.cuda.is_available() and is_available("cuda")
    if name == "auto":
        return torch.device("cuda" if has_gpu else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ArgumentValueError(f"qbits::cli: --device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (not has_gpu or (device.index or 0) >= torch.cuda.device_count()):
        raise DeviceError(
            f"qbits::cli: --device must be a GPU that `qbits info` lists as usable, got {name!r}"
        )
    return device
