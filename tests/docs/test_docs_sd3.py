"""The numbers of docs/sd3.md are the program's. Its commands and options are tested in test_docs_flow.py."""

from __future__ import annotations

import re

import pytest

from library.models.checkpoints.sd3.files import configurations
from library.models.checkpoints.sd3.names import fused_name, original_name
from library.models.modules import new_sd3_transformer
from library.models.stable_diffusion_3 import StableDiffusion3
from networks import sd3_arguments
from tests.docs.tables import page
from tests.models.test_stable_diffusion_3 import TRUE

PAGE = page("sd3")


def test_kohyas_network_args_are_named() -> None:
    for name in (*sd3_arguments._OF_KIND, "emb_dims", "train_block_indices"):
        assert f"`{name}`" in PAGE


@pytest.mark.parametrize(
    ("kind", "numbers"), [("5-medium", "has 83 MB, .* has 59; .* names 65"), ("5-large", "large: 182, 135 and 147 MB")]
)
def test_the_sizes_of_the_files(kind: str, numbers: str) -> None:
    """Of rank 16 in bf16: fused with zeros beside the blocks, as kohya has them, and the layers one by one."""
    transformer = new_sd3_transformer(configurations()["transformer"] | TRUE[kind][0])
    pattern = StableDiffusion3.PARTS["denoiser"].linear
    leaves = shared = fused = 0
    for path, layer in transformer.named_modules():
        if not pattern.fullmatch(path):
            continue
        rows, columns = layer.weight.shape  # type: ignore[union-attr]
        is_fused = bool(fused_name(original_name(path)))
        leaves += rows + columns
        shared += rows + (columns // 3 if is_fused else columns)  # a third of 1536 and of 2432 is nearly whole
        fused += columns + rows * (3 if is_fused else 1)
    assert shared == pytest.approx({"5-medium": 1_850_880, "5-large": 4_212_224}[kind], abs=200)
    said = [f"{round(per_rank * 16 * 2 / 1e6)}" for per_rank in (fused, shared, leaves)]
    assert re.findall(r"\d+", numbers.replace("large", "")) == said
    assert re.search(numbers, PAGE, flags=re.DOTALL)
    if kind == "5-medium":
        assert f"{round(leaves * 16 / 1e6)} million numbers" in PAGE
        assert f"a caption takes {(77 * 2048 + 256 * 4096 + 2048) * 2 / 1e6:.1f} MB" in PAGE
