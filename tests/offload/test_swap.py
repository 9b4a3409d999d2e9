"""Block swapping on a lane of the tests: the same bits, whatever computes with a weight and in whatever order."""

from __future__ import annotations

import json
import logging
import random
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from library.errors import UserError
from library.guidance.dry_run import dummy_loss
from library.guidance.estimate import peak_of
from library.models.opening import open_family
from library.offload.swap import Cost, Ring, chosen, layers_in, swapping_cost
from library.quantization import FORMATS
from library.quantization.frozen import Held, compute_frozen, weight_of
from library.run import encode
from networks.kinds import KINDS
from tests.conftest import BASE
from tests.offload.conftest import Made, Planned, same, started, trained
from tests.offload.held_back import HeldBackLane
from tests.quick import quick

PRECISIONS = {
    "fp32": (),
    "bf16": ("--mixed_precision", "bf16"),
    **{name: ("--mixed_precision", "bf16", "--base_format", name) for name in FORMATS},
}
LOW_RANK = ("--network_dim", "2", "--network_alpha", "1", "--network_args", "conv_dim=2")
NO_RANK = ("--network_args", "enable_conv=True")
ARGUMENTS = {
    **dict.fromkeys(KINDS, LOW_RANK),
    "boft": ("--network_dim", "6", "--network_args", "conv_dim=6"),
    "full": NO_RANK,
    "ia3": NO_RANK,
    "norm": NO_RANK,
    "lokr": (*LOW_RANK, "dora_wd=True"),
    "oft": ("--network_dim", "4", *NO_RANK),
    "vera": ("--network_dim", "2", "--network_args", "conv_dim=2"),
}
ALL = ("--blocks_to_swap", "100%")


@pytest.mark.parametrize(
    ("precision", "asked", "checkpointing"),
    [
        *quick(
            [
                *(("fp32", "100%", False), ("fp32", "5", True), ("bf16", "50%", False), ("bf16", "100%", True)),
                *((format, "100%", False) for format in FORMATS),
            ],
            ("fp32", "5", True),
        ),
    ],
)
def test_a_run_has_the_same_bits(made: Made, precision: str, asked: str, checkpointing: bool) -> None:
    """Without checkpointing as well, where the backward pass comes to a block after all others have computed."""
    words = (*PRECISIONS[precision], *(["--gradient_checkpointing"] if checkpointing else []))
    lane = HeldBackLane()
    assert same(trained(made(*words)), trained(made(*words, "--blocks_to_swap", asked, lane=lane)))
    assert lane.copies


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.slow
def test_every_kind_of_adapter_has_the_same_bits(made: Made, kind: str, precision: str) -> None:
    """Also those that compute with the layers' weights themselves: in host memory they would find NaN."""
    words = ("--network_module", f"networks.{kind}", *ARGUMENTS[kind], *PRECISIONS[precision])
    run = made(*words, *ALL, lane=HeldBackLane())
    swapped = trained(run)
    whole = made(*words)
    assert same(trained(whole), swapped)
    if (refusal := run.network.refuses("scale_weight_norms")) is None:
        assert torch.equal(whole.network.norms(), run.network.norms())
    else:
        assert refusal.startswith("--scale_weight_norms")


@pytest.mark.slow
def test_sdxl(made: Made, tiny_sdxl: Path) -> None:
    words = ("--mixed_precision", "bf16", "--gradient_checkpointing")
    lane = HeldBackLane()
    assert same(trained(made(*words, base=tiny_sdxl)), trained(made(*words, *ALL, base=tiny_sdxl, lane=lane)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_are_there_before_their_turn(made: Made, checkpointing: bool) -> None:
    """No block but the very first waits for a copy that it has started itself, and each pass copies a block once: the
    last two of a pass are the first two of the next."""
    run = made(*ALL, *(["--gradient_checkpointing"] if checkpointing else []), lane=HeldBackLane())
    late, loaded = [], []
    load, enter = Ring._load, Ring._enter

    def watched_enter(ring: Ring, block: int) -> None:
        if block not in ring._block_in:
            late.append(block)
        enter(ring, block)

    def watched_load(ring: Ring, block: int, buffer: int) -> None:
        loaded.append(block)
        load(ring, block, buffer)

    with mock.patch.object(Ring, "_enter", watched_enter), mock.patch.object(Ring, "_load", watched_load):
        trained(run)
    count = len(run.family.swap_blocks())
    assert late == [0]
    assert loaded == [0, 1, *([*range(2, count), *range(count - 3, -1, -1)] * 2)]


def stack(count: int = 6, width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(width, width, 3, padding=1), *(nn.Linear(width, width) for _ in range(count - 1))]
    return nn.Sequential(*layers).requires_grad_(False)


def test_any_order_is_right() -> None:
    whole, swapped = stack(), stack()
    Ring([layers_in(layer) for layer in swapped], lane := HeldBackLane())
    lane.hide()
    order = [random.Random(1).randrange(6) for _ in range(60)]
    x = torch.randn(8, 8, 8)
    for place in order:
        assert torch.equal(whole[place](x), swapped[place](x))
        assert swapped[place].weight.isnan().all()  # hidden
        assert torch.equal(weight_of(swapped[place]), whole[place].weight)


def test_a_weight_that_autograd_saves_is_a_copy() -> None:
    """Else it would be another block's in the backward pass."""
    whole, swapped = stack(), stack()
    Ring([layers_in(layer) for layer in swapped], HeldBackLane())
    found = []
    for module in (whole, swapped):
        factors = [torch.full((8, 1), 1.5, requires_grad=True) for _ in module]
        products = [weight_of(layer).flatten(1) * factor for layer, factor in zip(module, factors, strict=True)]
        torch.stack([product.square().sum() for product in products]).sum().backward()
        found.append(torch.stack([factor.grad for factor in factors if factor.grad is not None]))
    assert torch.equal(*found)


@pytest.mark.parametrize("format", FORMATS)
def test_packed_weights(format: str) -> None:
    """What moves are the plain tensors that a weight consists of; beside a packed one, one with transposed strides."""
    whole, swapped = stack(width=64), stack(width=64)
    for module in (whole, swapped):
        pack = Held(format, "--base_format").packing("it")
        for layer in (module[0], module[2], module[3]):
            layer.weight = nn.Parameter(pack(layer.weight.detach()), requires_grad=False)
            compute_frozen(layer)
        module[1].weight = nn.Parameter(module[1].weight.t().contiguous().t(), requires_grad=False)
    kinds = [type(layer.weight) for layer in swapped]
    Ring([layers_in(swapped[0], swapped[1]), layers_in(*swapped[2:4])], lane := HeldBackLane())
    lane.hide()
    assert [type(layer.weight) for layer in swapped] == kinds
    assert swapped[1].weight.stride() == (1, 64)
    x = torch.randn(1, 64, 8, 64, requires_grad=True)
    for _ in range(2):
        answers = [module[:4](x) for module in (whole, swapped)]
        assert torch.equal(*answers)
        gradients = [torch.autograd.grad(answer.square().sum(), x)[0] for answer in answers]
        assert torch.equal(*gradients)


def test_an_estimate_leaves_the_buffers_as_they_are(planned: Planned) -> None:
    """It runs the blocks on tensors without contents; the weights that are copied meanwhile are real."""
    whole = trained(started(planned(), None))
    plan = planned(*ALL)
    run = started(plan, HeldBackLane())
    peak_of(lambda fake: dummy_loss(plan, run, fake).backward())
    run.optimizer.zero_grad(set_to_none=True)
    assert same(whole, trained(run))


@pytest.mark.parametrize("base", ["sd", "sdxl"])
def test_the_blocks_of_a_unet(base: str, tiny_sdxl: Path) -> None:
    """In the order in which they compute, and every layer between the first and the last is in one of them."""
    family = open_family(str(tiny_sdxl if base == "sdxl" else BASE))
    unet = family.components.load("denoiser", torch.float32, "cpu")
    blocks = family.swap_blocks()
    layers = [layer for block in blocks for layer in block]
    assert len(layers) == len(set(layers))
    names = {name for name, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    own = {name for name, layer in unet.named_modules() if layer in set(layers)}
    outside = ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
    assert names - own == {*outside, *(f"add_embedding.linear_{n}" for n in (1, 2) if base == "sdxl")}
    number = {layer: place for place, block in enumerate(blocks) for layer in block}
    seen: list[int] = []
    for layer in layers:
        layer.register_forward_hook(lambda layer, *_: seen.append(number[layer]))
    sizes: dict[str, Any] = {"original_sizes": [(64, 64)], "crops": [(0, 0)], "target_size": (64, 64)}
    states = {"hidden_states": torch.randn(1, 77, unet.config.cross_attention_dim)}
    if base == "sdxl":
        states["pooled"] = torch.randn(1, 32)
    family.components.load_all(family.components.text_encoders, torch.float32, "cpu")
    with torch.no_grad():
        condition = family.condition(family.encode_prompts(["a cat"]), **sizes)
        family.predict(torch.randn(1, 4, 8, 8), torch.tensor([500]), condition)
    assert seen == sorted(seen)
    assert set(seen) == set(range(len(blocks)))


def test_a_share_of_the_blocks_is_spread_and_grows() -> None:
    blocks = [[nn.Linear(1, 1)] for _ in range(50)]
    before: set[int] = set()
    for number in range(1, 51):
        places = [blocks.index(block) for block in chosen(blocks, number)]
        assert places == sorted(places)
        assert len(places) == number
        assert before <= set(places)
        before = set(places)
        if number > 1:  # three-distance theorem: no gap is longer than twice the usual one, by the golden ratio
            gaps = [b - a for a, b in pairwise(places)]
            assert max(gaps) <= 2.7 * 50 / number
    assert len(chosen(blocks, "10%")) == 5
    assert len(chosen(blocks, "0.5%")) == 1  # rounded up
    assert len(chosen(blocks, "100%")) == 50


def test_bytes() -> None:
    layers = stack()
    blocks = [layers_in(layers[0]), layers_in(*layers[1:3]), layers_in(layers[3])]
    cost = swapping_cost(blocks)
    assert (cost.host, cost.buffers, cost.saved) == (4 * (576 + 3 * 64), 2 * 4 * 576, 4 * (576 + 192) - 8 * 576)
    assert Cost.of([0.5 * 576, 0.5 * 128, 0.5 * 64]).host == (576 + 192) // 2


def test_only_what_is_swapped_leaves_the_device(made: Made) -> None:
    """Biases, norms and all other parameters are where they were; the order of the parameters does not change."""
    whole, run = made(), made(*ALL, lane=(lane := HeldBackLane()))
    names = [name for name, _ in whole.family.components["denoiser"].named_parameters()]
    assert [name for name, _ in run.family.components["denoiser"].named_parameters()] == names
    hidden = {name for name, p in run.family.components["denoiser"].named_parameters() if p.isnan().any()}
    assert all(name.endswith(".weight") for name in hidden)
    assert len(hidden) == sum(len(block) for block in run.family.swap_blocks())
    cost = swapping_cost(run.family.swap_blocks())
    sizes = sum(p.nbytes for n, p in run.family.components["denoiser"].named_parameters() if n in hidden)
    assert cost.host == sizes
    assert sum(len(memory) for memory in lane.memories) < 1.1 * sizes  # rounded to 256 bytes each


# -- what the command line says


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--blocks_to_swap", "31"), "--blocks_to_swap 31: the model has 30 blocks"),
        (("--blocks_to_swap", "2"), "--blocks_to_swap 2: saves nothing"),
        (("--blocks_to_swap", "some"), "'some' is not a number"),
        (("--blocks_to_swap", "101%"), "'101%' is neither a number of blocks nor a percentage"),
        (("--blocks_to_swap", "-1"), "'-1' is neither a number of blocks nor a percentage"),
        (("--blocks_to_swap", "1.5"), "'1.5' is not a whole number"),
        ((*ALL, "--network_module", "lycoris.kohya", "--network_args", "algo=tlora"), "read the layers' weights"),
        (("--cpu_offload_checkpointing",), "--cpu_offload_checkpointing needs --gradient_checkpointing"),
    ],
)
def test_mistakes(planned: Planned, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as error:
        planned(*words)
    assert message in str(error.value)


def test_fsdp_is_refused(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="--blocks_to_swap with FSDP"):
        made(*ALL, lane=HeldBackLane())


def test_a_cpu_says_that_nothing_changes(made: Made, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run = made(*ALL, "--gradient_checkpointing", "--cpu_offload_checkpointing")
    for option in ("blocks_to_swap", "cpu_offload_checkpointing"):
        assert f"--{option}: has no effect here" in caplog.text
    assert not any("fetch" in vars(layer) for layer in run.family.components["denoiser"].modules())


def test_none_is_a_number(planned: Planned) -> None:
    assert planned("--blocks_to_swap", "0").options.precision.blocks_to_swap is None


def test_the_log_has_the_bytes(made: Made, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        made(*ALL, lane=HeldBackLane())
    assert "swapped: 30 of the UNet's 30 blocks, " in caplog.text


@pytest.mark.slow
def test_pictures_validation_and_a_resumed_run(train: Any, tmp_path: Path) -> None:
    """The whole command line with a lane of the tests: pictures and files have the same bits as without swapping."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --s 2 --w 64 --h 64\n", encoding="utf-8")
    words = (
        *("--network_train_unet_only", "--sample_prompts", str(prompts), "--sample_every_n_steps", "2"),
        *("--validation_split", "0.3", "--validate_every_n_steps", "2", "--save_state", "--save_every_n_steps", "2"),
        *("--gradient_accumulation_steps", "2", "--gradient_checkpointing", "--mixed_precision", "bf16"),
    )
    assert train(*words, "--output_name", "whole") == 0
    with mock.patch.object(encode, "lane_of", side_effect=lambda device: HeldBackLane()):
        more = (*words, *ALL, "--cpu_offload_checkpointing")
        assert train(*more, "--output_name", "swapped") == 0
        (state,) = tmp_path.glob("out/swapped-*00000002-state")
        assert train(*more, "--output_name", "resumed", "--resume", str(state)) == 0
    found = {name: load_file(tmp_path / f"out/{name}.safetensors") for name in ("whole", "swapped", "resumed")}
    for name in ("swapped", "resumed"):
        assert all(torch.equal(tensor, found["whole"][key]) for key, tensor in found[name].items())
    shown = [pixels(tmp_path / "out" / "sample", name) for name in ("whole", "swapped")]
    assert len(shown[0]) == 3  # two, and one of how they came to be
    assert shown[0] == shown[1]
    validated = [validation(tmp_path / "out" / f"{name}-metrics.jsonl") for name in ("whole", "swapped")]
    assert len(validated[0]) == 2
    assert validated[0] == validated[1]


def pixels(folder: Path, name: str) -> list[bytes]:
    """Of a run's pictures."""
    return [Image.open(path).tobytes() for path in sorted(folder.glob(f"{name}_*.png"))]


def validation(file: Path) -> list[dict[str, float]]:
    """The losses of held-out images in a run's metrics."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [line["validation"] for line in lines if "validation" in line]
