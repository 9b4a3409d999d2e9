"""docs/options.md says what the program does."""

from __future__ import annotations

import inspect

from library.config import kohya
from library.config.options import declared_options
from library.config.options_page import DIFFERS, PAGE, page


def test_the_page_is_what_the_options_give() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m library.config.options_page"


def test_every_name_stands_on_it_once() -> None:
    text = page()
    for name in declared_options():
        assert text.count(f"\n| `--{name}` | ") == 1, name
    for name in kohya.rows():
        assert f"`{name}`" in text, name


def test_the_defaults_of_custom_adamw_are_its_own() -> None:
    from library.config.fields import declared
    from library.config.options import CustomAdamWOptions
    from library.optimizers import CustomAdamW

    parameters = inspect.signature(CustomAdamW).parameters
    for name, item in declared(CustomAdamWOptions).items():
        default = parameters[name].default
        shown = {True: "on", False: "off"}[default] if isinstance(default, bool) else str(default)
        assert item.details.help.endswith(f"(default: {shown})"), name
    assert "| `--use_spd` |  | use selective projection decay (default: on) |" in page()
    assert "| `--report` |  | write a report" in page()


def test_notes_are_about_options_of_kohyas() -> None:
    options = declared_options()
    assert not [name for name in DIFFERS if name not in options or options[name].details.help.endswith("(ours)")]
