#!/usr/bin/env python3
"""Train a slider for SDXL: `train_leco.py` for SDXL models only."""

from __future__ import annotations

import sys

import train_network


def main(argv: list[str] | None = None) -> int:
    """As `train_leco.main`; a model of another family is refused as a user's mistake."""
    return train_network.main(argv, families=("sdxl",), required=("prompts_file",))


if __name__ == "__main__":
    sys.exit(main())
