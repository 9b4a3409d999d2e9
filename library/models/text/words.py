"""A new word for a CLIP tokenizer: what a trained embedding (textual inversion) is the meaning of."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from library.errors import UserError
from library.models.text.prompts import cleaned, content_tokens

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

_IN_PROMPTS = ",(){}[]|:\\"  # separators of tags, weights and wildcards


class _Encoded(NamedTuple):
    input_ids: list[int]


class TokenizerWithWord:
    """A CLIP tokenizer that reads one more word, as `vectors` tokens behind the vocabulary: first, first + 1, …

    The word is found wherever its letters stand, in any case, as by a token that is added to transformers' tokenizer.
    The tokenizer itself, which others share, is not changed.
    """

    def __init__(self, tokenizer: CLIPTokenizer, word: str, *, vectors: int) -> None:
        """`UserError` for a word that cannot stand in a prompt, and for one that the tokenizer has already."""
        _refuse_no_word(word)
        self._tokenizer, self.word = tokenizer, cleaned(word)
        if not self.word:
            raise UserError(f"--token_string {word!r}: captions are cleaned of such characters; choose plain letters")
        ids = content_tokens(tokenizer, self.word)
        if len(ids) == 1 or self.word in tokenizer.get_vocab():
            raise UserError(
                f"--token_string {word}: the tokenizer has this word already, as token {ids[0]}: choose one that it "
                "does not have, such as several letters and digits"
            )
        self.first = len(tokenizer)
        self._ids = list(range(self.first, self.first + vectors))

    def is_in(self, text: str) -> bool:
        """Whether a caption has the word."""
        return self.word in cleaned(text)

    def __call__(self, text: str, **options: object) -> _Encoded:
        """BOS, the tokens of the text, EOS. `text` must be `cleaned`; `options` are the tokenizer's."""
        before, *others = text.split(self.word)
        ids = self._between(before, options)
        for piece in others:
            ids += [*self._ids, *self._between(piece, options)]
        return _Encoded([self.bos_token_id, *ids, self.eos_token_id])

    def _between(self, text: str, options: dict[str, object]) -> list[int]:
        ids: list[int] = self._tokenizer(text, **options).input_ids[1:-1]
        return ids

    @property
    def bos_token_id(self) -> int:
        return int(self._tokenizer.bos_token_id)

    @property
    def eos_token_id(self) -> int:
        return int(self._tokenizer.eos_token_id)

    @property
    def pad_token_id(self) -> int:
        return int(self._tokenizer.pad_token_id)


def _refuse_no_word(word: str) -> None:
    if wrong := [letter for letter in word if letter.isspace() or letter in _IN_PROMPTS]:
        several = [part for part in re.split(r"[\s,|]+", word) if part]
        more = f". A run trains one word: train {' and '.join(several)} in a run each" if len(several) > 1 else ""
        raise UserError(
            f"--token_string {word!r}: contains {wrong[0]!r}: it is one word without spaces and without "
            f"{' '.join(_IN_PROMPTS)}, which have a meaning in captions and prompts{more}"
        )
