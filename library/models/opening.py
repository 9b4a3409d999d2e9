"""From a path or a hub id to the family of the base model that lies there."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from library.config.options.flow import asks_for_nothing
from library.config.registry import load
from library.errors import UserError
from library.files.index import read_index
from library.models import FAMILIES
from library.models.checkpoints.base_model import BaseModel, Folder
from library.models.checkpoints.detect import claimed_by, families, kind_of_file, not_a_base
from library.models.checkpoints.folder import not_a_model
from library.models.checkpoints.open_file import locate

if TYPE_CHECKING:
    from library.models.family import ModelFamily

logger = logging.getLogger(__name__)


def open_family(
    path: str,
    *,
    vae: str | None = None,
    only: tuple[str, ...] = (),
    options: Mapping[str, object] | None = None,
    given: Mapping[str, str] | None = None,
) -> ModelFamily:
    """The family of the base model at `path`: a diffusers folder, a single file or a hub id.

    Reads headers and small configurations only. vae: a folder or file of another VAE. only: the families that are
    wanted, if not all. options: values by name, of which the family takes those that it declares. given: the options
    that the user set, with the place where each stands; those that only other families declare are refused. Raises
    UserError if the model is not found, not supported, or not of a family that the user named, and for an option that
    says that it is another model.
    """
    base = open_base_model(path)
    family: type[ModelFamily] = load(FAMILIES, base.kind, where="FAMILIES")
    if only and base.kind not in only:
        wanted = " or ".join(load(FAMILIES, name, where="FAMILIES").TITLE for name in only)
        raise UserError(f"{path} is {family.TITLE}, where {wanted} is expected; train_network.py trains both")
    own, values = options_of(family), options or {}
    for name, (right, why) in family.WITHOUT_EFFECT.items():
        if name in (given or {}) and values.get(name) != right:
            logger.warning("%s has no effect: %s", (given or {})[name], why)
    for other in families():
        for name in options_of(other) - own - family.WITHOUT_EFFECT.keys():
            if name in (given or {}) and not asks_for_nothing(name, values.get(name)):
                raise UserError(f"{(given or {})[name]}: {path} is {family.TITLE}; the option is for {other.TITLE}")
    for name, right in family.STATED.items():
        if (said := values.get(name)) not in (None, right):
            place = (given or {}).get(name, f"--{name}")
            raise UserError(f"{place}: '{said}' is wrong: {path} is {family.TITLE}, '{right}'")
    for name, part in base.parts.items():
        if name != "vae" or vae is None:
            part.entries()  # finds a missing or damaged file now, not after all images are encoded
    return family(base, vae=vae, **{name: value for name, value in values.items() if name in own})


def options_of(family: type[ModelFamily]) -> set[str]:
    """The names of the command line's options that a family takes: the keyword-only parameters of its constructor."""
    parameters = inspect.signature(family.__init__).parameters.values()
    return {one.name for one in parameters if one.kind is one.KEYWORD_ONLY} - {"vae"}


def open_base_model(path: str) -> BaseModel:
    """Open a file, a diffusers folder or a hub id with the family that claims it. UserError if none does, with the kind
    of file that it is, or the nearest existing path."""
    location = locate(path)
    if location.is_dir():
        folder = Folder(location)
        if (family := claimed_by(folder)) is None:
            raise not_a_model(path, folder)
        return family.read(path, location)
    found = kind_of_file(read_index(location))
    if found.kind not in FAMILIES:
        raise UserError(f"{path} is {not_a_base(found)}")
    family = load(FAMILIES, found.kind, where="FAMILIES")
    return family.read(path, location)
