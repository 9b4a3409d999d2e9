"""What keeps a network from forgetting, in the metadata of its files. kohya has no keys for it.

    ss_previous_network                          the file whose predictions were kept
    ss_preserved_images                          JSON: a table of "images", "prior", "region", "weight" for each kind
    ss_distillation_weight, …_schedule           as the options
    ss_ewc_data, ss_ewc_images, ss_ewc_lambda    JSON: the names of the sources; the number of images; "None": computed

Names of files and folders have no paths, as in kohya's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from library.files.typed_json import from_json, to_json
from library.record.facts import Consolidated, Distilled, Preserved, Protections


def to_metadata(found: Protections) -> dict[str, object]:
    """By key, without "ss_"."""
    metadata: dict[str, object] = {}
    if found.previous:
        metadata["previous_network"] = found.previous
    if found.preserved:
        metadata["preserved_images"] = json.dumps(to_json(found.preserved))
    if (distilled := found.distilled) is not None:
        metadata |= {"distillation_weight": distilled.weight, "distillation_schedule": distilled.schedule}
    if (held := found.consolidated) is not None:
        metadata |= {"ewc_data": json.dumps(held.sources), "ewc_images": held.images, "ewc_lambda": held.strength}
    return metadata


def from_metadata(metadata: Mapping[str, str]) -> Protections | None:
    """The same from a file's metadata; None if there is none of it, or nothing that this program wrote."""
    try:
        preserved = from_json(tuple[Preserved, ...], json.loads(metadata.get("ss_preserved_images", "[]")))
        distilled = consolidated = None
        if "ss_distillation_weight" in metadata:
            weight, schedule = float(metadata["ss_distillation_weight"]), metadata["ss_distillation_schedule"]
            distilled = Distilled(weight=weight, schedule=schedule)
        if "ss_ewc_data" in metadata:
            strength = metadata["ss_ewc_lambda"]
            consolidated = Consolidated(
                images=int(metadata["ss_ewc_images"]),
                sources=from_json(tuple[str, ...], json.loads(metadata["ss_ewc_data"])),
                strength=None if strength == "None" else float(strength),
            )
    except (KeyError, ValueError, RecursionError):
        return None
    if not preserved and distilled is None and consolidated is None:
        return None
    previous = metadata.get("ss_previous_network", "")
    return Protections(preserved=preserved, distilled=distilled, consolidated=consolidated, previous=previous)
