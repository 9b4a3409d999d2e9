"""The options of validation and early stopping, and whether they fit the data sets.

Names, defaults and meanings are kohya's but for those marked as ours. `validation_split` and `validation_seed` may
stand in a data set's file, too; a subset may have its own, or a `validation_dir`, whose images join those held out.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

from library.config.fields import BadValue, option
from library.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

TIMES = ("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps", "validation_seed")
WITHOUT_IMAGES = "it matters only together with --validation_split"


GROUPS = ("folder", "date", "latest", "near")
NAME = "name:"


def read_group(word: str) -> str:
    """One of `GROUPS`, or "name:" and a regular expression with a group in parentheses."""
    if word in ("", *GROUPS):
        return word
    if not word.startswith(NAME):
        raise BadValue(f"'{word}' is not one of {', '.join(GROUPS)}, name:REGEX{did_you_mean(word, (*GROUPS, NAME))}")
    try:
        pattern = re.compile(word.removeprefix(NAME))
    except re.error as error:
        raise BadValue(f"'{word}': no regular expression: {error}") from None
    if not pattern.groups:
        raise BadValue(
            f"'{word}' has no group: put the part of the name that images share in parentheses, as in name:(.*)_"
        )
    return word


def read_fold(word: str) -> tuple[int, int]:
    """(2, 5) from "2/5": which one of how many parts, at least two."""
    part, slash, parts = word.partition("/")
    if not (slash and part.strip().isdecimal() and parts.strip().isdecimal()):
        raise BadValue(f"'{word}' is not a part such as 2/5, the second of five")
    if not 1 <= int(part) <= int(parts) or int(parts) < 2:
        raise BadValue(
            f"'{word}' is none of the parts 1/{max(2, int(parts))} … {max(2, int(parts))}/{max(2, int(parts))}"
        )
    return int(part), int(parts)


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """Validation"""

    validation_split: float = option(
        0.0, minimum=0, maximum=1, help="hold back this share of the images and measure the loss on them"
    )
    validation_seed: int | None = option(
        None, help="the seed that chooses these images and the noise they are measured with (default: as --seed)"
    )
    validation_dir: tuple[str, ...] = option(
        (),
        help="more folders of captioned images to validate on, each with a curve of its own; NAME=FOLDER names one. If "
        "no images are held out, the first decides which step is the best (ours)",
    )
    validation_gap: bool = option(
        False,
        help="at each validation measure as many of the trained images as are held out, with equal noise: the gap "
        "between the two (ours)",
    )
    forgetting_dir: tuple[str, ...] = option(
        (),
        help="folders of captioned images that the LoRA is not about: measure at each validation how far the loss on "
        "them is above the base model's; NAME=FOLDER names one (ours)",
    )
    validation_group: str = option(
        "",
        read=read_group,
        free_text=True,
        help="what is held out together, so that no image is judged by its like: folder, date (of the photograph, else "
        "of the file), latest (the newest dates are held out), near (near-duplicates), or name:REGEX (files for which "
        "the groups of the pattern are equal) (ours)",
    )
    validation_fold: tuple[int, int] | None = option(
        None,
        read=read_fold,
        joined_by="/",
        help="hold out one of several equal parts instead: 2/5 is the second of five (lora-tools cross_validate trains "
        "on all) (ours)",
    )
    validate_every_n_steps: int | None = option(
        None,
        minimum=1,
        zero_is_unset=True,
        help="measure the validation loss every n steps (default: after every epoch)",
    )
    validate_every_n_epochs: int | None = option(
        None,
        minimum=1,
        zero_is_unset=True,
        help="measure the validation loss every n epochs; may be combined with the steps",
    )
    max_validation_steps: int | None = option(
        None, minimum=1, zero_is_unset=True, help="validate on at most this many batches, always the same ones"
    )
    early_stopping_patience: int | None = option(
        None, minimum=1, zero_is_unset=True, help="end the run after n validations without improvement (ours)"
    )
    early_stopping_threshold: float = option(
        0.0,
        minimum=0,
        maximum=1,
        help="the least improvement that counts: this share of the best loss; 0.01 is 1 percent (ours)",
    )

    def __post_init__(self) -> None:
        if self.validation_fold is not None and self.validation_split:
            raise UserError("--validation_fold takes the place of --validation_split: give one of them")
        if self.validation_fold is not None and self.validation_group == "latest":
            raise UserError(
                "--validation_group latest: the newest images are one part, and --validation_fold has several"
            )


def check_validation(options: ValidationOptions, *, validated: bool) -> None:
    """Raises UserError for early stopping and a gap without validation images; warns of options that have no effect.

    `validated`: some images are held out, or lie in a validation folder.
    """
    if not validated:
        for name in ("early_stopping_patience", "validation_gap"):
            if getattr(options, name):
                raise UserError(
                    f"--{name} needs images to validate on: give --validation_split 0.1, --validation_dir, or a "
                    "subset's validation_dir in --dataset_config"
                )
        for name in TIMES if not options.forgetting_dir else ():
            if getattr(options, name) is not None:
                logger.warning("--%s has no effect: %s", name, WITHOUT_IMAGES)
        if options.validation_group:
            logger.warning("--validation_group has no effect: %s", WITHOUT_IMAGES)
    if options.early_stopping_threshold and options.early_stopping_patience is None:
        logger.warning("--early_stopping_threshold has no effect without --early_stopping_patience")
