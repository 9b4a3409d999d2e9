#!/usr/bin/env python3
"""Train a LoRA for Z-Image: `train_network.py` under a name that kohya's users know, for Z-Image models only."""

from __future__ import annotations

import sys

import train_network


def main(argv: list[str] | None = None) -> int:
    """As `train_network.main`; a model of another family is refused as a user's mistake."""
    return train_network.main(argv, families=("z_image",))


if __name__ == "__main__":
    sys.exit(main())
