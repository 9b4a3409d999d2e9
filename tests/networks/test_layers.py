"""Which layers get an adapter: presets, patterns, ranks by pattern, and LyCORIS' words for them."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import Toy, lora, randomize, unet_targets
from test_adapters import SIZES

from library.errors import UserError
from networks import kinds, lycoris
from networks.adapter import _warn_once
from networks.create import create, create_from_file
from networks.files import read
from networks.kinds import KINDS
from networks.layers import PRESETS, Preset, of_preset
from networks.settings import Asked
from networks.sites import Site, is_spatial

# Linear, 1 x 1 and wider layers of the UNet, and layers of the text encoders: LyCORIS 3.3's own counts, where it has
# such a preset
COUNTS = {
    ("sd15", "full"): ((184, 46, 52), 72),
    ("sd15", "full-lin"): ((184, 46, 0), 72),
    ("sd15", "attn-mlp"): ((160, 32, 0), 72),
    ("sd15", "attn-only"): ((128, 0, 0), 48),
    ("sd15", "attn-qv"): ((64, 0, 0), 24),
    ("sd15", "unet-only"): ((184, 46, 52), 0),
    ("sd15", "unet-transformer-only"): ((160, 32, 0), 0),
    ("sd15", "unet-convblock-only"): ((22, 14, 52 - 2), 0),
    ("sdxl", "full"): ((739, 11, 38), 264),
    ("sdxl", "full-lin"): ((739, 11, 0), 264),
    ("sdxl", "attn-mlp"): ((722, 0, 0), 264),
    ("sdxl", "attn-only"): ((560, 0, 0), 176),
    ("sdxl", "attn-qv"): ((280, 0, 0), 88),
    ("sdxl", "unet-only"): ((739, 11, 38), 0),
    ("sdxl", "unet-transformer-only"): ((722, 0, 0), 0),
    ("sdxl", "unet-convblock-only"): ((17, 11, 38), 0),
}


def counted(sites: list[Site]) -> tuple[tuple[int, int, int], int]:
    unet = [site.module for site in sites if site.part == "unet"]
    linear = sum(isinstance(module, torch.nn.Linear) for module in unet)
    wide = sum(is_spatial(module) for module in unet)
    return (linear, len(unet) - linear - wide, wide), len(sites) - len(unet)


@pytest.mark.parametrize(("size", "preset"), COUNTS)
def test_a_preset_takes_what_lycoris_takes(size: str, preset: str, true_sizes: Any) -> None:
    assert counted(of_preset(true_sizes[size], PRESETS[preset])) == COUNTS[size, preset]


def test_a_preset_of_everything_gives_convolutions_the_same_rank(toy: Toy) -> None:
    network = lora(3, 1.5, targets=[unet_targets(toy)], preset="unet-only")
    assert {adapter.site.path: adapter.rank for adapter in network.adapters} == {
        "downsamplers.0": 3, "resnets.0": 3, "attentions.0.proj_in": 3, "attentions.0.to_q": 3
    }  # fmt: skip
    network = lora(3, 1.5, targets=[unet_targets(toy)], preset="unet-only", conv_dim=2)
    assert {adapter.site.path for adapter in network.adapters if adapter.rank == 2} == {"downsamplers.0"}


def test_convolutions_of_a_preset_take_rank_and_alpha_of_the_others_unless_told(toy: Toy) -> None:
    def wide(kind: str = "lora", **arguments: Any) -> list[tuple[int, float]]:
        network = create(kind, [unet_targets(toy)], Asked(dim=4, alpha=2), {"preset": "unet-only", **arguments})
        return [(one.rank, one.scale) for one in network.adapters if one.site.spatial]

    assert wide() == [(4, 0.5)]
    assert wide(conv_dim=2) == [(2, 1.0)]
    assert wide(conv_alpha=1.0) == [(4, 0.25)]
    assert wide(conv_dim=2, conv_alpha=1.0) == [(2, 0.5)]
    assert wide(conv_dim=0) == []  # LyCORIS' word for none


@pytest.mark.parametrize("kind", ["oft", "boft"])
def test_so_do_those_of_rotations(kind: str, toy: Toy) -> None:
    def wide(**arguments: Any) -> int:
        arguments |= {"preset": "unet-only", "exclude_patterns": ".*to_q"}
        made = create(kind, [unet_targets(toy)], Asked(dim=4), arguments)
        return sum(adapter.site.spatial for adapter in made.adapters)

    assert (wide(), wide(conv_dim=2), wide(conv_dim=0)) == (1, 1, 0)


def test_arguments_about_convolutions_are_warned_of_where_none_is_adapted(toy: Toy, caplog: Any) -> None:
    lora(4, 1, targets=[unet_targets(toy)], conv_dim=2, use_tucker=True)
    assert "without effect" not in caplog.text
    lora(4, 1, targets=[unet_targets(toy)], preset="full-lin", conv_dim=2, conv_alpha=1.0, use_tucker=True)
    assert "no convolution wider than 1 x 1 is adapted: conv_dim, conv_alpha, use_tucker" in caplog.text


def test_a_layer_that_a_size_of_blocks_cuts_into_single_outputs_stays_as_it_is(toy: Toy, caplog: Any) -> None:
    """LyCORIS' rule does this to conv_out's 4 outputs where --network_dim is 4."""
    arguments = {"dim_is_size": True, "preset": "unet-only"}
    network = create("oft", [unet_targets(toy)], Asked(dim=6), arguments)
    assert "attentions.0.to_q" not in {adapter.site.path for adapter in network.adapters}  # 6 outputs
    assert len(list(network.adapters)) == 3
    assert "lora_unet_attentions_0_to_q: stays as it is: blocks of 1 x 1 rotate nothing" in caplog.text


def test_patterns_leave_layers_out_of_model_and_file(toy: Toy, caplog: Any) -> None:
    targets = [unet_targets(toy)]

    def adapted(**arguments: str) -> set[str]:
        return {adapter.site.path for adapter in lora(2, 1, targets=targets, conv_dim=2, **arguments).adapters}

    everything = adapted()
    assert len(everything) == 4
    with caplog.at_level(logging.INFO):
        assert adapted(exclude_patterns="['.*resnets.*', r'.*to_q']") == everything - {"resnets.0", "attentions.0.to_q"}
    assert "2 of 4 layers get no adapter" in caplog.text
    assert adapted(exclude_patterns=".*attentions.*", include_patterns="['.*to_q']") == everything - {
        "attentions.0.proj_in"
    }
    assert adapted(include_patterns="attentions.*") == {"attentions.0.proj_in", "attentions.0.to_q"}
    assert adapted(include_patterns="lora_unet_resnets_0") == {"resnets.0"}  # its name in files
    network = lora(2, 1, targets=targets, include_patterns=".*to_q")
    network.attach()
    assert {key.partition(".")[0] for key in network.tensors()} == {"lora_unet_attentions_0_to_q"}


def test_ranks_by_pattern(toy: Toy) -> None:
    network = lora(4, 2, targets=[unet_targets(toy)], network_reg_dims=".*proj_in=2, .*to_q=8,.*attentions.*=1")
    assert {adapter.site.path: (adapter.rank, adapter.scale) for adapter in network.adapters} == {
        "attentions.0.proj_in": (2, 1.0), "attentions.0.to_q": (8, 0.25)
    }  # fmt: skip
    network = lora(4, 2, targets=[unet_targets(toy)], network_reg_dims="downsamplers.*=2")
    assert {adapter.site.path for adapter in network.adapters} == {
        "downsamplers.0", "attentions.0.proj_in", "attentions.0.to_q"
    }  # fmt: skip


def test_an_enormous_rank_means_whole_matrices_in_lokr_alone(toy: Toy) -> None:
    network = create("lokr", [unet_targets(toy)], Asked(dim=100000, alpha=1, seed=1))
    assert {key.rpartition(".")[2] for key in network.state_dict()} == {"lokr_w1", "lokr_w2", "alpha"}
    assert max(adapter.rank for adapter in network.adapters) <= 8
    with pytest.raises(UserError, match=r"network_dim: 100000: networks\.loha takes 16384 at most"):
        create("loha", [unet_targets(toy)], Asked(dim=100000, alpha=1, seed=1))


MISTAKES = {
    "preset=attn-onyl": "preset: 'attn-onyl' is unknown, did you mean 'attn-only'? Known: attn-mlp, ",
    "preset=attn-only": "preset: this model does not define 'attn-only'; it has attn-mlp, full, ",
    "include_patterns=.*(": "include_patterns: '.*(' is not a regular expression: ",
    "include_patterns=attentions.0.to_p": "'attentions.0.to_p' matches no layer as a whole, did you mean 'attentions",
    "include_patterns=to_q": "'to_q' matches no layer as a whole, did you mean '.*to_q.*'?",
    "include_patterns=to_q|x": "'to_q|x' matches no layer as a whole, did you mean '.*(to_q|x).*'?",
    "include_patterns=.*to_k": "matches no layer as a whole; the nearest layer is attentions.0.to_q",
    "include_patterns=[1]": "include_patterns: [1] is no list of texts, such as ['.*attn1.*', '.*ff.*']",
    "exclude_patterns=['a'": "exclude_patterns: ['a' is no list of texts",
    "exclude_patterns=.*": "include_patterns, exclude_patterns: they leave no layer to adapt",
    "network_reg_dims=.*=x": "network_reg_dims: '.*=x' is not of the form pattern=rank,pattern=rank",
    "network_reg_dims=.*=0": "network_reg_dims: 0 is not a rank",
    "network_reg_dims=.*tok=3": "network_reg_dims: '.*tok' matches no layer as a whole",
}


@pytest.mark.parametrize("word", MISTAKES)
def test_mistakes(word: str, toy: Toy) -> None:
    name, _, text = word.partition("=")
    with pytest.raises(UserError) as caught:
        lora(2, 1, targets=[unet_targets(toy)], **{name: text})
    assert MISTAKES[word] in str(caught.value)


def test_presets_are_described() -> None:
    assert PRESETS["attn-mlp"] == Preset()
    assert all(preset.blocks or preset.conv for preset in PRESETS.values())


# -- networks.lycoris


def arguments(*words: str) -> tuple[str | None, dict[str, Any]]:
    values, unchecked = kinds.arguments("networks.lycoris", words, from_file=False)
    assert not unchecked
    assert values.pop("algo") in lycoris.ALGORITHMS  # for the metadata
    return kinds.kind_of("networks.lycoris", words), values


def test_algo_names_the_kind() -> None:
    assert arguments() == ("lora", {"preset": "full"})
    assert arguments("algo=LoCon", "conv_dim=4", "use_cp=True") == (
        "lora", {"preset": "full", "conv_dim": 4, "use_tucker": True}
    )  # fmt: skip
    kind, values = arguments("algo=lora", "preset=attn-mlp", "dora_wd=True")
    assert (kind, values) == ("dora", {"preset": "attn-mlp", "dora_wd": True, "wd_on_output": True})
    assert not arguments("algo=lokr", "dora_wd=True", "wd_on_output=False")[1]["wd_on_output"]


def test_every_algorithm_is_a_kind() -> None:
    assert set(lycoris.ALGORITHMS.values()) <= KINDS.keys()
    assert arguments("algo=diag-oft", "constraint=0.1", "rescaled=True")[1] == {
        "preset": "full", "constraint": 0.1, "rescaled": True, "dim_is_size": True
    }  # fmt: skip
    assert arguments("algo=ia3", "preset=ia3") == ("ia3", {})
    assert arguments("algo=dylora") == ("dylora", {"preset": "full", "block_size": 4})
    assert arguments('algo="glora"', "use_tucker=False", "conv_dim=2") == ("glora", {"preset": "full", "conv_dim": 2})


def test_arguments_that_guis_write_for_every_algo_are_left_out_with_a_warning(caplog: Any) -> None:
    assert arguments("factor=8", "train_on_input=False", "bypass_mode=False")[1] == {"preset": "full"}
    assert "--network_args: without effect with lora: factor" in caplog.text
    assert "train_on_input" not in caplog.text
    assert "bypass_mode" not in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("algo=lorka",), "--network_args: algo=lorka: unknown, did you mean 'lora'? Known: lora, locon, "),
        (("algo=tlora",), "algo=tlora: its orthogonal variant is lycoris.kohya's alone; the plain one is "),
        (("preset=a/b.toml",), "preset=a/b.toml: presets in files are lycoris.kohya's alone"),
        (("use_scalar=True",), "use_scalar=True: networks.lycoris does not have it, lycoris.kohya does"),
        (("fcator=8",), "takes no 'fcator'"),
    ],
)
def test_wrong_words_of_lycoris(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        arguments(*words)
    assert message in str(caught.value)


def test_a_file_settles_the_sizes(caplog: Any) -> None:
    words = ["algo=loha", "preset=full", "conv_dim=4", "dora_wd=True", "rank_dropout=0.1"]
    values, _ = kinds.arguments("networks.lycoris", words, from_file=True)
    assert values == {"rank_dropout": 0.1, "algo": "loha"}
    assert "without effect with --dim_from_weights: preset, conv_dim, dora_wd" in caplog.text
    for algo in lycoris.ALGORITHMS:
        assert kinds.arguments("networks.lycoris", [f"algo={algo}"], from_file=True)[0].keys() <= {"algo", "block_size"}


def test_older_names_win_over_newer_ones_with_a_warning(caplog: Any) -> None:
    """As in LyCORIS, whatever their order."""
    assert not arguments("use_cp=False", "use_tucker=True")[1]["use_tucker"]
    assert "use_tucker=True has no effect beside use_cp=False" in caplog.text


@pytest.mark.parametrize(
    ("module", "word", "message"),
    [
        ("networks.loha", "algo=loha", "algo: networks.loha is one kind; --network_module networks.lycoris takes it"),
        ("networks.lora", "dora_wd=True", "takes no 'dora_wd'; --network_module networks.dora is DoRA"),
    ],
)
def test_words_of_another_module_are_sent_there(module: str, word: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        kinds.arguments(module, [word], from_file=False)
    assert message in str(caught.value)


def test_options_that_a_kind_has_no_use_for_are_warned_of_once(train: Any, capsys: Any) -> None:
    """The rehearsal before the run, in which warnings are off, makes such a network first."""
    _warn_once.cache_clear()
    words = ("--network_module", "networks.lycoris", "--network_args", "algo=ia3", "--network_dim", "8")
    assert train("--max_train_steps", "1", *words) == 0
    assert capsys.readouterr().err.count("warning: --network_dim: 8 has no effect: networks.ia3 has no rank") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_takes_presets_and_patterns(kind: str, toy: Toy) -> None:
    asked, arguments = SIZES[kind]

    def adapted(**more: str) -> set[str]:
        return {adapter.site.path for adapter in create(kind, [unet_targets(toy)], asked, arguments | more).adapters}

    usual = adapted()
    one = min(usual)
    assert adapted(include_patterns=re.escape(one)) == {one}
    assert adapted(exclude_patterns=re.escape(one)) == usual - {one}
    blocks = {path for path in adapted(preset="attn-mlp") if path.startswith("attentions")}
    assert adapted(preset="attn-mlp") == blocks != set()


@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_trained_beside_every_kind(kind: str, toy: Toy, tmp_path: Path) -> None:
    asked, arguments = SIZES[kind]
    network = create(kind, [unet_targets(toy)], asked, {**arguments, "train_norm": True})
    norms = {adapter.site.path for adapter in network.adapters if adapter.NAME == "norm"}
    assert {"attentions.0.norm", "attentions.0.norm1"} <= norms
    network.eval()  # DyLoRA draws its ranks in training
    network.attach()
    randomize(network)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    expected = toy(x)
    file = tmp_path / "x.safetensors"
    network.save(file, None, None)
    network.detach()
    content = read(file)
    other = create_from_file(kind, content, [unet_targets(toy)], Asked(), {})
    other.eval()
    other.attach()
    report = other.load(content)
    assert not report.missing
    assert not report.unexpected
    # files of kinds that are written as plain LoRA hold the same sum of other factors: rounded once more
    torch.testing.assert_close(toy(x), expected, rtol=1e-5, atol=1e-6)


# -- docs/adapters.md


def _cells(page: str, first: str) -> list[list[str]]:
    lines = [line for line in page.splitlines() if re.match(rf"\| `{first}", line)]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


def _page() -> str:
    return (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")


def test_the_page_counts_the_layers_of_presets() -> None:
    table = {
        row[0]: [int(cell) for cell in row[2:]] for row in _cells(_page(), "") if len(row) == 6 and row[2].isdecimal()
    }
    assert table.keys() == PRESETS.keys()
    for preset, numbers in table.items():
        counts = [COUNTS[size, preset] for size in ("sd15", "sdxl")]
        assert numbers == [number for unet, text in counts for number in (sum(unet), text)]


@pytest.mark.parametrize("row", [row for row in _cells(_page(), r"networks\.") if len(row) == 7], ids=lambda r: r[0])
def test_the_page_has_the_sizes_of_each_kind(row: list[str], true_sizes: Any) -> None:
    module, dim, words, *shown = row
    values, _ = kinds.arguments(module, words.split(), from_file=False)
    asked = Asked(dim=int(dim) if dim else None)
    networks = [list(create(module[9:], true_sizes[size], asked, values).adapters) for size in ("sd15", "sdxl")]
    trained = [sum(part.numel() for one in network for part in one.parameters()) for network in networks]
    written = [sum(part.numel() for one in network for part in one.export().values()) for network in networks]
    expected = [number / 1e6 for number in trained] + [2 * number / 1e6 for number in written]
    numbers = [float(cell.removesuffix(" M")) for cell in shown]
    assert numbers == pytest.approx(expected, rel=0.05)
