"""Losses and sample weightings, by name. Import strings, so that naming one costs nothing."""

from __future__ import annotations

LOSSES = {"l2": "library.losses.l2.l2"}
WEIGHTINGS = {"min_snr": "library.losses.snr.min_snr_weight"}
