"""Print what an adapter file is, and which programs load it.

python -m networks.tools check fox.safetensors
python -m networks.tools check fox.safetensors --base sd15.safetensors

Exit code 2: the file is damaged or no adapter, or none of these programs loads a layer of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from library import log
from library.config.command import Command, Word, read, run
from library.config.fields import option
from library.errors import UserError
from library.files.header import read_metadata
from library.models.checkpoints.adapter_file import layers_of
from networks import base_weights, kinds
from networks.formats import loaders

# What a reader of metadata wants first, by the label of its line; all of it stands in the file's header
_METADATA = {
    "base model": ("ss_base_model_version", "ss_sd_model_name"),
    "made by": ("ss_network_module",),
    "trained": ("ss_output_name", "ss_steps", "ss_epoch"),
}
_VALUES_SHOWN = 4  # different ranks or alphas


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """The model"""

    base: str | None = option(None, help="look for its layers in this base model: a file or a folder")


COMMAND = Command(
    name="lora-tools check",
    description=__doc__,
    groups={"check": CheckOptions},
    words=(Word("FILE", "the adapter file"),),
)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code. Raises UserError."""
    given = read(COMMAND, argv)
    path = Path(given.words[0])
    lines, loads = report(path, base=given.groups["check"].base)
    print("\n".join(lines))
    if not loads:
        print(f"error: {path}: no program that is known here loads a layer of it", file=sys.stderr)
    return 0 if loads else 2


def report(path: Path, *, base: str | None = None) -> tuple[list[str], bool]:
    """The lines of the report, and whether any program loads a layer. `UserError` for what is no adapter file."""
    from networks import files
    from networks.tools.result import network_arguments

    contents, index = files.contents_of(path)
    shapes = {name: entry.shape for name, entry in index.entries.items()}
    metadata, more = read_metadata(path), kinds.tensor_names()
    layers = layers_of(shapes, more=more)
    lines = [f"{path}: {contents.title}, {len(layers)} layers, names in {contents.naming or 'nobody'}'s style"]
    if contents.embeddings:
        lines.append(_line("embeddings", ", ".join(contents.embeddings)))
    lines += _sizes(path)
    for label, keys in _METADATA.items():
        if words := [f"{key} {metadata[key]}" for key in keys if metadata.get(key, "None") != "None"]:
            lines.append(_line(label, ", ".join(words)))
    if arguments := network_arguments(metadata):
        lines.append(_line("arguments", ", ".join(arguments)))
    if trained_on := base_weights.read(path):
        lines.append(_line("on top of", base_weights.in_words(trained_on)))
    if trained_with := base_weights.in_metadata(metadata, base_weights.KEY_APART):
        lines.append(_line("trained", f"with {base_weights.in_words(trained_with)}, for use without it"))
    version, known = metadata.get("ss_base_model_version", ""), None
    if base is not None:
        version, known, more_lines = _in_model(path, base)
        lines += more_lines
    if version and not loaders.is_about(version):
        return [*lines, _line("programs", f"not known for models of the version {version}")], True
    found = loaders.verdicts(shapes, version=version, known=known, more=more)
    return lines + list(_table(found)), any(one.found for one in found)


def _line(label: str, text: str) -> str:
    return f"{label:<12}{text}"


def _sizes(path: Path) -> Iterator[str]:
    """Ranks and alphas, of the kinds that have them and are read here; else why the file is not read."""
    from networks import files
    from networks.adapter import WithRank

    try:
        with log.errors_only():
            content = files.read(path)
    except UserError as error:
        yield _line("not read", str(error).removeprefix(f"{path}").lstrip(": "))
        return
    readers, ranks, alphas = kinds.readers(), set(), set()
    for layer in content.layers.values():
        reader = readers.get(layer.kind)
        if reader is not None and issubclass(reader, WithRank):
            ranks.add(reader.rank_of(layer.tensors))
            alphas |= {round(float(layer.tensors["alpha"]), 6)} if "alpha" in layer.tensors else set()
    if ranks:
        yield _line("rank", _several(ranks))
        yield _line("alpha", _several(alphas) if alphas else "none: the rank")


def _several(numbers: set[int] | set[float]) -> str:
    ordered = sorted(numbers)
    if len(ordered) <= _VALUES_SHOWN:
        return ", ".join(f"{number:g}" for number in ordered)
    return f"{ordered[0]:g} to {ordered[-1]:g}, {len(ordered)} different"


def _in_model(path: Path, base: str) -> tuple[str, set[str], list[str]]:
    """`ss_base_model_version` of a base model, the names of its layers in files, and how the file's layers fit."""
    import torch

    from library.models.opening import open_family
    from networks import files
    from networks.create import create_to_merge
    from networks.load_report import some_names

    family = open_family(base)
    with family.outlined(), log.errors_only(), torch.no_grad():
        targets = family.adapter_targets()
        known = {
            f"{target.prefix}.{name}".replace(".", "_")
            for target in targets
            for module, part in target.root.named_modules()
            if module and "weight" in dict(part.named_parameters(recurse=False))
            for name in (target.name(module), module)
        }
        lines = [_line("model", f"{base} ({family.base_model_version})")]
        try:
            content = files.read(path)
            report, _ = create_to_merge(content, targets, multiplier=1.0).compare(content)
        except UserError as error:
            return family.base_model_version, known, [*lines, _line("", str(error))]
    fits = f"{len(report.matched)} layers fit it"
    lines.append(_line("", fits + (f", {len(report.unexpected)} are not in it" if report.unexpected else "")))
    if report.mismatched:
        lines.append(_line("", f"{len(report.mismatched)} have other shapes:{some_names(report.mismatched)}"))
    return family.base_model_version, known, lines


def _table(found: list[loaders.Verdict]) -> Iterator[str]:
    yield ""
    yield f"{'program':<12}{'layers that load':<20}{'as trained':<12}"
    for one in found:
        loads = f"{one.found} of {one.total}" if one.found else "none"
        yield f"{one.program:<12}{loads:<20}{one.exact or '-':<12}{'; '.join(one.notes)}".rstrip()


if __name__ == "__main__":
    sys.exit(run(main))
