"""From options to curves: who decides, what is said, what is refused."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from library.config.options.weight_decay import WeightDecayOptions
from library.config.parser import parse
from library.errors import UserError
from library.optimizers.auto_weight_decay import Complexity
from library.optimizers.create import OptimizerChoice, choose_optimizer, create_optimizer
from library.optimizers.weight_decay import Curve
from library.optimizers.weight_decay_choice import DecayChoice, apply, attach, check_options, resolve
from library.record.facts import Decay
from library.record.summary import decay
from library.run.about.summary import decay_curve

ON = ("--dynamic_weight_decay",)


def options(*words: str) -> WeightDecayOptions:
    return parse(["--pretrained_model_name_or_path", "base", "--output_dir", "out", *words]).weight_decay


def choice(name: str = "AdamW", *words: str) -> OptimizerChoice:
    return choose_optimizer(name, words)


def decide(
    *words: str,
    optimizer: OptimizerChoice | None = None,
    total_steps: int = 10_000,
    images: int = 20,
    complexity: Complexity | None = None,
) -> DecayChoice:
    given, optimizer = options(*words), optimizer or choice()
    check_options(given, optimizer, clips_gradients=True)
    decided = resolve(given, optimizer, total_steps=total_steps, images=images, complexity=complexity)
    assert decided is not None
    return decided


def test_without_the_flag_nothing_changes() -> None:
    check_options(options(), choice(), clips_gradients=True)
    assert resolve(options(), choice(), total_steps=100, images=1) is None
    assert resolve(options("--no-dynamic_weight_decay"), choice("CustomAdamW"), total_steps=100, images=1) is None
    assert apply(None, options(), choice()) == choice()
    assert attach(None, torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])) is None


def test_the_flag_alone_is_the_usual_curve() -> None:
    decided = decide(*ON)
    assert decided.curve == Curve()
    assert set(decided.reasons.values()) == {"default"}


def test_numbers_are_taken_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    words = (*ON, "--wd_transition_steps", "40", "--wd_decay_factor", "0.5", "--wd_min_ratio", "0.01")
    with caplog.at_level(logging.INFO):
        decided = decide(*words, "--wd_max_progress", "inf")
    assert decided.curve == Curve(transition_steps=40, decay_factor=0.5, min_ratio=0.01, max_progress=float("inf"))
    assert [record.getMessage() for record in caplog.records] == [
        "weight decay: wd_schedule exponential (default), wd_transition_steps 40 (given), wd_decay_factor 0.5 (given), "
        "wd_min_ratio 0.01 (given), wd_max_progress inf (given)"
    ]


AUTO = ("--wd_transition_steps", "auto", "--wd_decay_factor", "auto", "--wd_min_ratio", "auto")


def test_auto_asks_the_task_and_the_data_set() -> None:
    decided = decide(*ON, *AUTO, "--task", "image_generation", images=6000)
    assert decided.curve == Curve(transition_steps=1200, decay_factor=0.6, min_ratio=0.12)
    assert decided.reasons == {
        "wd_schedule": "default",
        "wd_transition_steps": "auto: task image_generation, 12% of 10000 steps",
        "wd_decay_factor": "auto: task image_generation; 0.65 by its 6000 images",
        "wd_min_ratio": "auto: 6000 images",
        "wd_max_progress": "default",
    }
    by_size = decide(*ON, *AUTO, images=6000).curve
    assert (by_size.transition_steps, by_size.decay_factor) == (1600, 0.65)
    given = decide(*ON, *AUTO, "--wd_decay_factor", "0.9")  # the last word wins; what is given goes before everything
    assert (given.curve.decay_factor, given.reasons["wd_decay_factor"]) == (0.9, "given")


def test_the_least_ratio_by_complexity() -> None:
    words = (*ON, "--wd_min_ratio", "complexity")
    decided = decide(*words, images=2000, complexity=Complexity(3000, 4000))
    assert decided.curve.min_ratio == pytest.approx(0.05 * 0.75 * 1.5)
    assert decided.reasons["wd_min_ratio"].startswith("complexity 0.75: 3,000 trained numbers for 4,000 in the latents")
    with pytest.raises(UserError, match="--wd_min_ratio complexity: a --network_module of another package"):
        decide(*words)


def test_percentages_are_of_the_run() -> None:
    decided = decide(*ON, "--wd_transition_steps", "20%", total_steps=1234)
    assert (decided.curve.transition_steps, decided.reasons["wd_transition_steps"]) == (246, "20% of 1234 steps")
    words = ("--wd_schedule", "multi_stage", "--wd_stages", "0:1.0,1000:0.7,20%:0.4", "--wd_interpolate")
    assert decide(*ON, *words).curve == Curve(
        "multi_stage", stages=((0, 1.0), (1000, 0.7), (2000, 0.4)), interpolate=True
    )
    with pytest.raises(UserError, match="wd_stages begin at steps 0, 1000, 200; these must rise"):
        decide(*ON, *words, total_steps=1000)


@pytest.mark.parametrize("schedule", ["cosine", "sigmoid", "linear"])
def test_infinite_progress_ends_with_the_run(schedule: str) -> None:
    decided = decide(*ON, "--wd_schedule", schedule, "--wd_max_progress", "inf", total_steps=7000)
    assert decided.curve.factor(7000) == pytest.approx(0.1)
    assert decided.curve.factor(6900) > 0.1
    assert decided.reasons["wd_max_progress"] == "inf: to the end of the run"


def test_a_run_that_ends_before_the_curve_begins_is_told(caplog: pytest.LogCaptureFixture) -> None:
    decide(*ON, "--wd_transition_steps", "auto", total_steps=400)
    assert "it would change after step 500, and the run has 400 steps" in caplog.text
    caplog.clear()
    decide(optimizer=choice("CustomAdamW", "dynamic_weight_decay=True"), total_steps=400)
    assert "it would change" not in caplog.text  # nobody asked


STAGES = ("--wd_schedule", "multi_stage", "--wd_stages", "0:1,100:1e-7,200:0.5")


@pytest.mark.parametrize(
    ("base", "words", "total_steps", "said"),
    [
        (1e-8, ON, 5000, "falls from 1e-08 to 4.9e-09, within the 5000 steps of this run"),
        (1e-8, ON, 500, "falls from 1e-08 to 4.9e-09, after the 500 steps of this run"),
        (1e-7, (*ON, "--wd_max_progress", "inf", "--wd_min_ratio", "0.01"), 5000, "from 1e-07 to 1e-09, after"),
        (1e-7, (*ON, "--wd_max_progress", "inf", "--wd_min_ratio", "0.01"), 9000, "from 1e-07 to 5.76e-09, within"),
        (3e-8, ON, 5000, ""),  # 1.47e-8 at the end: the cap on the progress keeps it above the least ratio
        (0.09, (*ON, *STAGES), 5000, "falls from 0.09 to 9e-09, within"),
        (0.09, (*ON, *STAGES), 50, "falls from 0.09 to 9e-09, after"),
        (1e-8, (*ON, "--wd_schedule", "adaptive"), 5000, "falls from 1e-08 to 4.9e-09"),
        (1e-9, (), 100, "is 1e-09, below 1e-08"),
        (1e-8, (), 100, ""),
        (0.0, (), 100, ""),
    ],
)
def test_a_weight_decay_too_small_to_do_anything_is_told_before_training(
    base: float, words: tuple[str, ...], total_steps: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    given = options(*words)
    resolve(given, choose_optimizer("AdamW", [], weight_decay=base), total_steps=total_steps, images=20)
    told = [text for record in caplog.records if "regularises nothing" in (text := record.getMessage())]
    assert len(told) == bool(said), told
    assert said in "".join(told)


def test_custom_adamw_gets_numbers_and_keeps_its_own(caplog: pytest.LogCaptureFixture) -> None:
    chosen = choice("CustomAdamW", "wd_min_ratio=0.3", "use_tam=False")
    words = (*ON, "--wd_schedule", "multi_stage", "--wd_stages", "0:1,50%:0.5")
    decided = decide(*words, optimizer=chosen)
    applied = apply(decided, options(*words), chosen)
    assert applied.arguments == {
        "wd_min_ratio": 0.3,
        "use_tam": False,
        "dynamic_weight_decay": True,
        "wd_schedule": "multi_stage",
        "wd_stages": ((0, 1.0), (5000, 0.5)),
    }
    optimizer = create_optimizer(applied, [{"params": [torch.nn.Parameter(torch.zeros(3))]}], learning_rate=1.0)
    assert attach(decided, optimizer) is None
    assert "initial_weight_decay" not in optimizer.param_groups[0]
    assert decide(*ON, optimizer=chosen).curve.min_ratio == 0.3
    assert decide(*ON, optimizer=chosen).reasons["wd_min_ratio"] == "--optimizer_args"


@pytest.mark.parametrize("name", ["CustomAdamW", "AdamW"])
def test_adaptive_wants_to_be_told_the_losses(name: str) -> None:
    words = (*ON, "--wd_schedule", "adaptive", "--wd_flat", "window=5", "earliest=6")
    decided = decide(*words, "--wd_transition_steps", "2", optimizer=choice(name))
    applied = apply(decided, options(*words), choice(name))
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = create_optimizer(applied, [{"params": [parameter]}], learning_rate=1e-3)
    observe = attach(decided, optimizer)
    for _ in range(9):
        observe(1.0, None)
        parameter.grad = torch.ones(3)
        optimizer.step()
    assert optimizer.param_groups[0]["wd_flat_since"] == 6
    assert decided.metadata()["wd_flat"] == "window=5 earliest=6"


def test_metadata() -> None:
    assert decide(*ON, *AUTO).metadata() == {
        "dynamic_weight_decay": True,
        "wd_schedule": "exponential",
        "wd_transition_steps": 1600,
        "wd_decay_factor": 0.8,
        "wd_min_ratio": 0.2,
        "wd_max_progress": 2.0,
    }
    paced = decide(*ON, "--wd_speed", "gradient", "--wd_lr_coupling", "lower").metadata()
    assert (paced["wd_speed"], paced["wd_lr_coupling"]) == ("gradient", "lower")
    staged = decide(*ON, "--wd_schedule", "multi_stage", "--wd_stages", "0:1.0,10%:0.25").metadata()
    assert staged["wd_stages"] == "0:1,1000:0.25"


def refused(*words: str, name: str = "AdamW", arguments: tuple[str, ...] = (), clips: bool = True) -> Any:
    check_options(options(*words), choice(name, *arguments), clips_gradients=clips)


@pytest.mark.parametrize(
    ("words", "given", "message"),
    [
        (("--wd_schedule", "cosine"), {}, "--wd_schedule needs --dynamic_weight_decay with AdamW"),
        (ON, {"name": "LBFGS"}, "LBFGS has no weight_decay that could change"),
        (ON, {"name": "Lion"}, "the weight decay of Lion is 0, which no curve changes: --weight_decay 0.01"),
        (ON, {"arguments": ("weight_decay=0",)}, "the weight decay of AdamW is 0"),
        (("--wd_min_ratio", "0.2"), {"name": "CustomAdamW", "arguments": ("weight_decay=0",)}, "of CustomAdamW is 0"),
        (("--task", "general"), {}, "--task needs --dynamic_weight_decay with AdamW"),
        (
            ("--wd_min_ratio", "0.2"),
            {"name": "CustomAdamW", "arguments": ("wd_min_ratio=0.3", "dynamic_weight_decay=True")},
            "--wd_min_ratio 0.2 contradicts --optimizer_args wd_min_ratio=0.3",
        ),
        (ON, {"name": "CustomAdamW", "arguments": ("dynamic_weight_decay=False",)}, "contradicts --optimizer_args dyn"),
        (
            (*ON, "--wd_flat", "windw=3"),
            {},
            "--wd_flat: --wd_schedule adaptive takes no 'windw', did you mean 'window'",
        ),
        ((*ON, "--wd_flat", "window=1"), {}, "a trend needs 3 steps"),
        ((*ON, "--wd_flat", "validation=0.1"), {}, "needs images to validate on: --validation_split"),
        ((*ON, "--wd_flat", "gradient=0.1"), {"clips": False}, "--wd_flat gradient needs --max_grad_norm above 0"),
        ((*ON, "--wd_speed", "gradient"), {"clips": False}, "--wd_speed gradient needs --max_grad_norm above 0"),
        (("--wd_lr_coupling", "lower"), {}, "--wd_lr_coupling needs --dynamic_weight_decay with AdamW"),
        ((), {"name": "CustomAdamW", "arguments": ("wd_flat=3",)}, "'wd_flat' is set by the program"),
    ],
)
def test_mistakes(words: tuple[str, ...], given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        refused(*words, **given)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--wd_transition_steps", "0"), "'0' is neither a number of steps, nor a percentage such as 20%, nor auto"),
        (("--wd_transition_steps", "120%"), "'120%' is more than all steps"),
        (("--wd_decay_factor", "1.5"), "'1.5' is neither a number from 0 to 1 nor auto"),
        (("--wd_max_progress", "-1"), "'-1' is not a number of 0 or more, or inf"),
        (("--wd_stages", "0:1,5"), "'5' is not a stage such as 1000:0.7"),
        (("--wd_stages", "0:1,-5:0.5"), "'-5:0.5' is not a stage"),
        (("--wd_stages", "0:-1"), "'0:-1' is not a stage"),
        (("--wd_schedule", "cosin"), "did you mean 'cosine'"),
        (("--task", "image_generatio"), "did you mean 'image_generation'"),
    ],
)
def test_words_that_are_no_values(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        options(*words)


def test_what_has_no_effect_is_told(caplog: pytest.LogCaptureFixture) -> None:
    refused(*ON, "--wd_schedule", "cosine", "--wd_decay_factor", "0.5")
    refused(*ON, "--wd_schedule", "multi_stage", "--wd_stages", "0:1,9:0.5", "--wd_speed", "gradient")
    refused("--no-dynamic_weight_decay", "--wd_min_ratio", "0.2", "--task", "general")
    assert [record.getMessage() for record in caplog.records] == [
        "--wd_decay_factor has no effect with --wd_schedule cosine: it is for exponential, adaptive",
        "--wd_speed has no effect with --wd_schedule multi_stage: it is for exponential, cosine, sigmoid, linear, "
        "adaptive",
        "--wd_min_ratio has no effect with --no-dynamic_weight_decay",
        "--task has no effect with --no-dynamic_weight_decay",
    ]


@pytest.mark.parametrize(
    ("words", "total_steps", "asked"),
    [
        ((), 5000, False),
        (("--wd_decay_factor", "auto"), 500, True),
        (("--wd_min_ratio", "auto"), 5000, False),  # the number of images decides
        (("--wd_transition_steps", "auto"), 5000, True),
        (("--wd_transition_steps", "auto"), 2999, False),
        (("--wd_transition_steps", "auto"), 20_001, False),
    ],
)
def test_a_task_that_is_not_asked_is_told(
    words: tuple[str, ...], total_steps: int, asked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    decide(*ON, *words, "--task", "image_generation", total_steps=total_steps)
    assert ("--task image_generation has no effect" in caplog.text) is not asked


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--wd_decay_factor", "1"), "with these numbers its curve never falls"),
        (("--wd_max_progress", "0"), "with these numbers its curve never falls"),
        (("--wd_schedule", "adaptive", "--wd_min_ratio", "1"), "with these numbers its curve never falls"),
        (("--wd_schedule", "adaptive", "--wd_flat", "earliest=900"), "after step 900, and the run has 900 steps"),
        (("--wd_schedule", "adaptive", "--wd_flat", "window=1001"), "after step 1000, and the run has 900 steps"),
        (("--wd_schedule", "multi_stage", "--wd_stages", "0:1,1000:0.5"), "after step 999, and the run has 900 steps"),
        (("--wd_schedule", "multi_stage", "--wd_stages", "0:1,1000:0.5", "--wd_interpolate"), ""),
        (("--wd_schedule", "multi_stage", "--wd_stages", "0:1,100:0.5,200:1"), ""),
        (("--wd_transition_steps", "899"), ""),
        (("--wd_transition_steps", "900"), "after step 900, and the run has 900 steps"),
    ],
)
def test_a_curve_that_changes_nothing_is_told(
    words: tuple[str, ...], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    decide(*ON, *words, total_steps=900)
    assert ("the weight decay is constant" in caplog.text) is bool(message)
    assert message in caplog.text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "0.01 until step 1000, then exponential; 0.007 at the last step"),
        (("--wd_schedule", "linear", "--wd_max_progress", "1"), "0.01 until step 1000, then linear; 0.001 at the last"),
        (("--wd_schedule", "multi_stage", "--wd_stages", "0:1,50%:0.5"), "0.01 times 0:1,1000:0.5; 0.005 at the last"),
        (
            ("--wd_speed", "gradient", "--wd_lr_coupling", "lower"),
            "0.01 until step 1000, then exponential; 0.007 at the last step at a steady speed, and its speed follows "
            "the gradient norm; the weights shrink by the lower of this curve and the rate's",
        ),
        (("--wd_schedule", "adaptive"), "0.01 until the loss is flat, at step 500 or later; then times 0.7 in every"),
        (("--wd_transition_steps", "2000"), "0.01, exponential: it does not change within this run"),
    ],
)
def test_the_curve_in_a_line(words: tuple[str, ...], text: str) -> None:
    curve = decay_curve(decide(*ON, *words, total_steps=2000), 0.01, total_steps=2000)
    assert decay(Decay(base=0.01, curve=curve)).startswith(text)


def test_stages_survive_output_config(tmp_path: Any) -> None:
    file = str(tmp_path / "x.toml")
    words = ("--wd_stages", "0:1.0,20%:0.4", "--wd_max_progress", "inf", "--wd_transition_steps", "20%")
    with pytest.raises(SystemExit):
        options("--config_file", file, "--output_config", *words)
    assert options("--config_file", file) == options(*words)
    assert replace(options(*words), wd_stages=None) != options(*words)
