"""The common part of the families that are trained by flow matching: transformers whose parts often lie in files of
their own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from library.errors import UserError
from library.models.checkpoints.base_model import BaseModel
from library.models.checkpoints.flux_files import autoencoder_config
from library.models.checkpoints.open_file import with_vae
from library.models.family import AdapterTargets, ModelFamily
from library.models.latent_diffusion import with_scaling

if TYPE_CHECKING:
    from torch import Tensor, nn

    from library.diffusion.flow import Flow, ResolutionShift, Shift, StepsShift
    from library.diffusion.latents import LatentSpace
    from library.models.blocks import Blocks
    from library.models.flow_pipeline import FlowPipeline

PATCH = 2  # latent cells of a token's side
_FLUX_SCALING = 0.3611  # of the latents of FLUX.1's autoencoder


class FlowMatching(ModelFamily):
    """The common part of these families. Each adds its texts, its condition and its call of the transformer."""

    def blocks(self) -> Blocks:
        """The numbered blocks of the transformer, as many as this model has."""
        raise NotImplementedError

    @property
    def size_divisor(self) -> int:
        """A patch of two latent cells."""
        return self.latents.factor * PATCH

    def adapter_targets(self, *names: str) -> list[AdapterTargets]:
        """With as many numbered blocks as this model has."""
        targets, blocks = super().adapter_targets(*names), self.blocks()
        return [replace(target, blocks=blocks) if target.part == "unet" else target for target in targets]

    def pipeline_arguments(self, positive: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"positive": positive, "negative": negative}

    def pipeline(self) -> FlowPipeline:
        from library.diffusion.flow import Flow
        from library.models.flow_pipeline import FlowPipeline

        assert isinstance(self.process, Flow)
        return FlowPipeline(self, self.process)


def plain_noise(script: str) -> dict[str, str]:
    """`ModelFamily.UNUSABLE` of a model whose samples begin with plain noise. script: kohya's, in words."""
    return dict.fromkeys(
        ("noise_offset", "multires_noise_iterations"),
        f"its samples begin with plain noise, so this is never seen there; {script} ignores the option",
    )


def flow_of(sampled: ResolutionShift | StepsShift, drawn: float, **more: Shift) -> Flow:
    """Flow matching with these shifts of the levels: of samples; of levels that are drawn by "sigma" or "shift", which
    --discrete_flow_shift sets; and `more` by other ways of --timestep_sampling. uniform and sigmoid are not shifted."""
    from library.diffusion.flow import Flow

    own: dict[str, Shift] = {**more, "uniform": 1.0, "sigmoid": 1.0, "sigma": drawn, "shift": drawn}
    return Flow(sampled, drawn=own)


def same_shift(shift: float) -> ResolutionShift:
    """This shift for samples of every size."""
    from library.diffusion.flow import ResolutionShift

    mu = math.log(shift)
    return ResolutionShift(mu_of_few=mu, mu_of_many=mu)


def latent_space_of(config: Mapping[str, Any]) -> LatentSpace:
    """Of FLUX.1's autoencoder, from its configuration."""
    from library.diffusion.latents import LatentSpace

    return LatentSpace(
        channels=int(config["latent_channels"]),
        factor=2 ** (len(config["block_out_channels"]) - 1),
        scaling=float(config["scaling_factor"]),
        shift=float(config.get("shift_factor") or 0.0),
        overflows_fp16=bool(config.get("force_upcast", False)),
    )


def in_its_dtype(weight: nn.Parameter, *inputs: Tensor) -> list[Tensor]:
    """The inputs of a module with this weight, in its dtype where autocast does not choose one."""
    import torch

    if torch.is_autocast_enabled(inputs[0].device.type):
        return list(inputs)
    return [one.to(weight.dtype) for one in inputs]


def one_autoencoder(vae: str | None, ae: str | None) -> str | None:
    """The one that --vae or --ae names, which are two names for one thing."""
    if vae and ae and vae != ae:
        raise UserError(f"--vae {vae} and --ae {ae} are two names for one thing: give one of them")
    return vae or ae


def with_flux_autoencoder(base: BaseModel, vae: str | None, ae: str | None) -> tuple[BaseModel, str | None]:
    """A model that has FLUX.1's autoencoder, with the one that --vae or --ae names if any; and that path."""
    own = one_autoencoder(vae, ae)
    if own:
        base = with_vae(base, own, option="ae" if ae else "vae", usual=autoencoder_config())
    return with_scaling(base, default=_FLUX_SCALING), own


def called(base: BaseModel, word: str) -> bool:
    """Whether a model has this word in its name. Versions that are distilled to a few steps have the shapes of the
    others."""
    return word in Path(base.path).name.lower()


def refuse_missing(base: BaseModel, model: str, wanted: Mapping[str, str], *, behind: str = "") -> None:
    """UserError if a part lies neither in the base nor in a file of its own.

    model: its name. wanted: what to give, by the part: the option, and what it names. behind: what ends the sentence.
    """
    if missing := [words for part, words in wanted.items() if part not in base.parts]:
        *most, last = missing
        listed = f"{', '.join(most)} and {last}" if most else last
        raise UserError(f"{base.path} does not hold all parts of {model}: give {listed}{behind}")


class Fit(NamedTuple):
    """Two numbers of channels that must be the same. who: the part that needs them, in words. what: it needs, with a
    preposition: "latents with"."""

    who: str
    what: str
    needed: object
    given: object


def refuse_misfits(base: BaseModel, fits: Sequence[Fit]) -> None:
    """UserError if a part needs other states or latents than the one before it returns. Beside absent parts, whose true
    sizes are not known, nothing is refused."""
    if any(part.absent for part in base.parts.values()):
        return
    for who, what, needed, given in fits:
        if needed != given:
            raise UserError(
                f"{base.path}: its {who} needs {what} {needed} channels and gets {given}: another model's file"
            )
