"""What docs/choosing.md tells a user to type works, and its numbers are those of code, presets and studies."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import toml
import torch
from torch import nn

from library.config import wishes
from library.config.options import declared_options
from library.config.presets import presets
from library.guidance import memory, recommend, rules
from library.models import FAMILIES
from library.models.family import AdapterTargets
from networks.create import create
from networks.kinds import KINDS
from networks.settings import Asked
from tests.conftest import ROOT
from tests.docs import true_sizes
from tests.docs.tables import commands, number, options_named, page, tables

PAGE = page("choosing")
TABLES = tables(PAGE)
RANKS = TABLES["rank | SD 1.5 | file, MB | SDXL | file, MB"]
LAYERS = TABLES["`preset` | layers | SD 1.5 | SDXL"]


def table(start: str) -> list[list[str]]:
    (found,) = (rows for head, rows in TABLES.items() if head.startswith(start))
    return found


def preset(name: str) -> dict[str, object]:
    sections = toml.load(presets()[name].path).values()
    return {key: value for section in sections for key, value in section.items()}


def test_the_command_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from train_network import main

    monkeypatch.chdir(ROOT)
    (command,) = commands(PAGE)
    assert main([*command[2:], "--output_dir", str(tmp_path)]) == 0
    assert "network_dim" in (tmp_path / "advice-recommended.toml").read_text(encoding="utf-8")
    assert "card     --gpu_memory 8GB: 8.0 GiB; it fits as it is" in capsys.readouterr().out


def test_every_option_of_the_page_exists() -> None:
    tools = {"parameters", "rank", "advise"}  # of python -m library.guidance.memory, and of merge
    assert options_named(PAGE) - tools <= declared_options().keys()


def test_the_words_of_recommend() -> None:
    words = [re.findall(r"`([^`]+)`", row[0]) for row in table("word | what")]
    assert words[:2] == [list(wishes.SUBJECTS), list(wishes.DIFFICULTIES)]
    assert wishes.of(words[2][0]).most_steps == int(7200 / 1.4)


# -- sizes


def check_ranks(row: list[str], model: str, place: int) -> None:
    found = true_sizes.numbers(model, rank=int(row[0]))
    assert found == int(number(row[place]))
    assert f"{2 * found / 1e6:.1f}" == row[place + 1]


@pytest.mark.parametrize("row", RANKS, ids=lambda row: row[0])
def test_what_a_rank_costs(row: list[str]) -> None:
    check_ranks(row, "SD 1.5", 1)


@pytest.mark.slow
@pytest.mark.parametrize("row", RANKS, ids=lambda row: row[0])
def test_what_a_rank_costs_with_sdxl(row: list[str]) -> None:
    check_ranks(row, "SDXL", 3)


@pytest.mark.parametrize("row", LAYERS, ids=lambda row: row[0][:10])
def test_what_layers_cost(row: list[str]) -> None:
    name = re.findall(r"`([\w-]+)`", row[0])[0]
    assert true_sizes.numbers("SD 1.5", rank=16, preset=name) == int(number(row[2]))
    if name == "attn-mlp":
        assert true_sizes.numbers("SD 1.5", rank=16) == int(number(row[2]))


@pytest.mark.slow
@pytest.mark.parametrize("row", LAYERS, ids=lambda row: row[0][:10])
def test_what_layers_cost_with_sdxl(row: list[str]) -> None:
    name = re.findall(r"`([\w-]+)`", row[0])[0]
    assert true_sizes.numbers("SDXL", rank=16, preset=name) == int(number(row[3]))


def share(model: str) -> float:
    """The trained numbers at rank 16 over those of the layers."""
    shapes = true_sizes.shapes(model, rank=16)
    down, up = shapes[::2], shapes[1::2]
    assert all(a[0] == b[1] == 16 for a, b in zip(down, up, strict=True))
    return true_sizes.numbers(model, rank=16) / sum(a[1] * b[0] for a, b in zip(down, up, strict=True))


def test_the_share_of_the_layers() -> None:
    assert 0.02 < share("SD 1.5") < 0.03
    assert "at rank 16 2 to 3 % of the numbers" in PAGE


@pytest.mark.slow
def test_the_share_of_the_layers_of_sdxl() -> None:
    assert 0.019 < share("SDXL") < 0.03


def test_a_square_layer() -> None:
    (head,) = (head for head in TABLES if head.startswith("rank | 4 | 8 | 16 | 32 | 64"))
    counts, shares = TABLES[head]
    for rank, count, part in zip(head.split(" | ")[1:], counts[1:], shares[1:], strict=True):
        found = int(rank) * (4096 + 4096)
        assert (f"{found:,}", f"{100 * found / 4096**2:.2f}") == (count, part)


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([nn.Linear(1280, 5120, device="meta")])


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        (kind, int(number(row[2])))
        for row in TABLES["kind | formula | numbers"]
        for kind in re.findall(r"`(\w+)`", row[0])
    ],
)
def test_the_numbers_of_a_layer(kind: str, shown: int) -> None:
    everything = re.compile(".*")
    targets = AdapterTargets(
        part="unet", prefix="lora_unet", root=OneLayer(), linear=everything, conv=re.compile("(?!)"), name=str
    )
    ranked = kind != "full"
    asked = Asked(dim=16 if ranked else None, alpha=8 if ranked and kind != "vera" else None, seed=0)
    with torch.no_grad():
        network = create(kind, [targets], asked, {"factor": 8} if kind == "lokr" else {})
    assert kind in KINDS
    assert sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad) == shown


# -- ranks, alphas, rates


def test_the_ranks_of_presets_and_advice() -> None:
    rows = [row for row in table("| rank") if row[1]]
    assert {preset(name)["network_dim"] for name in ("sd15_style", "sdxl_style", "sd15_character")} == {int(rows[0][1])}
    assert {preset(name)["network_dim"] for name in ("sd15_concept", "stable_diffusion_lora")} == {int(rows[1][1])}
    assert rows[2][1] == ", ".join(str(rank) for _, rank, _ in rules.BY_SIZE)
    assert "below 50, 1,000, 5,000 images" in rows[2][0]
    assert [most for most, _, _ in rules.BY_SIZE] == [50, 1_000, 5_000, math.inf]


def test_the_scales() -> None:
    for alpha, _, plain, rooted in table("alpha | who"):
        assert (float(plain), float(rooted)) == (int(alpha) / 16, int(alpha) / math.sqrt(16))


def test_the_rates_of_presets_and_advice() -> None:
    sd15, sdxl, others, small, lion, _ = table("| UNet, text encoder")
    for name in ("sd15_style", "sd15_character", "sd15_concept", "stable_diffusion_lora"):
        said = preset(name)
        assert [float(cell) for cell in sd15[1].split(", ")] == [said["learning_rate"], said["text_encoder_lr"]]
    for name in ("sdxl_style", "sdxl_character", "sdxl_concept"):
        assert preset(name)["learning_rate"] == float(sdxl[1].split(", ")[0])
        assert preset(name).get("text_encoder_lr") in (None, 1e-5)
    assert others[1] == "1e-4, none"
    for name in of_other_models():
        said = preset(name)
        assert (said["learning_rate"], said["network_train_unet_only"]) == (1e-4, True)
        assert said["network_dim"] == said["network_alpha"] == 16
    assert [float(cell) for cell in small[1].split(", ")] == [rules.SMALL_RATE, rules.SMALL_RATE * rules.TEXT]
    assert (float(sd15[1].split(", ")[0]), lion[1]) == (rules.RATE, "three tenths of these")
    assert rules.LION == 0.3


def of_other_models() -> list[str]:
    """The presets for a style and a character of all families but Stable Diffusion 1.5 and XL."""
    families = sorted(FAMILIES.keys() - set(recommend.FAMILIES_OF_PRESET))
    return [rules.preset_of(family, subject) for family in families for subject in ("style", "character")]


def test_what_muon_gains_is_what_its_page_has() -> None:
    (said,) = (row[1] for row in table("if | then") if "muon" in row[1])
    rows = re.findall(r"^\| (?:Muon on top of|the same on a).*$", page("optimizer"), flags=re.MULTILINE)
    measured = [figure for row in rows for figure in re.findall(r"−([\d.]+) %", row)]
    assert re.findall(r"−([\d.]+)", said) == measured
    assert len(measured) == 4
    assert f"makes it {float(measured[2]):.1f} %" in rules.METHODS["hard"].why


def test_the_best_rates_of_the_study() -> None:
    """They are those of docs/adapters.md, whose table comes from the study."""
    text = page("adapters")
    for name, best in (("LoRA, rank 16", "4e-3"), ("DoRA, rank 16", "4e-3"), ("PiSSA, rank 16", "2e-3")):
        (row,) = re.findall(rf"^\| {name} \|.*$", text, flags=re.MULTILINE)
        assert float(row.split("|")[3]) == float(best)
        assert best in PAGE
    assert "1.6e-2 for LoKr" in PAGE
    assert re.search(r"^\| LoKr, `factor=8` \|.*\| 0.016 \|", text, flags=re.MULTILINE)


def test_the_differences_that_were_measured() -> None:
    text = page("adapters")
    for name, said in (("DoRA, rank 16", "−0.30 %"), ("LoKr, `factor=8`", "+3.67 %")):
        (row,) = re.findall(rf"^\| {re.escape(name)} \|.*$", text, flags=re.MULTILINE)
        assert said.removesuffix(" %") in row
        assert said in PAGE


def test_what_recommend_says_of_other_methods_was_measured() -> None:
    text = page("adapters")
    said = "; ".join([*rules.NOT_ADVISED.values(), *(method.why for method in rules.METHODS.values() if method)])
    for name, claim in (("PiSSA, rank 16", "0.6 and"), ("LoHa, rank 8", "and 0.8 %"), ("DoRA, rank 16", "0.3 % below")):
        (row,) = re.findall(rf"^\| {name} \|.*$", text, flags=re.MULTILINE)
        difference, _ = re.findall(r"[+−]([\d.]+) \(", row)  # on the quickstart's style, on Twemoji's
        (figure,) = re.findall(r"[\d.]+", claim)
        assert f"{float(difference):.1f}" == figure
        assert claim in said
    decisions = (ROOT / "DECISIONS.md").read_text(encoding="utf-8")
    for share in re.findall(r"for (\d+) to (\d+) % more time", " ".join(said.split())):
        assert all(f"1.{part} (" in decisions for part in share)


# -- formulas


def test_the_formulas_that_the_program_has() -> None:
    assert [rules.views(n) for n in (20, 1000)] == [round(400 * n**0.6) for n in (20, 1000)]
    assert memory.STATES["AdamW"] == 8
    torch.manual_seed(0)
    matrix = torch.randn(40, 30, dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    cut = u[:, :5] * s[:5] @ v[:5]
    error = float((matrix - cut).norm() / matrix.norm())
    assert error == pytest.approx(math.sqrt(1 - float((s[:5] ** 2).sum() / (s**2).sum())))
