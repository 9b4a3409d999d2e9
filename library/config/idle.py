"""Options that say nothing without others."""

from __future__ import annotations

import logging

from library.config.options import Options

logger = logging.getLogger(__name__)


def warn_of_idle_options(options: Options) -> None:
    """A warning for each that was given without what it is about: files that do not come to be, states, a resume."""
    output = options.output
    by_steps = bool(output.save_every_n_steps)
    by_epochs = bool(output.save_every_n_epochs or output.save_n_epoch_ratio)
    for name, works, needs in (
        ("save_last_n_steps", by_steps, "--save_every_n_steps"),
        ("save_last_n_epochs", by_epochs, "--save_every_n_epochs"),
        ("save_last_n_steps_state", by_steps and output.save_state, "--save_every_n_steps and --save_state"),
        ("save_last_n_epochs_state", by_epochs and output.save_state, "--save_every_n_epochs and --save_state"),
        ("divergence_limit", options.divergence.on_divergence != "stop", "--on_divergence skip or rollback"),
        ("resume_anyway", options.run.resume is not None, "--resume"),
    ):
        if not works and _asked(options, name):
            logger.warning("%s: has no effect without %s", options.given[name], needs)
    if options.network.dim_from_weights and _asked(options, "network_dim"):
        logger.warning(
            "%s: has no effect with --dim_from_weights: the file has the ranks", options.given["network_dim"]
        )


def _asked(options: Options, name: str) -> bool:
    """Whether the user gave it a value that asks for something."""
    group = next(group for group in vars(options).values() if hasattr(group, name))
    return name in options.given and bool(getattr(group, name))
