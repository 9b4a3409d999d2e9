"""Signatures of this project's own functions and classes, read from their source without importing them."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from pkgutil import resolve_name
from typing import get_type_hints

from library.errors import UserError, did_you_mean

_PACKAGES = ("library", "networks")


@dataclass(frozen=True)
class SourceSignature:
    """See `registry.Signature`."""

    parameters: dict[str, str]
    required: frozenset[str]
    takes_any: bool


def is_ours(path: str) -> bool:
    """Whether a dotted path leads into this project."""
    return path.partition(".")[0] in _PACKAGES


def find(module: str, *, where: str) -> Path:
    """The file of one of our modules. Raises UserError with the nearest module."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    assert spec is not None, f"{top} is not importable"
    assert spec.submodule_search_locations, f"{top} is not a package"
    bases = [Path(location).joinpath(*rest) for location in spec.submodule_search_locations]
    for file in (path for base in bases for path in (base / "__init__.py", base.with_suffix(".py"))):
        if file.is_file():
            return file
    package = ".".join(module.split(".")[:-1])
    siblings = [f"{package}.{file.stem}" for file in sorted(bases[0].parent.glob("[a-z]*.py"))]
    raise UserError(f"{where}: there is no module '{module}'{did_you_mean(module, siblings)}")


def network_module_like(name: str) -> str:
    """Our network module of the same last name: networks.lora for "network.lora" and "lora"; "" if there is none."""
    like = f"networks.{name.rpartition('.')[2]}"
    try:
        find(like, where="")
    except UserError:
        return ""
    return like


def read_signature(path: str, *, where: str) -> SourceSignature | None:
    """The signature of the function or class at "package.module.Name"; None if it is imported from a third party.

    `**options: Unpack[Keywords]` stands for the keys of the TypedDict `Keywords`. Its module is imported, so it should
    import nothing heavy. Raises UserError if there is nothing of that name.
    """
    if not is_ours(path):
        return None
    module, _, name = path.rpartition(".")
    file = find(module, where=where)
    tree = _parsed(file)
    node = _definition(tree, name)
    if isinstance(node, ast.ImportFrom):
        return read_signature(_import_target(node, name, module, file), where=where)
    if node is None:
        names = [item.name for item in tree.body if isinstance(item, ast.FunctionDef | ast.ClassDef)]
        raise UserError(f"{where}: module '{module}' has no '{name}'{did_you_mean(name, names)}")
    if isinstance(node, ast.FunctionDef):
        return _with_keywords(_of_arguments(node.args, skip_first=False), node.args, tree, module, file)
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _with_keywords(_of_arguments(item.args, skip_first=True), item.args, tree, module, file)
    if any(ast.unparse(decorator).partition("(")[0] == "dataclass" for decorator in node.decorator_list):
        return _of_fields(node, module, where=where)
    for base in node.bases:
        if isinstance(base, ast.Name) and _definition(tree, base.id) is not None:
            return read_signature(f"{module}.{base.id}", where=where)
    return SourceSignature({}, frozenset(), takes_any=False)


def _of_fields(node: ast.ClassDef, module: str, *, where: str) -> SourceSignature:
    """The fields of a dataclass, those of its bases first, in the order in which `dataclasses` has them."""
    parameters: dict[str, str] = {}
    required: set[str] = set()
    for base in reversed(node.bases):
        found = read_signature(f"{module}.{ast.unparse(base)}", where=where)
        if found is not None:
            parameters |= found.parameters
            required |= found.required
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            parameters[item.target.id] = ast.unparse(item.annotation)
            if item.value is None:
                required.add(item.target.id)
    return SourceSignature(parameters, frozenset(required), takes_any=False)


@lru_cache(maxsize=32)
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def _definition(tree: ast.Module, name: str) -> ast.FunctionDef | ast.ClassDef | ast.ImportFrom | None:
    """The statement that defines `name` in a module: a definition or an import, also a lazy one in a function."""
    for item in tree.body:
        if isinstance(item, ast.FunctionDef | ast.ClassDef) and item.name == name:
            return item
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            return node
    return None


def _import_target(node: ast.ImportFrom, name: str, module: str, file: Path) -> str:
    """The dotted path that `from ... import name` means."""
    original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
    if not node.level:
        return f"{node.module}.{original}"
    parts = module.split(".")
    # "." is the package itself: for its __init__.py that is the module, for any other file its parent
    drop = node.level - 1 if file.name == "__init__.py" else node.level
    return ".".join([*parts[: len(parts) - drop], *([node.module] if node.module else []), original])


def _of_arguments(arguments: ast.arguments, *, skip_first: bool) -> SourceSignature:
    positional = [*arguments.posonlyargs, *arguments.args]
    without_default = positional[: len(positional) - len(arguments.defaults)]
    without_default += [a for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is None]
    named = [*positional, *arguments.kwonlyargs]
    if skip_first:
        named, without_default = named[1:], without_default[1:]
    return SourceSignature(
        {a.arg: ast.unparse(a.annotation) if a.annotation else "" for a in named},
        frozenset(a.arg for a in without_default),
        takes_any=arguments.kwarg is not None,
    )


def _with_keywords(
    found: SourceSignature, arguments: ast.arguments, tree: ast.Module, module: str, file: Path
) -> SourceSignature:
    """With the keys of a TypedDict in place of `**options: Unpack[TypedDict]`."""
    annotation = arguments.kwarg.annotation if arguments.kwarg else None
    if not (isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Unpack"):
        return found
    name = ast.unparse(annotation.slice)
    node = _definition(tree, name)
    path = _import_target(node, name, module, file) if isinstance(node, ast.ImportFrom) else f"{module}.{name}"
    keywords = resolve_name(path)
    hints = {key: inspect.formatannotation(hint) for key, hint in get_type_hints(keywords).items()}
    return SourceSignature(found.parameters | hints, found.required | keywords.__required_keys__, takes_any=False)
