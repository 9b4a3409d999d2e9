"""From options to the loss of a batch: every option on its own model, against closed forms and on the real network."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

from library.config.options.objective import ObjectiveOptions
from library.config.parser import parse
from library.data.dataset import Batch, Draw
from library.diffusion.draws import stacked_normal
from library.diffusion.noise import Noise, draw_noise
from library.errors import UserError
from library.models.opening import open_family
from library.run.objective import make_objective
from library.training.step import Objective, batch_loss
from tests.conftest import BASE

SEED = 1  # timesteps 18 to 917: on both sides of an SNR of 5
CPU = torch.device("cpu")
EVERY = torch.arange(1000)


def opened(path: Path, *, zero_terminal_snr: bool = False):
    return open_family(str(path), options={"zero_terminal_snr": zero_terminal_snr})


@pytest.fixture(scope="module")
def noise_model():
    """The small base, which predicts noise; UNet and text encoder loaded."""
    family = opened(BASE)
    family.components.load_all(family.components.text_encoders, torch.float32, "cpu")
    family.components.load("denoiser", torch.float32, "cpu")
    return family


@pytest.fixture(scope="module")
def v_folder(tmp_path_factory) -> Path:
    """The same files, whose configuration says that it predicts v."""
    folder = tmp_path_factory.mktemp("v") / "base"
    shutil.copytree(BASE, folder)
    set_scheduler(folder, prediction_type="v_prediction")
    return folder


def set_scheduler(folder: Path, **values: object) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def options(*words: str) -> ObjectiveOptions:
    return parse(["--pretrained_model_name_or_path", "m", "--output_dir", "o", *words]).objective


def batch_of(count: int = 6) -> Batch:
    """Latents with a mean, so that what follows the mean has something to follow."""
    subset = SimpleNamespace(diff_output_preservation=False)
    draws = [Draw(SimpleNamespace(key=f"0/{i}.png", subset=subset), 0, i) for i in range(count)]
    mean = torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(0)) + 0.5
    return Batch(
        samples=draws,
        pixels=None,
        moments=(mean, torch.full_like(mean, 0.01)),
        captions=["a cat"] * count,
        condition=None,
        loss_weights=torch.ones(count),
        original_sizes=[(64, 64)] * count,
        crops=[(0, 0)] * count,
        target_size=(64, 64),
    )


class Silent:
    """A model that answers 0 to everything, so that a loss is a function of its target alone; keeps what it saw."""

    def encode_prompts(self, captions):
        return {}

    def condition(self, texts, **sizes):
        return texts

    def with_text_dropout(self, condition, draws):
        return condition

    def predict(self, noisy, t, condition):
        self.noisy, self.t = noisy, t
        return torch.zeros_like(noisy)


def loss_of(objective: Objective, family, count: int = 6) -> float:
    return batch_loss(batch_of(count), family, objective, seed=SEED, device=CPU, train_text=False).loss.item()


# -- on the real network: no option is without effect

COMMON = [
    "--loss_type l1",
    "--loss_type huber",
    "--loss_type huber --huber_c 0.3",
    "--loss_type huber --huber_schedule exponential",
    "--loss_type huber --huber_schedule exponential --huber_scale 2",
    "--loss_type huber --huber_schedule constant",
    "--loss_type smooth_l1",
    "--loss_type smooth_l1 --huber_schedule constant --huber_scale 2",
    "--min_snr_gamma 5",
    "--min_snr_gamma 1",
    "--debiased_estimation_loss",
    "--min_snr_gamma 5 --debiased_estimation_loss",
    "--noise_offset 0.1",
    "--noise_offset 0.1 --noise_offset_random_strength",
    "--noise_offset 0.1 --adaptive_noise_scale 0.1",
    "--noise_offset 0.1 --noise_offset_random_strength --adaptive_noise_scale 0.1",
    "--multires_noise_iterations 6",
    "--multires_noise_iterations 2",
    "--multires_noise_iterations 6 --multires_noise_discount 0.8",
    "--multires_noise_iterations 6 --noise_offset 0.1",
    "--ip_noise_gamma 0.1",
    "--ip_noise_gamma 0.1 --ip_noise_gamma_random_strength",
    "--min_timestep 500",
    "--max_timestep 500",
    "--min_timestep 300 --max_timestep 310",
    "--timestep_sampling sigmoid",
    "--timestep_sampling sigmoid --sigmoid_scale 3",
    "--weighting_scheme logit_normal --logit_mean 0.5",
    "--weighting_scheme logit_normal --logit_std 0.5",
    "--weighting_scheme mode",
    "--weighting_scheme mode --mode_scale 0.5",
    "--training_shift 3",
    "--timestep_sampling uniform --training_shift 0.3",
]
ON_NOISE = ["--v_pred_like_loss 0.5", "--v_pred_like_loss 0.5 --min_snr_gamma 5 --loss_type huber"]
ON_V = [
    "--scale_v_pred_loss_like_noise_pred",
    "--zero_terminal_snr",
    "--zero_terminal_snr --min_snr_gamma 5",
    "--zero_terminal_snr --debiased_estimation_loss",
    "--zero_terminal_snr --scale_v_pred_loss_like_noise_pred",
    "--zero_terminal_snr --loss_type huber",
    "--zero_terminal_snr --noise_offset 0.1 --ip_noise_gamma 0.1 --multires_noise_iterations 6",
]


def losses_of(words: list[str], folder: Path, real) -> dict[str, float]:
    found = {}
    for line in ["", *words]:
        given = options(*line.split())
        objective = make_objective(given, opened(folder, zero_terminal_snr=given.zero_terminal_snr))
        found[line] = loss_of(objective, real)
    return found


def assert_each_has_an_effect(found: dict[str, float]) -> None:
    assert all(torch.tensor(value).isfinite() for value in found.values())
    losses: dict[str, list[str]] = {}
    for words, value in found.items():
        losses.setdefault(f"{value:.7g}", []).append(words)
    assert [same for same in losses.values() if len(same) > 1] == []


def test_each_option_changes_the_loss_of_a_noise_model(noise_model):
    assert_each_has_an_effect(losses_of(COMMON + ON_NOISE, BASE, noise_model))


@pytest.mark.slow
def test_each_option_changes_the_loss_of_a_v_model(noise_model, v_folder):
    """The weights were trained for noise, which makes the loss high, no less a function of the options."""
    assert_each_has_an_effect(losses_of(COMMON + ON_V, v_folder, noise_model))


def test_defaults_change_nothing(noise_model):
    plain = loss_of(make_objective(ObjectiveOptions(), noise_model), noise_model)
    words = "--loss_type l2 --min_snr_gamma 0 --noise_offset 0 --multires_noise_iterations 0 --min_timestep 0"
    words += " --max_timestep 1000 --timestep_sampling uniform --weighting_scheme none --ip_noise_gamma 0"
    assert loss_of(make_objective(options(*words.split()), noise_model), noise_model) == plain


# -- closed forms: the model is silent, so the loss is that of the target alone


def keyed(objective: Objective) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, noise and timesteps of the batch."""
    batch = batch_of()
    mean, std = batch.moments
    noise, _ = draw_noise(Noise(), mean, SEED, batch.samples)
    latents = mean + std * stacked_normal(mean.shape[1:], SEED, batch.samples, "vae")
    return latents, noise, objective.levels(SEED, batch.samples, (16, 16))


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("words", ["", "--min_snr_gamma 5", "--debiased_estimation_loss", "--loss_type huber"])
def test_losses_in_closed_form(predicts, words, v_folder):
    family = opened(v_folder if predicts == "v_prediction" else BASE)
    objective = make_objective(options(*words.split()), family)
    latents, noise, t = keyed(objective)
    a = family.process.alphas_cumprod[t]
    snr = a / (1 - a)
    v = a.sqrt().view(-1, 1, 1, 1) * noise - (1 - a).sqrt().view(-1, 1, 1, 1) * latents
    target = (noise if predicts == "epsilon" else v).double()
    per_sample, weight = target.square().mean(dim=(1, 2, 3)), torch.ones_like(a)
    if "min_snr" in words:
        weight = torch.minimum(snr, torch.tensor(5.0)) / (snr + (predicts == "v_prediction"))
    if "debiased" in words:
        cut = snr.clamp(max=1000)
        weight = 1 / cut.sqrt() if predicts == "epsilon" else 1 / (cut + 1)
    if "huber" in words:
        c = (0.9 / (1 + ((1 - a) / a).sqrt()).square() + 0.1).view(-1, 1, 1, 1)
        per_sample = (2 * c * ((target.square() + c.square()).sqrt() - c)).mean(dim=(1, 2, 3))
    assert loss_of(objective, Silent()) == pytest.approx((per_sample * weight).mean().item(), rel=1e-5)


def test_what_the_network_sees_and_what_it_answers():
    """A perturbation is in the input and not in the target; an offset is in both (arXiv 2301.11706)."""
    family, silent = opened(BASE), Silent()
    plain = make_objective(options(), family)
    _, noise, t = keyed(plain)
    plain_loss = loss_of(plain, silent)
    sigma = (1 - family.process.alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1).float()
    seen = silent.noisy
    assert loss_of(make_objective(options("--ip_noise_gamma", "0.5"), family), silent) == plain_loss
    extra = (silent.noisy - seen) / sigma / 0.5
    assert abs(extra.std().item() - 1) < 0.05
    assert abs((extra * noise).mean().item()) < 0.05, "it is the same noise again"

    loss_of(make_objective(options("--noise_offset", "0.5"), family), silent)
    offset = (silent.noisy - seen) / sigma
    torch.testing.assert_close(offset, offset.mean(dim=(2, 3), keepdim=True).expand_as(offset), rtol=0, atol=1e-4)


# -- zero terminal SNR


def test_every_table_comes_from_the_rescaled_noise_schedule(v_folder):
    """Kohya's scripts compute the weights before they rescale (sd-scripts issue 1263)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    table = torch.cumprod(1 - rescale_zero_terminal_snr(betas), dim=0)
    snr = table / (1 - table)
    family = opened(v_folder, zero_terminal_snr=True)
    weights = {
        "--min_snr_gamma 5": snr.clamp(max=5) / (snr + 1),
        "--debiased_estimation_loss": 1 / (snr.clamp(max=1000) + 1),
        "--scale_v_pred_loss_like_noise_pred": snr.clamp(max=1000) / (snr.clamp(max=1000) + 1),
    }
    for words, expected in weights.items():
        objective = make_objective(options("--zero_terminal_snr", *words.split()), family)
        torch.testing.assert_close(objective.main.weights(EVERY), expected, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(objective.process.alphas_cumprod, table, rtol=1e-9, atol=1e-15)
        assert objective.process.alphas_cumprod[999] == 0
    huber = make_objective(options("--zero_terminal_snr", "--loss_type", "huber"), family)
    assert huber.main.thresholds(EVERY)[999] == pytest.approx(0.1)


@pytest.mark.parametrize("words", ["", *[line for line in ON_V if "zero" in line]])
def test_the_last_timestep_is_pure_noise_and_finite(words, v_folder):
    given = options("--zero_terminal_snr", "--min_timestep", "999", *words.replace("--zero_terminal_snr", "").split())
    objective = make_objective(given, opened(v_folder, zero_terminal_snr=True))
    silent = Silent()
    loss = loss_of(objective, silent)
    assert torch.tensor(loss).isfinite()
    assert (silent.t == 999).all()
    latents, noise, _ = keyed(objective)
    if not words.count("noise"):
        torch.testing.assert_close(silent.noisy, noise, rtol=0, atol=0)
    if not words:
        assert loss == pytest.approx(latents.square().mean().item(), rel=1e-5)  # v = -x_0 there


def test_zero_terminal_snr_is_for_models_of_v(v_folder):
    with pytest.raises(UserError, match=r"--zero_terminal_snr: .*base predicts noise"):
        opened(BASE, zero_terminal_snr=True)
    assert opened(v_folder, zero_terminal_snr=False).process.alphas_cumprod[-1] > 0


def test_an_infinite_weight_is_refused(tmp_path):
    """A model of noise whose own schedule ends in pure noise."""
    folder = tmp_path / "base"
    shutil.copytree(BASE, folder)
    set_scheduler(folder, rescale_betas_zero_snr=True)
    family = opened(folder)
    assert make_objective(options("--min_snr_gamma", "5"), family).main.weights(EVERY)[999] == 1
    for words in ("--debiased_estimation_loss", "--v_pred_like_loss 1"):
        with pytest.raises(UserError, match=f"{words.split()[0]}: its weight is infinite at the last timestep"):
            make_objective(options(*words.split()), family)


# -- what does not fit


def test_what_does_not_fit_the_model(noise_model, v_folder, tmp_path):
    with pytest.raises(UserError, match=r"--scale_v_pred_loss_like_noise_pred: .* predicts noise"):
        make_objective(options("--scale_v_pred_loss_like_noise_pred"), noise_model)
    with pytest.raises(UserError, match=r"--v_pred_like_loss: .* predicts v already"):
        make_objective(options("--v_pred_like_loss", "1"), opened(v_folder))
    folder = tmp_path / "base"
    shutil.copytree(BASE, folder)
    set_scheduler(folder, num_train_timesteps=500)
    short = opened(folder)
    with pytest.raises(UserError, match=r"--max_timestep 1000: this model has the timesteps 0 to 499"):
        make_objective(options("--max_timestep", "1000"), short)
    assert make_objective(options(), short).levels(SEED, batch_of().samples, (16, 16)).max() < 500


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--huber_c 0.2", "--huber_c 0.2 has no effect: it matters only together with --loss_type huber or smooth_l1"),
        (
            "--loss_type huber --huber_scale 2",
            "--huber_scale 2.0 has no effect: it matters only together with --huber_",
        ),
        ("--noise_offset_random_strength", "--noise_offset_random_strength True has no effect"),
        ("--multires_noise_discount 0.4", "only together with --multires_noise_iterations"),
        ("--ip_noise_gamma_random_strength", "only together with --ip_noise_gamma"),
        ("--logit_mean 1", "only together with --weighting_scheme logit_normal"),
        ("--min_snr_gamma 5 --debiased_estimation_loss", "their weights are multiplied"),
    ],
)
def test_what_has_no_effect_is_said(words, message, noise_model, caplog):
    with caplog.at_level(logging.WARNING):
        make_objective(options(*words.split()), noise_model)
    assert message in caplog.text


def test_the_draws_of_a_sample_do_not_depend_on_its_neighbours():
    noise = Noise(
        offset=0.1,
        offset_random=True,
        adaptive_scale=0.1,
        resolutions=4,
        perturbation=0.1,
        perturbation_random=True,
    )
    batch = batch_of()
    together = draw_noise(noise, batch.moments[0], SEED, batch.samples)
    for i, draw in enumerate(batch.samples):
        alone = draw_noise(noise, batch.moments[0][i : i + 1], SEED, [draw])
        for ours, its in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[i], its[0])  # the same draws; sums over another batch
    other = draw_noise(noise, batch.moments[0], SEED + 1, batch.samples)
    assert not torch.equal(together[0], other[0])
