"""What accelerate's launcher may ask for, and the configurations for it that the project brings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).parent.parent.parent
FILES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))

Train = Callable[..., int]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_its_configurations(file: Path) -> None:
    config = load_config_from_file(str(file))
    kind = {"multi_gpu": "MULTI_GPU", "multi_node": "MULTI_GPU", "fsdp": "FSDP", "deepspeed_zero2": "DEEPSPEED"}[
        file.stem
    ]
    assert str(config.distributed_type).endswith(kind)
    assert config.num_processes > 1
    assert not config.use_cpu
    assert "Not run on" in file.read_text(encoding="utf-8")
    assert yaml.safe_load(file.read_text(encoding="utf-8")).keys() <= vars(config).keys()


@pytest.mark.parametrize(
    ("variable", "words", "said"),
    [
        ("MEGATRON_LM", (), "accelerate's configuration asks for Megatron-LM: it is for language models"),
        ("FSDP", ("--fp8_base", "--mixed_precision", "bf16"), "--fp8_base with FSDP: only weights of one precision"),
        ("FSDP", ("--compare_prompts", "a cat"), "--compare_prompts with FSDP: one process draws"),
        ("FSDP", ("--network_module", "lycoris.kohya"), "--network_module lycoris.kohya with FSDP: networks.lora only"),
    ],
)
def test_what_cannot_be(
    variable: str,
    words: tuple[str, ...],
    said: str,
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    assert train(*words) == 2
    assert said in capsys.readouterr().err


def test_one_process_shares_with_nobody(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert train("--max_train_steps", "1") == 0
    assert "FSDP with one process" in capsys.readouterr().err
