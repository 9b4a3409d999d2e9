"""How long torch's threads spin: settled before torch is imported, and only where the user has not. And bf16."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from library import cpus
from library.run import start

ROOT = Path(__file__).parents[1]
SHOWN = """
import train_network
assert train_network.main(["--no_such_option"]) == 2
import torch
"""


def libgomp_reads(**given: str) -> str:
    """What libgomp shows of its settings when the program loads it, with these variables."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", SHOWN],
        cwd=ROOT, env=ours | {"OMP_DISPLAY_ENV": "VERBOSE"} | given, capture_output=True, text=True, check=True,
    )  # fmt: skip
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this torch does not compute with libgomp")
    return done.stderr


def test_threads_spin_briefly() -> None:
    assert "GOMP_SPINCOUNT = '10000'" in libgomp_reads()


@pytest.mark.slow
def test_what_the_user_has_settled_is_kept() -> None:
    assert "GOMP_SPINCOUNT = '77'" in libgomp_reads(GOMP_SPINCOUNT="77")
    assert "GOMP_SPINCOUNT = '10000'" not in libgomp_reads(OMP_WAIT_POLICY="ACTIVE")


def test_bf16_without_kernels_is_warned_of_where_it_hurts(monkeypatch, caplog) -> None:
    def warned(*, device: str = "cpu", precision: str = "bf16", size: int = start.LARGE, kernels: bool = False) -> bool:
        monkeypatch.setattr(cpus, "computes_bf16", lambda: kernels)
        plan = SimpleNamespace(
            options=SimpleNamespace(precision=SimpleNamespace(mixed_precision=precision)),
            family=SimpleNamespace(components=SimpleNamespace(size=lambda name: size)),
        )
        caplog.clear()
        start._warn_of_slow_bf16(plan, SimpleNamespace(device=torch.device(device)))
        return "--mixed_precision no is faster" in caplog.text

    assert warned()
    assert not warned(device="cuda")
    assert not warned(precision="no")
    assert not warned(size=start.LARGE - 1)
    assert not warned(kernels=True)


def test_bf16_is_asked_of_torch_itself() -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "DEFAULT":
        pytest.skip("no x86 processor with AVX2, or ATEN_CPU_CAPABILITY is set")
    assert cpus.computes_bf16() == (capability != "AVX2")
