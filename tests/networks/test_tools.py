"""All tools as one command."""

from __future__ import annotations

import pytest

from networks.tools.__main__ import COMMANDS, main


@pytest.mark.parametrize("name", COMMANDS)
def test_every_tool_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_the_tools_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)
    assert main([]) == 2


def test_the_nearest_tool_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["find_rnak"]) == 2
    assert "'find_rnak' is no tool, did you mean 'find_rank'?" in capsys.readouterr().err
