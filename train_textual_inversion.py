#!/usr/bin/env python3
"""Train an embedding (textual inversion): `train_network.py --train_embedding_only` under kohya's name."""

from __future__ import annotations

import sys

import train_network


def main(argv: list[str] | None = None) -> int:
    """As `train_network.main`, for an embedding alone."""
    return train_network.main(argv, before=("--train_embedding_only",))


if __name__ == "__main__":
    sys.exit(main())
