"""Elastic weight consolidation: the Fisher information, its penalty and lambda, against closed forms; then in runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.config.options.forgetting import ForgettingOptions
from library.diffusion.ddpm import DDPM
from library.diffusion.noise import Noise
from library.files.header import read_metadata
from library.losses.l2 import l2
from library.losses.main import MainLoss
from library.record import protections, summary
from library.training import state
from library.training.hook import Step
from library.training.hooks.ewc import DRAWS, Consolidation, measure, natural_strength
from library.training.step import Objective
from tests.conftest import copy_images
from tests.training.test_resume import stop_after
from tests.training.written import same, weights

Train = Callable[..., int]
ALPHAS = torch.linspace(0.99, 0.01, 1000, dtype=torch.float64)


class Linear:
    """Predicts its input times a weight for each channel; remembers inputs and targets."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.tensor([0.5, -1.0]))
        self.inputs: list[Tensor] = []

    def encode_prompts(self, captions: list[str]) -> dict[str, Tensor]:
        return {}

    def condition(self, texts: dict[str, Tensor], **sizes: object) -> dict[str, Tensor]:
        return texts

    def with_text_dropout(self, condition: dict[str, Tensor], draws: object) -> dict[str, Tensor]:
        return condition

    def predict(self, noisy: Tensor, level: Tensor, condition: dict[str, Tensor]) -> Tensor:
        self.inputs.append(noisy)
        return noisy * self.weight.view(1, 2, 1, 1)


class Images:
    """Batches of one image each."""

    seed = 3

    def __init__(self, count: int) -> None:
        self.latents = torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(count))

    def plan(self, epoch: int) -> list[list[tuple[int, int]]]:
        return [[(i, 0)] for i in range(len(self.latents))]

    def batches(self, plan: list[list[tuple[int, int]]], *, epoch: int, loader: object) -> Any:
        for [(i, repeat)] in plan:
            mean = self.latents[i : i + 1]
            yield SimpleNamespace(
                samples=[SimpleNamespace(sample=SimpleNamespace(key=str(i)), epoch=epoch, repeat=repeat)],
                moments=(mean, torch.zeros_like(mean)),
                masks=None,
                captions=[""],
                condition={},
                loss_weights=torch.ones(1),
                original_sizes=[(8, 8)],
                crops=[(0, 0)],
                target_size=(8, 8),
            )


def run_of(model: Linear) -> Any:
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), scaler=None, process_index=0, num_processes=1, autocast=lambda: torch.enable_grad()
    )
    targets: list[Tensor] = []

    class Seen(MainLoss):
        def unweighted(self, seen: Any, masks: Tensor | None) -> Tensor:
            targets.append(seen.target_BCHW)
            return super().unweighted(seen, masks)

    def level(generator: torch.Generator, size: tuple[int, int]) -> float:
        return int(torch.randint(1000, (), generator=generator))

    process = DDPM("epsilon", ALPHAS)
    return SimpleNamespace(
        accelerator=accelerator,
        parameters=[model.weight],
        family=model,
        objective=Objective(process=process, level=level, steps=(0, 1000), noise=Noise(), main=Seen(l2)),
        network=nn.Module(),
        optimizer=SimpleNamespace(zero_grad=lambda set_to_none: setattr(model.weight, "grad", None)),
        loader=None,
        train_text=False,
        position=SimpleNamespace(done=0),
        targets=targets,
    )


def test_the_fisher_information_is_the_mean_squared_gradient_of_an_image() -> None:
    model = Linear()
    run = run_of(model)
    (fisher,), loss, elements = measure(run, [Images(3), Images(2)], most_images=4)  # type: ignore[list-item]
    assert len(model.inputs) == 4 * DRAWS
    assert elements == 2 * 4 * 4
    residuals = [
        noisy * model.weight.detach().view(1, 2, 1, 1) - target
        for noisy, target in zip(model.inputs, run.targets, strict=True)
    ]
    # the gradient of mean((w x - n)²) over 32 elements, by the channel's weight
    gradients = [
        2 / 32 * (residual * noisy).sum(dim=(0, 2, 3)) for noisy, residual in zip(model.inputs, residuals, strict=True)
    ]
    torch.testing.assert_close(fisher, torch.stack(gradients).square().mean(dim=0))
    assert loss == pytest.approx(float(torch.stack([one.square().mean() for one in residuals]).mean()), rel=1e-5)
    assert len({float(noisy.sum()) for noisy in model.inputs}) == len(model.inputs)  # other noise each time


def test_gradients_that_are_scaled_too_far_are_computed_again() -> None:
    """As in fp16, where a number above 65504 is infinite, and the scale at the start of a run a guess."""
    model, half = Linear(), Linear()
    half.weight.register_hook(lambda gradient: gradient.half().float())
    run = run_of(half)
    run.accelerator.scaler = SimpleNamespace(get_scale=lambda: 2.0**40)
    (fisher,), loss, _ = measure(run, [Images(3)], most_images=3)  # type: ignore[list-item]
    (exact,), same_loss, _ = measure(run_of(model), [Images(3)], most_images=3)  # type: ignore[list-item]
    torch.testing.assert_close(fisher, exact, rtol=0.01, atol=0)
    assert loss == same_loss


def test_the_pull_is_the_gradient_of_the_penalty() -> None:
    model = Linear()
    run = run_of(model)
    hook = Consolidation([model.weight], [Images(3)], strength=7.0, most_images=10)  # type: ignore[list-item]
    hook.before_training(run)
    fisher, anchor = hook.fisher[0], model.weight.detach().clone()
    assert hook.penalty() == 0
    with torch.no_grad():
        model.weight += torch.tensor([0.3, -0.2])
    model.weight.grad = torch.tensor([1.0, 2.0])
    hook.after_backward(run, Step(1, 0))
    own = model.weight.detach().clone().requires_grad_()
    penalty = 7.0 / 2 * (fisher * (own - anchor).square()).sum()
    penalty.backward()  # type: ignore[no-untyped-call]
    assert own.grad is not None
    torch.testing.assert_close(model.weight.grad, torch.tensor([1.0, 2.0]) + own.grad)
    assert hook.penalty() == pytest.approx(penalty.item())
    model.weight.grad = None
    hook.after_backward(run, Step(2, 0))
    torch.testing.assert_close(model.weight.grad, own.grad)


def test_lambda_makes_the_penalty_the_rise_of_the_loss() -> None:
    """Linear regression with independent residuals of equal size: lambda F is the Hessian. 2,000 "images" of 50
    residuals each; the sampling error of their mean is a few percent."""
    generator = torch.Generator().manual_seed(0)
    slopes = torch.randn(2000, 50, 3, generator=generator).double() * torch.tensor([1.0, 0.3, 2.0])
    residuals = 0.4 * torch.randn(2000, 50, generator=generator).double()
    fisher = (2 / 50 * torch.einsum("in,inw->iw", residuals, slopes)).square().mean(dim=0)
    hessian = 2 / 50 * slopes.square().sum(dim=1).mean(dim=0)
    strength = natural_strength(float(residuals.square().mean()), 50)
    torch.testing.assert_close(strength * fisher, hessian, rtol=0.1, atol=0)


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_protections_resume_with_the_same_bits(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """EWC, distillation that falls, and preservation of the network that the run goes on from."""
    assert train("--output_name", "first", "--max_train_steps", "2", "--learning_rate", "1e-2") == 0
    copy_images(tmp_path / "earlier", 2)
    data = tmp_path / "data.toml"
    folder = (tmp_path / "data" / "2_style").as_posix()
    data.write_text(
        f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{folder}'\n"
        f"[[datasets.subsets]]\nimage_dir = '{(tmp_path / 'earlier').as_posix()}'\nprior = 'previous'\n"
    )
    words = (
        *("--network_weights", str(tmp_path / "out" / "first.safetensors"), "--dim_from_weights"),
        *("--train_data_dir=", "--dataset_config", str(data), "--max_train_steps", "3", "--learning_rate", "1e-2"),
        *("--distillation_weight", "1", "--distillation_schedule", "cosine", "--ewc_data", str(tmp_path / "earlier")),
    )
    assert train(*words, "--output_name", "whole", "--save_state_on_train_end") == 0
    messages = capsys.readouterr().err
    assert "ewc: lambda" in messages
    assert "elements / (2 · loss" in messages
    assert "ewc: the penalty at the end is" in messages
    kept = [
        *("2 images keep the prediction of first.safetensors", "distillation from first.safetensors, weight 1, cosine"),
        "EWC for 2 images of earlier, lambda computed",
    ]
    assert f"protection  {kept[0]}; {kept[1]} to 0; {kept[2]}" in messages
    metadata = read_metadata(tmp_path / "out" / "whole.safetensors")
    found = protections.from_metadata(metadata)
    assert found is not None
    assert f"{kept[0]}; {kept[1]} to 0; {kept[2]}" == summary.protections(found)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert train(*words, "--output_name", "broken") == 130
    monkeypatch.setattr("library.training.hooks.ewc.measure", None)  # it is not measured again
    assert train(*words, "--output_name", "broken", "--resume", "latest") == 0
    assert same(weights(tmp_path, "whole"), weights(tmp_path, "broken"))
    tensors = torch.load(tmp_path / "out" / "whole-state" / state.TENSORS, weights_only=True)["hooks"]["ewc"]
    assert all(float(one.sum()) > 0 for one in tensors["fisher"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--distillation_weight", "1"), "--distillation_weight needs --network_weights"),
        (("--ewc_data", "nowhere"), "--ewc_data nowhere: no such folder"),
        (("--ewc_data", "nowhere.toml"), "--ewc_data nowhere.toml: no such file"),
        (("--ewc_data", ".", "--ewc_lambda", "0"), "--ewc_lambda must be above 0"),
    ],
)
def test_what_does_not_fit(
    words: tuple[str, ...], message: str, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*words) == 2
    assert message in capsys.readouterr().err


def test_options_without_effect() -> None:
    assert ForgettingOptions(ewc_lambda=5.0).idle() == {
        "distillation_schedule": " without --distillation_weight",
        "ewc_lambda": " without --ewc_data",
        "ewc_images": " without --ewc_data",
    }
    assert not ForgettingOptions(ewc_data=("a",), distillation_weight=1.0).idle()
