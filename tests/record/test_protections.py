"""What keeps a network from forgetting: in words, and in the metadata of its files."""

from __future__ import annotations

import json

import pytest

from library.record.facts import Consolidated, Distilled, Preserved, Protections
from library.record.protections import from_metadata, to_metadata
from library.record.summary import protections

ALL = Protections(
    preserved=(
        Preserved(images=79, prior="base"),
        Preserved(images=1, prior="previous", region="outside_mask", weight=0.5),
    ),
    distilled=Distilled(weight=2.0, schedule="linear"),
    consolidated=Consolidated(images=20, sources=("noto", "old 1"), strength=1000.0),
    previous="first.safetensors",
)
EACH = [
    ALL,
    Protections(preserved=ALL.preserved[:1]),
    Protections(distilled=Distilled(weight=1.0, schedule="constant"), previous="a.safetensors"),
    Protections(consolidated=Consolidated(images=1, sources=("noto",))),
]


@pytest.mark.parametrize("found", EACH, ids=["all", "preserved", "distilled", "consolidated"])
def test_metadata_and_back(found: Protections) -> None:
    written = {f"ss_{name}": str(value) for name, value in to_metadata(found).items()}
    assert from_metadata(written) == found


def test_in_words() -> None:
    assert protections(ALL) == (
        "79 images keep the base model's prediction; 1 image keeps the prediction of first.safetensors outside of "
        "their masks, weight 0.5; distillation from first.safetensors, weight 2, linear to 0; EWC for 20 images of "
        "noto, old 1, lambda 1000"
    )
    assert protections(EACH[2]) == "distillation from a.safetensors, weight 1"
    assert protections(EACH[3]) == "EWC for 1 image of noto, lambda computed"


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"ss_preserved_images": "[]"},
        {"ss_preserved_images": "nothing"},
        {"ss_preserved_images": json.dumps([{"images": "many", "prior": "base"}])},
        {"ss_distillation_weight": "1.0"},
        {"ss_ewc_data": "[" * 5000, "ss_ewc_images": "1", "ss_ewc_lambda": "None"},
    ],
)
def test_none_of_it(metadata: dict[str, str]) -> None:
    assert from_metadata(metadata) is None
