"""Compare two LoRA files: their layers, and how alike their differences are.

python -m networks.tools compare fox.safetensors fox-old.safetensors

cosine      of the two differences as vectors: 1 the same direction, 0 unrelated, -1 opposite
difference  |second - first| / |first|, Frobenius norms
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.config.command import Command, Word, read
from library.config.fields import option
from networks.tools.blocks import block_of, order

if TYPE_CHECKING:
    from networks.tools.low_rank import Factors


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """The report"""

    layers: bool = option(False, help="print each layer, not only each block")


COMMAND = Command(
    name="lora-tools compare",
    description=__doc__,
    groups={"compare": CompareOptions},
    words=(Word("FIRST", "a LoRA file"), Word("SECOND", "another")),
)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code. Raises UserError."""
    given = read(COMMAND, argv)
    from networks.tools import result

    first, second = map(result.factors, result.read([Path(word) for word in given.words], purpose="is compared"))
    print("\n".join(report(first, second, by_layer=given.groups["compare"].layers)))
    return 0


@dataclass
class Products:
    """Σ of squares of the first and of the second, and of their products."""

    first: float = 0.0
    second: float = 0.0
    both: float = 0.0

    def add(self, other: Products) -> None:
        """Count another part in."""
        self.first, self.second, self.both = (
            self.first + other.first,
            self.second + other.second,
            self.both + other.both,
        )

    @property
    def cosine(self) -> float | None:
        """None where one of them is 0."""
        return self.both / (self.first * self.second) ** 0.5 if self.first > 0 and self.second > 0 else None

    @property
    def difference(self) -> float | None:
        """|second - first| / |first|; None where the first is 0."""
        return max(self.first + self.second - 2 * self.both, 0.0) ** 0.5 / self.first**0.5 if self.first > 0 else None


def products_of(first: Factors, second: Factors) -> Products:
    """From the factors alone."""
    return Products(first.inner(first), second.inner(second), first.inner(second))


def report(first: Mapping[str, Factors], second: Mapping[str, Factors], *, by_layer: bool = False) -> list[str]:
    """Lines: layers that only one has, those of other shapes, then a table and the whole."""
    both = [name for name in first if name in second]
    other = [name for name in both if first[name].shape != second[name].shape]
    alone = f"{len(first) - len(both)} only in the first, {len(second) - len(both)} only in the second"
    lines = [f"{len(both)} layers in both, {alone}"]
    lines += [
        f"  {name}: only in the {word}"
        for word, one, two in (("first", first, second), ("second", second, first))
        for name in one
        if name not in two
    ]
    lines += [
        f"  {name}: {list(first[name].shape)} in the first, {list(second[name].shape)} in the second" for name in other
    ]
    whole, rows = Products(), dict[str, Products]()
    for name in both:
        if name not in other:
            found = products_of(first[name], second[name])
            whole.add(found)
            rows.setdefault(name if by_layer else block_of(name), Products()).add(found)
    if not rows:
        return [*lines, "no layer can be compared"]
    names = list(rows) if by_layer else sorted(rows, key=order)
    width = max(len(name) for name in (*names, "all"))
    lines.append(f"{'':<{width}}  {'cosine':>8} {'difference':>10} {'norm 1':>9} {'norm 2':>9}")
    lines += [_row(name, rows[name], width) for name in names]
    return [*lines, _row("all", whole, width)]


def _row(name: str, found: Products, width: int) -> str:
    cosine = "-" if found.cosine is None else f"{found.cosine:.4f}"
    difference = "-" if found.difference is None else f"{found.difference:.4g}"
    norms = " ".join(f"{max(square, 0) ** 0.5:>9.4g}" for square in (found.first, found.second))
    return f"{name:<{width}}  {cosine:>8} {difference:>10} {norms}"
