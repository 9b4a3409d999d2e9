"""The options of trained embeddings, with kohya's names and meanings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from library.config.fields import option
from library.errors import UserError

_NEED_A_WORD = (
    *("init_word", "use_object_template", "use_style_template", "weights", "embedding_lr", "save_embedding"),
    "train_embedding_only",
)


@dataclass(frozen=True, kw_only=True)
class EmbeddingOptions:
    """A trained embedding (textual inversion)"""

    token_string: str | None = option(
        None,
        joined_by=" ",  # several words are refused with the reason: library.models.text.words
        help="train an embedding as well, the meaning of this new word, which stands in captions and prompts",
    )
    init_word: str | None = option(
        None, help="the word whose vectors the embedding starts from (default: random ones)", free_text=True
    )
    num_vectors_per_token: int = option(1, minimum=1, maximum=75, help="vectors of the embedding")
    use_object_template: bool = option(
        False, help="replace the captions by 'a photo of a WORD' and 26 similar sentences, at random each time"
    )
    use_style_template: bool = option(
        False, help="replace the captions by 'a painting in the style of WORD' and 16 similar sentences"
    )
    weights: str | None = option(
        None, help="an embedding to start from, of kohya's scripts, A1111, diffusers or OneTrainer"
    )
    embedding_lr: float | None = option(
        None, minimum=0, help="the embedding's learning rate (default: --learning_rate) (ours)"
    )
    train_embedding_only: bool = option(False, help="train the embedding only, and no LoRA (ours)")
    save_embedding: Literal["both", "bundle", "apart"] | None = option(
        None,
        help="an embedding that is trained with a LoRA: in the LoRA's file (bundle), in a file of its own (apart), or "
        "both (the default; apart with --save_naming diffusers) (ours)",
    )

    def __post_init__(self) -> None:
        if self.use_object_template and self.use_style_template:
            raise UserError("--use_object_template and --use_style_template: give one of them")
        given = [name for name in _NEED_A_WORD if getattr(self, name) not in (None, False)]
        if self.num_vectors_per_token != 1:
            given.append("num_vectors_per_token")
        if self.train_embedding_only and self.token_string is None:
            raise UserError("--token_string is required: the new word of the embedding")
        if self.token_string is None and given:
            hint = "; to start from a LoRA file: --network_weights" if given == ["weights"] else ""
            raise UserError(f"--{given[0]} needs --token_string, the new word of an embedding{hint}")
        if self.train_embedding_only and self.save_embedding is not None:
            raise UserError("--save_embedding is for an embedding beside a LoRA; --train_embedding_only has no LoRA")

    def check_beside(self, *, text_cache: str, naming: str | None, of_loras: Mapping[str, object]) -> None:
        """Check these options against others. `text_cache`: the given option that turns on that cache, or "". `naming`:
        --save_naming. `of_loras`: the values of options that only a LoRA can follow. Raises UserError."""
        if self.is_trained and text_cache:
            raise UserError(
                f"--{text_cache} with --token_string: a trained embedding changes what the text encoders return for "
                "its word in every step: leave the cache out"
            )
        if naming == "diffusers" and self.save_embedding in ("both", "bundle"):
            raise UserError(
                f"--save_embedding {self.save_embedding} with --save_naming diffusers: diffusers refuses a LoRA file "
                "with an embedding in it: give --save_embedding apart"
            )
        for name, value in of_loras.items():
            if value and self.train_embedding_only:
                raise UserError(f"--{name} is about a LoRA, and --train_embedding_only trains none: leave it out")

    @property
    def is_trained(self) -> bool:
        return self.token_string is not None

    @property
    def beside_a_lora(self) -> bool:
        """Whether a LoRA is trained together with it."""
        return self.is_trained and not self.train_embedding_only

    @property
    def file_name(self) -> str | None:
        """The name of the file where the user gives none: the word, if no LoRA is trained and it is such a name."""
        named = self.train_embedding_only and re.fullmatch(r"[\w-]+", self.token_string or "")
        return self.token_string if named else None

    def is_bundled(self, naming: str | None) -> bool:
        """Whether the LoRA's file has the embedding in it. `naming`: --save_naming."""
        usual = () if naming == "diffusers" else (None, "both")
        return self.beside_a_lora and self.save_embedding in (*usual, "bundle")

    @property
    def is_apart(self) -> bool:
        """Whether it has a file of its own beside the LoRA's."""
        return self.beside_a_lora and self.save_embedding != "bundle"
