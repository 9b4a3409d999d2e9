#!/usr/bin/env python3
"""Train a LoRA for FLUX.2 klein: `train_network.py` for this model only."""

from __future__ import annotations

import sys

import train_network


def main(argv: list[str] | None = None) -> int:
    """As `train_network.main`; a model of another family is refused as a user's mistake."""
    return train_network.main(argv, families=("flux2",))


if __name__ == "__main__":
    sys.exit(main())
