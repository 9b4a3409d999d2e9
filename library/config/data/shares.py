"""How often each folder of a data set is drawn: `share` of a folder, `balance` and `reg_share` of a data set.

A share is a part of all draws of its data set: m beside n other draws is n · m / (1 - m) draws. Folders without one
divide the rest by their images × repeats, or as `balance` says. Regularisation folders have shares of their own, or
`reg_share` together.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence

from library.config.data.dataset_config import DatasetSpec, SubsetSpec
from library.config.fields import BALANCES
from library.errors import UserError

logger = logging.getLogger(__name__)

REG_SHARE = 0.5  # of regularisation images, where shares decide about the others: as many as these
_ROUNDED = 0.005  # three shares of 0.333 are meant to be all


def draws_by_shares(spec: DatasetSpec) -> bool:
    """Whether shares decide how often its images are drawn, rather than repeats alone."""
    train, reg = _parts(spec)
    given = any(subset.share is not None for subset in spec.subsets)
    return given or (spec.balance is not None and len(train) > 1) or (spec.reg_share is not None and bool(reg))


def shares_of(spec: DatasetSpec, due: Mapping[SubsetSpec, int]) -> tuple[float, dict[SubsetSpec, float]]:
    """The draws of an epoch, and each folder's part of them. `due`: its images × repeats.

    Folders that are learnt and have no share are drawn as often as their repeats say; with `balance = "smallest"` each
    as often as the smallest of them. If all have a share, they are drawn as often together as without. `spec` must have
    passed `check_shares`. Raises UserError for a folder that is to have a part and has no image.
    """
    train, reg = _parts(spec)
    shares = {subset: subset.share for subset in spec.subsets if subset.share is not None}
    balanced = train if spec.balance is not None else []
    for subset in (*shares, *balanced):
        if not due.get(subset):
            raise UserError(f"{subset.origin}: no image of {subset.source} is left to draw, and it is to have a share")
    if not any(subset in shares for subset in reg):
        together = sum(due.get(subset, 0) for subset in reg)
        of_reg = REG_SHARE if spec.reg_share is None else spec.reg_share
        shares |= {subset: of_reg * due[subset] / together for subset in reg if due.get(subset)}
    rest = [subset for subset in train if subset not in shares and due.get(subset)]
    if rest:
        left = 1 - math.fsum(shares.values())
        draws = [due[subset] for subset in rest]
        parts = _parts_of_rest(spec.balance, draws)
        length = (len(rest) * min(draws) if spec.balance == "smallest" else sum(draws)) / left
        shares |= {subset: left * part / math.fsum(parts) for subset, part in zip(rest, parts, strict=True)}
    else:
        length = sum(due[subset] for subset in train) / math.fsum(shares[subset] for subset in train)
    total = math.fsum(shares.values())  # 1 but for rounding
    return length, {subset: shares[subset] / total for subset in spec.subsets if subset in shares}


def _parts_of_rest(balance: str | None, draws: list[int]) -> list[float]:
    """How folders without a share divide what is left."""
    if balance is None:
        return [float(count) for count in draws]
    return [1.0] * len(draws) if balance in BALANCES else [float(part) for part in balance.split(",")]


def check_shares(datasets: Sequence[DatasetSpec]) -> None:
    """Raises UserError, which names every mistake, one a line; warns of what has no effect."""
    if found := list(dict.fromkeys(problem for spec in datasets for problem in _problems(spec))):  # once a resolution
        raise UserError("\n".join(found))
    for warning in _idle(datasets):
        logger.warning("%s", warning)


def _problems(spec: DatasetSpec) -> Iterator[str]:
    train, reg = _parts(spec)
    if not draws_by_shares(spec) or not train:  # only regularisation images have a message of their own
        return
    with_share, reg_with_share = ([subset for subset in part if subset.share is not None] for part in (train, reg))
    if spec.balance is not None and with_share:
        yield f"{with_share[0].origin}: share: the data set has balance = '{spec.balance}': give one of them"
    elif 0 < len(reg_with_share) < len(reg):
        without = next(subset for subset in reg if subset.share is None)
        yield f"{without.origin}: share: is missing: other regularisation images of this data set have one"
    elif reg_with_share and spec.reg_share is not None:
        yield f"{reg_with_share[0].origin}: share: the data set has reg_share = {spec.reg_share:g}: give one of them"
    elif wrong := _wrong_weights(spec.balance, train):
        yield f"{train[0].origin}: balance: {wrong}"
    elif wrong := _wrong_sum(spec):
        first = next((subset for subset in spec.subsets if subset.share is not None), spec.subsets[0])
        yield f"{first.origin}: share: {wrong}"


def _wrong_weights(balance: str | None, train: list[SubsetSpec]) -> str:
    if balance is None or balance in BALANCES or len(train) < 2:
        return ""
    count = balance.count(",") + 1
    folders = ", ".join(subset.source.name for subset in train)
    return "" if count == len(train) else f"{count} weights for {len(train)} folders to learn ({folders})"


def _wrong_sum(spec: DatasetSpec) -> str:
    """Why the shares of a data set cannot be; "" if they can."""
    train, reg = _parts(spec)
    given = [subset.share for subset in spec.subsets if subset.share is not None]
    words = [f"{share:g}" for share in given]
    if reg and not any(subset.share is not None for subset in reg):
        given.append(REG_SHARE if spec.reg_share is None else spec.reg_share)
        words.append(f"{given[-1]:g} of the regularisation images")
    total, added = math.fsum(given), " + ".join(words)
    rest = [subset for subset in train if subset.share is None]
    if total > 1 + _ROUNDED:
        return f"the shares of its data set add up to {total:.4g}, and 1 is all: {added}"
    if rest and total > 1 - _ROUNDED:
        return (
            f"the shares of its data set add up to 1 ({added}), so nothing is left for {rest[0].source}, which has none"
        )
    if not rest and total < 1 - _ROUNDED:
        return f"every folder of its data set has a share, and they add up to {total:.4g}, not 1: {added}"
    return ""


def _idle(specs: Sequence[DatasetSpec]) -> Iterator[str]:
    """What is given and has no effect, each as a warning."""
    balances = [len(_parts(spec)[0]) > 1 for spec in specs if spec.balance is not None]
    if balances and not any(balances):
        yield "balance: has no effect without a second folder to learn"
    of_reg = [bool(_parts(spec)[1]) for spec in specs if spec.reg_share is not None]
    if of_reg and not any(of_reg):
        yield "reg_share: has no effect without regularisation images"
    for subset in dict.fromkeys(subset for spec in specs for subset in _with_idle_repeats(spec)):
        yield f"{subset.origin}: num_repeats = {subset.num_repeats} has no effect beside its share"


def _with_idle_repeats(spec: DatasetSpec) -> Iterator[SubsetSpec]:
    """The folders whose repeats decide nothing. Where all that are learnt have a share, these give the length."""
    train, _ = _parts(spec)
    of_length = all(subset.share is not None for subset in train)
    for subset in spec.subsets:
        if subset.share is not None and subset.num_repeats != 1 and not (of_length and subset in train):
            yield subset


def _parts(spec: DatasetSpec) -> tuple[list[SubsetSpec], list[SubsetSpec]]:
    """(folders that are learnt, regularisation folders)."""
    train = [subset for subset in spec.subsets if not subset.is_reg]
    return train, [subset for subset in spec.subsets if subset.is_reg]
