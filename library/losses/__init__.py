"""Losses per element, by name. Import strings, so that naming one costs nothing."""

from __future__ import annotations

LOSSES = {
    "l2": "library.losses.l2.l2",
    "l1": "library.losses.l1.l1",
    "huber": "library.losses.huber.pseudo_huber",
    "smooth_l1": "library.losses.huber.smooth_l1",
}
