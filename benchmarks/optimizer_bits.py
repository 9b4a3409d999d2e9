"""Whether two versions of CustomAdamW give the same bits on this machine: weights, states and resumed runs.

    python -m benchmarks.optimizer_bits before.json --states folder   # in one checkout: a minute or two
    python -m benchmarks.optimizer_bits after.json --states folder --against before.json   # in the other

Writes a hash for each combination of techniques, bits, type of the weights, LoRA names, and kernel or plain operations.
The first run writes the states of half-done runs into the folder, the second one resumes from those. Hashes of two
machines or compilers differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path

import torch
from torch import nn

from library.config.registry import Arguments
from library.optimizers import CustomAdamW

Named = list[tuple[str, nn.Parameter]]
TECHNIQUES = (
    *("use_agr", "use_orthogonal_grad", "use_adopt_stability", "use_tam", "use_grams", "use_cautious", "use_alora"),
    *("dynamic_weight_decay", "use_spd"),
)
OFF: Arguments = dict.fromkeys(TECHNIQUES, False)
ALL: Arguments = {**dict.fromkeys(TECHNIQUES, True), "use_grams": False}
SETTINGS: dict[str, Arguments] = {
    "tam_bias_correction": {"use_tam": True, "tam_bias_correction": True, "tam_beta": 0.99},
    "tam_bias_correction+adopt": {"use_tam": True, "tam_bias_correction": True, "use_adopt_stability": True},
    "adopt": {"use_adopt_stability": True, "adopt_eps": 1e-3, "adopt_clip": 0.5, "betas": (0.9, 0.9999)},
    "cautious_min": {"use_cautious": True, "cautious_min": 0.6},
    "spd_anchor": {"use_spd": True, "spd_anchor": "initial", "spd_lambda": 0.7},
    "spd_anchor+all": {**ALL, "spd_anchor": "initial"},
    "orthograd_target": {"use_orthogonal_grad": True, "orthograd_target": "up"},
    "alora": {"use_alora": True, "alora_ratio": 4.0, "alora_eta": 0.5},
    "stochastic_rounding": {**ALL, "stochastic_rounding": True},
    "cosine": {"dynamic_weight_decay": True, "wd_schedule": "cosine"},
    "grams+cautious": {"use_grams": True, "use_cautious": True},
}
SHAPES: dict[str, tuple[int, ...]] = {
    "a.lora_down.weight": (4, 40),
    "a.lora_up.weight": (64, 4),
    "b.lora_down.weight": (5, 12, 3, 3),
    "b.lora_up.weight": (33, 5, 1, 1),
    "c.lora_down.weight": (16, 320),
    "c.lora_up.weight": (700, 16),
    "d.lora_down.weight": (4, 40),
    "d.lora_up.weight": (64, 4),
    "bias": (7,),
    "scalar": (),
    "big": (50, 100),
}
CAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def cases() -> dict[str, Arguments]:
    """Options by name: nothing, each technique, each pair, all, all but one, and some settings."""
    found: dict[str, Arguments] = {"nothing": {}, "all": ALL}
    found |= {name: {name: True} for name in TECHNIQUES}
    found |= {f"{a}+{b}": {a: True, b: True} for a, b in combinations(TECHNIQUES, 2)}
    found |= {f"all but {name}": {**ALL, name: False} for name in TECHNIQUES if name != "use_grams"}
    return found | {f"settings: {name}": options for name, options in SETTINGS.items()}


def bag(dtype: torch.dtype, *, pairs: bool) -> Named:
    """Parameters of many shapes, LoRA pairs among them if their names are left as they are."""
    g = torch.Generator().manual_seed(0)
    return [
        (name if pairs else name.replace("lora_", ""), nn.Parameter((torch.randn(shape, generator=g) / 10).to(dtype)))
        for name, shape in SHAPES.items()
    ]


def train(named: Named, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Steps with gradients that agree in part; those of lora_down are zero in step 0, as in a real LoRA."""
    for step in range(first, last):
        for index, (name, parameter) in enumerate(named):
            steady, noise = (
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                for seed in (1000 + index, 7919 * step + index)
            )
            size = 0.0 if step == 0 and "down" in name else 1e-2
            parameter.grad = ((steady + noise) * size).to(parameter.dtype)
        optimizer.step()


def make(named: Named, options: Arguments, **more: object) -> CustomAdamW:
    usual: Arguments = {
        "lr": 1e-2,
        "orthograd_target": "all",
        "wd_transition_steps": 2,
        "spd_lambda": 0.3,
        "min_8bit_size": 200,
    }
    return CustomAdamW([{"params": named, "lora_scale": 0.5}], **{**OFF, **usual, **options, **more})


def digest(named: Named, optimizer: CustomAdamW) -> str:
    """Of weights, state and groups."""
    found = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                add(key)
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            found.update(repr(value).encode())

    add([parameter for _, parameter in named])
    add(optimizer.state_dict())
    return found.hexdigest()[:24]


def hashes(names: list[str], states: Path) -> Iterator[tuple[str, str]]:
    """(what was run, its hash). A state that is not in the folder yet is written there."""
    ways = list(product((32, 8), CAST, (True, False), ("eager", "native")))
    for name in names:
        options = cases()[name]
        for bits, dtype, pairs, implementation in ways:
            if (dtype, implementation) == ("fp64", "native"):
                continue  # the kernel has no double precision
            label = f"{name}, {bits} bits, {dtype}, {'pairs' if pairs else 'no pairs'}, {implementation}"
            named = bag(CAST[dtype], pairs=pairs)
            optimizer = make(named, options, optim_bits=bits, implementation=implementation)
            train(named, optimizer, 0, 5)
            yield label, digest(named, optimizer)
            file = states / f"{hashlib.sha256(label.encode()).hexdigest()[:16]}.pt"
            if not file.exists():
                torch.save({"weights": [p.detach() for _, p in named], "state": optimizer.state_dict()}, file)
            for other in (32, 8):
                again = bag(CAST[dtype], pairs=pairs)
                resumed = make(again, options, optim_bits=other, implementation=implementation)
                kept = torch.load(file, weights_only=True)
                for (_, parameter), weight in zip(again, kept["weights"], strict=True):
                    parameter.data.copy_(weight)
                resumed.load_state_dict(kept["state"])
                train(again, resumed, 5, 8)
                yield f"{label}, resumed in {other} bits", digest(again, resumed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the JSON file to write")
    parser.add_argument("--states", type=Path, required=True, help="a folder for the states of half-done runs")
    parser.add_argument("--against", type=Path, help="a file that another version wrote: exit code 1 if any differs")
    options = parser.parse_args()
    logging.getLogger("library").setLevel(logging.CRITICAL)
    options.states.mkdir(parents=True, exist_ok=True)
    found = dict(hashes(list(cases()), options.states))
    options.out.write_text(json.dumps(found, indent=0), encoding="utf-8")
    known = json.loads(options.against.read_text(encoding="utf-8")) if options.against else found
    differing = [label for label, value in known.items() if found.get(label) != value]
    print(f"{len(found)} hashes, {len(differing)} differ", *differing[:50], sep="\n")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
