"""Modules with quantized weights; each holds parameters and calls `qbits.functional`."""

from qbits.nn.linear_4bit import Linear4bit, LinearFP4, LinearNF4

__all__ = ["Linear4bit", "LinearFP4", "LinearNF4"]
