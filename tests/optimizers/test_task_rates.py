"""Learning rates by task and size, against the table that is in circulation."""

from __future__ import annotations

import pytest

from library.errors import UserError
from library.optimizers import CustomAdamW, preset_arguments, task_rate
from library.optimizers.task_rates import FULL_RATES, LORA_RATES, SIZES, size_of

LORA = {
    ("classification", "small"): 1e-4, ("classification", "medium"): 5e-5, ("classification", "large"): 2e-5,
    ("generation", "small"): 5e-5, ("generation", "medium"): 2e-5, ("generation", "large"): 1e-5,
    ("question_answering", "small"): 1e-4, ("question_answering", "medium"): 5e-5,
    ("question_answering", "large"): 2e-5,
}  # fmt: skip


@pytest.mark.parametrize(("task", "size"), LORA)
def test_the_table(task: str, size: str) -> None:
    found = task_rate(task, size)
    assert found == (LORA[task, size], "cosine" if task == "generation" else "linear", 0.05)
    assert preset_arguments(task=task, size=size) == {"lr": found.rate}
    full = task_rate(task, size, full=True)
    assert full.warmup == 0.1
    assert 3 <= found.rate / full.rate <= 6  # "about a fifth"


def test_every_task_has_all_sizes() -> None:
    assert LORA_RATES.keys() == FULL_RATES.keys()
    assert {len(rates) for table in (LORA_RATES, FULL_RATES) for rates in table.values()} == {len(SIZES)}


def test_a_size_may_be_a_number() -> None:
    assert [size_of(count) for count in (1, 3 * 10**9, 3 * 10**9 + 1, 13 * 10**9, 70 * 10**9)] == [
        "small", "small", "medium", "medium", "large",
    ]  # fmt: skip
    assert preset_arguments(task="image_classification", size=86_000_000)["lr"] == 1e-4


def test_a_task_changes_only_the_rate_of_a_preset() -> None:
    plain = preset_arguments("language_model_finetune")
    assert preset_arguments("language_model_finetune", task="generation", size="large") == plain | {"lr": 1e-5}
    assert preset_arguments("language_model_finetune", task="generation", size="small", full=True)["lr"] == 1e-5
    import torch

    optimizer = CustomAdamW(
        torch.nn.Linear(2, 2).named_parameters(),
        **preset_arguments("default", task="question_answering", size="medium"),
    )
    assert optimizer.param_groups[0]["lr"] == 5e-5


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"task": "generatoin", "size": "small"}, "no rate for 'generatoin', did you mean 'generation'"),
        ({"task": "x", "size": "small"}, "no rate for 'x'; there are classification, generation,"),
        ({"task": "generation", "size": "smal"}, "size: no 'smal', did you mean 'small'"),
        ({"task": "generation", "size": 0}, "0 is no number of parameters"),
        ({"task": "generation"}, "task and size belong together"),
        ({"size": "small"}, "task and size belong together"),
        ({"full": True}, "full needs both"),
    ],
)
def test_what_is_wrong(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        preset_arguments("default", **wrong)
