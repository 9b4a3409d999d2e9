"""What --recommend may be told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.config import wishes
from library.config.fields import BadValue
from library.config.parser import parse
from library.config.wishes import Wishes

REQUIRED = ("--pretrained_model_name_or_path", "base", "--train_data_dir", "images", "--output_dir", "out")


@pytest.mark.parametrize(
    ("words", "meaning"),
    [
        ("data", Wishes()),
        ("style", Wishes(subject="style")),
        ("Hard, concept", Wishes(subject="concept", difficulty="hard")),
        ("90min,1.5s,easy", Wishes(difficulty="easy", budget=5400, step=1.5)),
    ],
)
def test_words(words: str, meaning: Wishes) -> None:
    assert wishes.of(words) == meaning


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("stile", "'stile' is not known here, did you mean 'style'?"),
        ("10x", "there are style, character, concept; easy, normal, hard; and the time"),
        ("0s", "'0s' is not known here"),
        ("style,concept", "'concept': the subject is given twice"),
        ("1h,90min,1s", "'90min': the time is given twice"),
        ("2h", "needs that of a step, such as 1.4s"),
        ("1.4s", "--dry_run=measure times steps"),
    ],
)
def test_mistakes(words: str, message: str) -> None:
    with pytest.raises(BadValue) as caught:
        wishes.of(words)
    assert message in str(caught.value)


@given(st.floats(0.01, 100), st.floats(0.01, 1000))
def test_the_steps_fit_into_the_time(hours: float, step: float) -> None:
    most = wishes.of(f"{hours:.4f}h,{step:.4f}s").most_steps
    assert most is not None
    within = float(f"{hours:.4f}") * 3600 * (1 + 1e-12)  # the quotient is rounded
    assert most * float(f"{step:.4f}") <= within or most == 1


@pytest.mark.parametrize(
    ("given_words", "value"),
    [
        (("--recommend",), "data"),
        (("--recommend", "style", "hard"), "style,hard"),
        (("--recommend=style,hard",), "style,hard"),
        (("--recommend", "true"), "data"),  # what the flag was in files
        (("--recommend", "false"), ""),
        ((), ""),
    ],
)
def test_on_the_command_line(given_words: tuple[str, ...], value: str) -> None:
    assert parse([*REQUIRED, *given_words]).guidance.recommend == value
