"""What follows from the techniques' declarations, for each of them."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from adamw_problems import TECHNIQUES as NINE

from library.config.fields import declared
from library.config.options import CustomAdamWOptions
from library.config.options.weight_decay import WeightDecayOptions
from library.optimizers import CustomAdamW
from library.optimizers.custom_adamw import native, page
from library.optimizers.custom_adamw.technique import STAGES, Technique
from library.optimizers.custom_adamw.techniques import TECHNIQUES, arguments, settings, techniques
from tests.conftest import ROOT

KINDS = techniques()
HERE = ROOT / "library" / "optimizers" / "custom_adamw"


def test_all_are_there() -> None:
    assert set(TECHNIQUES) == {*NINE, "orthogonalize"}


def test_the_table_and_the_stub_are_what_the_declarations_say() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert text == page.with_table(text), "run python -m library.optimizers.custom_adamw.page"
    assert page.STUB.read_text(encoding="utf-8") == page.stub(), "run python -m library.optimizers.custom_adamw.page"


@pytest.mark.parametrize("kind", KINDS)
def test_a_declaration_is_complete(kind: type[Technique]) -> None:
    for item in kind.settings():
        item.check(item.default)
        assert item.help
        assert not item.help.endswith(".")
    module = inspect.getdoc(sys.modules[kind.__module__]) or ""
    assert all(number in module for number in kind.papers), "the paper stands in the module's docstring"
    assert (inspect.getdoc(kind) or "").partition("\n")[0].endswith(".")
    assert kind.acts_at(*STAGES, "decay_factor")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.acts_at(*STAGES)])
def test_the_kernel_knows_all_of_ours(kind: type[Technique]) -> None:
    assert kind.has_kernel()
    assert native.knows(kind())


def test_signature_flags_and_groups_have_the_same_settings() -> None:
    parameters = inspect.signature(CustomAdamW).parameters
    assert {name: parameters[name].default for name in arguments()} == {n: a.default for n, a in arguments().items()}
    flags = {**declared(CustomAdamWOptions), **declared(WeightDecayOptions)}
    assert arguments().keys() <= flags.keys()
    group = CustomAdamW([{"params": []}]).param_groups[0]
    assert {name: group[name] for name in settings()} == {name: item.default for name, item in settings().items()}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.acts_at(*STAGES)])
def test_nothing_else_names_its_settings(kind: type[Technique]) -> None:
    """Where a technique stands: its file, its line, its kernel, and those that exclude it. The stub is written. (The
    options of the weight decay are those of every optimizer.)"""
    excluding = [other for other in KINDS if kind.switch().name in other.excludes]
    mine = {HERE / "techniques" / "__init__.py", *(Path(inspect.getfile(one)) for one in (kind, *excluding))}
    names = [item.name for item in kind.settings() if not item.of_group]
    word = re.compile(rf"\b({'|'.join(names)})\b")
    sources = [*(ROOT / "library" / "optimizers").rglob("*.py"), *(ROOT / "library" / "config").rglob("*.py")]
    assert [file for file in sources if file not in mine and word.search(file.read_text(encoding="utf-8"))] == []


def test_reading_them_loads_no_torch() -> None:
    code = "import library.config.options, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
