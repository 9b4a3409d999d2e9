"""How well an image fits its prompt, by a CLIP model (Hessel et al. 2021, arXiv 2104.08718: 2.5 · max(cosine, 0))."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.errors import UserError
from library.progress import bar

if TYPE_CHECKING:
    from PIL.Image import Image


@torch.no_grad()
def clip_scores(folder: Path, images: Sequence[Image], texts: Sequence[str]) -> list[float]:
    """The cosine of each image's embedding and its text's, in -1 … 1; the paper's score is 2.5 times that.

    folder: a CLIP model as transformers saves one, with its tokenizer and its image processor. Texts longer than CLIP
    reads are cut. `UserError` if the folder holds no such model.
    """
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    try:
        model: Any = CLIPModel.from_pretrained(folder, local_files_only=True)
        tokenizer: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        processor: Any = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--clip {folder}: cannot be read as a CLIP model: {reason}") from error
    model.eval()
    scores = []
    for image, text in bar(list(zip(images, texts, strict=True)), desc="CLIP", unit="image"):
        words = tokenizer(text, truncation=True, max_length=model.config.text_config.max_position_embeddings)
        tokens = {name: torch.tensor([value]) for name, value in words.items()}
        pixels = processor(images=image.convert("RGB"), return_tensors="pt")
        found = model(**tokens, **pixels)
        # both are of length 1
        scores.append(float((found.image_embeds * found.text_embeds).sum()))
    return scores
