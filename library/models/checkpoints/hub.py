"""Base models from the Hugging Face hub, where there is a network; from its cache where there is none."""

from __future__ import annotations

import logging
from pathlib import Path

from library.errors import UserError, nearest_path
from library.models.checkpoints.base_model import few
from library.models.checkpoints.detect import families
from library.models.checkpoints.folder import choose_weights, shards_of

logger = logging.getLogger(__name__)

_TIMEOUT = 10.0  # seconds for the list of files


def fetch(name: str) -> Path:
    """The local copy of the diffusers folder "organisation/name": its configurations, tokenizer and chosen weights."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    not_here = f"{name}: no such file or folder{nearest_path(Path(name))}"
    try:
        files = [file.rfilename for file in HfApi().model_info(name, timeout=_TIMEOUT).siblings or []]
        if not (chosen := wanted(files)):
            single = [file for file in files if file.endswith((".safetensors", ".ckpt"))]
            raise UserError(
                f"{name}: the hub has no diffusers folder of that name, but {few(single or files) or 'nothing'}; "
                "fetch a file with `hf download` and give its path"
            )
        return Path(snapshot_download(name, allow_patterns=chosen))
    except UserError:
        raise
    except GatedRepoError:
        raise UserError(f"{name}: the hub requires you to accept its terms and to log in (`hf auth login`)") from None
    except RepositoryNotFoundError:
        raise UserError(f"{not_here}; nor does the hub have a public model of that name") from None
    except HfHubHTTPError as error:
        raise UserError(f"{not_here}; the hub answered: {error}") from None
    except Exception as error:  # without a network, any of several libraries' errors is raised
        reason = f"{type(error).__name__}"
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except Exception:
        raise UserError(f"{not_here}; as a name on the hub it cannot be fetched: no connection ({reason})") from None
    logger.info("no connection to the hub (%s); %s is used from the cache, %s", reason, name, folder)
    return folder


def wanted(files: list[str]) -> list[str]:
    """Of a repository's files, those that are needed: one set of weights a part, not all precisions and formats."""
    small = ("scheduler/", "tokenizer/", "tokenizer_2/", "tokenizer_3/", "t5_tokenizer/")
    chosen = [file for file in files if file == "model_index.json" or file.startswith(small)]
    for part in dict.fromkeys(kind.folder for family in families() for kind in family.PARTS.values()):
        chosen += _of_part(f"{part}/", files)
    return chosen or _of_part("", files)  # a VAE has a repository of its own


def _of_part(folder: str, files: list[str]) -> list[str]:
    inside = [file.removeprefix(folder) for file in files if file.startswith(folder)]
    weights = choose_weights(inside)
    if weights is None or "config.json" not in inside:
        return []
    shards = shards_of(weights, inside) if weights.endswith(".json") else []
    return [f"{folder}{name}" for name in ("config.json", weights, *shards)]
