"""From the options of noise, timesteps and loss to the objective of the steps, its tables computed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from library.config import registry
from library.config.options.objective import ObjectiveOptions
from library.diffusion import ddpm, timesteps
from library.diffusion.noise import Noise
from library.errors import UserError
from library.losses import LOSSES, huber, snr
from library.models.family import ModelFamily
from library.training.step import Objective

logger = logging.getLogger(__name__)


def make_objective(options: ObjectiveOptions, family: ModelFamily) -> Objective:
    """What these options minimise with this model. Raises UserError where they do not fit it.

    Every table is made from the model's final noise schedule, in which --zero_terminal_snr is done already.
    """
    for sentence in options.without_effect():
        logger.warning("%s", sentence)
    if options.noise_offset and family.prediction_type == "v_prediction":
        logger.warning(
            "--noise_offset %g: %s predicts v, and users report that the offset ruins LoRAs of such models; it is for "
            "those that predict noise. --noise_offset 0 leaves it out",
            *(options.noise_offset, family.path),
        )
    return Objective(
        prediction_type=family.prediction_type,
        alphas_cumprod=family.alphas_cumprod,
        loss=registry.load(LOSSES, options.loss_type, where="--loss_type"),
        timestep=_timestep(options, len(family.alphas_cumprod)),
        noise=_noise(options),
        thresholds=_thresholds(options, family.alphas_cumprod),
        weights=_weights(options, family),
    )


def _timestep(options: ObjectiveOptions, count: int) -> Callable[[torch.Generator], int]:
    """Draws one timestep in --min_timestep ... --max_timestep - 1; of two that are equal, that one, as in kohya."""
    low = options.min_timestep or 0
    high = count if options.max_timestep is None else options.max_timestep
    if low == high:
        high += 1
    if high > count:
        raise UserError(f"--max_timestep {options.max_timestep}: this model has the timesteps 0 to {count - 1}")
    if options.density == "uniform" and options.training_shift == 1:
        return partial(timesteps.uniform_timestep, low=low, high=high)
    densities: dict[str, timesteps.Density] = {
        "uniform": timesteps.uniform,
        "sigmoid": partial(timesteps.logit_normal, mean=0.0, std=options.sigmoid_scale),
        "logit_normal": partial(timesteps.logit_normal, mean=options.logit_mean, std=options.logit_std),
        "mode": partial(timesteps.mode, scale=options.mode_scale),
    }
    density = densities[options.density]
    return partial(timesteps.timestep, density=density, shift=options.training_shift, low=low, high=high)


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


def _thresholds(options: ObjectiveOptions, alphas_cumprod: Tensor) -> Tensor | None:
    if options.loss_type not in ("huber", "smooth_l1"):
        return None
    return huber.thresholds(options.huber_schedule, alphas_cumprod, c=options.huber_c, scale=options.huber_scale)


def _weights(options: ObjectiveOptions, family: ModelFamily) -> Tensor | None:
    """The product of the weightings that are asked for, per timestep."""
    predicts = family.prediction_type
    if options.scale_v_pred_loss_like_noise_pred and predicts != "v_prediction":
        raise UserError(
            f"--scale_v_pred_loss_like_noise_pred: {family.path} predicts noise, not v, so there is nothing to scale"
        )
    if options.v_pred_like_loss and predicts == "v_prediction":
        raise UserError(f"--v_pred_like_loss: {family.path} predicts v already; the option is for models of noise")
    ratios = ddpm.signal_to_noise(family.alphas_cumprod)
    factors: dict[str, Tensor] = {}
    if options.min_snr_gamma:
        gamma = options.min_snr_gamma
        factors["min_snr_gamma"] = snr.min_snr_weight(ratios, gamma=gamma, prediction_type=predicts)
    if options.scale_v_pred_loss_like_noise_pred:
        factors["scale_v_pred_loss_like_noise_pred"] = snr.like_noise_weight(ratios)
    if options.v_pred_like_loss:
        factors["v_pred_like_loss"] = snr.v_like_weight(ratios, strength=options.v_pred_like_loss)
    if options.debiased_estimation_loss:
        factors["debiased_estimation_loss"] = snr.debiased_weight(ratios, prediction_type=predicts)
    for name, factor in factors.items():
        if not factor.isfinite().all():
            raise UserError(
                f"--{name}: its weight is infinite at the last timestep of {family.path}, whose noise schedule ends "
                "in pure noise (zero terminal SNR)"
            )
    if len(factors) > 1:
        names = " and ".join(f"--{name}" for name in factors)
        logger.warning("%s each weight the timesteps: their weights are multiplied, as in kohya's scripts", names)
    return torch.stack(list(factors.values())).prod(dim=0) if factors else None
