"""Shares and balances: what they come to, what is refused, what has no effect."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from library.config.data.dataset_config import DatasetSpec, load_datasets
from library.config.data.shares import check_shares, draws_by_shares, shares_of
from library.config.options import Options
from library.errors import UserError

Parse = Callable[..., Options]

PLACE = "data.toml: [[datasets]] 1, [[datasets.subsets]] "


def load(folder: Path, options: Parse, text: str, *words: str) -> tuple[DatasetSpec, ...]:
    (folder / "data.toml").write_text(text, encoding="utf-8")
    datasets = load_datasets(options("--dataset_config", "data.toml", *words))
    check_shares(datasets)
    return datasets


def toml(*subsets: str, above: str = "") -> str:
    """A data set with the folders a, b, …, each with these lines."""
    own = "".join(
        f"[[datasets.subsets]]\nimage_dir = '{name}'\n{lines}\n" for name, lines in zip("abcd", subsets, strict=False)
    )
    return f"[[datasets]]\nresolution = 64\n{above}\n{own}"


REG = "is_reg = true"
EACH = {
    # 200 draws by repeats, and 0.3 of all is 200 * 0.3 / 0.7
    "by share": (toml("num_repeats = 10", "share = 0.3"), [200, 1000], 200 / 0.7, [0.7, 0.3]),
    "regularisation by share": (toml("", f"{REG}\nshare = 0.3"), [200, 1000], 200 / 0.7, [0.7, 0.3]),
    "reg_share": (toml("", REG, REG, above="reg_share = 0.2"), [100, 30, 10], 125, [0.8, 0.15, 0.05]),
    "reg_share by default": (toml("", "share = 0.25", REG), [100, 30, 10], 400, [0.25, 0.25, 0.5]),
    "all": (toml("share = 0.4", "share = 0.4", "share = 0.2"), [100, 300, 600], 1000, [0.4, 0.4, 0.2]),
    "all but regularisation": (
        toml("share = 0.6", "share = 0.2", f"{REG}\nshare = 0.2"),
        [90, 30, 5],
        150,
        [0.6, 0.2, 0.2],
    ),
    "thirds": (toml("share = 0.333", "share = 0.333", "share = 0.333"), [1, 2, 3], 6 / 0.999, [1 / 3] * 3),
    "the rest by repeats": (toml("share = 0.5", "", ""), [7, 10, 30], 80, [0.5, 0.125, 0.375]),
    "smallest": (toml("", "", "", above="balance = 'smallest'"), [20, 100, 50], 60, [1 / 3] * 3),
    "equal": (toml("", "", "", above="balance = 'equal'"), [20, 100, 60], 180, [1 / 3] * 3),
    "weights": (toml("", "", "", above="balance = [2, 1, 1]"), [20, 100, 60], 180, [0.5, 0.25, 0.25]),
    "smallest with others": (toml("", "", REG, above="balance = 'smallest'"), [20, 99, 7], 80, [0.25, 0.25, 0.5]),
    "equal with a share": (
        toml("", "", f"{REG}\nshare = 0.1", above="balance = 'equal'"),
        [20, 160, 7],
        200,
        [0.45, 0.45, 0.1],
    ),
}


@pytest.mark.parametrize("name", EACH)
def test_what_they_come_to(name: str, folder: Path, options: Parse) -> None:
    text, due, length, shares = EACH[name]
    (spec,) = load(folder, options, text)
    assert draws_by_shares(spec)
    found, parts = shares_of(spec, dict(zip(spec.subsets, due, strict=True)))
    assert found == pytest.approx(length)
    assert [parts[subset] for subset in spec.subsets] == pytest.approx(shares)


def test_options_hold_where_the_file_says_nothing(folder: Path, options: Parse) -> None:
    text = toml("", "") + toml("", "", above="balance = 'smallest'\nreg_share = 0.3")
    first, second = load(folder, options, text, "--balance", "3,1", "--reg_share", "0.1")
    assert [(spec.balance, spec.reg_share) for spec in (first, second)] == [("3,1", 0.1), ("smallest", 0.3)]
    (by_words,) = load(folder, options, toml("", ""), "--balance", "3", "1")
    assert by_words.balance == "3,1"


def test_nothing_given_is_by_repeats(folder: Path, options: Parse) -> None:
    assert not draws_by_shares(load(folder, options, toml("", "", REG))[0])


MISTAKES = {
    toml("share = 1.5"): "1: share: 1.5 is not a share, which is a number above 0 and below 1; 1.5 % is 0.015",
    toml("share = 30"): "1: share: 30 is not a share, which is a number above 0 and below 1; 30 % is 0.3",
    toml("share = 0"): "1: share: 0 is not a share, which is a number above 0 and below 1; num_repeats = 0 leaves a "
    "folder out",
    toml("share = 'much'"): '1: share: "much" is not a share, which is a number above 0 and below 1',
    toml(
        "share = 0.6", "share = 0.5", ""
    ): "1: share: the shares of its data set add up to 1.1, and 1 is all: 0.6 + 0.5",
    toml(
        "share = 0.6", "share = 0.4", ""
    ): "1: share: the shares of its data set add up to 1 (0.6 + 0.4), so nothing is left for c, which has none",
    toml(
        "share = 0.6", "share = 0.3"
    ): "1: share: every folder of its data set has a share, and they add up to 0.9, not 1: 0.6 + 0.3",
    toml("", "share = 0.6", REG): "2: share: the shares of its data set add up to 1.1, and 1 is all: 0.6 + 0.5 of the "
    "regularisation images",
    toml("", f"{REG}\nshare = 0.3", REG): "3: share: is missing: other regularisation images of this data set have one",
    toml("", f"{REG}\nshare = 0.3", above="reg_share = 0.2"): "2: share: the data set has reg_share = 0.2: give one of "
    "them",
    toml(
        "share = 0.2", "", above="balance = 'equal'"
    ): "1: share: the data set has balance = 'equal': give one of them",
    toml("", "", REG, above="balance = '1,2,3'"): "1: balance: 3 weights for 2 folders to learn (a, b)",
    toml(
        "", "", above="balance = 'smalest'"
    ): ": balance: 'smalest' is neither smallest nor equal, nor weights such as 2,1,1, did you mean 'smallest'?",
    toml(
        "", "", above="balance = [1, 0]"
    ): ": balance: '1,0': weights must be above 0; num_repeats = 0 leaves a folder out",
    toml(
        "", "", above="balance = true"
    ): ": balance: true is neither 'smallest' nor 'equal', nor a list of weights such as [2, 1, 1]",
    toml("", above="reg_share = 1"): ": reg_share: 1 is not a share, which is a number above 0 and below 1",
    toml("", above="share = 0.3"): ": share: belongs to [[datasets.subsets]], not to [[datasets]]",
}


@pytest.mark.parametrize("text", MISTAKES, ids=range(len(MISTAKES)))
def test_mistakes(text: str, folder: Path, options: Parse) -> None:
    with pytest.raises(UserError) as caught:
        load(folder, options, text)
    said = MISTAKES[text]
    assert str(caught.value) == (PLACE if said[0] in "123" else "data.toml: [[datasets]] 1") + said


def test_several_resolutions_name_a_mistake_once(folder: Path, options: Parse) -> None:
    text = toml("share = 0.6", "share = 0.3").replace("resolution = 64", "resolutions = [64, 96]")
    with pytest.raises(UserError) as caught:
        load(folder, options, text)
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_without_images_has_no_share(folder: Path, options: Parse) -> None:
    (spec,) = load(folder, options, toml("", "share = 0.3"))
    with pytest.raises(UserError, match="2: no image of b is left to draw, and it is to have a share"):
        shares_of(spec, {spec.subsets[0]: 5})
    (spec,) = load(folder, options, toml("", "", above="balance = 'smallest'"))
    with pytest.raises(UserError, match="1: no image of a is left"):
        shares_of(spec, {spec.subsets[1]: 5})


def test_what_has_no_effect_is_warned_about(folder: Path, options: Parse, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        (spec,) = load(folder, options, toml(""), "--balance", "equal", "--reg_share", "0.3")
        load(folder, options, toml("num_repeats = 2", "num_repeats = 3\nshare = 0.3"))
        load(folder, options, toml("num_repeats = 2\nshare = 0.5", "num_repeats = 3\nshare = 0.5"))  # give the length
        load(folder, options, toml("", "") + toml(""), "--balance", "equal")  # of the first data set only
    assert not draws_by_shares(spec)
    assert [record.getMessage() for record in caplog.records] == [
        "balance: has no effect without a second folder to learn",
        "reg_share: has no effect without regularisation images",
        f"{PLACE}2: num_repeats = 3 has no effect beside its share",
    ]
