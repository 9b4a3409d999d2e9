#!/usr/bin/env python3
"""Train a slider from prompts, without images (LECO): `train_network.py --prompts_file FILE` under kohya's name."""

from __future__ import annotations

import sys

import train_network


def main(argv: list[str] | None = None) -> int:
    """As `train_network.main`, for a slider."""
    return train_network.main(argv, required=("prompts_file",))


if __name__ == "__main__":
    sys.exit(main())
