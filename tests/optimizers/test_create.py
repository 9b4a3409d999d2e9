"""From names, words and flags to optimizers."""

from __future__ import annotations

import logging

import pytest
import torch

from library.errors import UserError
from library.optimizers.create import (
    choose_optimizer,
    create_optimizer,
    effective_rates,
    effective_weight_decays,
    state_bytes,
)
from library.optimizers.registry import CUSTOM_ADAMW, OPTIMIZERS


def groups() -> list[dict]:
    return [
        {"params": [torch.nn.Parameter(torch.ones(8, 4))], "lr": 1e-2, "name": "unet", "param_names": ["a"]},
        {"params": [torch.nn.Parameter(torch.ones(4))], "lr": 1e-3, "name": "text_encoder", "param_names": ["b"]},
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_name_makes_an_optimizer_in_any_case(name):
    choice = choose_optimizer(name.upper(), [])
    optimizer = create_optimizer(choice, groups(), learning_rate=1e-2)
    assert type(optimizer).__name__ == choice.path.rsplit(".", 1)[1]
    assert list(effective_rates(optimizer)) == ["unet", "text_encoder"]


def test_kohyas_defaults_hold_where_the_user_says_nothing():
    sgd = create_optimizer(choose_optimizer("SGDNesterov", []), groups(), learning_rate=1.0)
    assert sgd.defaults["momentum"] == 0.9
    assert sgd.defaults["nesterov"] is True
    said = create_optimizer(choose_optimizer("SGDNesterov", ["momentum=0.5"]), groups(), learning_rate=1.0)
    assert said.defaults["momentum"] == 0.5
    assert choose_optimizer("Adafactor", []).relative_step
    assert not choose_optimizer("Adafactor", ["relative_step=False"]).relative_step


def test_torchs_classes_and_paths_work():
    assert choose_optimizer("RMSprop", []).path == "torch.optim.RMSprop"
    assert choose_optimizer("torch.optim.SGD", ["momentum=0.9"]).arguments == {"momentum": 0.9}


def test_group_rates_are_respected():
    optimizer = create_optimizer(choose_optimizer("AdamW", []), groups(), learning_rate=5.0)
    assert effective_rates(optimizer) == {"unet": 1e-2, "text_encoder": 1e-3}


def test_state_bytes_of_adamw():
    """Two moments in fp32 and a step counter in fp32, per parameter tensor."""
    optimizer = create_optimizer(choose_optimizer("AdamW", []), groups(), learning_rate=1.0)
    assert state_bytes(optimizer) == 36 * 8 + 2 * 4


def test_nothing_is_said_of_the_stand_in_that_settings_are_tried_on(caplog):
    """It has no LoRA pairs: ALoRA would warn that it does nothing."""
    caplog.set_level(logging.INFO)
    choose_optimizer("CustomAdamW", [], custom_adamw={"use_alora": True, "use_orthogonal_grad": True})
    assert not caplog.records
    assert logging.root.manager.disable == logging.NOTSET


def test_flags_of_custom_adamw():
    choice = choose_optimizer("customadamw", ["spd_lambda=0.1"], custom_adamw={"use_alora": False, "spd_lambda": 0.1})
    assert choice.path == CUSTOM_ADAMW
    assert choice.arguments == {"spd_lambda": 0.1, "use_alora": False}
    with pytest.raises(UserError, match=r"--spd_lambda 0.2 contradicts --optimizer_args spd_lambda=0.1"):
        choose_optimizer("CustomAdamW", ["spd_lambda=0.1"], custom_adamw={"spd_lambda": 0.2})
    with pytest.raises(UserError, match=r"--use_alora: only CustomAdamW has this; --optimizer_type is AdamW"):
        choose_optimizer("AdamW", [], custom_adamw={"use_alora": True})
    with pytest.raises(UserError, match=r"did you mean 'spd_lambda'"):
        choose_optimizer("CustomAdamW", ["spd_lamda=0.1"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_weight_decay_is_an_option_of_every_optimizer_that_has_one(name):
    """All that kohya's users know by name have one."""
    choice = choose_optimizer(name, [], weight_decay=0.25)
    optimizer = create_optimizer(choice, groups(), learning_rate=1e-2)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.25]
    assert "weight_decay" not in choose_optimizer(name, []).arguments


def test_the_weight_decay_and_what_the_words_say_of_it():
    assert choose_optimizer("AdamW", ["weight_decay=0.25"], weight_decay=0.25).arguments == {"weight_decay": 0.25}
    assert choose_optimizer("SGD", ["weight_decay=0"], weight_decay=0.0).arguments == {"weight_decay": 0}
    with pytest.raises(UserError, match=r"--weight_decay 0.1 contradicts --optimizer_args weight_decay=0.2"):
        choose_optimizer("AdamW", ["weight_decay=0.2"], weight_decay=0.1)
    with pytest.raises(UserError, match=r"--weight_decay: LBFGS has no weight_decay$"):
        choose_optimizer("LBFGS", [], weight_decay=0.1)
    with pytest.raises(UserError, match=r"--optimizer_args weight_decay=... passes it unchecked"):
        choose_optimizer(f"{__name__}.AnyName", [], weight_decay=0.1)


class AnyName(torch.optim.Optimizer):
    """Takes whatever it is given, and does nothing with it."""

    def __init__(self, params, lr=1e-3, **rest):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        pass


# -- what an optimizer is like, whatever its name


@pytest.mark.parametrize(
    ("name", "words", "traits"),
    [
        ("AdamW", [], ""),
        ("AdamWScheduleFree", [], "modes averages schedule_free"),
        ("RAdamScheduleFree", [], "modes averages schedule_free"),
        ("schedulefree.SGDScheduleFreeReference", [], "modes averages schedule_free"),
        ("schedulefree.AdamWScheduleFreeClosure", [], ""),  # keeps no weights apart
        ("pytorch_optimizer.ScheduleFreeAdamW", [], "modes averages schedule_free"),
        ("pytorch_optimizer.ScheduleFreeRAdam", [], "modes averages schedule_free"),
        ("pytorch_optimizer.SPlus", [], "modes averages"),  # an average that no rate weighs: schedules are its users'
        ("prodigyplus.ProdigyPlusScheduleFree", [], "modes averages schedule_free finds_its_rate"),
        ("prodigyplus.ProdigyPlusScheduleFree", ["use_schedulefree=False"], "modes finds_its_rate"),
        ("Prodigy", [], "finds_its_rate one_rate"),
        ("DAdaptAdaGrad", [], "finds_its_rate one_rate"),  # without a word
        ("DAdaptAdam", [], "finds_its_rate one_rate"),
        ("pytorch_optimizer.Prodigy", [], "finds_its_rate one_rate"),
        ("pytorch_optimizer.DAdaptLion", [], "finds_its_rate one_rate"),
        ("Adafactor", [], "relative_step takes_no_rate"),
        ("Adafactor", ["relative_step=False"], ""),
        ("transformers.Adafactor", [], "relative_step takes_no_rate"),
        ("pytorch_optimizer.AdaFactor", [], "relative_step"),
        ("pytorch_optimizer.AdaFactor", ["relative_step=False"], ""),
        ("torch.optim.Adafactor", [], ""),  # has a "d", which is an argument, and knows no relative steps
        ("CustomAdamW", [], "is_custom_adamw"),
        ("library.optimizers.CustomAdamW", [], "is_custom_adamw"),
        ("library.optimizers.custom_adamw.CustomAdamW", [], "is_custom_adamw"),
        ("pytorch_optimizer.ROSE", [], ""),
    ],
)
def test_what_an_optimizer_is_like_does_not_depend_on_its_name(name, words, traits):
    choice = choose_optimizer(name, words)
    found = {
        "modes": choice.has_modes,
        "averages": choice.averages,
        "schedule_free": choice.schedule_free,
        "finds_its_rate": choice.finds_its_rate,
        "one_rate": not choice.has_a_rate_a_group,
        "relative_step": choice.relative_step,
        "takes_no_rate": choice.takes_no_rate,
        "is_custom_adamw": choice.is_custom_adamw,
    }
    assert " ".join(trait for trait, has in found.items() if has) == traits


def test_rates_that_are_its_own_are_not_evened_out(caplog):
    for name, rates, warned in (
        ("prodigyplus.ProdigyPlusScheduleFree", [1.0, 0.5], False),
        ("Prodigy", [1.0, 1.0], True),
        ("DAdaptAdan", [1.0, 1.0], True),
    ):
        caplog.clear()
        two = [{**group, "lr": rate} for group, rate in zip(groups(), (1.0, 0.5), strict=True)]
        optimizer = create_optimizer(choose_optimizer(name, []), two, learning_rate=1.0)
        assert [group["lr"] for group in optimizer.param_groups] == rates
        assert ("one rate for all parts" in caplog.text) == warned


def stepped(name: str, *words: str, steps: int = 1) -> torch.optim.Optimizer:
    made = groups()
    optimizer = create_optimizer(choose_optimizer(name, list(words)), made, learning_rate=1e-2)
    for _ in range(steps):
        for group in made:
            for parameter in group["params"]:
                parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(("words", "steps", "rate"), [((), 1, 1e-2), (("warmup_init=True",), 3, 3e-6)])
def test_a_relative_rate_is_the_steps_own(words, steps, rate):
    """Of weights of 1 each, so that transformers' scaling by their size is about 1."""
    for name in ("Adafactor", "pytorch_optimizer.AdaFactor"):
        rates = effective_rates(stepped(name, *words, steps=steps))
        assert rates == {"unet": pytest.approx(rate, rel=0.05), "text_encoder": pytest.approx(rate, rel=0.05)}


def test_names_that_mean_something_else_elsewhere():
    """A "d" that is an argument is no rate that was found, and another's "wd_schedule" is none of ours."""
    assert effective_rates(stepped("torch.optim.Adafactor", "d=2.0")) == {"unet": 1e-2, "text_encoder": 1e-3}
    assert effective_weight_decays(stepped("pytorch_optimizer.ROSE")).keys() == {"unet", "text_encoder"}


def test_settings_of_custom_adamw_go_to_it_by_every_path():
    for path in ("library.optimizers.CustomAdamW", CUSTOM_ADAMW):
        choice = choose_optimizer(path, ["spd_lambda=0.1"], custom_adamw={"use_alora": True})
        assert choice.arguments == {"spd_lambda": 0.1, "use_alora": True}
        with pytest.raises(UserError, match="spd_lambda"):
            choose_optimizer(path, ["spd_lamda=0.1"])


def test_whatever_a_class_raises_is_a_refusal():
    with pytest.raises(UserError, match=r"pytorch_optimizer\.Muon does not take these settings: .*use_muon"):
        choose_optimizer("pytorch_optimizer.Muon", [])


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("AdamX", [], "unknown optimizer 'AdamX', did you mean 'AdamW'"),
        ("AdamW", ["weight_deca=1"], "did you mean 'weight_decay'"),
        ("AdamW", ["lr=1"], "'lr' is set by the program"),
        ("AdamW", ["betas"], "not of the form name=value"),
        ("Adafactor", ["warmup_init=True", "relative_step=False"], "needs relative_step=True"),
        ("no_such_package.Adam", [], "pip install no_such_package"),
    ],
)
def test_mistakes(name, words, message):
    with pytest.raises(UserError, match=message):
        choose_optimizer(name, words)
