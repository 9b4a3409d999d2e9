"""What docs/eight-bit.md tells a user to type works, and its bytes are those of real steps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from library.config.options import declared_options
from library.optimizers.create import choose_optimizer, create_optimizer, state_bytes
from library.optimizers.custom_adamw import CustomAdamW
from library.optimizers.custom_adamw.codec import BLOCK, DECADES, dynamic_map, places
from library.optimizers.registry import OPTIMIZERS
from tests.conftest import ROOT
from tests.docs import true_sizes
from tests.docs.tables import commands, number, options_named, page, tables

PAGE = page("eight-bit")
TABLES = tables(PAGE)
SIZES = TABLES["model | rank | trained numbers | AdamW, MiB | 8 bits, MiB | saved, MiB"]


@pytest.mark.parametrize("command", commands(PAGE), ids=" ".join)
def test_every_command_works(command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from train_network import main

    monkeypatch.chdir(ROOT)
    short = ["--max_train_epochs", "0", "--max_train_steps", "1", "--compare_prompts=", "--output_dir", str(tmp_path)]
    assert main([*command[2:], *short, "--no-report", "--no-loss_plot"]) == 0


def test_every_option_of_the_page_exists() -> None:
    assert options_named(PAGE) <= declared_options().keys()


def test_the_program_prints_its_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(program, {})
    # the bias is small and stays in 32 bits
    assert capsys.readouterr().out == "2.04 bytes a parameter\n"


def in_8_bits(shapes: tuple[tuple[int, ...], ...], *, small: int = 4096) -> int:
    """Bytes of CustomAdamW's two moments: a byte a number, and a scale in fp32 for each block."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    return sum(8 * n if n < small else 2 * (n + 4 * -(-n // BLOCK)) for n in sizes)


def test_the_formula_is_what_the_optimizer_keeps() -> None:
    shapes = ((4, 320), (8, 1280), (16, 320), (16, 321))
    named = [(f"{i}.weight", torch.nn.Parameter(torch.zeros(shape))) for i, shape in enumerate(shapes)]
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
    optimizer = CustomAdamW(named)
    optimizer.step()
    assert optimizer.get_optimization_info()["state_bytes"] == in_8_bits(shapes)


@pytest.mark.parametrize("row", [row for row in SIZES if row[0] == "SD 1.5"], ids=lambda row: row[1])
def test_the_state_of_a_lora(row: list[str]) -> None:
    check_row(row)


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in SIZES if row[0] == "SDXL"], ids=lambda row: row[1])
def test_the_state_of_a_lora_of_sdxl(row: list[str]) -> None:
    check_row(row)


def check_row(row: list[str]) -> None:
    model, *cells = row
    rank, count, adamw, eight, saved = (int(number(cell)) for cell in cells)
    shapes = true_sizes.shapes(model, rank=rank)
    found = sum(torch.Size(shape).numel() for shape in shapes)
    assert (found, round(8 * found / 2**20)) == (count, adamw)
    assert round(in_8_bits(shapes) / 2**20) == eight
    assert abs((8 * found - in_8_bits(shapes)) / 2**20 - saved) <= 0.5


def test_small_tensors_of_small_ranks() -> None:
    four, eight = (true_sizes.shapes("SD 1.5", rank=rank) for rank in (4, 8))
    sizes = [torch.Size(shape).numel() for shape in four]
    small = sum(n for n in sizes if n < 4096) / sum(sizes)
    assert f"at rank 4 these are {small:.0%}".replace("%", " %") in PAGE.replace("\n  ", " ")
    assert f"{in_8_bits(four) / sum(sizes):.1f} bytes a number instead" in PAGE
    assert f"at rank 8 {in_8_bits(eight) / (2 * sum(sizes)):.1f};" in PAGE
    assert min(torch.Size(shape).numel() for shape in true_sizes.shapes("SD 1.5", rank=16)) >= 4096


def test_bytes_by_optimizer() -> None:
    listed = set()
    for names, shown, *_ in TABLES["`--optimizer_type` | bytes | from | kept"]:
        for name in re.findall(r"`(\w+)`", names):
            listed.add(name)
            parameter = torch.nn.Parameter(torch.zeros(16, 1280))
            group = {"params": [parameter], "lr": 1e-4, "name": "unet", "param_names": ["a"]}
            optimizer = create_optimizer(choose_optimizer(name, []), [group], learning_rate=1e-4)
            assert f"{state_bytes(optimizer) / parameter.numel():.2f}" == shown, name
    assert listed == {name for name in OPTIMIZERS if "8bit" in name} | {"AdamW", "CustomAdamW"}


def test_the_maps() -> None:
    for signed in (True, False):
        table = dynamic_map(signed=signed)
        assert len(table.values) == 256
        smallest = float(table.values[table.values > 0].min())
        assert f"{smallest:.3g}" in PAGE
        assert str(places(DECADES - 1, signed=signed)) in PAGE
    assert f"{BLOCK} numbers share a scale" in PAGE


def test_what_was_measured() -> None:
    study = page("optimizer")
    for name in ("AdamW8bit", "CustomAdamW, nothing on"):
        (row,) = re.findall(rf"^\| {name} \|.*$", study, flags=re.MULTILINE)
        (value, low, high) = re.findall(r"([-+][\d.]+) \(([-+][\d.]+) … ([-+][\d.]+)\)", row)[0]
        assert re.search(rf"{re.escape(value)} % \((95 %: )?{low.replace('-', '−')} to {re.escape(high)}\)", PAGE), name
