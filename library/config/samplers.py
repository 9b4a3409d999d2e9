"""Kohya's names of samplers, and the class of diffusers that each stands for."""

from __future__ import annotations

import logging

from library.config.fields import BadValue
from library.errors import did_you_mean

logger = logging.getLogger(__name__)

_SCHEDULERS = "diffusers.schedulers.scheduling_"
_DPM = f"{_SCHEDULERS}dpmsolver_multistep.DPMSolverMultistepScheduler"

SAMPLERS: dict[str, str] = {
    "ddim": f"{_SCHEDULERS}ddim.DDIMScheduler",
    "pndm": f"{_SCHEDULERS}pndm.PNDMScheduler",
    "lms": f"{_SCHEDULERS}lms_discrete.LMSDiscreteScheduler",
    "euler": f"{_SCHEDULERS}euler_discrete.EulerDiscreteScheduler",
    "euler_a": f"{_SCHEDULERS}euler_ancestral_discrete.EulerAncestralDiscreteScheduler",
    "heun": f"{_SCHEDULERS}heun_discrete.HeunDiscreteScheduler",
    "dpm_2": f"{_SCHEDULERS}k_dpm_2_discrete.KDPM2DiscreteScheduler",
    "dpm_2_a": f"{_SCHEDULERS}k_dpm_2_ancestral_discrete.KDPM2AncestralDiscreteScheduler",
    "dpmsolver": _DPM,
    "dpmsolver++": _DPM,
    "dpmsingle": f"{_SCHEDULERS}dpmsolver_singlestep.DPMSolverSinglestepScheduler",
}
_SAME = {f"k_{name}": name for name in ("lms", "euler", "euler_a", "dpm_2", "dpm_2_a")}
# Other programs' names that occur in users' files. Kohya's scripts silently use ddim for them.
_OTHERS = {"dpmpp_2m": "dpmsolver++", "dpm++_2m": "dpmsolver++", "euler_ancestral": "euler_a"}


def read_sampler(word: str) -> str:
    """One of SAMPLERS. Names of other programs for one of them are taken with a warning. Raises BadValue."""
    if word in _OTHERS:
        logger.warning("sample_sampler %s: its name here is %s", word, _OTHERS[word])
        return _OTHERS[word]
    name = _SAME.get(word, word)
    if name not in SAMPLERS:
        known = (*SAMPLERS, *_SAME)
        raise BadValue(f"'{word}' is not one of {', '.join(known)}{did_you_mean(word, known)}")
    return name
