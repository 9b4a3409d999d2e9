"""Whatever a configuration or a description of data says: it ends in options and data sets, or in a named error."""

from __future__ import annotations

import os
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from library.config import kohya
from library.config.data.dataset_config import LEVELS, load_datasets
from library.config.options import Options, declared_options
from library.config.parser import parse
from library.errors import UserError

BOUNDED = settings(max_examples=300, suppress_health_check=list(HealthCheck))
REQUIRED = ("--pretrained_model_name_or_path", "base", "--output_dir", "out")
IMAGES = ("--train_data_dir", "data", "--resolution", "64")

WORDS = (
    "",
    "a",
    "data",
    "AdamW",
    "cosine",
    "64",
    "1e-4",
    "nan",
    "-1",
    "true",
    "None",
    "a=1",
    "512,768",
    "5%",
    "~",
    "..",
)
numbers = st.one_of(st.integers(), st.integers(-2, 70), st.floats(), st.floats(-1, 2))
scalars = st.one_of(st.booleans(), numbers, st.sampled_from(WORDS), st.text(max_size=8), st.dates(), st.datetimes())
# the values of one list are of one kind, as TOML of old has it
lists = st.one_of(
    *(st.lists(kind, max_size=3) for kind in (st.booleans(), st.integers(), st.floats(), st.text(max_size=5)))
)
keys = st.text(string.ascii_letters + string.digits + "_- .", min_size=1, max_size=12)
values = st.recursive(
    st.one_of(scalars, lists),
    lambda inner: st.dictionaries(keys, inner, max_size=2) | st.lists(inner, max_size=2),
    max_leaves=4,
)


def names_of(known: list[str]) -> st.SearchStrategy[str]:
    """Right names mostly, some with a letter too few or too many, some of anything."""
    right = st.sampled_from(known)
    near = right.flatmap(lambda name: st.sampled_from((name[:-1], f"{name}s", name.upper(), f"no-{name}", f"{name}_")))
    return st.one_of(right, right, right, near, keys)


OPTIONS = [name for name in declared_options() if name not in ("help", "config_file", "output_config", "list_presets")]
option_names = names_of([*OPTIONS, *OPTIONS, *kohya.rows()])
sections = st.dictionaries(option_names, values, max_size=6)
configurations = st.one_of(sections, st.dictionaries(keys, sections, max_size=3))

dataset_keys = names_of(sorted({key for level in LEVELS.values() for key in level}))
tables = st.dictionaries(dataset_keys, values, max_size=5)
subsets = tables.map(lambda table: {"image_dir": "data/2_style"} | table)
datasets = st.builds(
    lambda own, below: own | {"subsets": below}, tables, st.one_of(st.lists(subsets, min_size=1, max_size=3), values)
)
descriptions = st.fixed_dictionaries(
    {"datasets": st.one_of(st.lists(datasets, min_size=1, max_size=2), values)},
    optional={"general": st.one_of(tables, values), "genral": values},
)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("random"))
    Path("data/2_style").mkdir(parents=True)
    yield
    os.chdir(before)


def as_toml(content: dict[str, Any]) -> str | None:
    """None for what the writer cannot write, such as some lists of tables."""
    try:
        return toml.dumps(content)
    except Exception:
        return None


def _ends_well(words: tuple[str, ...]) -> Options | None:
    """The options and data sets of a command line, or an error that says something."""
    try:
        options = parse([*REQUIRED, *words])
        load_datasets(options)
    except UserError as error:
        message = str(error)
    else:
        return options
    assert message.strip()
    return None


@BOUNDED
@given(configurations)
def test_any_configuration_ends_in_options_or_a_named_error(content: dict[str, Any]) -> None:
    text = as_toml(content)
    if text is not None:
        Path("train.toml").write_text(text, encoding="utf-8", errors="surrogatepass")
        _ends_well(("--config_file", "train.toml", *IMAGES))


@BOUNDED
@given(descriptions)
def test_any_description_of_data_ends_in_data_sets_or_a_named_error(content: dict[str, Any]) -> None:
    text = as_toml(content)
    if text is not None:
        Path("data.toml").write_text(text, encoding="utf-8", errors="surrogatepass")
        _ends_well(("--dataset_config", "data.toml", "--resolution", "64"))


fragments = st.sampled_from(
    (
        "[",
        "]",
        "[[",
        "]]",
        "{",
        "}",
        "=",
        '"',
        "'",
        '"""',
        "'''",
        "\\",
        "#",
        "\n",
        ",",
        ".",
        "seed",
        "1",
        "a",
        " ",
        "\0",
        "é",
    )
)


@BOUNDED
@given(st.one_of(st.lists(fragments, max_size=25).map("".join), st.text(max_size=40)))
def test_any_text_as_a_configuration_ends_in_options_or_a_named_error(text: str) -> None:
    Path("any.toml").write_text(text, encoding="utf-8", errors="surrogatepass")
    _ends_well(("--config_file", "any.toml", *IMAGES))


@BOUNDED
@given(st.binary(max_size=60))
def test_any_bytes_as_a_configuration_end_in_options_or_a_named_error(content: bytes) -> None:
    Path("bytes.toml").write_bytes(content)
    _ends_well(("--config_file", "bytes.toml", *IMAGES))


word = st.one_of(st.sampled_from(WORDS), st.text(max_size=8), numbers.map(str))
flag = st.builds(lambda name, given: [f"--{name}", *given], option_names, st.lists(word, max_size=2))


@BOUNDED
@given(st.lists(flag, max_size=5))
def test_any_command_line_ends_in_options_or_a_named_error(flags: list[list[str]]) -> None:
    _ends_well((*IMAGES, *(word for words in flags for word in words)))


def test_some_of_them_end_well() -> None:
    """Or nothing behind the first mistake would be reached."""
    ended_well = []

    @settings(BOUNDED, max_examples=150)
    @given(st.dictionaries(st.sampled_from(OPTIONS), st.one_of(st.booleans(), st.integers(1, 3)), max_size=2))
    def count(content: dict[str, Any]) -> None:
        Path("train.toml").write_text(toml.dumps(content), encoding="utf-8")
        ended_well.append(_ends_well(("--config_file", "train.toml", *IMAGES)))

    count()
    assert sum(options is not None for options in ended_well) > 20
