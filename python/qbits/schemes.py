"""Quantization schemes: what a layer's weight becomes, as small frozen records, and the rules that pick one.

Numeric types: NF4 and FP4 (Dettmers et al., QLoRA, arXiv:2305.14314, section 3) and AF4 (Yoshida, NF4 Isn't
Information Theoretically Optimal, arXiv:2306.06965); int8 with outlier columns (Dettmers et al., LLM.int8(),
arXiv:2208.07339, section 3); int8 products in training (Wortsman et al., SwitchBack, arXiv:2304.13013).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeAlias

from qbits.errors import ArgumentTypeError, ArgumentValueError

__all__ = [
    "AF4",
    "BLOCK_SIZES_4BIT",
    "FP4",
    "NF4",
    "Int8",
    "LLMInt8",
    "Pattern",
    "QuantScheme",
    "Scheme4bit",
    "SchemeRules",
    "SwitchBack",
    "as_scheme",
    "available_schemes",
    "check_threshold",
    "fits_any",
    "matches",
    "resolve",
]

BLOCK_SIZES_4BIT = (32, 64, 128, 256, 512, 1024, 2048, 4096)

Pattern: TypeAlias = str | re.Pattern[str]


@dataclass(frozen=True)
class QuantScheme:
    """What a layer's weight becomes; each kind of codes is a subclass, with its options as fields."""

    codebook: ClassVar[str] = ""  # the kind's name in records and files
    stores_codes: ClassVar[bool] = True  # in the place of the float weight

    @property
    def name(self) -> str:
        """The preset's name."""
        return self.codebook

    def __str__(self) -> str:
        return self.name

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready record that `from_dict` turns back into an equal scheme."""
        return {"codebook": self.codebook, **asdict(self)}

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> QuantScheme:
        """The scheme that `to_dict` wrote.

        Raises:
            ValueError: the codebook is unknown, or the record holds a key that its scheme has not.
        """
        options = dict(record)
        codebook = options.pop("codebook", None)
        if codebook not in _CODEBOOKS:
            raise ArgumentValueError(
                f"qbits::QuantScheme.from_dict: codebook must be one of {list(_CODEBOOKS)}, got {codebook!r}"
            )
        scheme = _CODEBOOKS[codebook]
        known = [field.name for field in fields(scheme)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            *first, last = ["codebook", *known]
            raise ArgumentValueError(
                f"qbits::QuantScheme.from_dict: record must hold only {', '.join(first)} and {last}, "
                f"got {unknown}"
            )
        return scheme(**options)


@dataclass(frozen=True)
class Scheme4bit(QuantScheme):
    """A 4-bit code with one ``absmax`` per block of the flattened weight.

    ``double_quant`` also quantizes the ``absmax`` values, to 8 bits in blocks of 256 (nested statistics).

    Units: ``block_size`` counts elements.

    Raises:
        ValueError: ``block_size`` is not a power of two from 32 to 4096.
        TypeError: ``double_quant`` is not a bool.
    """

    block_size: int = 64
    double_quant: bool = False

    def __post_init__(self) -> None:
        if type(self.block_size) is not int or self.block_size not in BLOCK_SIZES_4BIT:
            raise ArgumentValueError(
                f"qbits::{type(self).__name__}: block_size must be one of {list(BLOCK_SIZES_4BIT)}, "
                f"got {self.block_size!r}"
            )
        if type(self.double_quant) is not bool:
            raise ArgumentTypeError(
                f"qbits::{type(self).__name__}: double_quant must be a bool, got {self.double_quant!r}"
            )

    @property
    def name(self) -> str:
        """The preset's name: the codebook, and ``-dq`` with nested statistics."""
        return f"{self.codebook}-dq" if self.double_quant else self.codebook

    def __str__(self) -> str:
        return self.name if self.block_size == 64 else f"{self.name} (block {self.block_size})"


@dataclass(frozen=True)
class NF4(Scheme4bit):
    """4-bit NormalFloat: sixteen quantiles of a normal distribution.

    Example:
        >>> NF4(block_size=128, double_quant=True).name
        'nf4-dq'
    """

    codebook: ClassVar[str] = "nf4"


@dataclass(frozen=True)
class FP4(Scheme4bit):
    """4-bit float in bitsandbytes' code order: sign, two exponent bits, one mantissa bit.

    Example:
        >>> str(FP4(block_size=32))
        'fp4 (block 32)'
    """

    codebook: ClassVar[str] = "fp4"


@dataclass(frozen=True)
class AF4(Scheme4bit):
    """4-bit AbnormalFloat: the table of least expected error at block size 64; not in bitsandbytes' format.

    Example:
        >>> AF4().to_dict()
        {'codebook': 'af4', 'block_size': 64, 'double_quant': False}
    """

    codebook: ClassVar[str] = "af4"


@dataclass(frozen=True)
class Int8(QuantScheme):
    """int8 rows: one scale per output feature, and one per token for the input of each product.

    With ``threshold`` above 0 the input's columns that hold a value of at least that size are multiplied in
    16 bits (LLM.int8()).

    Raises:
        ValueError: ``threshold`` is negative, NaN or no number.

    Example:
        >>> str(Int8()), str(Int8(threshold=4.5))
        ('int8', 'int8 (threshold 4.5)')
    """

    threshold: float = 0.0

    codebook: ClassVar[str] = "int8"

    def __post_init__(self) -> None:
        check_threshold(type(self).__name__, self.threshold)

    def __str__(self) -> str:
        usual = type(self).__dataclass_fields__["threshold"].default
        return self.name if self.threshold == usual else f"{self.name} (threshold {self.threshold:g})"


@dataclass(frozen=True)
class LLMInt8(Int8):
    """`Int8` with the threshold of the paper.

    Example:
        >>> LLMInt8().to_dict()
        {'codebook': 'llm-int8', 'threshold': 6.0}
    """

    threshold: float = 6.0

    codebook: ClassVar[str] = "llm-int8"


@dataclass(frozen=True)
class SwitchBack(QuantScheme):
    """A float weight that trains, with int8 products for output and input gradient.

    ``vectorwise``: one scale per row of the weight, and per column backward, in place of one in all.

    Raises:
        TypeError: ``vectorwise`` is not a bool.

    Example:
        >>> str(SwitchBack()), str(SwitchBack(vectorwise=False)), SwitchBack.stores_codes
        ('switchback', 'switchback (one scale)', False)
    """

    vectorwise: bool = True

    codebook: ClassVar[str] = "switchback"
    stores_codes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if type(self.vectorwise) is not bool:
            raise ArgumentTypeError(f"qbits::SwitchBack: vectorwise must be a bool, got {self.vectorwise!r}")

    def __str__(self) -> str:
        return self.name if self.vectorwise else f"{self.name} (one scale)"


def check_threshold(owner: str, threshold: Any) -> None:
    """Raise ValueError unless an outlier threshold is a number >= 0; ``owner`` is what the message names."""
    is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not is_number or not threshold >= 0:  # NaN is not
        raise ArgumentValueError(f"qbits::{owner}: threshold must be a number >= 0, got {threshold!r}")


SchemeRules: TypeAlias = str | QuantScheme | Mapping[Pattern, str | QuantScheme | None]

_KINDS_4BIT: tuple[type[Scheme4bit], ...] = (NF4, FP4, AF4)
_KINDS_8BIT: tuple[type[QuantScheme], ...] = (Int8, LLMInt8, SwitchBack)
_CODEBOOKS: Mapping[str, type[QuantScheme]] = {cls.codebook: cls for cls in (*_KINDS_4BIT, *_KINDS_8BIT)}
_PRESETS: Mapping[str, QuantScheme] = {
    scheme.name: scheme
    for scheme in (
        *(cls(double_quant=nested) for cls in _KINDS_4BIT for nested in (False, True)),
        *(cls() for cls in _KINDS_8BIT),
    )
}


def available_schemes() -> list[str]:
    """Names that every ``scheme`` argument takes.

    Example:
        >>> available_schemes()
        ['nf4', 'nf4-dq', 'fp4', 'fp4-dq', 'af4', 'af4-dq', 'int8', 'llm-int8', 'switchback']
    """
    return list(_PRESETS)


def as_scheme(scheme: str | QuantScheme) -> QuantScheme:
    """The scheme itself, or the preset of that name.

    Raises:
        ValueError: no preset has that name; the message lists those that exist.
        TypeError: neither a name nor a scheme.
    """
    if isinstance(scheme, QuantScheme) and scheme.codebook:
        return scheme
    if not isinstance(scheme, str):
        raise ArgumentTypeError(
            f"qbits::as_scheme: scheme must be a preset's name or a QuantScheme, got {type(scheme).__name__}"
        )
    if scheme not in _PRESETS:
        raise ArgumentValueError(
            f"qbits::as_scheme: scheme must be one of {available_schemes()}, got {scheme!r}"
        )
    return _PRESETS[scheme]


def matches(pattern: Pattern, name: str) -> bool:
    """Whether a layer's dotted name fits a pattern.

    A glob (``"encoder.*.query"``) fits the whole name, or its last part when the glob has no dot
    (``"lm_head"``). A regular expression, compiled or as text after ``"re:"``, must fit the whole name.

    Example:
        >>> matches("q_proj", "layers.0.q_proj"), matches("layers.?.k_*", "layers.0.q_proj")
        (True, False)
        >>> matches(r"re:layers[.][0-3][.].*", "layers.0.q_proj")
        True
    """
    if isinstance(pattern, str) and pattern.startswith("re:"):
        try:
            pattern = re.compile(pattern[3:])
        except re.error as error:
            raise ArgumentValueError(
                f"qbits::matches: pattern must be a regular expression after 're:', got {pattern!r} ({error})"
            ) from None
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(name) is not None
    if not isinstance(pattern, str):
        raise ArgumentTypeError(
            f"qbits::matches: pattern must be a glob or a regular expression, got {type(pattern).__name__}"
        )
    return fnmatch.fnmatchcase(name if "." in pattern else name.rpartition(".")[2], pattern)


def resolve(scheme: SchemeRules) -> Callable[[str], QuantScheme | None]:
    """A function from a layer's name to its scheme, or None where it keeps its float weight.

    A mapping is read in order; the first pattern that fits decides, and a layer that none fits is left alone.

    Raises:
        ValueError: an unknown scheme; all of a mapping's schemes are checked at once.

    Example:
        >>> pick = resolve({"*.mlp.*": "fp4", "lm_head": None, "*.*": NF4(block_size=128)})
        >>> str(pick("layers.0.mlp.up")), pick("lm_head"), str(pick("layers.0.attn.q"))
        ('fp4', None, 'nf4 (block 128)')
    """
    if not isinstance(scheme, Mapping):
        same = as_scheme(scheme)
        return lambda name: same
    rules = [(pattern, None if s is None else as_scheme(s)) for pattern, s in scheme.items()]
    return lambda name: next((s for pattern, s in rules if matches(pattern, name)), None)


def fits_any(patterns: Iterable[Pattern], name: str) -> bool:
    """Whether a name fits at least one of the patterns."""
    return any(matches(pattern, name) for pattern in patterns)
