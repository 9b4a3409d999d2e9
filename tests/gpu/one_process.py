"""One process of `torchrun` that shares the weights, or the optimizer's state, with nobody but itself.

`one_process.py plain|fsdp|zero FOLDER` trains three steps on `FOLDER/data` and writes losses and norms of all gradients
to `FOLDER/WHAT.json`. The command line leaves sharing out where there is one process, so it is asked for here.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from library.config.parser import parse  # noqa: E402
from library.parallel import shard  # noqa: E402
from library.parallel.zero import ZeroTwo  # noqa: E402
from library.run.build import build  # noqa: E402
from library.run.plan import make_plan  # noqa: E402
from library.training import loop  # noqa: E402

if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    words = [
        *("--pretrained_model_name_or_path", str(ROOT / "quickstart" / "base"), "--resolution", "64", "--seed", "1"),
        *("--train_data_dir", str(folder / "data"), "--caption_extension", ".txt", "--output_dir", str(folder / what)),
        *("--network_dim", "4", "--learning_rate", "1e-3", "--max_train_steps", "3", "--cache_latents"),
        *("--no-monitoring", "--no-loss_plot", "--gradient_checkpointing"),
    ]
    run = build(make_plan(parse(words)))
    assert torch.distributed.is_initialized()
    assert run.accelerator.num_processes == 1
    if what == "fsdp":
        shard.share_out(run.family.components["denoiser"], run.family.denoiser_blocks(), run.accelerator)  # type: ignore[arg-type]
        from torch.distributed.tensor import DTensor

        assert all(isinstance(parameter, DTensor) for parameter in run.family.components["denoiser"].parameters())  # type: ignore[union-attr]
    if what == "zero":
        zero = ZeroTwo(run.network, run.optimizer.optimizer, run.accelerator, accumulation=1, max_grad_norm=1.0)
        run = replace(run, optimizer=zero, gradients=zero)
    losses = [loop.optimizer_step(run, item).loss for item in loop.step_batches(run)]
    weights = sum(parameter.detach().double().square().sum().item() for parameter in run.parameters)
    found = {"backend": torch.distributed.get_backend(), "losses": losses, "weights": weights}
    (folder / f"{what}.json").write_text(json.dumps(found))
    run.accelerator.state.destroy_process_group()
