"""The options about measurements during training."""

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
        help="write the status of the run to NAME-run.json and the numbers of each step to NAME-metrics.jsonl, beside "
        "the LoRA, and warn if training goes wrong",
    )
    monitor_every_n_steps: int | None = option(
        None,
        minimum=1,
        help="log updates, adapters and the loss by timestep every n steps (default: "
        f"{EVERY_N_STEPS}); loss, gradient, rates and weight decay are logged at every step",
    )
    report: bool | None = option(
        None,
        help="write a report at the end, one HTML file NAME-report.html: settings, data, curves, samples, files "
        "(default: on with --monitoring)",
    )

    def __post_init__(self) -> None:
        if not self.monitoring and self.monitor_every_n_steps is not None:
            raise UserError(
                "--monitor_every_n_steps has no effect with --no-monitoring, which measures nothing: give one of them"
            )
        if not self.monitoring and self.report:
            raise UserError(
                "--report needs the files of monitoring, which --no-monitoring switches off: give one of them"
            )

    @property
    def writes_report(self) -> bool:
        """Whether the run writes a report at its end."""
        return self.monitoring if self.report is None else self.report

    @property
    def every(self) -> int:
        """Steps from one measurement to the next."""
        return self.monitor_every_n_steps or EVERY_N_STEPS
