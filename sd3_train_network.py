#!/usr/bin/env python3
"""Train a LoRA for Stable Diffusion 3 or 3.5: `train_network.py` under the name by which kohya's users know it."""

from __future__ import annotations

import sys

import train_network


def main(argv: list[str] | None = None) -> int:
    """As `train_network.main`; a model of another family is refused as a user's mistake."""
    return train_network.main(argv, families=("sd3",))


if __name__ == "__main__":
    sys.exit(main())
