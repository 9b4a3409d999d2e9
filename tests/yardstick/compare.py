"""Expectations on disk, and how a run differs from them, in lines."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.yardstick.cases import Case
from tests.yardstick.observe import Json, Layouts, keys_of
from tests.yardstick.plain_text import loose

EXPECTED = Path(__file__).parent / "expected"
LAYOUTS = EXPECTED / "layouts"
MACHINE = EXPECTED / "machine.json"
# What losses may differ by, relative, where a machine's arithmetic is another.
BOUND = 0.02
_SHOWN = 8  # names of tensors that are listed
_WIDTH = 118


def path_of(case: Case) -> Path:
    return EXPECTED / f"{case.name}.json"


def read(case: Case) -> Json | None:
    """The expectation; None if there is none yet."""
    path = path_of(case)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write(case: Case, found: Json, layouts: Layouts) -> None:
    LAYOUTS.mkdir(parents=True, exist_ok=True)
    for name in _layouts_in(found):
        (LAYOUTS / f"{name}.txt").write_text(layouts.texts[name], encoding="utf-8")
    path_of(case).write_text(readable(found) + "\n", encoding="utf-8")


def drop_unused() -> None:
    """Remove expectations of cases that are no more, and layouts that no file has."""
    from tests.yardstick.cases import CASES

    used: set[str] = set()
    for path in EXPECTED.glob("*.json"):
        if path == MACHINE:
            continue
        if path.stem in CASES:
            used.update(_layouts_in(json.loads(path.read_text(encoding="utf-8"))))
        else:
            path.unlink()
    for path in LAYOUTS.glob("*.txt"):
        if path.stem not in used:
            path.unlink()


def _layouts_in(found: Json) -> Iterator[str]:
    for file in found["files"].values():
        if "layout" in file:
            yield file["layout"]
        if "run" in file:
            yield file["run"]["adapters"]


def readable(value: Any, indent: int = 0) -> str:
    """JSON that a diff can be read of: what fits into a line stands in one."""
    flat = json.dumps(value, ensure_ascii=False)
    inner = " " * (indent + 1)
    if (indent > 1 and len(flat) + indent <= _WIDTH) or not isinstance(value, dict | list) or not value:
        return flat
    if isinstance(value, dict):
        rows = [
            f"{inner}{json.dumps(key, ensure_ascii=False)}: {readable(item, indent + 1)}" for key, item in value.items()
        ]
        return "{\n" + ",\n".join(rows) + "\n" + " " * indent + "}"
    return "[\n" + ",\n".join(inner + readable(item, indent + 1) for item in value) + "\n" + " " * indent + "]"


def differences(expected: Json, found: Json, layouts: Layouts, *, same_bits: bool = True) -> list[str]:
    """What differs, in lines; empty if nothing. `same_bits`: whether the arithmetic is that of the expectations; if
    not, losses are compared within `BOUND`, what follows from single bits not at all, and text without its numbers."""
    found = json.loads(json.dumps(found))  # as it comes back from disk
    return list(_Comparison(layouts, same_bits=same_bits).cases(expected, found))


class _Comparison:
    def __init__(self, layouts: Layouts, *, same_bits: bool) -> None:
        self._layouts = layouts
        self._same_bits = same_bits

    def cases(self, expected: Json, found: Json) -> Iterator[str]:
        if expected["commands"] != found["commands"]:
            yield "the commands are not those of the expectation: record it anew"
            yield from _diff(expected["commands"], found["commands"])
        for number, (before, now) in enumerate(zip(expected["runs"], found["runs"], strict=False), start=1):
            if before["code"] != now["code"]:
                yield f"command {number}: exit code {before['code']} → {now['code']}"
            for stream in ("stdout", "stderr"):
                yield from self.text(f"command {number}: {stream}", before[stream], now[stream])
        for name in sorted(expected["files"].keys() | found["files"].keys()):
            if name not in found["files"]:
                yield f"{name}: is not written any more"
            elif name not in expected["files"]:
                yield f"{name}: is new"
            else:
                yield from self.file(name, expected["files"][name], found["files"][name])

    def text(self, where: str, before: list[str], now: list[str]) -> Iterator[str]:
        if not self._same_bits:
            before, now = [loose(line) for line in before], [loose(line) for line in now]
        if before != now:
            yield f"{where}:"
            yield from _diff(before, now)

    def file(self, name: str, before: Json, now: Json) -> Iterator[str]:
        if before.get("layout") != now.get("layout"):
            yield from self.layout(name, before.get("layout"), now.get("layout"))
        for key in sorted(before.keys() | now.keys()):
            ours, theirs = now.get(key), before.get(key)
            if key == "losses":
                yield from self.losses(name, theirs or {}, ours or {})
            elif key == "text":
                yield from self.text(name, theirs or [], ours or [])
            elif key not in ("layout", "bits"):
                yield from self.values(f"{name}: {key}", theirs, ours)
        if self._same_bits and before.get("bits") != now.get("bits"):
            yield from self.bits(name, before, now)

    def layout(self, name: str, before: str | None, now: str | None) -> Iterator[str]:
        old, new = (self._text_of(layout).splitlines() for layout in (before, now))
        yield f"{name}: names, types or shapes of tensors differ:"
        if sorted(old) == sorted(new):
            yield "    they are the same in another order"
        else:
            lines = list(_diff(old, new))
            yield from lines[: 2 * _SHOWN]
            if len(lines) > 2 * _SHOWN:
                yield f"    … {len(lines) - 2 * _SHOWN} more lines"

    def _text_of(self, layout: str | None) -> str:
        if layout is None:
            return ""
        found = self._layouts.texts.get(layout)
        return (LAYOUTS / f"{layout}.txt").read_text(encoding="utf-8") if found is None else found

    def bits(self, name: str, before: Json, now: Json) -> Iterator[str]:
        old, new = before.get("bits", {}), now.get("bits", {})
        if "each" in old and "each" in new:
            tables = []
            for layout, each in ((before["layout"], old["each"]), (now["layout"], new["each"])):
                keys = keys_of(self._text_of(layout))
                tables.append(dict(zip(keys, " ".join(each).split(" "), strict=True)))
            both = tables[0].keys() & tables[1].keys()
            changed = [key for key in tables[0] if key in both and tables[0][key] != tables[1][key]]
            shown = ", ".join(changed[:_SHOWN]) + (" …" if len(changed) > _SHOWN else "")
            yield f"{name}: {len(changed)} of {len(both)} tensors have other bits: {shown}"
        else:
            changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
            yield f"{name}: other bits in {', '.join(changed)}"

    def losses(self, name: str, before: dict[str, list[Any]], now: dict[str, list[Any]]) -> Iterator[str]:
        for key in sorted(before.keys() | now.keys()):
            old, new = before.get(key, []), now.get(key, [])
            if old == new or (not self._same_bits and len(old) == len(new) and all(map(_near, old, new))):
                continue
            yield f"{name}: {key}:"
            yield f"    - {old}"
            yield f"    + {new}"

    def values(self, where: str, before: Any, now: Any) -> Iterator[str]:
        if before == now:
            return
        if isinstance(before, dict) and isinstance(now, dict):
            for key in sorted(before.keys() | now.keys()):
                yield from self.values(f"{where} {key}", before.get(key), now.get(key))
        elif self._same_bits or (not where.endswith("_hash") and loose(json.dumps(before)) != loose(json.dumps(now))):
            yield f"{where}: {_short(before)} → {_short(now)}"


def _near(before: Any, now: Any) -> bool:
    if isinstance(before, float | int) and isinstance(now, float | int):
        return math.isclose(before, now, rel_tol=BOUND, abs_tol=1e-6)
    return bool(before == now)


def _diff(before: list[str], now: list[str]) -> Iterator[str]:
    lines = difflib.unified_diff(before, now, "expected", "now", lineterm="", n=1)
    return (f"    {line}" for line in list(lines)[2:])


def _short(value: Any) -> str:
    text = "absent" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else f"{text[:300]}…"
