"""The report about a machine, complete whatever is missing on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library import diagnose
from tests.conftest import ROOT


def lines_of(text: str) -> dict[str, str]:
    return {line[:22].strip(): line[22:] for line in text.splitlines()}


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "library.diagnose"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = lines_of(done.stdout)
    assert found["torch"] == torch.__version__
    assert found["cpu dtypes"].startswith("fp32 yes, bf16 yes")
    assert found["Python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert found["bitsandbytes works"] == ("yes: NF4 on cuda" if torch.cuda.is_available() else "yes: NF4 on cpu")
    assert " in all, " in found["memory"]
    assert done.stderr == ""


def test_a_missing_or_broken_package_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, *_: object) -> object:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(diagnose.importlib, "import_module", broken)
    monkeypatch.setattr(diagnose.shutil, "which", lambda _: None)
    monkeypatch.setattr(diagnose, "_compiles", broken)  # slow, and called without the argument that it needs
    found = lines_of(diagnose.report())
    assert found["Triton"] == "no: OSError: triton: cannot open shared object file"
    assert found["bitsandbytes works"].startswith("no: OSError: bitsandbytes.functional")
    assert found["C++ compiler"] == "none of c++, g++, clang++"
    assert found["driver"] == "nvidia-smi is not there"
    assert found["torch.compile"].startswith("no: TypeError")


def test_home_folders_are_not_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "anna"))
    assert diagnose.without_home(f"{tmp_path}/anna/models/x.ckpt: gone") == "~/models/x.ckpt: gone"

    def fails() -> str:
        raise FileNotFoundError(2, "gone", f"{tmp_path}/anna/x")

    assert "anna" not in diagnose._tried(fails)
    assert "~/x" in diagnose._tried(fails)


def test_wrong_results_are_not_called_working(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "ones", lambda *shape, device: torch.zeros(*shape, device=device))
    assert diagnose._dtypes(torch.device("cpu")).startswith("fp32 no (ArithmeticError: wrong: 0 instead of 16)")


def test_the_lines_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the answers that a card gives."""
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((3 + device.index) * gib, 12 * gib))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: gib)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * gib)
    found = {label: diagnose._tried(probe) for label, probe in diagnose._devices()}
    assert found["cuda:1 memory"] == (
        "12.0 GiB in all, 4.0 GiB free; of this process 1.0 GiB allocated, 2.0 GiB reserved"
    )
    assert found["cuda:0"].startswith("no: ")  # there is no card here
    assert found["cuda:0 dtypes"].startswith("fp32 no (")
