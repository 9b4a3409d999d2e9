"""A second kind of adapter takes one file and one line in KINDS: from the command line to the file and back.

The kind is made up (`made_up/diagonal.py`). Nothing else in the project knows of it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import MADE_UP, made_up_kind, sd_targets
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.files.hashes import safetensors_hashes
from library.files.header import read_metadata
from networks import kinds
from networks.files import check, read
from networks.merge import BaseWeights
from networks.tools.__main__ import main as tools
from tests.conftest import BASE, ROOT
from tests.merging import merge_into
from train_network import main

WORDS = (
    *("--pretrained_model_name_or_path", str(BASE), "--caption_extension", ".txt", "--resolution", "64"),
    *("--network_module", "networks.diagonal", "--learning_rate", "1e-2", "--train_batch_size", "2", "--seed", "1"),
    *("--cache_latents", "--max_data_loader_n_workers", "0", "--no-loss_plot", "--no-report"),
)


@pytest.fixture(autouse=True)
def kind() -> Iterator[str]:
    with made_up_kind() as name:
        yield name


@pytest.fixture
def train(tmp_path: Path, image_folder: Path) -> Callable[..., int]:
    """train_network.py's main with the made-up kind, into `tmp_path`."""

    def run(name: str, *words: str) -> int:
        places = ("--train_data_dir", str(image_folder), "--output_dir", str(tmp_path), "--output_name", name)
        return main([*WORDS, *places, *words])

    return run


@pytest.mark.slow
def test_it_trains_saves_loads_and_resumes(train: Any, tmp_path: Path) -> None:
    args = ("--network_args", "diag_dropout=0.1", "down_lr_weight=0.5,1")
    whole = ("--optimizer_type", "CustomAdamW", "--monitoring", *args)
    assert train("whole", *whole, "--max_train_steps", "4", "--save_every_n_steps", "2", "--save_state") == 0
    tensors = load_file(tmp_path / "whole.safetensors")
    assert {key.partition(".")[2] for key in tensors} == {"diag_v"}
    assert all(tensor.any() for tensor in tensors.values())
    metadata = read_metadata(tmp_path / "whole.safetensors")
    assert metadata["ss_network_module"] == "networks.diagonal"
    assert "diag_dropout" in metadata["ss_network_args"]

    (state,) = (path for path in tmp_path.iterdir() if path.is_dir() and "00000002" in path.name)
    assert train("resumed", *whole, "--max_train_steps", "4", "--resume", str(state)) == 0
    resumed = load_file(tmp_path / "resumed.safetensors")
    assert all(torch.equal(resumed[key], tensor) for key, tensor in tensors.items())  # same seed, same bits

    start = ("--network_weights", str(tmp_path / "whole.safetensors"), "--max_train_steps", "1")
    assert train("more", *start, "--scale_weight_norms", "0.01") == 0
    assert train("sizes", *start, "--dim_from_weights") == 0
    for name in ("more", "sizes"):
        found = load_file(tmp_path / f"{name}.safetensors")
        assert found.keys() == tensors.keys()
    assert max(tensor.norm() for tensor in load_file(tmp_path / "more.safetensors").values()) <= 0.0101


def diagonal_file(tiny: Any, path: Path) -> dict[str, torch.Tensor]:
    from networks.create import create
    from networks.settings import Asked

    network = create("diagonal", sd_targets(*tiny), Asked())
    for number, parameter in enumerate(network.parameters()):
        torch.nn.init.constant_(parameter, 0.01 * (number % 5 + 1))
    network.save(path, None, {"ss_steps": "7", "sshs_model_hash": "of another file"})
    return {key: tensor.detach().clone() for key, tensor in network.tensors().items()}


def test_it_merges_into_the_base(tiny: Any, tmp_path: Path) -> None:
    diagonal_file(tiny, tmp_path / "x.safetensors")
    targets = sd_targets(*tiny)
    layer = tiny[0].get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
    before = layer.weight.detach().clone()
    weights = BaseWeights([str(tmp_path / "x.safetensors")], [0.5])
    weights.check(targets)
    merge_into(weights, targets)
    weights.report()
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.diag_v"
    v = load_file(tmp_path / "x.safetensors")[name]
    torch.testing.assert_close(layer.weight, before + 0.5 * torch.diag(v))


def test_it_converts_and_says_where_it_has_no_names(tiny: Any, tmp_path: Path, capsys: Any) -> None:
    source, target = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    tensors = diagonal_file(tiny, source)
    assert tools(["convert", str(source), str(target), "--to", "kohya"]) == 0
    assert all(torch.equal(load_file(target)[key], tensor) for key, tensor in tensors.items())
    metadata = read_metadata(target)
    assert metadata["ss_steps"] == "7"
    assert metadata["sshs_model_hash"] == safetensors_hashes(target)["sshs_model_hash"]
    assert tools(["convert", str(source), str(tmp_path / "z.safetensors"), "--to", "diffusers"]) == 2
    assert "diag_v has no name in diffusers, which knows plain LoRA and DoRA of rows alone" in capsys.readouterr().err
    assert not (tmp_path / "z.safetensors").exists()


def test_its_files_are_recognised_by_their_mark(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = diagonal_file(tiny, path)
    assert {layer.kind for layer in read(path).layers.values()} == {"diagonal"}
    with pytest.raises(UserError, match="is a diagonal adapter, and only plain LoRA is trained by netw"):
        check(path, purpose="is trained by networks.lora", allowed=["lora"])
    pair = {f"lora_unet_x.lora_{half}.weight": torch.ones(2, 2) for half in ("down", "up")}
    save_file({**tensors, **pair}, path)
    with pytest.raises(UserError, match="layers of diagonal and 1 layers of LoRA, and only diagonal adapters is trai"):
        check(path, purpose="is trained by networks.diagonal", allowed=["diagonal"])
    save_file({**tensors, "lora_unet_x.diag_w": torch.ones(2)}, path)
    with pytest.raises(UserError, match="1 tensors of no known kind, such as lora_unet_x"):
        check(path, purpose="is merged")


WRONG = {
    "diag_dropuot=0.1": "networks.diagonal takes no 'diag_dropuot', did you mean 'diag_dropout'? It takes:",
    "diag_dropout=much": "diag_dropout: 'much' is not a number",
    "conv_dim=4": "networks.diagonal takes no 'conv_dim'",
    "loraplus_lr_ratio=4": "networks.diagonal takes no 'loraplus_lr_ratio'",  # it raises no tensor
    "seed=4": "'seed' is set by the program and cannot be given here",
}


def test_wrong_settings_are_refused_before_torch_loads(tmp_path: Path) -> None:
    code = (
        "import sys, networks\n"
        f"networks.__path__.append({str(MADE_UP)!r})\n"
        "from networks import kinds\n"
        "kinds.KINDS['diagonal'] = 'networks.diagonal.Diagonal'\n"
        "from library.errors import UserError\n"
        "for word in sys.argv[1:]:\n"
        "    try: kinds.arguments('networks.diagonal', [word], from_file=False)\n"
        "    except UserError as error: print(error)\n"
        "print(kinds.arguments('networks.diagonal', ['diag_dropout=0.5'], from_file=True))\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *WRONG], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    *messages, arguments = done.stdout.splitlines()
    assert arguments == "({'diag_dropout': 0.5}, [])"
    for message, expected in zip(messages, WRONG.values(), strict=True):
        assert message.startswith(f"--network_args: {expected}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--network_args", "diag_dropout=1.5"),
            "networks.diagonal: diag_dropout: 1.5 is not in [0, 1)",
        ),
        (("--network_dim", "8"), "networks.diagonal: network_dim: 8 has no effect: networks.diagonal has no rank"),
        (("--network_dropout", "0.5"), "network_dropout: 0.5 has no effect: networks.diagonal has no dropout"),
        (("--network_alpha", "8"), "network_alpha: 8 has no effect: networks.diagonal has no alpha"),
        (("--network_args", "block_dims=4"), "networks.diagonal takes no 'block_dims'"),
    ],
)
def test_wrong_settings_from_the_command_line(train: Any, words: tuple[str, ...], message: str, capsys: Any) -> None:
    assert train("x", "--max_train_steps", "1", *words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_a_module_that_is_no_kind_is_refused(train: Any, capsys: Any) -> None:
    assert train("x", "--max_train_steps", "1", "--network_module", "networks.rates") == 2
    said = capsys.readouterr().err
    assert "--network_module networks.rates: is no kind of adapter; known: networks.lora, " in said
    assert "networks.diagonal" in said


def test_the_project_knows_nothing_else_of_it() -> None:
    assert kinds.KINDS["diagonal"] == "networks.diagonal.Diagonal"
    sources = [*(ROOT / "library").rglob("*.py"), *(ROOT / "networks").rglob("*.py")]
    assert not [path for path in sources if "diagonal.Diagonal" in path.read_text(encoding="utf-8")]
