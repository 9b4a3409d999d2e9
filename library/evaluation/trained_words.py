"""Trained embeddings among the candidates' files: the word that each is the meaning of, and its vectors."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from library.errors import UserError
from library.record.summary import count
from networks.embeddings import files

if TYPE_CHECKING:
    from library.evaluation.candidates import Candidate
    from library.models.family import ModelFamily

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedWord:
    """vectors: [vectors, width] each, fp32, by the names of the model's tables. alone: its file has nothing else."""

    word: str
    vectors: Mapping[str, Tensor]
    alone: bool

    @property
    def count(self) -> int:
        return len(next(iter(self.vectors.values())))

    @contextmanager
    def learnt_by(self, family: ModelFamily) -> Iterator[None]:
        """A context in which the family's tokenizer has the word."""
        family.learn_word(self.word, vectors=self.count)
        try:
            yield
        finally:
            family.forget_word()


def read_words(
    family: ModelFamily, candidates: Sequence[Candidate], *, token_string: str | None
) -> dict[Path, TrainedWord]:
    """The embeddings of the candidates' files. `token_string`: their word; None: that of each file.

    Raises UserError for an embedding of another model, a word that cannot be one, two embeddings or a multiplier that
    cannot act, and for `token_string` without an embedding.
    """
    found = {}
    for path in dict.fromkeys(part.path for one in candidates for part in one.parts):
        if (word := _read(family, path, token_string)) is not None:
            found[path] = word
            logger.info("%s: an embedding of '%s', %s", path, word.word, count(word.count, "vector"))
    if token_string is not None and not found:
        raise UserError(f"--token_string {token_string}: none of the files has an embedding")
    for one in candidates:
        _refuse_what_cannot_act(one, found)
    return found


def _read(family: ModelFamily, path: Path, token_string: str | None) -> TrainedWord | None:
    names = files.words(path)
    if len(names) > 1 and token_string not in names:
        logger.warning(
            "%s: has embeddings of %s, of which one can be read: --token_string %s; all are left out",
            *(path, ", ".join(names), names[0]),
        )
        return None
    if not names:
        return None
    name = token_string if token_string is not None and token_string in names else names[0]
    vectors = files.read(path, word=name, widths=_widths(family, token_string or name, path), where=str(path))
    return TrainedWord(token_string or name, vectors, alone=files.is_embedding(path))


def _widths(family: ModelFamily, word: str, path: Path) -> dict[str, int]:
    """How many numbers a vector has in each of the model's tables. `UserError` for a word that cannot be one."""
    try:
        family.learn_word(word, vectors=1)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    with family.outlined():
        widths = {table.key: table.table.weight.shape[1] for table in family.token_tables()}
    family.forget_word()
    return widths


def _refuse_what_cannot_act(candidate: Candidate, words: Mapping[Path, TrainedWord]) -> None:
    having = [part for part in candidate.parts if part.path in words]
    if len(having) > 1:
        both = " and ".join(str(part.path) for part in having)
        raise UserError(f"{candidate.name}: {both} have an embedding each, and one can be read at a time")
    for part in having:
        if words[part.path].alone and part.multiplier != 1:
            raise UserError(
                f"{part}: an embedding has no multiplier: a prompt has its word, or has not. Leave {part.multiplier:g} "
                "out"
            )


def warn_of_absent_words(
    family: ModelFamily, words: Mapping[Path, TrainedWord], texts: Iterable[str], *, what: str
) -> None:
    """Warn of embeddings whose word is in none of the texts: they change nothing. `what`: "caption", "prompt"."""
    texts = tuple(texts)
    for path, word in words.items():
        with word.learnt_by(family):
            if not any(map(family.has_word, texts)):
                logger.warning(
                    "%s: no %s has '%s', the word of its embedding, which changes nothing", path, what, word.word
                )
