"""The options of the objective: noise, timesteps, loss and the weights of timesteps.

Names, defaults and meanings are kohya's. The distributions of timesteps carry the names that kohya's scripts for SD3
and FLUX have for them; here they serve every model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from library.config.fields import option
from library.errors import UserError

_ABOVE_ZERO = ("huber_c", "huber_scale", "logit_std", "sigmoid_scale", "training_shift")
_LIKE_SIGMOID = ("sigmoid", "shift", "flux_shift", "flux2_shift")  # the others move what sigmoid draws


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """Noise, timesteps and loss"""

    loss_type: Literal["l2", "l1", "huber", "smooth_l1"] = option("l2", help="the loss")
    huber_schedule: Literal["constant", "exponential", "snr"] = option(
        "snr", help="how the threshold of huber and smooth_l1 decreases with the timestep"
    )
    huber_c: float = option(
        0.1, minimum=0, help="the threshold of huber and smooth_l1 where there is most noise; with constant: everywhere"
    )
    huber_scale: float = option(
        1.0, minimum=0, help="factor of the threshold of huber and smooth_l1; constant and exponential only"
    )
    min_snr_gamma: float | None = option(
        None, minimum=0, zero_is_unset=True, help="weight timesteps by min-SNR with this gamma; 5 is usual"
    )
    debiased_estimation_loss: bool = option(False, help="weight timesteps by 1 / sqrt(SNR), for v by 1 / (SNR + 1)")
    scale_v_pred_loss_like_noise_pred: bool = option(
        False, help="weight a v-prediction loss by timestep as if the same network predicted noise"
    )
    v_pred_like_loss: float | None = option(
        None, minimum=0, zero_is_unset=True, help="for models that predict noise: add the loss on v, times this"
    )
    zero_terminal_snr: bool = option(
        False, help="rescale the noise schedule so that its last timestep is pure noise; for v-prediction models"
    )
    noise_offset: float | None = option(
        None,
        minimum=0,
        zero_is_unset=True,
        help="shift the noise of each channel as a whole by a random number times this; 0.1 is usual",
    )
    noise_offset_random_strength: bool = option(
        False, help="scale --noise_offset by a random factor from 0 to 1 for each image"
    )
    adaptive_noise_scale: float | None = option(
        None, zero_is_unset=True, help="add this times the latents' absolute mean, per channel, to --noise_offset"
    )
    multires_noise_iterations: int | None = option(
        None, minimum=1, zero_is_unset=True, help="add noise of this many coarser resolutions; 6 to 10 are usual"
    )
    multires_noise_discount: float = option(
        0.3, minimum=0, help="factor from the noise of each resolution to the next coarser one"
    )
    ip_noise_gamma: float | None = option(
        None,
        minimum=0,
        zero_is_unset=True,
        help="perturb the network's input with additional noise of this strength; 0.1 is usual",
    )
    ip_noise_gamma_random_strength: bool = option(
        False, help="scale --ip_noise_gamma by a random factor from 0 to 1 for each image"
    )
    min_timestep: int | None = option(None, minimum=0, help="the first timestep that is trained (default: 0)")
    max_timestep: int | None = option(None, minimum=1, help="train timesteps below this one (default: 1000, all)")
    timestep_sampling: Literal["sigma", "uniform", "sigmoid", "shift", "flux_shift", "flux2_shift"] = option(
        "sigma",
        help="how timesteps are drawn; sigma: by --weighting_scheme; sigmoid: more from the middle, Anima's default; "
        "for FLUX, Chroma, Anima and Z-Image also shift, sigmoid with --discrete_flow_shift (Z-Image's default), and "
        "with a shift that grows with the image flux_shift for FLUX.1 and Chroma, and flux2_shift for FLUX.2 (its "
        "default)",
    )
    sigmoid_scale: float = option(
        1.0, minimum=0, help="width of sigmoid, shift, flux_shift and flux2_shift; above 1 nearer to uniform"
    )
    weighting_scheme: Literal["uniform", "none", "logit_normal", "mode"] = option(
        "uniform",
        not_yet=("sigma_sqrt", "cosmap"),
        help="how timesteps are drawn: uniform (none is the same), or as SD3's logit_normal or mode",
    )
    logit_mean: float = option(0.0, help="centre of logit_normal; above 0: more noise")
    logit_std: float = option(1.0, minimum=0, help="width of logit_normal")
    mode_scale: float = option(1.29, minimum=-1, maximum=1.75, help="how much more mode draws from the middle")
    training_shift: float = option(1.0, minimum=0, help="above 1: timesteps with more noise, below: with less")

    def __post_init__(self) -> None:
        idle = self.idle()
        for name in _ABOVE_ZERO:
            if getattr(self, name) == 0 and name not in idle:
                raise UserError(f"--{name} must be above 0")
        if self.adaptive_noise_scale is not None and self.noise_offset is None:
            raise UserError("--adaptive_noise_scale needs --noise_offset, which it adds to")
        low, high = self.min_timestep or 0, 1000 if self.max_timestep is None else self.max_timestep
        if low > high or low > 999 or high > 1000:
            raise UserError(
                f"--min_timestep {low} and --max_timestep {high} leave no timestep to train: there are 0 to 999"
            )
        if self.timestep_sampling != "sigma" and self.weighting_scheme not in ("uniform", "none"):
            raise UserError(
                f"--timestep_sampling {self.timestep_sampling} and --weighting_scheme {self.weighting_scheme} each "
                "choose the distribution of timesteps: give one of them"
            )

    @property
    def density(self) -> str:
        """The distribution of timesteps before a shift: uniform, sigmoid, logit_normal or mode."""
        if self.timestep_sampling != "sigma":
            return "sigmoid" if self.timestep_sampling in _LIKE_SIGMOID else self.timestep_sampling
        return "uniform" if self.weighting_scheme == "none" else self.weighting_scheme

    def idle(self) -> dict[str, str]:
        """The options without effect beside the others, each with the words that follow "has no effect"."""
        huber = self.loss_type in ("huber", "smooth_l1")
        scaled = huber and self.huber_schedule != "snr"
        matters = {
            "huber_schedule": (huber, "--loss_type huber or smooth_l1"),
            "huber_c": (huber, "--loss_type huber or smooth_l1"),
            "huber_scale": (scaled, "--huber_schedule constant or exponential, and --loss_type huber or smooth_l1"),
            "noise_offset_random_strength": (self.noise_offset, "--noise_offset"),
            "multires_noise_discount": (self.multires_noise_iterations, "--multires_noise_iterations"),
            "ip_noise_gamma_random_strength": (self.ip_noise_gamma, "--ip_noise_gamma"),
            "sigmoid_scale": (
                self.density == "sigmoid",
                f"--timestep_sampling {' or '.join(_LIKE_SIGMOID)}",
            ),
            "logit_mean": (self.density == "logit_normal", "--weighting_scheme logit_normal"),
            "logit_std": (self.density == "logit_normal", "--weighting_scheme logit_normal"),
            "mode_scale": (self.density == "mode", "--weighting_scheme mode"),
        }
        return {
            name: f": it matters only together with {others}" for name, (used, others) in matters.items() if not used
        }

    def without_effect(self) -> list[str]:
        """One sentence for each option that was changed from its default and has no effect beside the other options."""
        fields = type(self).__dataclass_fields__
        return [
            f"--{name} {getattr(self, name)} has no effect{why}"
            for name, why in self.idle().items()
            if getattr(self, name) != fields[name].default
        ]
