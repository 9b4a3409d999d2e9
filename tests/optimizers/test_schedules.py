"""Learning-rate curves at known steps, each against its closed form; custom classes; what is refused."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch

from library.config.options.schedule import ScheduleOptions
from library.errors import UserError
from library.optimizers.schedules import SCHEDULES, choose_schedule, create_schedule, rehearse, steps_of

# What each needs beside its name to do its work
NEEDS = {
    "cosine_with_min_lr": {"lr_scheduler_min_lr_ratio": 0.1},
    "warmup_stable_decay": {"lr_decay_steps": 20},
    "piecewise_constant": {"lr_scheduler_args": ("step_rules=1:10,0.1:50,0.01",)},
    "exponential": {"lr_scheduler_args": ("gamma=0.97",)},
    "step": {"lr_scheduler_args": ("step_size=30",)},
}
WITHOUT_WARMUP = ("constant", "piecewise_constant")


def options(name: str, **given: object) -> ScheduleOptions:
    return ScheduleOptions(lr_scheduler=name, **(NEEDS.get(name, {}) | given))


def factors(wanted: ScheduleOptions, *, total: int = 100, optimizer: str = "SGD") -> list[float]:
    made = getattr(torch.optim, optimizer)([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = create_schedule(choose_schedule(wanted, total_steps=total), made)
    values = []
    for _ in range(total):
        values.append(made.param_groups[0]["lr"])
        made.step()
        schedule.step()
    return values


def test_every_name_of_the_option_has_a_schedule():
    names = get_args(get_type_hints(ScheduleOptions)["lr_scheduler"])
    assert set(names) == {*SCHEDULES, "adafactor"}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_runs_and_stays_within_the_rate(name):
    assert all(0 <= value <= 1 for value in factors(options(name)))


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in WITHOUT_WARMUP])
def test_warmup_is_linear_from_zero(name):
    found = factors(options(name, lr_warmup_steps=10))[:11]
    assert found == pytest.approx([i / 10 for i in range(11)], abs=1e-6)


@pytest.mark.parametrize("name", WITHOUT_WARMUP)
def test_schedules_without_warmup_refuse_it(name):
    with pytest.raises(UserError, match=f"--lr_scheduler {name} has no warm-up, but --lr_warmup_steps gives it 5"):
        factors(options(name, lr_warmup_steps=5))


def test_closed_forms():
    assert factors(options("constant")) == [1.0] * 100
    assert factors(options("linear"))[50] == pytest.approx(0.5)
    assert factors(options("cosine"))[25] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    # two hard restarts: the second half starts again from the full rate
    restarts = factors(options("cosine_with_restarts", lr_scheduler_num_cycles=2))
    assert restarts[49] < 0.01
    assert restarts[50] == pytest.approx(1.0)
    # diffusers' polynomial ends at 1e-7
    assert factors(options("polynomial", lr_scheduler_power=2.0))[50] == pytest.approx(0.25, abs=1e-6)


def test_cosine_with_min_lr_ends_there():
    found = factors(options("cosine_with_min_lr", lr_scheduler_min_lr_ratio=0.2))
    for step in (0, 25, 50, 99):
        assert found[step] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * step / 100)))
    # two cycles are down and up again, as in kohya: half a wave each
    assert factors(options("cosine_with_min_lr", lr_scheduler_num_cycles=2))[50] == pytest.approx(0.1)
    # the same end as a rate instead of a share
    absolute = options("cosine_with_min_lr", lr_scheduler_min_lr_ratio=None, lr_scheduler_args=("min_lr=0.2",))
    assert factors(absolute) == found


def test_warmup_stable_decay_has_three_parts():
    found = factors(options("warmup_stable_decay", lr_warmup_steps=10, lr_decay_steps="20%"))
    assert found[:10] == pytest.approx([i / 10 for i in range(10)])
    assert found[10:80] == [1.0] * 70
    assert found[80:] == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 20)) for i in range(20)])
    # it ends at the share, and begins its warm-up there, too
    to_share = factors(options("warmup_stable_decay", lr_warmup_steps=10, lr_scheduler_min_lr_ratio=0.1))
    assert to_share[0] == pytest.approx(0.1)
    assert to_share[90] == pytest.approx(0.1 + 0.9 * 0.5)
    straight = factors(options("warmup_stable_decay", lr_scheduler_args=("decay_type=linear",)))
    assert straight[80:] == pytest.approx([1 - i / 20 for i in range(20)])


def test_inverse_sqrt():
    """sqrt(timescale / (step - warm-up + timescale)); the timescale is the warm-up, or 10,000 steps without one."""
    found = factors(options("inverse_sqrt", lr_scheduler_timescale=25))
    assert found[75] == pytest.approx(0.5)
    assert factors(options("inverse_sqrt", lr_warmup_steps=10))[40] == pytest.approx(0.5)
    assert factors(options("inverse_sqrt"))[99] == pytest.approx((10_000 / 10_099) ** 0.5)


def test_piecewise_constant():
    found = factors(options("piecewise_constant"))
    assert (found[:10], found[10:50], found[50:]) == ([1.0] * 10, [0.1] * 40, [0.01] * 50)
    # with quotes, as kohya's parser needs them
    quoted = options("piecewise_constant", lr_scheduler_args=("step_rules='1:10,0.1:50,0.01'",))
    assert factors(quoted) == found


def test_exponential_step_and_rex():
    assert factors(options("exponential", lr_warmup_steps=10))[30] == pytest.approx(0.97**20)
    assert factors(options("step", lr_warmup_steps=10))[75] == pytest.approx(0.01)
    assert factors(options("rex", lr_warmup_steps=10))[55] == pytest.approx(2 / 3)  # half of the 90 steps left
    with pytest.raises(UserError, match=r"--lr_scheduler exponential needs gamma=\.\.\."):
        factors(options("exponential", lr_scheduler_args=()))
    with pytest.raises(UserError, match="did you mean 'step_size'"):
        factors(options("step", lr_scheduler_args=("stepsize=3",)))


@pytest.mark.parametrize(
    ("given", "depends"),
    [
        ({}, False),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": "5%"}, False),
        ({"lr_scheduler": "exponential", "lr_scheduler_args": ("gamma=0.9",)}, False),
        ({"lr_scheduler": "exponential", "lr_scheduler_args": ("gamma=0.9",), "lr_warmup_steps": 0.1}, True),
        ({"lr_scheduler": "inverse_sqrt", "lr_warmup_steps": 5}, False),
        ({"lr_scheduler": "rex"}, True),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 5}, True),
        ({"lr_scheduler_type": "StepLR", "lr_scheduler_args": ("step_size=3",)}, False),
    ],
)
def test_whether_a_longer_run_has_another_curve(given, depends):
    options = ScheduleOptions(**given)
    short, long = (choose_schedule(options, total_steps=steps) for steps in (100, 200))
    assert short.depends_on_length(options) is depends
    if not depends and options.lr_scheduler != "constant_with_warmup":
        assert replace(short, total_steps=200) == long


def test_what_a_schedule_refuses_needs_no_optimizer():
    chosen = choose_schedule(options("exponential", lr_scheduler_args=("gamma=1.2",)), total_steps=100)
    with pytest.raises(UserError, match=r"^--lr_scheduler_args gamma=1.2: it must be above 0, at most 1$"):
        rehearse(chosen, rate=1e-4)


@pytest.mark.parametrize(
    ("value", "steps"), [(0, 0), (100, 100), ("100", 100), (0.05, 50), ("5%", 50), ("0.1", 100), ("2.9%", 29)]
)
def test_steps_as_a_number_a_ratio_or_a_percentage(value, steps):
    assert steps_of(value, 1000, option="lr_warmup_steps") == steps


@pytest.mark.parametrize("value", [1001, -1, "101%"])
def test_impossible_steps_are_refused(value):
    with pytest.raises(UserError, match="--lr_decay_steps"):
        steps_of(value, 1000, option="lr_decay_steps")


# -- classes


def test_classes_of_torch_by_name_and_path():
    cosine = ScheduleOptions(lr_scheduler_type="CosineAnnealingLR", lr_scheduler_args=("T_max=50", "eta_min=0.2"))
    expected = [0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * i / 50)) for i in range(50)]
    assert factors(cosine, total=50) == pytest.approx(expected)
    path = "torch.optim.lr_scheduler.CosineAnnealingLR"
    by_path = ScheduleOptions(lr_scheduler_type=path, lr_scheduler_args=("T_max=50", "eta_min=0.2"))
    assert factors(by_path, total=50) == pytest.approx(expected)
    steps = ScheduleOptions(lr_scheduler_type="MultiStepLR", lr_scheduler_args=("milestones=[3,5]", "gamma=0.5"))
    assert factors(steps, total=7) == [1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    one_cycle = ScheduleOptions(lr_scheduler_type="OneCycleLR", lr_scheduler_args=("max_lr=1", "total_steps=10"))
    assert max(factors(one_cycle, total=10, optimizer="AdamW")) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr_scheduler_type": "CosineAnealingLR"}, "did you mean 'CosineAnnealingLR'"),
        ({"lr_scheduler_type": "CosineAnnealingLR"}, "needs T_max=..."),
        ({"lr_scheduler_type": "CosineAnnealingLR", "lr_scheduler_args": ("T_mx=3",)}, "takes no 'T_mx', did you"),
        ({"lr_scheduler_type": "CosineAnnealingLR", "lr_scheduler_args": ("T_max",)}, "not of the form name=value"),
        ({"lr_scheduler_type": "CosineAnnealingLR", "lr_scheduler_args": ("optimizer=1",)}, "set by the program"),
        (
            {"lr_scheduler_type": "StepLR", "lr_scheduler_args": ("step_size=ten",)},
            "StepLR does not take these settings",
        ),
        (
            {
                "lr_scheduler_type": "OneCycleLR",
                "lr_scheduler_args": ("max_lr=1", "total_steps=50", "cycle_momentum=0"),
            },
            "Tried to step 51 times",
        ),
        ({"lr_scheduler_type": "no_such_package.Curve"}, "pip install no_such_package"),
        ({"lr_scheduler_type": "torch.optim.lr_scheduler.math"}, "is not a class with a step"),
        ({"lr_scheduler_type": "ReduceLROnPlateau"}, "needs 'metrics' at each step"),
        ({"lr_scheduler_type": "StepLR", "lr_warmup_steps": 5}, "StepLR has no warm-up"),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ("T_max=3",)}, "takes no 'T_max'"),
        ({"lr_scheduler": "cosine_with_min_lr"}, "needs --lr_scheduler_min_lr_ratio"),
        ({"lr_scheduler": "piecewise_constant"}, "needs step_rules=..."),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ("step_rules=1:10,0.1:20",)}, "and a last factor"),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ("step_rules=1:9,0.1:3,1",)}, "steps must rise"),
        ({"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 60, "lr_decay_steps": 60}, r"60 \+ 60 steps"),
    ],
)
def test_mistakes(given, message):
    with pytest.raises(UserError, match=message):
        factors(ScheduleOptions(**given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr_scheduler": "cosine", "lr_scheduler_num_cycles": 3}, "--lr_scheduler_num_cycles 3 has no effect with"),
        ({"lr_scheduler": "cosine", "lr_decay_steps": "20%"}, "--lr_decay_steps 20% has no effect with"),
        ({"lr_scheduler": "linear", "lr_scheduler_power": 2.0}, "it is for polynomial"),
        ({"lr_scheduler": "linear", "lr_scheduler_timescale": 2}, "it is for inverse_sqrt"),
        ({"lr_scheduler": "warmup_stable_decay"}, "never decays without --lr_decay_steps, such as 20%"),
        (
            {"lr_scheduler": "cosine", "lr_scheduler_type": "StepLR", "lr_scheduler_args": ("step_size=3",)},
            "--lr_scheduler cosine has no effect: --lr_scheduler_type StepLR is used",
        ),
    ],
)
def test_what_has_no_effect_is_said(given, message, caplog):
    with caplog.at_level(logging.WARNING):
        choose_schedule(ScheduleOptions(**given), total_steps=100)
    assert message in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        choose_schedule(options("warmup_stable_decay", lr_scheduler_min_lr_ratio=0.1), total_steps=100)
    assert caplog.text == ""
