"""A LoRA of a few thousand weights on which an optimizer is tried: its steps show the properties of its class."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from library import log
from library.optimizers.groups import ParameterGroups

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Make = Callable[[ParameterGroups], torch.optim.Optimizer]

STEPS = 12
"""Enough for an eps that is 0 (the second step is NaN) and for optimizers that do nothing in their first five."""

GRADIENT = 3e-5
"""Root mean square of the gradient of lora_up at the first step: 2e-5 to 5e-5 in runs of the quickstart's model."""

_LAYERS = ((4, 48), (8, 320))  # (rank, width)
_CONVOLUTION = (4, 48)  # (rank, channels)


class SmallLora:
    """Pairs of lora_down and lora_up = 0, one parameter group for each of `rates`, and the gradients of a regression.

    The target is a low-rank change of each layer, under noise that is ten times as large, as in a diffusion model's
    loss. Gradients are computed in fp32 on the CPU and then cast, so that every device and dtype gets the same. Two
    groups have the same numbers.
    """

    def __init__(
        self,
        rates: Mapping[str, float | None],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        gradient: float = GRADIENT,
        kernels: Collection[int] = (),
    ) -> None:
        """`rates`: by the groups' names; None leaves the rate to the optimizer. `kernels`: the sizes of convolutions
        that have a pair as well, of four dimensions."""
        draws = torch.Generator().manual_seed(0)
        self._draws, self._gradient, self._scale = draws, gradient, 0.0
        rank, channels = _CONVOLUTION
        shapes: list[tuple[tuple[int, ...], tuple[int, ...]]]
        shapes = [((rank, width), (width, rank)) for rank, width in _LAYERS]
        shapes += [((rank, channels, size, size), (channels, rank, 1, 1)) for size in sorted(kernels)]
        downs = [2 * torch.rand(down, generator=draws) - 1 for down, _ in shapes]
        downs = [down / math.sqrt(down[0].numel()) for down in downs]
        sizes = [(up[0], down[0].numel()) for (_, up), down in zip(shapes, downs, strict=True)]
        self._targets = [torch.randn(size, generator=draws) / math.sqrt(size[1]) for size in sizes]
        self.groups: ParameterGroups = []
        for name, rate in rates.items():
            parameters, names = [], []
            for number, (down, (_, up)) in enumerate(zip(downs, shapes, strict=True)):
                parameters += [down.to(device, dtype, copy=True), torch.zeros(up, device=device, dtype=dtype)]
                names += [f"{name}_{number}.lora_down.weight", f"{name}_{number}.lora_up.weight"]
            own = {} if rate is None else {"lr": rate}
            parameters = [torch.nn.Parameter(parameter) for parameter in parameters]
            self.groups.append({"params": parameters, "name": name, "param_names": names, **own})

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.groups for parameter in group["params"]]

    def copied(self) -> list[Tensor]:
        """Copies of all weights."""
        return [parameter.detach().clone() for parameter in self.parameters]

    def backward(self) -> None:
        """Set every parameter's gradient to that of the next batch."""
        batches = [[torch.randn(n, 4, generator=self._draws) for n in target.shape] for target in self._targets]
        for group in self.groups:
            pairs = zip(group["params"][::2], group["params"][1::2], self._targets, batches, strict=True)
            for down, up, target, (noise, inputs) in pairs:
                weights = [weight.detach().float().cpu().requires_grad_() for weight in (down, up)]
                matrices = [weight.flatten(1) for weight in weights]
                difference = matrices[1] @ (matrices[0] @ inputs) - 0.1 * target @ inputs - noise
                gradients = torch.autograd.grad(difference.square().mean(), weights)
                # one factor for all steps and layers, like a loss's
                self._scale = self._scale or self._gradient / float(gradients[1].square().mean().sqrt())
                for parameter, gradient in zip((down, up), gradients, strict=True):
                    parameter.grad = (self._scale * gradient).to(parameter)


class HasModes(Protocol):
    """An optimizer with two modes: weights for training, and weights for saving, validation and sampling."""

    @property
    def state(self) -> Mapping[Tensor, object]: ...

    def train(self) -> None: ...
    def eval(self) -> None: ...


def has_modes(optimizer: object) -> TypeIs[HasModes]:
    """Whether an optimizer, or its class, has `train()` and `eval()`: weights for training, and weights for saving,
    validation and sampling."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def train(optimizer: torch.optim.Optimizer, lora: SmallLora, steps: int = STEPS) -> None:
    """Make this many steps, in the optimizer's training mode."""
    if has_modes(optimizer):
        optimizer.train()
    for _ in range(steps):
        lora.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def quietly(device: torch.device | str = "cpu") -> Iterator[None]:
    """A context in which third-party code logs nothing and does not change the state of random generators."""
    device = torch.device(device)
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        contextlib.redirect_stdout(io.StringIO()),
        log.errors_only(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


# -- properties of a class


def averages(make: Make) -> bool:
    """Whether `eval()` switches to other weights than the trained ones."""
    lora = SmallLora({"unet": 1e-3})
    with quietly():
        optimizer = make(lora.groups)
        if not has_modes(optimizer):
            return False
        train(optimizer, lora)
        trained = lora.copied()
        optimizer.eval()
    return any(not torch.equal(*pair) for pair in zip(trained, lora.parameters, strict=True))


def has_a_rate_a_group(make: Make) -> bool:
    """Whether each group moves at its own rate; otherwise one is used for all, or different rates are refused."""
    lora = SmallLora({"unet": 1.0, "text_encoder": 0.5})
    before = lora.copied()
    with quietly():
        try:
            train(make(lora.groups), lora)
        except Exception:  # third-party code raises errors of any class
            return False
    moved = torch.stack([(a - b).norm() for a, b in zip(before, lora.parameters, strict=True)])
    unet, text = moved.chunk(2)
    return not torch.allclose(unet, text, rtol=0.1, atol=0)
