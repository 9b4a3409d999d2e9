"""Shards the denoiser's frozen weights over the processes, for models that do not fit into one GPU.

An FSDP configuration of `accelerate launch` turns it on. Accelerate's own FSDP wraps the trained module; a LoRA is
small and the frozen denoiser is not, so here the denoiser is sharded, by torch's `fully_shard`, and the LoRA with its
optimizer stays whole on every process: any optimizer works, and the files are those of one process.
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
    """UserError for configurations of the launcher, and options beside FSDP, that are not supported."""
    if os.environ.get("ACCELERATE_USE_MEGATRON_LM", "false").lower() == "true":
        raise UserError(
            "accelerate's configuration asks for Megatron-LM: it is for language models. Use "
            "configs/accelerate/multi_gpu.yaml, or fsdp.yaml to shard the model's frozen weights"
        )
    if not is_asked_for():
        return
    samples = options.samples
    drawn = samples.sample_every_n_steps or samples.sample_every_n_epochs or samples.sample_at_first
    for option, given in (("sample_prompts", drawn), ("compare_prompts", options.output.compare_prompts)):
        if given:
            raise UserError(
                f"--{option} with FSDP: one process renders, and has only a part of the model: leave it out"
            )
    if options.slider.is_trained:
        raise UserError(
            "--prompts_file with FSDP: each process denoises a number of steps of its own, and sharded weights need "
            "equally many on all; configs/accelerate/multi_gpu.yaml and deepspeed_zero2.yaml do not"
        )
    if options.precision.unet_format:
        name = options.precision.unet_format_option
        raise UserError(f"--{name} with FSDP: only weights of one precision can be sharded")
    if options.precision.blocks_to_swap:
        raise UserError("--blocks_to_swap with FSDP: sharded weights are gathered on the GPU; use one of the two")
    if refusal := kinds.refuses(options.network.network_module, "fsdp"):
        raise UserError(refusal)


@contextlib.contextmanager
def without_accelerates_own() -> Iterator[None]:
    """A context that hides FSDP or DeepSpeed from accelerate, which would wrap the model itself."""
    asked = {name: os.environ.pop(name) for name in (_FSDP, zero.ASKED) if name in os.environ}
    try:
        yield
    finally:
        os.environ |= asked


def shard(family: ModelFamily, accelerator: Accelerator) -> bool:
    """Shard the denoiser's weights; a block's weights are gathered while it computes.

    Every process must then run the denoiser equally often. Returns False if there is only one process.
    """
    if accelerator.num_processes == 1:
        logger.warning("FSDP with one process: the weights are not sharded")
        return False
    denoiser = family.components["denoiser"]
    whole = sum(parameter.numel() * parameter.element_size() for parameter in denoiser.parameters())
    share_out(denoiser, family.denoiser_blocks(), accelerator)
    logger.info(
        "the %s's weights, %.0f MB, are sharded over %d processes",
        *(family.PARTS["denoiser"].title, whole / 1e6, accelerator.num_processes),
    )
    return True


def share_out(denoiser: nn.Module, blocks: Iterable[nn.Module], accelerator: Accelerator) -> None:
    """Shard over all processes, even if there is only one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(denoiser, mesh=mesh)
