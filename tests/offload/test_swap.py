"""Block swapping on a lane of the tests: the same bits, the order of the copies, the bytes."""

from __future__ import annotations

import time

import pytest

from networks.kinds import KINDS
from tests.offload.conftest import Made, same, trained
from tests.offload.held_back import HeldBackLane

PRECISIONS = {
    "fp32": (),
    "bf16": ("--mixed_precision", "bf16"),
    "float8": ("--mixed_precision", "bf16", "--fp8_base_unet"),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("asked", ["100%", "50%"])
def test_bits(made: Made, precision: str, checkpointing: bool, asked: str) -> None:
    words = (*PRECISIONS[precision], *(["--gradient_checkpointing"] if checkpointing else []))
    start = time.time()
    plain = trained(made(*words))
    print(time.time() - start)
    lane = HeldBackLane()
    assert same(plain, trained(made(*words, "--blocks_to_swap", asked, lane=lane)))
    print(len(lane.copies), time.time() - start)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kind(made: Made, kind: str, precision: str) -> None:
    words = ("--network_module", f"networks.{kind}", *PRECISIONS[precision])
    plain = trained(made(*words))
    assert same(plain, trained(made(*words, "--blocks_to_swap", "100%", lane=HeldBackLane())))
