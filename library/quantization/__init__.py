"""The formats of frozen weights by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

NF4 = 0.5 + (8 / 64 + 32 / (64 * 256)) / 8
"""Bytes a weight: 4 bits, for each 64 weights a scale of 8 bits, for each 256 scales one of 32 (double quantisation,
QLoRA, arXiv 2305.14314)."""

FORMATS = {
    "fp8": "library.quantization.fp8.pack",
    "fp8_scaled": "library.quantization.scaled.pack_fp8",
    "int8": "library.quantization.scaled.pack_int8",
    "nf4": "library.quantization.nf4.pack",
}
"""Import strings of functions: a weight → the tensor that is held for it. Each raises UserError for weights that the
format cannot hold, as the rest of a sentence: "{layer} has …"."""

BYTES: Mapping[str, Callable[[int, int], float]] = {
    "fp8": lambda numbers, rows: numbers,
    "fp8_scaled": lambda numbers, rows: numbers + 4 * rows,
    "int8": lambda numbers, rows: numbers + 4 * rows,
    "nf4": lambda numbers, rows: numbers * NF4,
}
"""Of each format the bytes of a weight of so many numbers in so many rows (output channels). Rows' scales are fp32."""
