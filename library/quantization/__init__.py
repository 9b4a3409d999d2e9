"""The formats of frozen weights by name. Import strings of functions (named layers, device) → number of layers."""

from __future__ import annotations

FORMATS = {"float8": "library.quantization.float8.hold_in_float8"}
