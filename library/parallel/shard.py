"""The denoiser's frozen weights shared out over the processes, for models that do not fit into one GPU.

`accelerate launch` with an FSDP configuration asks for it. Accelerate's own FSDP wraps what is trained; a LoRA is small
and the frozen denoiser is not, so here the denoiser is what is shared out, by torch's `fully_shard`, and the LoRA with
its optimizer stays whole on every process: any optimizer works, and the files are those of one process.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from library.errors import UserError
from library.parallel import zero
from networks import kinds

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from library.config.options import Options
    from library.models.family import ModelFamily

logger = logging.getLogger(__name__)

_FSDP = "ACCELERATE_USE_FSDP"


def is_asked_for() -> bool:
    """Whether the launcher's configuration is one of FSDP."""
    return os.environ.get(_FSDP, "false").lower() == "true"


def refuse_what_cannot_be(options: Options) -> None:
    """UserError for launchers' configurations, and options beside FSDP, that this program has no use for."""
    if os.environ.get("ACCELERATE_USE_MEGATRON_LM", "false").lower() == "true":
        raise UserError(
            "accelerate's configuration asks for Megatron-LM: it is for language models. Use "
            "configs/accelerate/multi_gpu.yaml, or fsdp.yaml to share out the model's frozen weights"
        )
    if not is_asked_for():
        return
    samples = options.samples
    drawn = samples.sample_every_n_steps or samples.sample_every_n_epochs or samples.sample_at_first
    for option, given in (("sample_prompts", drawn), ("compare_prompts", options.output.compare_prompts)):
        if given:
            raise UserError(f"--{option} with FSDP: one process draws, and has only a part of the model: leave it out")
    if options.precision.holds_unet_in_float8:
        raise UserError(f"--{options.precision.float8_option} with FSDP: only weights of one precision are shared out")
    if refusal := kinds.refuses(options.network.network_module, "fsdp"):
        raise UserError(refusal)


@contextlib.contextmanager
def without_accelerates_own() -> Iterator[None]:
    """A context in which accelerate is told of no FSDP or DeepSpeed: it would want to wrap the model itself."""
    asked = {name: os.environ.pop(name) for name in (_FSDP, zero.ASKED) if name in os.environ}
    try:
        yield
    finally:
        os.environ |= asked


def shard(family: ModelFamily, accelerator: Accelerator) -> bool:
    """Leave each process its share of the denoiser's weights; a block's are put together while it computes.

    Every process must then run the denoiser as often as the others. False if there is only one.
    """
    if accelerator.num_processes == 1:
        logger.warning("FSDP with one process: there is nobody to share the weights with")
        return False
    denoiser = family.components["denoiser"]
    whole = sum(parameter.numel() * parameter.element_size() for parameter in denoiser.parameters())
    share_out(denoiser, family.denoiser_blocks(), accelerator)
    logger.info(
        "the %s's weights, %.0f MB, are shared out over %d processes",
        *(family.PARTS["denoiser"].title, whole / 1e6, accelerator.num_processes),
    )
    return True


def share_out(denoiser: nn.Module, blocks: Iterable[nn.Module], accelerator: Accelerator) -> None:
    """Over all processes, also where that is one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(denoiser, mesh=mesh)
