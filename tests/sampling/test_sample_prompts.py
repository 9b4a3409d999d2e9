"""Kohya's three forms of prompt files, and when samples are due."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from library.config.options import SampleOptions
from library.errors import UserError
from library.sampling.prompts import SamplePrompt, SampleTimes, plan_samples, read_prompts, warn_of_idle_flags

CAT = SamplePrompt(
    prompt="a cat, --sitting", negative_prompt="bad, ugly", width=640, height=448, seed=7, sample_steps=20, scale=6.5,
    guidance_scale=2.0, flow_shift=3.0, sample_sampler="euler_a", multiplier=-1.5,
)  # fmt: skip
PLAIN = SamplePrompt(prompt="a dog")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_lines_with_flags(tmp_path):
    text = (
        "# comment\n\na cat --w 645 --H 448 --d 7 --s 20 --l 6.5 --g 2 --fs 3 --n bad, ugly --ss k_euler_a --am -1.5\n"
    )
    text += "  a dog  \n"
    cat, dog = read_prompts(write(tmp_path / "p.txt", text))
    assert cat == SamplePrompt(**(vars(CAT) | {"prompt": "a cat"}))
    assert dog == PLAIN
    assert (dog.width, dog.height, dog.sample_steps, dog.scale, dog.seed) == (512, 512, None, None, None)


def test_toml_and_json(tmp_path):
    toml = '[prompt]\nwidth = 640\nscale = 6.5\nnegative_prompt = "bad, ugly"\n[[prompt.subset]]\n'
    toml += 'prompt = "a cat, --sitting"\nheight = 448\nseed = 7\nsample_steps = 20\nsample_sampler = "euler_a"\n'
    toml += "multiplier = -1.5\nguidance_scale = 2\nflow_shift = 3\n"
    toml += '[[prompt.subset]]\nprompt = "b"\nwidth = 64\n'
    cat, b = read_prompts(write(tmp_path / "p.toml", toml))
    assert cat == CAT
    assert (b.width, b.scale) == (64, 6.5)  # a subset's own goes before what all have
    rows = [vars(CAT), "a dog"]
    assert read_prompts(write(tmp_path / "p.json", json.dumps(rows))) == (CAT, PLAIN)


def test_a_negative_prompt_alone_or_a_prompt_of_nothing(tmp_path):
    only, empty = read_prompts(write(tmp_path / "p.txt", "--n bad\n--s 5\n"))
    assert (only.prompt, only.negative_prompt) == ("", "bad")
    assert (empty.prompt, empty.sample_steps) == ("", 5)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", "a\nb --w wide\n", r"p.txt, line 2: width: 'wide' is not a whole number"),
        ("p.txt", "a --x 3\n", r"line 1: unknown flag --x; known: --w, --h"),
        ("p.txt", "a --s 0\n", r"sample_steps: must be 1 … 1000"),
        ("p.txt", "a --fs 0\n", r"flow_shift: must be above 0, not 0; 1 shifts nothing"),
        ("p.txt", "a --ss eulr\n", r"sample_sampler: 'eulr' is not one of .*did you mean 'euler'"),
        ("p.txt", "# nothing\n", "contains no prompt"),
        ("p.md", "a\n", "must end with .txt, .toml or .json"),
        ("p.toml", "[prompt]\nwidth = 3\n", r"has no \[\[prompt.subset\]\]"),
        ("p.toml", "[prompt]\n[[prompt.subset]]\nwidht = 3\n", "subset 1: unknown key 'widht', did you mean 'width'"),
        ("p.json", "[\n1]", "not a list of prompts"),
        ("p.json", "[\n{]", "line 2: not valid JSON"),
        ("p.json", '[{"prompt": ["a", "b"]}]', r"prompt 1: prompt: \['a', 'b'\] is neither text nor a number"),
        ("p.json", '[{"prompt": null}]', r"prompt 1: prompt: None is neither text nor a number"),
    ],
)
def test_mistakes_have_their_place(tmp_path, name, text, said):
    with pytest.raises(UserError, match=said):
        read_prompts(write(tmp_path / name, text))


def test_flags_of_other_models_are_said_to_have_no_effect(tmp_path, caplog):
    (told,) = prompts = read_prompts(write(tmp_path / "p.txt", "a dog --g 3.5 --fs 2 --rcfg 1\n"))
    assert told == SamplePrompt(prompt="a dog", guidance_scale=3.5, flow_shift=2)
    assert "line 1: --rcfg has no effect: it is for other models" in caplog.text
    warn_of_idle_flags(prompts, told=True, flow=True)
    assert not re.search("--(g|fs) has no effect", caplog.text)
    warn_of_idle_flags(prompts, told=False, flow=False)
    assert "--g has no effect: it is for models that are told a guidance" in caplog.text
    assert "--fs has no effect: it is for models that are trained by flow matching" in caplog.text


def times(**changes) -> SampleTimes:
    given = {"prompts": (PLAIN,), "sampler": "ddim", "at_first": False, "every_n_steps": None, "every_n_epochs": None}
    return SampleTimes(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"every_n_steps": 4}, {4: "000004", 8: "000008", 12: "000012"}),
        ({"every_n_epochs": 2}, {10: "e000002"}),
        ({"every_n_epochs": 1, "every_n_steps": 2}, {5: "e000001", 10: "e000002"}),
        ({"at_first": True}, {0: "e000000"}),
    ],
)
def test_when_samples_are_due(changes, expected):
    found = {step: times(**changes).due(step, steps_per_epoch=5) for step in range(13)}
    assert {step: moment for step, moment in found.items() if moment} == expected


def test_half_a_wish_is_warned_about(tmp_path, caplog):
    assert plan_samples(SampleOptions()) is None
    assert caplog.text == ""
    assert plan_samples(SampleOptions(sample_prompts="absent.txt")) is None
    assert "--sample_prompts has no effect: it needs --sample_every_n_epochs" in caplog.text
    assert plan_samples(SampleOptions(sample_at_first=True)) is None
    assert "--sample_prompts, the file of the prompts, is not given" in caplog.text
    with pytest.raises(UserError, match=r"absent.txt: no such file"):
        plan_samples(SampleOptions(sample_prompts="absent.txt", sample_at_first=True))
