"""Weights into modules: exact values, types, and nothing missing or left over."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from library.errors import UserError
from library.files.index import read_index
from library.models.checkpoints import weights


def _module() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(6, 4), nn.Conv2d(4, 4, 1), nn.LayerNorm(4))


def _states(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(p.shape).to(dtype) for name, p in _module().named_parameters()}


def _fill(path: Path, dtype: torch.dtype) -> nn.Module:
    module = _module()
    weights.fill(module, read_index(path).entries, dtype=dtype, device="cpu", where="the module in x")
    return module


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_values_are_those_of_a_plain_conversion(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_BUFFER", 64)  # several pieces a tensor
    states = _states(stored)
    save_file(states, tmp_path / "x.safetensors")
    filled = dict(_fill(tmp_path / "x.safetensors", wanted).named_parameters())
    for name, parameter in filled.items():
        assert torch.equal(parameter, states[name].to(wanted)), name
        assert parameter.dtype == wanted
        assert not parameter.requires_grad


def test_the_files_own_type_is_mapped_and_private(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(_states(), path)
    before = path.read_bytes()
    module = _fill(path, torch.float32)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    assert path.read_bytes() == before
    assert torch.equal(module[0].weight, _states()["0.weight"] + 1)


def test_the_weights_outlive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(_states(), path)
    module = _fill(path, torch.float32)
    path.unlink()
    assert torch.equal(module[1].weight, _states()["1.weight"])


def test_a_convolution_of_one_pixel_and_a_linear_layer_are_the_same(tmp_path: Path) -> None:
    states = _states()
    states["0.weight"] = states["0.weight"][:, :, None, None].contiguous()
    states["1.weight"] = states["1.weight"][:, :, 0, 0].contiguous()
    save_file(states, tmp_path / "x.safetensors")
    module = _fill(tmp_path / "x.safetensors", torch.bfloat16)
    assert module[0].weight.shape == (4, 6)
    assert module[1].weight.shape == (4, 4, 1, 1)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"

    def refused(states: dict[str, torch.Tensor], message: str) -> None:
        save_file(states, path)
        with pytest.raises(UserError, match=message) as caught:
            _fill(path, torch.float32)
        assert "the module in x" in str(caught.value)

    states = _states()
    weight = states.pop("2.weight")
    refused(states, r"1 missing: 2\.weight")
    refused({**states, "2.weight": weight, "more": torch.ones(1)}, "1 unknown: more")
    refused({**states, "2.weight": torch.ones(5)}, r"'2\.weight' has the shape \[5\] where \[4\] is expected")
    refused({**states, "2.weight": torch.ones(4, dtype=torch.int64)}, "int64")


def test_a_file_that_shrinks_meanwhile_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(_states(), path)
    entries = read_index(path).entries
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="ended while it was being read"):
        weights.fill(_module(), entries, dtype=torch.bfloat16, device="cpu", where="x")


def test_threads_are_as_before(tmp_path: Path) -> None:
    save_file(_states(), tmp_path / "x.safetensors")
    threads = torch.get_num_threads()
    _fill(tmp_path / "x.safetensors", torch.bfloat16)
    assert torch.get_num_threads() == threads


_PEAK = """
import sys, torch
from pathlib import Path
from torch import nn
from library.files.index import read_index
from library.models.checkpoints.weights import fill

def peak():  # not getrusage, which begins with the peak of the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

with torch.device("meta"):
    module = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(4)))
torch.ones(8).to(torch.bfloat16)
before = peak()
fill(module, read_index(Path(sys.argv[1])).entries, dtype=torch.bfloat16, device="cpu", where="x")
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads peak memory from /proc")
def test_converting_needs_little_more_than_the_result(tmp_path: Path) -> None:
    """A process that loads 256 MiB of fp32 as bf16 grows by 128 MiB and the buffer: no copy, no mapping of the file."""
    save_file({f"{i}.weight": torch.zeros(4096, 4096) for i in range(4)}, tmp_path / "x.safetensors")
    command = [sys.executable, "-c", _PEAK, str(tmp_path / "x.safetensors")]
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    grown = float(result.stdout)
    assert 100 < grown < 128 + 16 + 12, f"{grown:.0f} MiB"
