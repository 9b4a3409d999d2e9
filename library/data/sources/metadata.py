"""A file that lists images with captions and tags, as kohya's tools for fine-tuning data sets write it.

JSON: {image: {"caption": text, "tags": text}, …}. JSONL: one object a line, {"image_path": image, "caption": …}. An
image is a path, absolute or below the subset's `image_dir`, with its extension or, as those tools write it, without.
Other entries, such as sizes and buckets, are not read: images are measured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.config.fields import ControlCharacters, control_characters
from library.config.other_files import refuse_other_file
from library.config.toml_file import read_toml
from library.data.captions import refuse_long_caption
from library.data.images import image_extensions
from library.data.samples import UNMEASURED, Sample, Scan, SubsetSummary, warn_of
from library.errors import UserError, nearest_path, told_apart, why_not
from library.files.json_text import Json, parse_json
from library.paths import composed, on_disk
from library.progress import bar

if TYPE_CHECKING:
    from library.config.data.dataset_config import SubsetSpec

_SHOWN = 10
_MANY = 5000  # entries that take long enough for a bar

Entry = dict[str, Json]  # of one image, unchecked: see `_text`
Entries = dict[str, Entry]


def scan(spec: SubsetSpec, index: int) -> Scan:
    """The samples of a subset, sorted by the image as the file names it and not yet measured.

    Raises UserError if the file is missing or of another form, or if an image is missing.
    """
    file = spec.metadata_file
    assert file is not None
    if not os.path.isfile(file):
        raise UserError(f"{spec.origin}: no such file: {file}{nearest_path(file)}")
    entries = _read(file)
    if not entries:
        raise UserError(f"{spec.origin}: {file} lists no images")
    paths = _image_paths(spec, file, sorted(entries))
    captions = {image: _caption(spec, f"{file}: {image}", entries[image]) for image in paths}
    empty = [image for image, caption in captions.items() if not caption]
    lines = {image: str(entries[image].get("caption") or "") for image in paths}
    several = [image for image in paths if not spec.enable_wildcard and "\n" in lines[image]]
    warn_of(
        file,
        (
            (empty, "images have neither caption nor tags: their caption is empty"),
            (several, "captions have more than one line: only the first is used (enable_wildcard draws one)"),
        ),
    )
    samples = [
        Sample(path, f"{index}/{_name(spec, image)}", captions[image], spec, UNMEASURED, spec.num_repeats)
        for image, path in paths.items()
    ]
    summary = SubsetSummary(
        subset=spec,
        images=len(samples),
        captions_found=len(samples) - len(empty),
        captions_missing=len(empty),
        captions_of_several_lines=len(several),
    )
    return Scan(samples, summary)


def _read(file: Path) -> Entries:
    """The file's entry for each image."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 (byte {error.start}): save it in that encoding") from error
    except OSError as error:
        raise UserError(f"{file}: {why_not(error)}") from error
    if file.suffix.lower() == ".toml":
        refuse_other_file(read_toml(file), file, "in_json")
        raise UserError(f"{file}: a list of images is a .json or a .jsonl file")
    if file.suffix.lower() == ".jsonl":
        return _read_lines(file, text)
    content = parse_json(text, str(file))
    refuse_other_file(content, file, "in_json")
    if isinstance(content, dict):
        entries = {image: entry for image, entry in content.items() if isinstance(entry, dict)}
        if len(entries) == len(content):
            return entries
    raise UserError(f'{file}: is not of the form {{"image": {{"caption": "…", "tags": "…"}}, …}}')


def _read_lines(file: Path, text: str) -> Entries:
    entries: Entries = {}
    lines = text.split("\n")
    for number, line in enumerate(bar(lines, desc=file.name, total=len(lines), disable=len(lines) < _MANY), 1):
        if not line.strip():
            continue
        entry = parse_json(line, str(file), first_line=number)
        image = entry.get("image_path") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not isinstance(image, str):
            raise UserError(f'{file}, line {number}: is not of the form {{"image_path": "…", "caption": "…"}}')
        entries[image] = entry
    return entries


def _image_paths(spec: SubsetSpec, file: Path, images: Sequence[str]) -> dict[str, Path]:
    folders: dict[Path, dict[str, list[Path]]] = {}
    paths: dict[str, Path] = {}
    missing: list[str] = []
    for image in bar(images, desc="finding images", total=len(images), disable=len(images) < _MANY):
        path = spec.image_dir / image
        if path.suffix.lower() not in image_extensions():
            path = _with_extension(path, folders)
        if not os.path.isfile(path):
            path = on_disk(path)
        if os.path.isfile(path):
            paths[image] = path
        else:
            missing.append(image)
    if missing:
        odd = {image for image in missing if control_characters(image)}
        listed = "".join(f"\n  {repr(image) if image in odd else image}" for image in missing[:_SHOWN])
        listed += f"\n  and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        listed += f"\n{ControlCharacters.in_a_file}" if odd else ""
        raise UserError(
            f"{spec.origin}: {len(missing)} of the {len(images)} images that {file} lists are not in {spec.image_dir} "
            f"(their folder is image_dir, or with --in_json --train_data_dir):{listed}"
        )
    return paths


def _name(spec: SubsetSpec, image: str) -> str:
    """The image's name in keys, the same on every machine for a path below `image_dir`, even an absolute one."""
    path, folder = Path(image), spec.image_dir.absolute()
    return path.relative_to(folder).as_posix() if path.is_absolute() and path.is_relative_to(folder) else image


def _with_extension(path: Path, folders: dict[Path, dict[str, list[Path]]]) -> Path:
    """The image file that `path` names without an extension; `path` itself if there is none."""
    if path.parent not in folders:
        stems = folders[path.parent] = {}
        folder = on_disk(path.parent)
        for found in sorted(folder.iterdir()) if os.path.isdir(folder) else ():
            if found.suffix.lower() in image_extensions():
                stems.setdefault(composed(found.stem), []).append(found)
    images = folders[path.parent].get(composed(path.name), [])
    images = [image for image in images if image.stem == path.name] or images
    if len(images) > 1:
        names = " or ".join(told_apart([image.name for image in images]))
        raise UserError(f"{path}: could be {names}: give the extension in the metadata file")
    return images[0] if images else path


def _caption(spec: SubsetSpec, place: str, entry: Entry) -> str:
    """Caption and tags in one text, joined by the separator. With `enable_wildcard` the tags follow each line.

    Kohya loses the tags where there is no caption but `enable_wildcard`, or several lines and no `enable_wildcard`.
    """
    caption, tags = _text(entry, "caption", place), _text(entry, "tags", place)
    lines = [line for line in caption.split("\n") if line.strip()] if spec.enable_wildcard else [caption.split("\n")[0]]
    tags = tags.replace("\n", spec.caption_separator)
    return "\n".join(spec.caption_separator.join(filter(None, (line, tags))) for line in lines or [""])


def _text(entry: Entry, name: str, place: str) -> str:
    value = entry.get(name)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{place}: {name}: {json.dumps(value, ensure_ascii=False)} is not text in quotes")
    refuse_long_caption(len(value or ""), f"{place}: {name}")
    return value or ""
