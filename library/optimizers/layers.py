"""Layer-wise learning rates for transformers of others, by the names of their modules: lower towards the input."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from library.errors import UserError
from library.optimizers.groups import Group, ParameterGroups

if TYPE_CHECKING:
    from torch import nn

# Llama, OPT, CLIP: layers.3; BERT, older ViTs: layer.3; GPT-2, Bloom: h.3; T5: block.3; timm: blocks.3. Swin and
# ConvNeXT have stages of layers: layers.1.blocks.3, stages.1.layers.3. What T5 has inside a block (block.3.layer.0)
# counts with the block.
_LAYER = re.compile(
    r"(?P<stack>(?:.*?\.)??)(?:layers|layer|h|blocks|block|stages)\.(?P<first>\d+)\."
    r"(?:(?:blocks|layers)\.(?P<second>\d+)\.)?"
)

Depth = tuple[int, int]
Named = tuple[str, "nn.Parameter"]


def depth_of(name: str) -> tuple[str, Depth] | None:
    """The stack of layers that a parameter is in, as the prefix of its name, and its place there; None outside."""
    found = _LAYER.match(name)
    return found and (found["stack"], (int(found["first"]), int(found["second"] or 0)))


def layer_groups(named_parameters: Iterable[Named], *, lr: float, decay: float = 0.9) -> ParameterGroups:
    """Groups for an optimizer in which layer i of n has the rate lr · decay ** (n - 1 - i).

    `named_parameters`: in the order of the model's definition, as `model.named_parameters()` has them; frozen ones are
    left out. `decay` in (0, 1]. What comes before the layers (embeddings, patches, positions) has lr · decay ** n, and
    what comes behind them (last norm, head) has lr itself. The layers of an encoder and of a decoder are counted by
    themselves. Raises UserError if no name has a numbered layer.
    """
    if not 0 < decay <= 1:
        raise UserError(f"layer_groups: decay must be above 0 and at most 1, not {decay}")
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    stacks: dict[str, dict[Depth, None]] = {}
    for stack, depth in filter(None, (depth_of(name) for name, _ in trained)):
        stacks.setdefault(stack, {})[depth] = None
    if not stacks:
        example = f", such as '{trained[0][0]}'" if trained else "; all are frozen"
        raise UserError(f"layer_groups: no trained parameter is in a numbered layer{example}")
    groups: dict[str, Group] = {}
    begun: set[str] = set()
    for name, parameter in trained:
        if (found := depth_of(name)) is not None:
            stack, depth = found
            begun.add(stack)
            key, power = _layer(stack, sorted(stacks[stack]), depth)
        else:
            stack = _nearest(name, stacks)
            # OPT defines its last norm, final_layer_norm, before its layers
            behind = stack in begun or "final" in name
            key, power = (f"{stack}output", 0) if behind else (f"{stack}input", len(stacks[stack]))
        group = groups.setdefault(key, {"params": [], "name": key, "lr": lr * decay**power})
        group["params"].append((name, parameter))
    return list(groups.values())


def _layer(stack: str, depths: list[Depth], depth: Depth) -> tuple[str, int]:
    """The name of a layer's group, and how many layers follow it."""
    index = depths.index(depth)
    return f"{stack}{index}", len(depths) - 1 - index


def _nearest(name: str, stacks: Iterable[str]) -> str:
    """The stack whose prefix has most parts in common with the name, the last of several."""

    def common(stack: str) -> int:
        pairs = zip(name.split("."), stack.split("."), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    return max(reversed(list(stacks)), key=common)
