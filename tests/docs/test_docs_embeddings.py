"""What docs/embeddings.md tells a user to type works."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
from safetensors.torch import load_file

from library.data import templates
from networks.tools.__main__ import main as tools
from tests.conftest import ROOT, forget_accelerator

PAGE = (ROOT / "docs" / "embeddings.md").read_text(encoding="utf-8")
COMMANDS = [block.replace("\\\n", " ") for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)]
SHORT = (
    "--max_train_epochs",
    "0",
    "--max_train_steps",
    "1",
    "--max_validation_steps",
    "1",
    "--no-report",
    "--no-loss_plot",
)


def here(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.chdir(folder)
    Path("quickstart").symlink_to(ROOT / "quickstart")
    for block in re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL):
        Path(block.splitlines()[0].removeprefix("# ")).write_text(block, encoding="utf-8")


def run(command: str, *more: str) -> None:
    _, program, *words = shlex.split(command)
    assert importlib.import_module(program.removesuffix(".py")).main([*words, *more]) == 0
    forget_accelerator()


@pytest.mark.slow
def test_the_commands_train_what_the_page_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here(monkeypatch, tmp_path)
    alone, together, drawn = COMMANDS
    run(alone, *SHORT)
    said = capsys.readouterr().err
    (shown,) = re.findall(r"```text\n(.*?)```", PAGE, flags=re.DOTALL)
    assert all(line in said for line in shown.splitlines())
    assert load_file("output/flatstyle.safetensors").keys() == {"emb_params"}
    run(together, *SHORT)
    assert load_file("output/flat-embedding.safetensors").keys() == {"emb_params"}
    assert "bundle_emb.flatstyle.emb_params" in load_file("output/flat.safetensors")
    _, _, _, *words = shlex.split(drawn.replace("--s 25", "--s 1"))
    assert tools(words) == 0
    assert Path("output/grid.png").is_file()
    said = capsys.readouterr().err
    assert all(f"{name}.safetensors: an embedding of 'flatstyle', 4 vectors" in said for name in ("flatstyle", "flat"))


def test_every_option_of_the_page_exists() -> None:
    from library.config.options import declared_options
    from library.config.options.embedding import EmbeddingOptions

    named = set(re.findall(r"`--(\w+)", PAGE))
    assert named <= declared_options().keys()
    assert set(vars(EmbeddingOptions())) <= named


def test_the_templates_are_as_many_as_the_page_says() -> None:
    (counts,) = re.findall(r"\((\d+) and (\d+) of them\)", PAGE)
    assert counts == (str(len(set(templates.OBJECT))), str(len(set(templates.STYLE))))
    assert all(sentence.count("{}") == 1 for sentence in (*templates.OBJECT, *templates.STYLE))
