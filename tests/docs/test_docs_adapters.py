"""What docs/adapters.md tells a user to type works, and its tables say what the kinds, presets and loaders say."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from library.config.options import declared_options
from networks import kinds, lycoris
from networks.formats import loaders
from networks.settings import LayerSizes, RankSettings, RankSizes, RateSettings
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(block.replace("\\\n", " ")) for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)]
EXAMPLES = [shlex.split(text) for text in re.findall(r"`(--network_module networks\.[^`]*)`", PAGE)]
SHARED = {field.name for schema in (RateSettings, LayerSizes) for field in fields(schema)}
RANKED = {field.name for schema in (RankSettings, RankSizes) for field in fields(schema)}
HEADINGS = {
    "LoRA": "lora", "DoRA": "dora", "LoHa": "loha", "LoKr": "lokr", "GLoRA": "glora", "Full difference": "full",
    "Norms": "norm", "LoRA-FA": "lora_fa", "DyLoRA": "dylora", "PiSSA": "pissa", "VeRA": "vera", "AdaLoRA": "adalora",
    "T-LoRA": "t_lora", "OFT": "oft", "BOFT": "boft", "IA3": "ia3",
}  # fmt: skip
# The rows of the table of programs, by the forms that the program tells apart
FORMS = {
    "LoRA and its variants": "lora", "LoRA with `use_tucker`": "tucker", "DoRA of rows": "dora of rows",
    "DoRA of input channels": "dora of input channels", "LoHa": "loha", "LoKr": "lokr",
    "LoKr with `use_tucker`": "lokr with a core", "OFT": "oft", "OFT with `rescaled`": "oft with rescale",
    "BOFT": "boft", "GLoRA": "glora", "(IA)³": "ia3", "(IA)³ of convolutions": "ia3 of a convolution",
    "full difference": "full", "norms": "norm",
}  # fmt: skip


def section(heading: str) -> str:
    (text,) = re.findall(rf"^##+ {re.escape(heading)}$(.*?)(?=^##|\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    return text


def rows(text: str) -> list[list[str]]:
    """The cells of the tables of a text, without heads."""
    lines = re.findall(r"^\|(.*)\|$", re.sub(r"^\|.*\|\n\|[-|]+\|$", "", text, flags=re.MULTILINE), re.MULTILINE)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]


def run(words: list[str], folder: Path) -> int:
    """A command of the page: one step, in a folder of its own."""
    from networks.tools.check import main as check
    from train_network import main

    if words[1] == "-m":
        return check([word.replace("output/", f"{folder}/") for word in words[3:]])
    short = ["--max_train_epochs", "0", "--max_train_steps", "1", "--compare_prompts", "", "--no-loss_plot"]
    return main([*words[2:], *short, "--output_dir", str(folder)])


def test_every_command_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the page's order, since one looks at what an earlier one wrote."""
    monkeypatch.chdir(ROOT)
    for words in COMMANDS:
        assert run(words, tmp_path) == 0, words
    printed = capsys.readouterr().out
    assert re.search(r"^ComfyUI +(\d+) of \1 ", printed, re.MULTILINE)


def test_every_kind_has_a_section_with_a_command_that_is_taken() -> None:
    assert set(HEADINGS.values()) == kinds.KINDS.keys()
    shown = set()
    for words in EXAMPLES:
        _, unchecked = kinds.arguments(words[1], words[3:], from_file=False)
        assert not unchecked
        shown.add(kinds.kind_of(words[1]))
    assert shown == kinds.KINDS.keys()


@pytest.mark.parametrize("heading", HEADINGS)
def test_a_kind_s_arguments_stand_in_its_section_with_their_defaults(heading: str) -> None:
    kind = kinds.load(HEADINGS[heading])
    assert f"`networks.{kind.NAME}`" in section(heading)
    declared = {field.name: field.default for schema in (kind.SIZES, kind.SETTINGS) for field in fields(schema)}
    ranked = issubclass(kind.SETTINGS, RankSettings)
    own = {name: value for name, value in declared.items() if name not in (SHARED | RANKED if ranked else SHARED)}
    found = {}
    for names, defaults, _ in rows(section(heading)):
        listed = [name for name in re.findall(r"`([\w-]+)`", names) if not name.startswith("--")]
        found |= dict(zip(listed, defaults.split(", "), strict=bool(listed))) if listed else {}
    assert found == {name: "none" if value is None else str(value) for name, value in own.items()}


def test_the_settings_of_all_kinds_with_a_rank() -> None:
    named = set(re.findall(r"`([\w-]+)`", section("Settings of all kinds with a rank")))
    rates = {name for name in RANKED | SHARED if "lr" in name.split("_")} | {"network_reg_lrs"}
    assert RANKED - SHARED - rates <= named
    which_layers = set(re.findall(r"`(\w+)[`=]", section("Which layers")))
    assert SHARED - rates - {"module_dropout"} <= which_layers


@pytest.mark.parametrize("row", rows(section("Which program loads what")), ids=lambda row: row[0])
def test_which_program_loads_what(row: list[str]) -> None:
    rules = loaders._FORMS[FORMS[row[0]]]
    for program, cell in zip(loaders.PROGRAMS, row[1:], strict=True):
        rule = rules[program]
        assert cell.startswith("yes") == (rule.loads and rule.as_trained), (program, cell)
        assert (cell == "no") == (not rule.loads), (program, cell)


def test_the_words_of_lycoris() -> None:
    text = section("Coming from LyCORIS")
    (listed,) = re.findall(r"^`algo` is (.*?);", text, re.MULTILINE | re.DOTALL)
    assert re.findall(r"`([\w-]+)`", listed) == list(lycoris.ALGORITHMS)
    refused = [name for name, reason in lycoris._WITHOUT.items() if not reason]
    assert f"| {', '.join(f'`{name}`' for name in refused)} | refused" in text


def test_the_help_names_every_kind() -> None:
    text = declared_options()["network_module"].details.help
    assert {*kinds.KINDS, "lycoris"} <= set(re.findall(r"\w+", text))
