"""The exceptions and the warning that qbits raises, and which of its error kinds becomes which exception.

Every class derives from `QbitsError` and from the builtin that programs already catch for that mistake, so
that ``except ValueError`` keeps working. Messages follow one form: ``qbits::<op>: <argument> must <rule>,
got <value>``.
"""

from __future__ import annotations

__all__ = [
    "KINDS",
    "ArgumentTypeError",
    "ArgumentValueError",
    "CheckpointFormatError",
    "DeviceError",
    "DriverError",
    "DtypeError",
    "FP8MatmulError",
    "NotQuantizedError",
    "QbitsError",
    "QbitsWarning",
    "ShapeError",
    "TracedTensorError",
    "UnsupportedHardwareError",
]


class QbitsError(Exception):
    """Base of every exception that qbits defines."""


class ShapeError(QbitsError, ValueError):
    """A rank, a dimension or a length does not fit."""


class DtypeError(QbitsError, TypeError):
    """A tensor's dtype is not one that the operation takes."""


class ArgumentTypeError(QbitsError, TypeError):
    """An argument is not of the kind that is due, for example a list where a tensor must stand."""


class ArgumentValueError(QbitsError, ValueError):
    """An argument's value is outside the accepted ones, or memory that it names must not be used so."""


class DeviceError(QbitsError, ValueError, RuntimeError):
    """Tensors lie on different devices, or on one that qbits does not serve."""


class TracedTensorError(ArgumentTypeError):
    """A tensor without memory (traced, fake, functorch) reached the direct path."""


class NotQuantizedError(QbitsError, RuntimeError):
    """A quantized weight is needed, and the weight still holds floats (or nothing yet)."""


class UnsupportedHardwareError(QbitsError, RuntimeError):
    """This GPU, or this machine's driver, cannot run the operation."""


class DriverError(QbitsError, RuntimeError):
    """The CUDA driver refused a call; its own error name and words are in the message."""


class CheckpointFormatError(QbitsError, ValueError):
    """Quantization data in a checkpoint cannot be read or contradict each other."""


class FP8MatmulError(ShapeError):
    """Operands of an fp8 product do not fit each other or the hardware's tile."""


class QbitsWarning(UserWarning):
    """Something works, but not as the caller may expect."""


KINDS: dict[str, type[QbitsError]] = {
    "shape": ShapeError,
    "dtype": DtypeError,
    "type": ArgumentTypeError,
    "value": ArgumentValueError,
    "device": DeviceError,
    "traced": TracedTensorError,
    "unsupported_hardware": UnsupportedHardwareError,
    "driver": DriverError,
}
"""The error kinds of `qbits._core`, by the name that it uses."""
