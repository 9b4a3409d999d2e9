"""Preservation outside of masks, distillation, and the network as it was: against their closed forms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.diffusion.process import Predicted
from library.losses.distillation import Distillation, factor
from library.losses.huber import smooth_l1
from library.losses.l2 import l2
from library.losses.main import MainLoss
from library.losses.preservation import Preservation
from library.losses.term import total
from library.training.previous import PreviousNetwork

PRIORS = {"base": 0.25, "previous": 0.5}  # what each multiplies its input by


class Model:
    """Predicts its input times `k`, plus what it is conditioned on."""

    k = 1.0

    def predict(self, noisy: Tensor, level: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        assert len(noisy) == len(level) == len(condition["h"])
        return noisy * self.k + condition["h"]

    @contextmanager
    def as_prior(self, name: str) -> Iterator[None]:
        self.k = PRIORS[name]
        yield
        self.k = 1.0

    def contexts(self) -> dict[str, Any]:
        return {name: lambda name=name: self.as_prior(name) for name in PRIORS}


def batch(*subsets: tuple[str, str], masks: Tensor | None = None, weight: float = 1.0) -> Any:
    samples = [
        SimpleNamespace(
            sample=SimpleNamespace(subset=SimpleNamespace(prior=prior, prior_region=region, prior_weight=weight))
        )
        for prior, region in subsets
    ]
    return SimpleNamespace(samples=samples, masks=masks, loss_weights=torch.linspace(1, 2, len(samples)))


def seen(count: int, model: Model) -> Predicted:
    generator = torch.Generator().manual_seed(count)
    noisy, target = (torch.randn(count, 2, 4, 4, generator=generator) for _ in range(2))
    level, condition = torch.arange(count) * 100.0 + 100, {"h": torch.arange(float(count)).view(-1, 1, 1, 1)}
    return Predicted(
        prediction_BCHW=model.predict(noisy, level, condition),
        target_BCHW=target,
        noisy_BCHW=noisy,
        level_B=level,
        condition=condition,
    )


def of_levels(level_B: Tensor) -> Tensor:
    return level_B / 200


def test_each_sample_has_its_own_prior() -> None:
    model = Model()
    found, main = seen(3, model), MainLoss(l2)
    one = batch(("previous", "all"), ("", "all"), ("base", "all"))
    term = Preservation(model.predict, model.contexts(), main)
    target = term.target(found, one)
    assert torch.equal(target[1], found.target_BCHW[1])
    # prediction - target = (1 - k) · noisy
    for row, k in ((0, PRIORS["previous"]), (2, PRIORS["base"])):
        torch.testing.assert_close(found.prediction_BCHW[row] - target[row], (1 - k) * found.noisy_BCHW[row])
    assert term.per_sample(found, one) is None


@pytest.mark.parametrize("prior", PRIORS)
def test_outside_of_the_mask(prior: str) -> None:
    """Σ over a sample: mask · (prediction - target)² + weight · (1 - mask) · (prediction - prior's)²."""
    model = Model()
    found, main = seen(2, model), MainLoss(l2, weights=of_levels)
    mask = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    one = batch((prior, "outside_mask"), ("", "all"), masks=mask, weight=0.7)
    losses = total((Preservation(model.predict, model.contexts(), main), main), found, one)
    inside = (mask * (found.prediction_BCHW - found.target_BCHW).square()).mean(dim=(1, 2, 3))
    outside = ((1 - mask) * ((1 - PRIORS[prior]) * found.noisy_BCHW).square()).mean(dim=(1, 2, 3))
    expected = (inside + 0.7 * outside * torch.tensor([1.0, 0.0])) * one.loss_weights * of_levels(found.level_B)
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize(("schedule", "done", "left"), [
    ("constant", 0.9, 1.0), ("linear", 0.0, 1.0), ("linear", 0.25, 0.75), ("linear", 1.0, 0.0),
    ("cosine", 0.0, 1.0), ("cosine", 0.5, 0.5), ("cosine", 1 / 3, 0.75), ("cosine", 1.0, 0.0),
])  # fmt: skip
def test_schedules(schedule: str, done: float, left: float) -> None:
    assert factor(schedule, done) == pytest.approx(left, abs=1e-12)


def test_distillation_adds_the_distance_to_the_teacher() -> None:
    model = Model()
    found, main = seen(3, model), MainLoss(l2, weights=of_levels)
    one = batch(*[("", "all")] * 3)
    term = Distillation(model.predict, model.contexts()["previous"], main, weight=0.8, schedule="linear")
    term.done = 0.25
    weights = one.loss_weights * of_levels(found.level_B)
    plain = (found.prediction_BCHW - found.target_BCHW).square().mean(dim=(1, 2, 3)) * weights
    distance = (0.5 * found.noisy_BCHW).square().mean(dim=(1, 2, 3)) * weights
    torch.testing.assert_close(total((term, main), found, one), plain + 0.8 * 0.75 * distance)
    term.done = 1.0
    assert term.per_sample(found, one) is None


def test_distillation_has_the_runs_own_loss() -> None:
    model = Model()
    found = seen(2, model)
    main = MainLoss(smooth_l1, thresholds=lambda level: level / 1000)
    term = Distillation(model.predict, model.contexts()["base"], main, weight=1, schedule="constant")
    losses = term.per_sample(found, batch(("", "all"), ("", "all")))
    assert losses is not None
    thresholds = (found.level_B / 1000).view(-1, 1, 1, 1)
    expected = smooth_l1(found.prediction_BCHW, found.prediction_BCHW - 0.75 * found.noisy_BCHW, thresholds)
    torch.testing.assert_close(losses, expected.mean(dim=(1, 2, 3)) * torch.tensor([1.0, 2.0]))


# --- the network as it was --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_previous_network(dtype: torch.dtype) -> None:
    """Its predictions are those of the start, also under autocast, which keeps copies of the weights; the gradients of
    a prediction made before it was switched on are those without it."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    images = torch.randn(8, 4)

    def predict() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return network(images)

    network.eval()
    at_start = predict().detach()
    network.train()
    previous = PreviousNetwork(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter))
    own = [parameter.detach().clone() for parameter in network.parameters()]
    places = [parameter.data_ptr() for parameter in network.parameters()]

    def gradients(*, switched: bool) -> list[Tensor]:
        network.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = network(images).float().square().mean()
            if switched:
                with torch.no_grad(), previous.active():
                    assert torch.equal(network(images), at_start)
        loss.backward()
        return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]

    plain, beside = gradients(switched=False), gradients(switched=True)
    assert all(map(torch.equal, plain, beside))
    assert len(plain) == 4
    assert network.training
    assert all(map(torch.equal, own, network.parameters()))
    assert places == [parameter.data_ptr() for parameter in network.parameters()]
    with pytest.raises(RuntimeError, match="broken"), previous.active():
        raise RuntimeError("broken")
    assert all(map(torch.equal, own, network.parameters()))
