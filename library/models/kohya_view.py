"""A text encoder with the module paths that kohya's network modules expect."""

from __future__ import annotations

from typing import Any

from torch import nn


class TextModelView(nn.Module):
    """Shows a CLIPTextModel under "text_model.", the level that transformers 5 dropped and that keys in files name.

    The weights are the encoder's own, and so is each module: whatever a network module attaches to them is in force in
    the encoder. None makes a view without any module.
    """

    def __init__(self, encoder: nn.Module | None) -> None:
        super().__init__()
        if encoder is not None:
            self.text_model = encoder

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder's answer."""
        return self.text_model(*args, **kwargs)
