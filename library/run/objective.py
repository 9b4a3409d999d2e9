"""From the options of noise, timesteps and loss to the objective of the steps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from library.config import registry
from library.config.options.objective import ObjectiveOptions
from library.diffusion import levels
from library.diffusion.noise import Noise
from library.diffusion.process import Process
from library.errors import UserError
from library.losses import LOSSES, huber, snr
from library.losses.main import MainLoss
from library.models.family import ModelFamily
from library.training.step import Level, Objective

logger = logging.getLogger(__name__)


OfLevels = Callable[[Tensor], Tensor]
"""A number for each noise level [B]."""


def make_objective(options: ObjectiveOptions, family: ModelFamily) -> Objective:
    """The objective of these options with this model. Raises UserError if they do not fit it.

    All weights come from the model's final noise schedule, after --zero_terminal_snr.
    """
    for sentence in options.without_effect():
        logger.warning("%s", sentence)
    process = family.process
    for name, why in family.UNUSABLE.items():
        if getattr(options, name):
            raise UserError(f"--{name}: {family.path} is {family.TITLE}: {why}")
    if options.noise_offset and process.prediction_type == "v_prediction":
        logger.warning(
            "--noise_offset %g: %s predicts v, and users report that the offset ruins LoRAs of such models; it is for "
            "models that predict noise. --noise_offset 0 switches it off",
            *(options.noise_offset, family.path),
        )
    return Objective(
        process=process,
        level=_level(options, family),
        steps=_step_range(options, process),
        noise=_noise(options),
        main=MainLoss(
            loss=registry.load(LOSSES, options.loss_type, where="--loss_type"),
            thresholds=_thresholds(options, process),
            weights=_weights(options, family),
        ),
    )


def _step_range(options: ObjectiveOptions, process: Process) -> tuple[int, int]:
    """--min_timestep and --max_timestep, the end excluded; if both are equal, only that step, as in kohya."""
    low = options.min_timestep or 0
    high = process.steps if options.max_timestep is None else options.max_timestep
    return low, max(high, low + 1)


def _level(options: ObjectiveOptions, family: ModelFamily) -> Level:
    """Draws one noise level in the trained range."""
    process, sampling = family.process, options.timestep_sampling
    low, high = _step_range(options, process)
    if sampling not in process.samplings:
        raise UserError(
            f"--timestep_sampling {sampling}: {family.path} is {family.TITLE}, for which there are "
            f"{', '.join(process.samplings)}; --training_shift shifts the timesteps of every model"
        )
    if high > process.steps:
        raise UserError(f"--max_timestep {options.max_timestep}: this model has the timesteps 0 to {process.steps - 1}")
    densities: dict[str, levels.Density] = {
        "uniform": levels.uniform,
        "sigmoid": partial(levels.logit_normal, mean=0.0, std=options.sigmoid_scale),
        "logit_normal": partial(levels.logit_normal, mean=options.logit_mean, std=options.logit_std),
        "mode": partial(levels.mode, scale=options.mode_scale),
    }
    density: levels.Density | None = densities[options.density]
    if options.training_shift != 1:
        density = partial(levels.shifted_density, densities[options.density], shift=options.training_shift)
    elif options.density == "uniform":
        density = None

    def draw(generator: torch.Generator, size: tuple[int, int]) -> float:
        return process.draw(generator, density=density, low=low, high=high, size=size, sampling=sampling)

    return draw


def _noise(options: ObjectiveOptions) -> Noise:
    return Noise(
        offset=options.noise_offset or 0.0,
        offset_random=options.noise_offset_random_strength,
        adaptive_scale=options.adaptive_noise_scale or 0.0,
        resolutions=options.multires_noise_iterations or 0,
        discount=options.multires_noise_discount,
        perturbation=options.ip_noise_gamma or 0.0,
        perturbation_random=options.ip_noise_gamma_random_strength,
    )


def _thresholds(options: ObjectiveOptions, process: Process) -> OfLevels | None:
    if options.loss_type not in ("huber", "smooth_l1"):
        return None

    def thresholds(level_B: Tensor) -> Tensor:
        ratios, shares = process.signal_to_noise(level_B), process.share(level_B)
        return huber.thresholds(options.huber_schedule, ratios, shares, c=options.huber_c, scale=options.huber_scale)

    return thresholds


def _weights(options: ObjectiveOptions, family: ModelFamily) -> OfLevels | None:
    """The product of the given weightings."""
    process = family.process
    predicts = process.prediction_type
    if options.scale_v_pred_loss_like_noise_pred and predicts != "v_prediction":
        raise UserError(
            f"--scale_v_pred_loss_like_noise_pred: {family.path} predicts noise, not v, so there is nothing to scale"
        )
    if options.v_pred_like_loss and predicts == "v_prediction":
        raise UserError(f"--v_pred_like_loss: {family.path} predicts v already; the option is for models of noise")
    factors: dict[str, OfLevels] = {}
    if options.min_snr_gamma:
        factors["min_snr_gamma"] = partial(snr.min_snr_weight, gamma=options.min_snr_gamma, prediction_type=predicts)
    if options.scale_v_pred_loss_like_noise_pred:
        factors["scale_v_pred_loss_like_noise_pred"] = snr.like_noise_weight
    if options.v_pred_like_loss:
        factors["v_pred_like_loss"] = partial(snr.v_like_weight, strength=options.v_pred_like_loss)
    if options.debiased_estimation_loss:
        factors["debiased_estimation_loss"] = partial(snr.debiased_weight, prediction_type=predicts)
    if factors and predicts == "velocity":
        raise UserError(
            f"--{next(iter(factors))}: {family.path} is trained by flow matching, and the weight is for models that "
            "predict noise or v; leave it out"
        )
    every_ratio = process.signal_to_noise(process.at(torch.arange(process.steps)))
    for name, factor in factors.items():
        if not factor(every_ratio).isfinite().all():
            raise UserError(
                f"--{name}: its weight is infinite at the last timestep of {family.path}, whose noise schedule ends "
                "in pure noise (zero terminal SNR)"
            )
    if len(factors) > 1:
        names = " and ".join(f"--{name}" for name in factors)
        logger.warning("%s each weight the timesteps: their weights are multiplied, as in kohya's scripts", names)

    def weights(level_B: Tensor) -> Tensor:
        ratios = process.signal_to_noise(level_B)
        return torch.stack([factor(ratios) for factor in factors.values()]).prod(dim=0)

    return weights if factors else None
