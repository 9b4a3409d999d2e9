"""The keyword arguments of `CustomAdamW` that its techniques declare, as a `TypedDict`.

Type checkers and editors read keywords.pyi instead, which `python -m library.optimizers.custom_adamw.page` writes.
"""

from __future__ import annotations

from typing import TypedDict

from .techniques import arguments

Keywords = TypedDict("Keywords", {name: item.hint for name, item in arguments().items()}, total=False)
