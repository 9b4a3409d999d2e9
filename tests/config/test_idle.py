"""Options without what they are about are said to have no effect."""

from __future__ import annotations

import pytest

from library.config.idle import warn_of_idle_options
from library.config.parser import parse

REQUIRED = ("--pretrained_model_name_or_path", "x", "--output_dir", "out", "--train_data_dir", "data")


@pytest.mark.parametrize(
    ("idle", "works"),
    [
        ("--save_last_n_steps 3", "--save_every_n_steps 1"),
        ("--save_last_n_epochs 3", "--save_n_epoch_ratio 2"),
        ("--save_last_n_steps_state 3", "--save_every_n_steps 1 --save_state"),
        ("--save_last_n_epochs_state 3", "--save_every_n_epochs 1 --save_state"),
        ("--divergence_limit 10", "--on_divergence rollback"),
        ("--resume_anyway", "--resume latest"),
        ("--network_dim 8 --network_weights x --dim_from_weights", "--network_weights x --no-dim_from_weights"),
    ],
)
def test_what_has_no_effect_is_said(idle: str, works: str, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_idle_options(parse([*REQUIRED, *idle.split(), *works.split()]))
    assert caplog.messages == []
    warn_of_idle_options(parse([*REQUIRED, *idle.split()]))
    (message,) = caplog.messages
    assert message.startswith(f"command line: {idle.split()[0]}: has no effect with")


def test_zero_asks_for_nothing(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_idle_options(parse([*REQUIRED, "--save_last_n_steps", "0", "--no-resume_anyway"]))
    assert caplog.messages == []
