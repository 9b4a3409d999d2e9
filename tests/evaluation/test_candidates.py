"""Files with multipliers on a command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.errors import UserError
from library.evaluation.candidates import BASE, Candidate, Part, read_candidates


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("fox.safetensors", "style.safetensors", "my+own.safetensors", "other/fox.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_files_with_multipliers(files: Path) -> None:
    fox, style = files / "fox.safetensors", files / "style.safetensors"
    found = read_candidates([str(fox), f"{fox}:0.7", f"{fox}:-1+{style}:0.5"])
    assert found == (
        Candidate((Part(fox),)),
        Candidate((Part(fox, 0.7),)),
        Candidate((Part(fox, -1.0), Part(style, 0.5))),
    )
    assert [one.name for one in found] == ["fox", "fox × 0.7", "fox × -1 + style × 0.5"]
    assert found[2].times(-0.5).parts == (Part(fox, 0.5), Part(style, -0.25))
    assert found[2].times(-0.5).name == "fox × 0.5 + style × -0.25"
    assert BASE.name == "base"


def test_a_plus_in_a_name_belongs_to_it(files: Path) -> None:
    (found,) = read_candidates([f"{files / 'my+own.safetensors'}:0.5+{files / 'style.safetensors'}"])
    assert [part.path.name for part in found.parts] == ["my+own.safetensors", "style.safetensors"]


def test_files_of_one_stem_are_named_by_their_paths(files: Path) -> None:
    words = [str(files / "fox.safetensors"), str(files / "other" / "fox.safetensors")]
    assert [one.name for one in read_candidates(words)] == [f"{files.name}/fox", "other/fox"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("{}/fux.safetensors:0.5", "did you mean '{}/fox.safetensors'?"),
        ("{}/fox.safetensors:much", "the multiplier 'much' of {}/fox.safetensors is not a number"),
        ("{}/fox.safetensors:nan", "the multiplier 'nan' of {}/fox.safetensors is not a number"),
        ("{0}/fox.safetensors:0.5+{0}/fox.safetensors:0.2", "stands in it twice"),
        ("{0}/fox.safetensors+", "no such file"),
    ],
)
def test_mistakes_are_named(files: Path, word: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        read_candidates([word.format(files)])
    assert said.format(files) in str(error.value)


def test_equal_candidates_are_refused(files: Path) -> None:
    with pytest.raises(UserError, match="is given twice"):
        read_candidates([str(files / "fox.safetensors"), f"{files / 'fox.safetensors'}:1.0"])
