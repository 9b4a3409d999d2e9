"""Memory of a full fine-tune, a LoRA and a QLoRA of a transformer of any size, by formulas.

    python -m library.guidance.memory --parameters 7B --rank 16

For a run of this program `--dry_run` counts exactly; these formulas are for models that it does not train.

With P parameters, L layers of width h, b sequences of s tokens, and c bytes of a number that is computed with:

* weights: c · P; of QLoRA's frozen ones 0.516 · P: 4 bits, for each 64 numbers a scale of 8 bits, and for each 256
  scales one of 32 (arXiv 2305.14314). Embeddings are counted like all others, although QLoRA keeps them in 16 bits.
* gradients: c bytes for each trained number; AdamW: 8 (two states in fp32), AdamW8bit: 2, SGD: 4 (momentum), and under
  bf16 or fp16 a full fine-tune keeps 4 more, the weights in fp32 (mixed precision, arXiv 1710.03740).
* LoRA: on each of the 7 linear layers of a block (query, key, value, output: h × h; gate, up, down: h × 8/3 h)
  rank · (in + out) numbers, in fp32, as are their gradients and states.
* activations: 34 · s · b · h bytes a layer in 16 bits, without the s² of attention, which fused kernels do not keep;
  with checkpointing 2 · s · b · h a layer and one whole layer (arXiv 2205.05198).

A formula in circulation, (0.5 GB, or 0.1 with checkpointing) · b · s · layers / 1024 with layers = √(P / 150 million),
has 6 layers for a model of 7B, which has 32: it is not used here. Totals printed beside it (87.7 GB for a 7B) do not
follow from it either: it gives 90.0.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass

from library.config.fields import BadValue, memory_bytes
from library.quantization import NF4
from library.units import human_bytes

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
STATES = {"AdamW": 8, "AdamW8bit": 2, "SGD": 4, "Adafactor": 0.05}
"""Bytes of state a trained number. Adafactor: a row and a column of a matrix, below 1 % of it."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A transformer: `parameters` in all, `layers` of width `hidden`."""

    parameters: int
    layers: int
    hidden: int

    @classmethod
    def of_size(cls, parameters: int, layers: int | None = None, hidden: int | None = None) -> Model:
        """The usual shape of a model of this size, where none is given: 12 · layers · hidden² parameters, and a layer
        for each 128 of width, as in LLaMA (7B: 32 × 4096)."""
        if hidden is None and layers is None:
            hidden = max(1, round((parameters * 128 / 12) ** (1 / 3) / 128)) * 128
        if hidden is None:
            assert layers is not None
            hidden = max(1, round((parameters / 12 / layers) ** 0.5))
        if layers is None:
            layers = max(1, round(parameters / 12 / hidden**2))
        return cls(parameters=parameters, layers=layers, hidden=hidden)

    def of_lora(self, rank: int) -> int:
        """The trained numbers of adapters on all linear layers."""
        wide = round(self.hidden * 8 / 3)
        return self.layers * rank * (4 * 2 * self.hidden + 3 * (self.hidden + wide))

    def activations(self, *, batch: int, sequence: int, precision: str, checkpointing: bool) -> float:
        """Bytes that the backward pass needs."""
        token = batch * sequence * self.hidden * _BYTES[precision] / 2
        return token * (2 * self.layers + 34) if checkpointing else token * 34 * self.layers


Parts = dict[str, float]


def needs(
    model: Model, *, rank: int, batch: int, sequence: int, precision: str, optimizer: str, checkpointing: bool
) -> dict[str, Parts]:
    """Bytes by part of each of the three ways to train."""
    size, count = _BYTES[precision], model.parameters
    activations = model.activations(batch=batch, sequence=sequence, precision=precision, checkpointing=checkpointing)
    adapter = model.of_lora(rank)
    of_lora = {"adapter": 4 * adapter, "gradients": 4 * adapter, "optimizer state": STATES[optimizer] * adapter}
    masters = {"weights in fp32": 4 * count} if size == 2 else {}
    return {
        "full fine-tune": {
            "weights": size * count,
            **masters,
            "gradients": size * count,
            "optimizer state": STATES[optimizer] * count,
            "activations": activations,
        },
        "LoRA": {"weights": size * count, **of_lora, "activations": activations},
        "QLoRA": {"weights": NF4 * count, **of_lora, "activations": activations},
    }


def table(found: dict[str, Parts], card: int | None) -> str:
    """The parts in rows, the ways to train in columns."""
    parts = list(dict.fromkeys(part for column in found.values() for part in column))
    rows = [["", *found]]
    rows += [
        [part, *(human_bytes(column[part]) if part in column else "-" for column in found.values())] for part in parts
    ]
    totals = [sum(column.values()) for column in found.values()]
    rows.append(["in all", *map(human_bytes, totals)])
    if card is not None:
        rows.append([f"of {human_bytes(card)}", *("fits" if total <= card else "does not fit" for total in totals)])
    return "\n".join(f"{row[0]:<18}" + "".join(f"{cell:>18}" for cell in row[1:]) for row in rows)


def read_count(word: str) -> int:
    """A number of parameters: "7B", "860M", "124000000"."""
    found = re.fullmatch(r"([\d.]+)\s*([kKmMbBtT]?)", word.strip())
    try:
        number = float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[found[2].lower()] if found else 0.0
    except ValueError:
        number = 0.0
    if not number >= 1:
        raise argparse.ArgumentTypeError(f"'{word}' is not a number of parameters such as 7B or 860M")
    return round(number)


def _read_card(word: str) -> int:
    try:
        return memory_bytes(word)
    except BadValue as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _natural(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"'{word}' is not a whole number of at least 1")
    return int(word)


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m library.guidance.memory", description=__doc__.split("\n")[0])
    parser.add_argument("--parameters", type=read_count, required=True, help="7B, 860M, ...")
    parser.add_argument("--layers", type=_natural, help="(default: as usual for the size)")
    parser.add_argument("--hidden", type=_natural, help="the width of a layer (default: as usual for the size)")
    parser.add_argument("--rank", type=_natural, default=16, help="of the LoRA (default: 16)")
    parser.add_argument("--batch", type=_natural, default=1, help="sequences (default: 1)")
    parser.add_argument("--sequence", type=_natural, default=2048, help="tokens of a sequence (default: 2048)")
    parser.add_argument("--precision", choices=_BYTES, default="bf16", help="(default: bf16)")
    parser.add_argument("--optimizer", choices=STATES, default="AdamW", help="(default: AdamW)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--gpu_memory", type=_read_card, help="compare with a card: 24GB")
    given = parser.parse_args(argv)
    model = Model.of_size(given.parameters, given.layers, given.hidden)
    print(
        f"{model.parameters / 1e9:.3g} billion parameters, {model.layers} layers of width {model.hidden}; "
        f"{model.of_lora(given.rank):,} of a LoRA of rank {given.rank} on all linear layers\n"
    )
    found = needs(
        model,
        rank=given.rank,
        batch=given.batch,
        sequence=given.sequence,
        precision=given.precision,
        optimizer=given.optimizer,
        checkpointing=given.checkpointing,
    )
    print(table(found, given.gpu_memory))
    print("\nComputed by formulas, not measured; CUDA itself takes 0.3 to 0.6 GiB more.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
