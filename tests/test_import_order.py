"""A package imports only from those above it in this list, and no modules import each other in a circle.

Lazy imports and those under `TYPE_CHECKING` count: a value that is handed down takes their place.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from networks.kinds import KINDS

ROOT = Path(__file__).parent.parent
# Programs, not modules: their place beside the modules of `networks` is where kohya's users have them, and each is no
# more than kohya's options over a sub-command of `networks.tools`
DOORS = (
    *("networks.merge_lora", "networks.sdxl_merge_lora", "networks.svd_merge_lora", "networks.resize_lora"),
    *("networks.extract_lora_from_models", "networks.check_lora_weights", "networks.lora_interrogator"),
)
ORDER = f"""
    library.paths library.errors library.log library.progress library.rng library.cpus library.processes library.gpu
    library.memory library.out_of_memory library.units
    library.files
    library.config
    library.data
    library.diffusion library.losses
    library.optimizers
    library.quantization
    library.offload
    library.models
    library.sampling
    networks
    library.record
    library.report
    library.training
    library.parallel
    library.run
    library.guidance
    library.evaluation
    networks.tools library.job library.diagnose {" ".join(DOORS)}
"""
ROOMS = {room: place for place, line in enumerate(ORDER.strip().splitlines()) for room in line.split()}
"""Where each stands; those of one line may import each other."""

OURS = ("library", "networks")
PROGRAMS = (*OURS, "benchmarks", "docs", "examples", "tests")

Graph = Mapping[str, set[str]]


def modules() -> dict[str, Path]:
    """Every module of the program by its name; of a package its `__init__`."""
    files = [path for top in ("library", "networks") for path in (ROOT / top).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports(module: str, path: Path, known: Mapping[str, Path]) -> set[str]:
    """The modules that one imports anywhere in its text."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            full = {f"{base}.{alias.name}" for alias in node.names}
            names |= (full & known.keys()) or {base}
            names |= {base} if full - known.keys() else set()
    return (names & known.keys()) - {module}


@pytest.fixture(scope="module")
def graph() -> Graph:
    known = modules()
    return {module: imports(module, path, known) for module, path in known.items()}


def room_of(module: str) -> str | None:
    """The longest name of a room that this module is in; None for the packages that only hold rooms."""
    inside = [room for room in ROOMS if module == room or module.startswith(f"{room}.")]
    return max(inside, key=len, default=None)


def circles(graph: Graph) -> Iterator[frozenset[str]]:
    """The strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(module: str) -> Iterator[frozenset[str]]:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in index:
                yield from visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            place = stack.index(module)
            found = frozenset(stack[place:])
            del stack[place:]
            if len(found) > 1:
                yield found

    for module in sorted(graph):
        if module not in index:
            yield from visit(module)


def test_every_module_has_a_room(graph: Graph) -> None:
    assert [module for module in graph if room_of(module) is None and module != "library"] == []


def test_imports_go_upwards(graph: Graph) -> None:
    wrong = {
        (module, room_of(other))
        for module, others in graph.items()
        for other in others
        if ROOMS[room_of(other) or "library.errors"] > ROOMS[room_of(module) or "library.job"]
    }
    assert sorted(wrong) == []


def test_there_are_no_circles(graph: Graph) -> None:
    assert list(circles(graph)) == []


def test_no_room_is_a_long_list() -> None:
    """More than 20 files in one folder are a room that has been missed, unless they are the members of one registry, or
    kohya's scripts, whose place is given."""
    members = [*(path.rpartition(".")[0] for path in KINDS.values()), *DOORS]
    apart = {ROOT / f"{module.replace('.', '/')}.py" for module in members}
    files = {path for top in ("library", "networks") for path in (ROOT / top).rglob("*.py")} - apart
    folders = [path.parent for path in files]
    assert [str(folder) for folder in set(folders) if folders.count(folder) - 1 > 20] == []  # but for __init__.py


def test_what_is_imported_exists() -> None:
    """Also by lazy imports in programs that few tests start; mypy takes a module that is gone for a third party's."""
    known, wrong = modules(), []
    for path in (path for top in PROGRAMS for path in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            wrong += [(str(path), name) for name in names if name.split(".")[0] in OURS and name not in known]
    assert wrong == []


def test_a_circle_is_found() -> None:
    chain = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set[str]()}
    assert list(circles(chain)) == [frozenset("abc")]


def test_every_kind_of_import_counts(tmp_path: Path) -> None:
    known = dict.fromkeys(("library.a", "library.b", "library.c.d", "library.c"), Path())
    text = "from library import a\nif TYPE_CHECKING:\n    from library.b import name\ndef f():\n    from .c import d\n"
    path = tmp_path / "me.py"
    path.write_text(text)
    assert imports("library.me", path, known) == {"library.a", "library.b", "library.c.d"}


def test_doors_stay_thin() -> None:
    """At most 60 lines; and no module imports one."""
    paths = {door: ROOT / f"{door.replace('.', '/')}.py" for door in DOORS}
    assert {door for door, path in paths.items() if len(path.read_text(encoding="utf-8").splitlines()) > 60} == set()
    known = modules()
    assert [name for name, path in known.items() if imports(name, path, known) & paths.keys()] == []
