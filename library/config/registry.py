"""From a name to a function or class, and from `key=value` words to its arguments.

A registry is a dict of names to import strings ("package.module.Name"), so naming one loads nothing. A target's own
signature is the schema of its words. The signatures of this project's targets are read from their source, so a mistake
is reported before any heavy package is imported; those of third parties are read by importing them.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from library.config import source
from library.config.annotations import describe, fit
from library.errors import UserError, did_you_mean

# Packages whose name for pip differs from their name for import.
_PIP_NAMES = {
    "dadaptation": "dadaptation",
    "lion_pytorch": "lion-pytorch",
    "lycoris": "lycoris-lora",
    "prodigyplus": "prodigy-plus-schedule-free",
    "pytorch_optimizer": "pytorch-optimizer",
    "sklearn": "scikit-learn",
}


Arguments = dict[str, Any]  # of a function or class that is known by its name: its signature says their types


@dataclass(frozen=True)
class Signature:
    """The named parameters of a function or of a class's constructor.

    `parameters`: names to annotations, as text ("" if there is none). `required`: those without a default. `takes_any`:
    it has `**kwargs`. `ours`: it belongs to this project, so its words are checked strictly.
    """

    path: str
    parameters: Mapping[str, str]
    required: frozenset[str]
    takes_any: bool
    ours: bool


def load(table: Mapping[str, str], name: str, *, where: str = "registry") -> Any:  # a name can stand for anything
    """The entry of a registry with this name; case does not matter. Raises UserError with the nearest name."""
    lowered = {known.lower(): path for known, path in table.items()}
    path = lowered.get(name.lower())
    if path is None:
        raise UserError(f"{where}: '{name}' is unknown{did_you_mean(name, table) or '.'} Known: {', '.join(table)}")
    return load_path(path, where=where)


def load_path(path: str, *, where: str) -> Any:  # likewise
    """The function or class at "package.module.Name". Raises UserError if there is none."""
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise UserError(f"{where}: '{path}' is not a path such as package.module.Name")
    refuse_no_name(path, where=where)
    module = load_module(module_name, where=where)
    if not hasattr(module, name):
        public = [known for known in dir(module) if not known.startswith("_") and known[:1] == name[:1]]
        raise UserError(f"{where}: module '{module_name}' has no '{name}'{did_you_mean(name, public)}")
    return getattr(module, name)


def load_module(name: str, *, where: str) -> ModuleType:
    """Import a module. Raises UserError if it, or a package that it needs, is absent."""
    refuse_no_name(name, where=where)
    if source.is_ours(name):
        source.find(name, where=where)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        top = missing.partition(".")[0]
        if missing == top:
            if near := source.network_module_like(name):
                raise UserError(f"{where}: there is no module '{name}', did you mean '{near}'?") from error
            needed = "" if top == name.partition(".")[0] else f"'{name}' needs the package '{top}', which"
            subject = needed or f"'{name}': the package '{top}'"
            raise UserError(f"{where}: {subject} is not installed: pip install {_PIP_NAMES.get(top, top)}") from error
        raise UserError(f"{where}: there is no module '{missing}'{_near_module(missing)}") from error
    except ImportError as error:
        raise UserError(f"{where}: module '{name}' cannot be imported: {error}") from error


def refuse_no_name(path: str, *, where: str) -> None:
    """UserError unless the words between the dots are names: importing "..x" or "a/b.py" fails in odd ways."""
    if all(word.isidentifier() for word in path.split(".")):
        return
    dotted = re.sub(r"[\\/.]+", ".", path.removesuffix(".py")).strip(". ")
    hint = f", did you mean '{dotted}'?" if dotted and dotted.replace(".", "").isidentifier() else ""
    raise UserError(f"{where}: '{path}' is not a dotted name such as package.module{hint}")


def _near_module(name: str) -> str:
    """The nearest of the modules that stand beside the missing one."""
    package, _, last = name.rpartition(".")
    try:
        siblings = [module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__)]
    except (ImportError, AttributeError):
        return ""
    near = did_you_mean(last, siblings)
    return re.sub("'(.*)'", rf"'{package}.\1'", near)


def signature(path: str, *, where: str) -> Signature:
    """The signature of the function or class at `path`. Imports it only if it is a third party's."""
    refuse_no_name(path, where=where)
    found = source.read_signature(path, where=where)
    if found is not None:
        return Signature(path, found.parameters, found.required, found.takes_any, ours=True)
    target = load_path(path, where=where)
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):  # built in C, without a signature
        return Signature(path, {}, frozenset(), takes_any=True, ours=False)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return Signature(
        path,
        {p.name: "" for p in named},
        frozenset(p.name for p in named if p.default is p.empty),
        takes_any=any(p.kind is p.VAR_KEYWORD for p in parameters),
        ours=False,
    )


def split_words(words: Iterable[str], *, where: str) -> dict[str, str]:
    """`key=value` words as text, split at the first "=". Raises UserError for one without."""
    found: dict[str, str] = {}
    for word in words:
        key, equals, text = word.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UserError(f"{where}: '{word}' is not of the form name=value")
        if second := re.search(r"[^\s,]\s+(\w+)=", text):  # after a comma it is a list's next: network_reg_lrs=a=1, b=2
            raise UserError(f"{where}: '{word}' is one word: write {key}=… and {second[1]}=… as two")
        if found.setdefault(key, text.strip()) != text.strip():
            raise UserError(f"{where}: '{key}' is given twice: {found[key]} and {text.strip()}")
    return found


def parse_words(words: Iterable[str], *, where: str) -> dict[str, object]:
    """`key=value` words as Python values: true, false, none in any case, numbers, tuples, lists, else text."""
    return {key: parse_value(text) for key, text in split_words(words, where=where).items()}


def parse_value(text: str) -> object:
    """The value that a word stands for: "true" → True, "0.9,0.99" → (0.9, 0.99), "'x'" → "x", "x" → "x"."""
    constants = {"true": True, "false": False, "none": None}
    if text.lower() in constants:
        return constants[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def bind(
    path: str,
    words: Iterable[str],
    *,
    also: Iterable[str] = (),
    given: Collection[str] = (),
    reserved: Collection[str] = (),
    where: str,
    named_by: str = "",
    called: str = "",
    as_text: bool = False,
) -> tuple[Arguments, list[str]]:
    """The keyword arguments for the target at `path`, and the names that could not be checked.

    `also`: more of our own targets, whose parameters count as those of the first. `given`: parameters that the caller
    fills itself unless a word does; `reserved`: those that it fills in any case, so a word for one is an error. For our
    own targets, names and types are checked, as annotated. For a third party's, names are, unless it takes `**kwargs`.
    `where`: the option that holds the words; `named_by`: the one that names the target, if another; `called`: what
    messages call the target, if not its path. `as_text`: hand a third party its values as text, as kohya's scripts hand
    `--network_args` to network modules. Raises UserError.
    """
    target = signature(path, where=named_by or where)
    for more in also:
        found = signature(more, where=named_by or where)
        parameters, required = {**target.parameters, **found.parameters}, target.required | found.required
        target = replace(target, parameters=parameters, required=required)
    texts = split_words(words, where=where)
    unchecked: list[str] = []
    values: Arguments = {}
    for key, text in texts.items():
        if key in reserved:
            raise UserError(f"{where}: '{key}' is set by the program and cannot be given here")
        if key not in target.parameters:
            if not target.takes_any:
                valid = [name for name in target.parameters if name not in reserved]
                near = did_you_mean(key, valid) or "."
                raise UserError(
                    f"{where}: {called or path} takes no '{key}'{near} It takes: {', '.join(valid) or 'nothing'}"
                )
            unchecked.append(key)
        values[key] = _value(target, key, text, where=where, as_text=as_text)
    lacking = sorted(target.required - values.keys() - set(given) - set(reserved))
    if lacking:
        raise UserError(f"{where}: {called or path} needs {', '.join(f'{name}=...' for name in lacking)}")
    return values, unchecked


def _value(target: Signature, key: str, text: str, *, where: str, as_text: bool) -> object:
    value = parse_value(text)
    if target.ours:
        annotation = target.parameters.get(key, "")
        fitted = fit(value, text, annotation)
        if fitted is None:
            raise UserError(f"{where}: {key}: '{text}' is not {describe(annotation)}")
        return fitted[0]
    if as_text:
        # Such modules expect text: some compare with "True", some only test whether the text is empty. "True"
        # for yes and False for no is understood by both.
        return {True: "True", False: False, None: None}[value] if value is None or isinstance(value, bool) else text
    return value
