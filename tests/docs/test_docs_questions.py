"""The answers of docs/questions.md are computed, with the program's own functions where it has them."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from library.config.options.schedule import ScheduleOptions
from library.guidance import rules
from library.models import modules
from library.models.checkpoints.base_model import ASSETS
from library.optimizers import auto_weight_decay
from library.optimizers.custom_adamw.codec import BLOCK
from library.optimizers.schedules import choose_schedule, create_schedule
from library.optimizers.weight_decay import Curve
from library.record.forgetting import SEVERE, WARNED, rate
from tests.docs import true_sizes
from tests.docs.tables import page

PAGE = page("questions")


def answers() -> dict[int, list[str]]:
    """The numbers in bold below each question."""
    found = {}
    for number, text in re.findall(r"^\*\*(\d+)\. (.*?)(?=^\*\*\d+\. |^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL):
        _, _, answer = text.partition("**\n\n")
        found[int(number)] = re.findall(r"\*\*([^*]+)\*\*", answer)
    return found


def lora(inputs: int, outputs: int, rank: int) -> int:
    return rank * (inputs + outputs)


def expected() -> dict[int, list[str]]:
    of_13b = 40 * 4 * lora(5120, 5120, 16)
    in_8_bits = 2 * of_13b * (1 + 4 / BLOCK)
    energy = [value**2 for value in (8, 4, 2, 1, 1)]
    kept = sum(energy[:2]) / sum(energy)
    views = rules.views(100)
    endless = Curve(max_progress=math.inf)
    forgotten = rate(0.092, 0.080)
    ten = 10 * true_sizes.numbers("SD 1.5", rank=16)
    assert WARNED < forgotten < SEVERE
    return {
        1: [f"{lora(1280, 5120, 16):,}", f"{lora(1280, 5120, 16) / (1280 * 5120):.2%}"],
        2: [f"{of_13b:,}", f"{of_13b / 13e9:.2%}"],
        3: [f"{2 * of_13b / 1e6:.1f} MB", f"{8 * of_13b / 2**20:.0f} MiB", f"{in_8_bits / 2**20:.0f} MiB"],
        4: [f"{8 / 16:g}", f"{8 / 32:g}", f"{8 / math.sqrt(32):.2f}"],
        5: [f"{kept:.1%}", f"{math.sqrt(1 - kept):.1%}"],
        6: [f"{40 * 10 // (4 * 2) * 8}"],
        7: [f"{round(views / 4):,}"],
        8: [f"{100 + 1900 // 2:,}", "5e-5"],
        9: [f"{8 * 0.52 * 0.75:.1f} hours", f"{8 * 0.52 * 0.75 / 2:.1f}"],
        10: [f"{1 - (1 - 1e-6) ** 5000:.2%}"],
        11: [f"{Curve().factor(2500):.2f}", f"{Curve().factor(10_000):.2f}", f"{endless.factor(10_000):.2f}"],
        12: [str(auto_weight_decay.transition_steps(5000, "text_to_image")[0])],
        13: [str(16 + 8 + 8), f"{0.6:.0%}"],
        14: [f"{math.hypot(3, 4):g}", f"{math.hypot(3, 4) / 2:g}"],
        15: [str(round(200 * 0.3 / 0.7))],
        16: [f"{forgotten:.0%}"],
        17: [f"{ten / 1_066_235_307:.0%}"],
    }  # fmt: skip


def test_the_answers() -> None:
    found = answers()
    assert {number: [text.replace(" %", "%") for text in texts] for number, texts in found.items()} == expected()


def test_what_the_answers_rest_on() -> None:
    assert rules.views(100) == 6340
    assert round(rules.views(100) / 100) == 63
    chosen = choose_schedule(ScheduleOptions(lr_scheduler="cosine", lr_warmup_steps="5%"), total_steps=2000)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    schedule = create_schedule(chosen, optimizer)
    for _ in range(1050):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-5)


def test_the_numbers_of_sd_1_5() -> None:
    config = json.loads((ASSETS / "sd1.json").read_text(encoding="utf-8"))
    makers = {"unet": modules.new_unet, "vae": modules.new_vae, "text_encoder": modules.new_text_encoder}
    with torch.device("meta"):
        parameters = [p for part, new in makers.items() for p in new(config[part]).parameters()]
    assert sum(parameter.numel() for parameter in parameters) == 1_066_235_307
