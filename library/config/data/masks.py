"""Checks that the options about masks fit together."""

from __future__ import annotations

from collections.abc import Iterable

from library.config.data.dataset_config import DatasetSpec
from library.errors import UserError


def check_masks(datasets: Iterable[DatasetSpec], *, masked_loss: bool) -> None:
    """Raises UserError if masks are enabled but there are none, or there are masks that are not enabled.

    An alpha_mask is enough by itself; masks from conditioning_data_dir count only with --masked_loss, as in kohya,
    whose data sets for ControlNet have the same key.
    """
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    for subset in subsets:
        if subset.conditioning_data_dir is None:
            continue
        if subset.alpha_mask:
            raise UserError(
                f"{subset.origin}: alpha_mask and conditioning_data_dir both name the mask: give one of them"
            )
        if not masked_loss:
            raise UserError(f"{subset.origin}: conditioning_data_dir needs --masked_loss: its images are the masks")
    if masked_loss and not any(subset.alpha_mask or subset.conditioning_data_dir for subset in subsets):
        raise UserError(
            "--masked_loss: there are no masks: give --alpha_mask, or conditioning_data_dir in the subsets of "
            "--dataset_config, or leave it out"
        )
