"""The new word of a trained embedding, checked before training: tokenizer, first word, captions."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from library.data import templates
from library.data.captions import as_written
from library.errors import UserError

if TYPE_CHECKING:
    from library.config.data.dataset_config import DatasetSpec
    from library.config.options import Options
    from library.data.prepared import Prepared
    from library.models.family import ModelFamily

logger = logging.getLogger(__name__)


def with_templates(datasets: tuple[DatasetSpec, ...], options: Options) -> tuple[DatasetSpec, ...]:
    """The data sets with the sentences of --use_object_template or --use_style_template in place of captions."""
    wanted = options.embedding
    if wanted.token_string is None or not (wanted.use_object_template or wanted.use_style_template):
        return datasets
    sentences = templates.OBJECT if wanted.use_object_template else templates.STYLE
    return templates.in_place_of_captions(datasets, wanted.token_string, sentences)


def learn(options: Options, family: ModelFamily) -> None:
    """Teach the family's tokenizer the word. `UserError` for a word or a first word that cannot be; a first word of
    another number of tokens than vectors is repeated or cut, as in kohya's scripts, with a warning."""
    wanted = options.embedding
    if wanted.token_string is None:
        return
    family.learn_word(wanted.token_string, vectors=wanted.num_vectors_per_token)
    if "." in wanted.token_string and wanted.is_bundled(options.output.save_naming):
        raise UserError(
            f"--token_string {wanted.token_string}: A1111 cuts words of embeddings in LoRA files at a dot: choose a "
            "word without one, or --save_embedding apart"
        )
    if wanted.embedding_lr is None and "learning_rate" not in options.given:
        logger.warning(
            "--token_string: at the default of --learning_rate, %g, an embedding hardly moves: give --embedding_lr, "
            "such as 1e-3",
            options.optimizer.learning_rate,
        )
    _check_first_word(options, family)


def _check_first_word(options: Options, family: ModelFamily) -> None:
    wanted = options.embedding
    if wanted.init_word is None or wanted.weights is not None:
        return
    count, vectors = len(family.token_ids(wanted.init_word)), wanted.num_vectors_per_token
    if not count:
        raise UserError(f"--init_word {wanted.init_word!r}: has no token")
    if family.has_word(wanted.init_word):
        raise UserError(f"--init_word {wanted.init_word}: contains --token_string, which has no meaning yet")
    if count > 1 and count != vectors:
        fate = f"the first {vectors} are used" if count > vectors else f"they are repeated to {vectors}"
        fate = "only the first is used" if vectors == 1 else fate
        logger.warning(
            "--init_word %s: has %d tokens, and --num_vectors_per_token is %d: %s, as in kohya's scripts; "
            "--num_vectors_per_token %d takes each once",
            *(wanted.init_word, count, vectors, fate, count),
        )


def check_captions(options: Options, family: ModelFamily, prepared: Prepared) -> None:
    """`UserError` if no caption has the word, a warning if some lack it: such an image does not train the embedding."""
    word = options.embedding.token_string
    if word is None:
        return
    samples = [sample for sample in prepared.samples if sample.subset.learns]
    texts = {text for sample in samples for text in as_written(sample.caption, sample.subset)}
    having = {text for text in texts if family.has_word(text)}
    lacking = [sample for sample in samples if not having.intersection(as_written(sample.caption, sample.subset))]
    if len(lacking) == len(samples):
        raise UserError(
            f"--token_string {word}: no caption has this word, so that nothing would be trained: add it to the "
            "captions, or give --caption_prefix, --use_object_template or --use_style_template"
        )
    if lacking:
        logger.warning(
            "--token_string %s: %d of %d images have a caption without it and do not train it (such as %s)",
            *(word, len(lacking), len(samples), lacking[0].path),
        )
