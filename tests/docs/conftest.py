"""The commands of the pages train, render and measure, minutes in all: the README's first runs in `make test`, the
others in `make test-full`. That they can be parsed, and all tables, is tested in both."""

from __future__ import annotations

import pytest

_RUN = ("test_every_command", "test_the_command")


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "docs" and item.path.stem != "test_readme" and item.name.startswith(_RUN):
            item.add_marker(pytest.mark.slow)
