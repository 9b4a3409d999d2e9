"""The methods of merging against closed forms on small matrices, and weights by block."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tool_files import LINEAR, TEXT, WIDE, deltas, tensors_of, write

from library.errors import UserError
from networks.tools.__main__ import main
from networks.tools.block_weights import LISTS, BlockWeights, block_of
from networks.tools.methods import METHODS, Method
from networks.tools.methods.ties import trim


def _combine(name: str, deltas: list[torch.Tensor], weights: list[float], **options: float) -> torch.Tensor:
    method = Method.of(name, options.get("density"), options.get("seed"), files=len(deltas))  # type: ignore[arg-type]
    return method.combine(deltas, weights, layer="layer")


def _matrix(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (6, 5)), generator=torch.Generator().manual_seed(seed))


def test_task_arithmetic_is_the_weighted_sum() -> None:
    a, b = _matrix(1), _matrix(2)
    torch.testing.assert_close(_combine("linear", [a, b], [0.5, -2.0]), 0.5 * a - 2 * b)


def test_ties_by_hand() -> None:
    """The example of the three steps: trimmed to 3 of 6, signs of the sums, means of those that agree."""
    a = torch.tensor([[4.0, -3.0, 0.1, 2.0, 0.2, 0.3]])
    b = torch.tensor([[-1.0, -5.0, 6.0, 0.1, 0.2, 0.3]])
    # trimmed: a = [4, -3, 0, 2, 0, 0], b = [-1, -5, 6, 0, 0, 0]; signs: + - + + 0 0
    expected = torch.tensor([[4.0, -4.0, 6.0, 2.0, 0.0, 0.0]])
    assert torch.equal(_combine("ties", [a, b], [1.0, 1.0], density=0.5), expected)
    # a weight counts in the election: 8 · b outweighs a in the first place
    expected = torch.tensor([[-8.0, (-3.0 - 40.0) / 2, 48.0, 2.0, 0.0, 0.0]])
    assert torch.equal(_combine("ties", [a, b], [1.0, 8.0], density=0.5), expected)


def test_equal_weights_of_ties_are_the_papers_lambda() -> None:
    parts = [_matrix(seed) for seed in (1, 2, 3)]
    once = _combine("ties", parts, [1.0, 1.0, 1.0])
    torch.testing.assert_close(_combine("ties", parts, [0.3, 0.3, 0.3]), 0.3 * once)


def test_the_trimming_of_ties_keeps_the_largest() -> None:
    one = _matrix(3, 20, 10)
    kept = trim(one, 0.2)
    assert int(kept.count_nonzero()) == 40
    assert float(one[kept == 0].abs().max()) <= float(one[kept != 0].abs().min())
    assert torch.equal(kept[kept != 0], one[kept != 0])


def test_ties_of_a_file_with_itself_is_its_trimmed_self() -> None:
    one = _matrix(4)
    assert torch.equal(_combine("ties", [one, one], [1.0, 1.0], density=0.4), trim(one, 0.4))


def test_slerp_stays_on_the_arc() -> None:
    """Of orthogonal differences of one length: cos and sin of a quarter turn's share, and the length of both."""
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    for share in (0.0, 0.25, 0.5, 1.0):
        angle = share * math.pi / 2
        expected = 2 * torch.tensor([[math.cos(angle), math.sin(angle)]])
        torch.testing.assert_close(_combine("slerp", [a, b], [1 - share, share]), expected)


def test_the_length_of_a_slerp_lies_between() -> None:
    a, b = _matrix(5), 3 * _matrix(6)
    found = _combine("slerp", [a, b], [0.75, 0.25])
    assert float(found.norm()) == pytest.approx(0.75 * float(a.norm()) + 0.25 * float(b.norm()), rel=1e-5)
    cosine = torch.nn.functional.cosine_similarity

    def angle(one: torch.Tensor, other: torch.Tensor) -> float:
        return math.acos(float(cosine(one.flatten().double(), other.flatten().double(), dim=0)))

    assert angle(a, found) == pytest.approx(0.25 * angle(a, b), rel=1e-5)


def test_slerp_of_parallels_and_of_nothing_is_the_sum() -> None:
    a = _matrix(7)
    torch.testing.assert_close(_combine("slerp", [a, 2 * a], [0.5, 0.5]), 1.5 * a)
    torch.testing.assert_close(_combine("slerp", [a, torch.zeros_like(a)], [0.7, 0.3]), 0.7 * a)


def test_dare_drops_the_share_and_keeps_the_mean() -> None:
    """Each element is 0 or the original over density; within five standard deviations of the mean."""
    one, density = _matrix(8, 200, 200), 0.3
    found = _combine("dare", [one], [1.0], density=density)
    kept = found != 0
    torch.testing.assert_close(found[kept], one[kept] / density)
    deviation = math.sqrt(density * (1 - density) / one.numel())
    assert abs(float(kept.float().mean()) - density) < 5 * deviation


def test_the_draws_of_dare_depend_on_seed_layer_and_file() -> None:
    ones = torch.ones(50, 40)

    def draw(seed: int, layer: str) -> torch.Tensor:
        return Method("dare", 0.5, seed).combine([ones, ones], [1.0, 10.0], layer=layer)

    first = draw(1, "x")
    assert torch.equal(first, draw(1, "x"))
    assert not torch.equal(first, draw(2, "x"))
    assert not torch.equal(first, draw(1, "y"))
    assert set(first.unique().tolist()) == {0.0, 2.0, 20.0, 22.0}  # the files are not dropped together
    turned = Method("dare", 0.5, 1).combine([ones.view(10, 20, 5, 2)] * 2, [1.0, 10.0], layer="x")
    assert torch.equal(turned.flatten(), first.flatten())  # a convolution as a matrix and with its axes


def test_dare_ties_elects_among_what_is_left() -> None:
    a, b = torch.full((40, 40), 1.0), torch.full((40, 40), -3.0)
    found = _combine("dare_ties", [a, b], [1.0, 1.0], density=0.5)
    # both left: -6 outweighs 2, and 2 does not count in the mean
    assert set(found.unique().tolist()) == {0.0, 2.0, -6.0}


@pytest.mark.parametrize("name", METHODS)
def test_each_method_merges_files(name: str, tmp_path: Path) -> None:
    """To full rank: the file then has the method's result on the dense differences."""
    a, b = tensors_of(1), tensors_of(2, rank=2)
    files = [str(write(tmp_path / f"{which}.safetensors", own)) for which, own in (("a", a), ("b", b))]
    more = ["--density", "0.5"] if "dare" in name else []
    target = tmp_path / "out.safetensors"
    words = ["--method", name, *more, "--rank", "54", "--weights", "0.5", "0.25", "--save_to", str(target)]
    assert main(["merge", *files, *words]) == 0
    found, one, two = deltas(load_file(target)), deltas(a), deltas(b)
    method = Method.of(name, 0.5 if more else None, None, files=2)
    for layer in one:
        expected = method.combine([one[layer].float(), two[layer].float()], [0.5, 0.25], layer=layer)
        assert float((found[layer] - expected).norm()) <= 1e-4 * float(expected.norm()), layer


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "ties"], "--method ties: needs --rank"),
        (["--method", "svd"], "--method svd: needs --rank"),
        (["--method", "dare", "--rank", "2"], "needs --density"),
        (["--method", "ties", "--rank", "2", "--density", "1.5"], "--density 1.5: has to be above 0"),
        (["--density", "0.5"], "--density has no effect with --method linear"),
        (["--method", "ties", "--rank", "2", "--seed", "1"], "--seed has no effect with --method ties"),
        (["--method", "slerp", "--rank", "2", "--weights", "1", "-1"], "-1 is negative"),
        (["--allow_missing"], "--allow_missing has no effect without --base"),
        (["--lbw", "1"], "--lbw: 1 lists for 2 files"),
        (["--lbw", "1,2,3", "1"], "3 numbers; there are lists of 17 or 26"),
        (["--lbw", ",".join(["1"] * 12), "1"], "takes 17 or 26 numbers"),
        (["--lbw", "IN12=1", "1"], "'IN12' is no block"),
        (["--lbw", "IN01=x", "1"], "'x' is no weight"),
        (["--lbw", ",".join(["1"] * 17), "1"], "the file has layers in OUT00"),
    ],
)
def test_wrong_options_are_refused(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    extra = {**tensors_of(1), **tensors_of(3, names={"lora_unet_up_blocks_0_resnets_0_conv1": (4, 4, 3, 3)})}
    files = [str(write(tmp_path / "a.safetensors", extra)), str(write(tmp_path / "b.safetensors", tensors_of(2)))]
    target = tmp_path / "out.safetensors"
    assert main(["merge", *files, *words, "--save_to", str(target)]) == 2
    assert said in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "BASE"),
        ("lora_unet_time_embedding_linear_1", "BASE"),
        ("lora_unet_conv_in", "IN00"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in", "IN01"),
        ("lora_unet_down_blocks_0_resnets_1_conv1", "IN02"),
        ("lora_unet_down_blocks_0_downsamplers_0_conv", "IN03"),
        ("lora_unet_down_blocks_2_attentions_1_proj_in", "IN08"),
        ("lora_unet_down_blocks_3_resnets_1_conv1", "IN11"),
        ("lora_unet_mid_block_attentions_0_proj_in", "MID"),
        ("lora_unet_up_blocks_0_upsamplers_0_conv", "OUT02"),
        ("lora_unet_up_blocks_1_attentions_0_proj_in", "OUT03"),
        ("lora_unet_up_blocks_3_attentions_2_proj_out", "OUT11"),
        ("lora_unet_input_blocks_4_1_proj_in", "IN04"),
        ("lora_unet_middle_block_1_proj_in", "MID"),
        ("lora_unet_output_blocks_5_1_proj_in", "OUT05"),
        ("oft_unet_output_blocks_5_1_proj_in", "OUT05"),
    ],
)
def test_a_layer_lies_in_a_block_in_either_naming(layer: str, block: str) -> None:
    assert block_of(layer) == block


def test_the_lists_have_the_usual_blocks() -> None:
    assert {length: len(blocks) for length, blocks in LISTS.items()} == {12: 12, 17: 17, 20: 20, 26: 26}
    assert " ".join(LISTS[17]) == "BASE IN01 IN02 IN04 IN05 IN07 IN08 MID " + " ".join(
        f"OUT{n:02}" for n in range(3, 12)
    )
    assert " ".join(LISTS[12]) == "BASE IN04 IN05 IN07 IN08 MID OUT00 OUT01 OUT02 OUT03 OUT04 OUT05"


def test_named_blocks_leave_the_rest_at_1_and_later_ones_win() -> None:
    weights = BlockWeights.parse("OUT=0, OUT05=0.5,M00=2")
    assert weights.of("lora_unet_up_blocks_1_attentions_2_proj_in") == 0.5
    assert weights.of("lora_unet_up_blocks_1_attentions_0_proj_in") == 0
    assert weights.of("lora_unet_mid_block_attentions_0_proj_in") == 2
    assert weights.of("lora_te_text_model_encoder_layers_0_mlp_fc1") == 1
    with pytest.raises(UserError, match="'OUTS' is no block"):
        BlockWeights.parse("OUTS=1")


def test_a_merge_weighs_each_block(tmp_path: Path) -> None:
    """Once, not squared; a block of weight 0 is left out."""
    a, b = tensors_of(1), tensors_of(2)
    files = [str(write(tmp_path / f"{which}.safetensors", own)) for which, own in (("a", a), ("b", b))]
    target = tmp_path / "out.safetensors"
    listed = ",".join(["0", "0.5", *["1"] * 5, "2", *["1"] * 9])  # BASE, IN01, …, MID, …
    words = ["--weights", "0.6", "1", "--lbw", listed, "BASE=0", "--save_to", str(target)]
    assert main(["merge", *files, *words]) == 0
    found, one, two = deltas(load_file(target)), deltas(a), deltas(b)
    assert TEXT not in found
    for layer, weight in ((LINEAR, 0.3), (WIDE, 1.2)):
        expected = weight * one[layer] + two[layer]
        assert float((found[layer] - expected).norm()) <= 1e-5 * float(expected.norm()), layer
