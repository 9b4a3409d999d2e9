"""Who may know what about networks, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

NETWORKS = sorted((ROOT / "networks").rglob("*.py"))
LIBRARY = sorted((ROOT / "library").rglob("*.py"))


def calls(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(function, its arguments as text) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), [ast.unparse(argument) for argument in node.args]


def test_only_foreign_networks_are_asked_what_they_can_do() -> None:
    reflection = {"hasattr", "getattr", "inspect.signature"}
    networks = [path for path in NETWORKS if "tools" not in path.parts]  # tools ask options and modules
    asking = {path.name for path in networks if any(function in reflection for function, _ in calls(path))}
    assert asking == {"foreign.py"}


def test_nobody_asks_whose_network_it_is() -> None:
    ours = {"Network", "ForeignNetwork", "LoRA"}
    asking = [
        f"{path.name}: {function}({', '.join(arguments)})"
        for path in LIBRARY
        for function, arguments in calls(path)
        if (function == "isinstance" and arguments[-1].rpartition(".")[2] in ours)
        or (function in ("hasattr", "getattr") and arguments[0].rpartition(".")[2] == "network" and len(arguments) < 3)
    ]
    assert asking == ["plan.py: getattr(network, only)"]  # which are options


def test_networks_have_no_circle_of_imports() -> None:
    """Lazy ones and those for types count, too."""
    names = {
        f"networks.{'.'.join(path.relative_to(ROOT / 'networks').with_suffix('').parts)}": path for path in NETWORKS
    }
    imports: dict[str, set[str]] = {}
    for name, path in names.items():
        found = [
            node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)
        ]
        reached = {f"{node.module}.{alias.name}" for node in found for alias in node.names}
        imports[name] = ({node.module or "" for node in found} | reached) & (names.keys() - {name})
    while free := {name for name, others in imports.items() if not others & imports.keys()}:
        imports = {name: others for name, others in imports.items() if name not in free}
    assert not imports


def test_kinds_and_settings_load_no_torch() -> None:
    heavy = {"torch", "safetensors"}
    for name in ("kinds.py", "settings.py"):
        tree = ast.parse((ROOT / "networks" / name).read_text(encoding="utf-8"))
        tops = {node.module.partition(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom) and node.module}
        assert not heavy & tops, name
