#!/usr/bin/env python3
"""Train an embedding for SDXL: `train_textual_inversion.py` for SDXL models only."""

from __future__ import annotations

import sys

import train_network


def main(argv: list[str] | None = None) -> int:
    """As `train_textual_inversion.main`; a model of another family is refused as a user's mistake."""
    return train_network.main(argv, families=("sdxl",), before=("--train_embedding_only",))


if __name__ == "__main__":
    sys.exit(main())
