"""The options that say what is watched while training."""

from __future__ import annotations

from dataclasses import dataclass

from library.config.fields import option
from library.errors import UserError

EVERY_N_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class MonitoringOptions:
    """What is measured while training (ours)"""

    monitoring: bool = option(
        True,
        help="write how the run stands to NAME-run.json and what each step did to NAME-metrics.jsonl, beside the LoRA, "
        "and warn if training goes wrong",
    )
    monitor_every_n_steps: int | None = option(
        None,
        minimum=1,
        help="measure updates, adapters and the loss by timestep every n steps, for curves and file (default: "
        f"{EVERY_N_STEPS}); loss, gradient, rates and weight decay are told at every step",
    )
    report: bool | None = option(
        None,
        help="put the run into one HTML file at its end, NAME-report.html: settings, data, curves, samples, files "
        "(default: on with --monitoring)",
    )

    def __post_init__(self) -> None:
        if not self.monitoring and self.monitor_every_n_steps is not None:
            raise UserError("--monitor_every_n_steps says how often to measure, and --no-monitoring never to: give one")
        if not self.monitoring and self.report:
            raise UserError("--report is made of what monitoring writes, which --no-monitoring switches off: give one")

    @property
    def writes_report(self) -> bool:
        """Whether there is one at the end."""
        return self.monitoring if self.report is None else self.report

    @property
    def every(self) -> int:
        """Steps from one measurement to the next."""
        return self.monitor_every_n_steps or EVERY_N_STEPS
