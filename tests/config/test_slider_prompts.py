"""The prompts of a slider: kohya's forms, the settings of an axis, and the message of each mistake."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from library.config.data.slider_prompts import Setting, check_sizes, read_settings
from library.errors import UserError


def read(folder: Path, text: str) -> tuple[Setting, ...]:
    path = folder / "prompts.toml"
    path.write_text(text, encoding="utf-8")
    return read_settings(path)


def mistake(folder: Path, text: str) -> str:
    with pytest.raises(UserError) as error:
        read(folder, text)
    return str(error.value)


def test_a_list_of_prompts_with_defaults_above(tmp_path: Path) -> None:
    first, second = read(
        tmp_path,
        """
guidance_scale = 2.0
resolution = [256, 512]

[[prompts]]
target = "van gogh"

[[prompts]]
target = "cat"
positive = "fluffy cat"
unconditional = "bald cat"
neutral = "cat"
action = "enhance"
guidance_scale = 3
batch_size = 2
multiplier = -1.5
weight = 0.5
dynamic_crops = true
dynamic_resolution = true
resolution = 768
""",
    )
    assert first == Setting(
        target="van gogh", positive="van gogh", unconditional="", neutral="", guidance_scale=2.0, size=(512, 256)
    )
    assert second == Setting(
        target="cat", positive="fluffy cat", unconditional="bald cat", neutral="cat", action="enhance",
        guidance_scale=3.0, size=(768, 768), batch_size=2, multiplier=-1.5, weight=0.5, dynamic_crops=True,
        dynamic_resolution=True,
    )  # fmt: skip
    assert second.place.endswith("prompts.toml, prompt 2")
    assert second.prompts == ("cat", "fluffy cat", "bald cat")


AXIS = 'target_class = "face"\npositive = "happy face"\nnegative = "sad face"\nneutral = "face"\n'


def of(settings: tuple[Setting, ...]) -> list[tuple[str, str, str, float]]:
    return [(one.action, one.positive, one.unconditional, one.multiplier) for one in settings]


def test_both_ends_make_each_direction_twice(tmp_path: Path) -> None:
    settings = read(tmp_path, AXIS + "multiplier = 2.0\n")
    assert of(settings) == [
        ("erase", "sad face", "happy face", 2.0),
        ("enhance", "happy face", "sad face", 2.0),
        ("erase", "happy face", "sad face", -2.0),
        ("enhance", "sad face", "happy face", -2.0),
    ]
    assert {(one.target, one.neutral) for one in settings} == {("face", "face")}


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ('positive = "happy"', [("enhance", "happy", "", 1.0), ("erase", "happy", "", -1.0)]),
        ('negative = "sad"', [("erase", "sad", "", 1.0), ("enhance", "sad", "", -1.0)]),
    ],
)
def test_one_end_makes_each_direction_once(
    tmp_path: Path, end: str, expected: list[tuple[str, str, str, float]]
) -> None:
    assert of(read(tmp_path, f'target_class = ""\n{end}\n')) == expected


@pytest.mark.parametrize(
    "form",
    [
        AXIS,
        f"[slider]\n{AXIS}",
        f"[[targets]]\n{AXIS}",
        f"[slider]\n[[slider.targets]]\n{AXIS}",
        f"[[prompts]]\n{AXIS}",
        'neutral = "face"\n[[targets]]\n' + AXIS.replace('neutral = "face"\n', ""),
        '[slider]\nneutrals = ["face"]\n[[slider.targets]]\n' + AXIS.replace('neutral = "face"\n', ""),
    ],
    ids=["top", "slider", "targets", "slider targets", "prompts", "neutral above", "neutrals above"],
)
def test_kohyas_forms_of_one_axis_are_the_same(tmp_path: Path, form: str) -> None:
    assert read(tmp_path, form) == read(tmp_path, AXIS)


def test_neutrals_and_resolutions_multiply(tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("a crowd\n\n face \n", encoding="utf-8")
    settings = read(
        tmp_path,
        """
prompt_file = "more.txt"
neutrals = ["face", "portrait"]
resolution = [[64, 128], [256, 256]]

[[targets]]
target_class = "face"
positive = "happy"

[[targets]]
target_class = "dog"
neutral = "dog"
negative = "x"
""",
    )
    assert {one.neutral for one in settings if one.target == "face"} == {"face", "portrait", "a crowd"}
    assert {one.size for one in settings} == {(128, 64), (256, 256)}
    assert len(settings) == 3 * 2 * 2 + 2 * 2


def test_a_neutral_that_is_not_the_target_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read(tmp_path, AXIS)
        assert not caplog.messages
        read(tmp_path, AXIS.replace('neutral = "face"\n', ""))
    (message,) = caplog.messages
    assert message.endswith("neutral = 'face' trains the axis alone")


def test_a_prompt_that_stands_twice_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert len(read(tmp_path, '[[prompts]]\ntarget = "a"\n' * 2)) == 2
    (message,) = caplog.messages
    assert message.endswith("prompt 1: stands 2 times in the file, and counts as often")


PROMPT = '[[prompts]]\ntarget = "cat"\n'
TARGET = '[[targets]]\ntarget_class = "cat"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "--prompts_file {}: is empty"),
        ("[[prompts]]\n", "{}, prompt 1: lacks target, the prompt to train"),
        ("prompts = []", "{}: prompts: is empty"),
        ("prompts = 3", "{}: prompts: must be tables, such as [[prompts]]"),
        ("targets = []", "{}: targets: is empty"),
        (
            "dynamic_crops = true",
            "{}: has neither [[prompts]] nor targets, nor a target or target_class of its own",
        ),
        ("guidence_scale = 1.0", "{}: unknown key 'guidence_scale', did you mean 'guidance_scale'?"),
        (PROMPT + 'postive = "x"', "{}, prompt 1: unknown key 'postive', did you mean 'positive'?"),
        (TARGET + 'positve = "b"', "{}, target 1: unknown key 'positve', did you mean 'positive'?"),
        (
            PROMPT + 'action = "erasing"',
            "{}, prompt 1: action 'erasing': must be erase or enhance, did you mean 'erase'?",
        ),
        (PROMPT + "positive = 3", "{}, prompt 1: positive 3: must be text in quotes"),
        (PROMPT + 'weight = "x"', "{}, prompt 1: weight 'x': must be a number"),
        (PROMPT + "weight = -1.0", "{}, prompt 1: weight -1: must be at least 0"),
        (PROMPT + "batch_size = 0", "{}, prompt 1: batch_size 0: must be a whole number, 1 … 1024"),
        (PROMPT + 'dynamic_crops = "yes"', "{}, prompt 1: dynamic_crops 'yes': must be true or false"),
        (
            PROMPT + "multiplier = 0",
            "{}, prompt 1: multiplier 0: the LoRA has no effect there, and nothing could be trained",
        ),
        (
            PROMPT + "resolution = [1, 2, 3]",
            "{}, prompt 1: resolution [1, 2, 3]: must be a number of pixels, or [height, width]",
        ),
        (PROMPT + "resolution = 100000", "{}, prompt 1: resolution 100000: must be 1 … 16384 pixels"),
        (
            PROMPT + 'unconditional = "cat"',
            "{}, prompt 1: positive and unconditional are both 'cat': their difference, which the LoRA is taught, is "
            "nothing",
        ),
        (
            PROMPT + 'neutral = "cat"\nguidance_scale = 0',
            "{}, prompt 1: guidance_scale 0, and neutral is the target itself: nothing would be trained",
        ),
        (
            'target_class = "a"\npositive = "b"\nnegative = "b"',
            "{}: positive and negative are both 'b': there is no axis between them",
        ),
        ('target_class = "a"', "{}: needs positive or negative, the prompt at one end of the axis, or both"),
        (
            '[[targets]]\npositive = "b"\nnegative = "c"',
            "{}, target 1: lacks target_class, the prompt whose pictures move along the axis",
        ),
        ('target_class = "a"\npositive = "b"\nneutrals = []', "{}: neutrals: is empty"),
        ('target_class = "a"\npositive = "b"\nneutrals = "c"', "{}: neutrals: 'c': must be a list of texts"),
        (
            '[prompt]\n[[prompt.subset]]\nprompt = "a"',
            "--prompts_file {}: holds prompts for samples, not prompts of a slider: give it as --sample_prompts",
        ),
    ],
)  # fmt: skip
def test_each_mistake_is_named(tmp_path: Path, text: str, said: str) -> None:
    assert mistake(tmp_path, text) == said.format(tmp_path / "prompts.toml")


def test_a_missing_file_of_neutrals(tmp_path: Path) -> None:
    found = mistake(tmp_path, 'target_class = "a"\npositive = "b"\nprompt_file = "no.txt"\n')
    assert found.startswith(f"{tmp_path / 'prompts.toml'}: prompt_file: {tmp_path / 'no.txt'}: no such file")


def test_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is YAML; the file is TOML"):
        read_settings(tmp_path / "slider.yaml")


def test_sides_are_multiples_of_the_models(tmp_path: Path) -> None:
    (setting,) = read(tmp_path, PROMPT + "resolution = [64, 100]")
    check_sizes([setting], multiple_of=4)
    with pytest.raises(UserError) as error:
        check_sizes([setting], multiple_of=8)
    assert str(error.value).endswith(
        "prompt 1: resolution 100: this model's sides are multiples of 8 pixels, such as 96"
    )
