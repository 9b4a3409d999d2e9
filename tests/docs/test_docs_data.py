"""What docs/data.md tells a user to type works, and draws the pictures that stand there."""

from __future__ import annotations

import re

import numpy as np
from PIL import Image

from docs import pictures


def test_the_pictures_of_the_page_are_what_its_commands_draw(tmp_path):
    drawn = pictures.make(tmp_path / "examples")
    shown = re.findall(r"\(images/(.*?)\)", pictures.PAGE)
    assert sorted(shown) == [path.name for path in drawn]
    for path in drawn:
        new, old = (
            np.asarray(Image.open(file).convert("RGB"), np.float32) for file in (path, pictures.IMAGES / path.name)
        )
        assert new.shape == old.shape
        # another Pillow may draw letters a little differently
        assert np.abs(new - old).mean() < 2, f"python -m docs.pictures makes {path.name} anew"


def test_every_data_set_of_the_page_is_used():
    named = {block.splitlines()[0].removeprefix("# ") for block in pictures.blocks("toml")}
    assert named == {words[words.index("--dataset_config") + 1] for words in pictures.commands()}
