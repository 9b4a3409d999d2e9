"""The formats of frozen weights by name. Import strings of functions: a weight → the tensor that is held for it.

Each raises UserError for weights that the format cannot hold, as the rest of a sentence: "{layer} has …".
"""

from __future__ import annotations

FORMATS = {
    "fp8": "library.quantization.fp8.pack",
    "fp8_scaled": "library.quantization.scaled.pack_fp8",
    "int8": "library.quantization.scaled.pack_int8",
    "nf4": "library.quantization.nf4.pack",
}
