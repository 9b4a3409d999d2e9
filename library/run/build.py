"""From a plan to a run that is ready for its first step."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import get_args

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LRScheduler

from library.data.dataset import TrainingData
from library.data.prepared import Prepared
from library.data.sources.prompts import PromptData
from library.errors import UserError
from library.losses.distillation import Distillation
from library.losses.preservation import Active, Preservation
from library.losses.term import LossTerm
from library.optimizers import weight_decay_choice
from library.optimizers.create import ParameterGroups, create_optimizer
from library.optimizers.schedules import create_schedule
from library.parallel import shard, together, zero
from library.record.run_file import RunFile
from library.record.saves import SavePlan
from library.run import base_weights, compiled, disk, start
from library.run.about import recording
from library.run.curves import Curves, curves_of, of_length
from library.run.encode import load_and_encode, trains_text
from library.run.hooks import Made, MeasuredData, make_hooks
from library.run.measured import Use
from library.run.network import make_network, parameter_groups
from library.run.objective import make_objective
from library.run.plan import Plan
from library.run.slider import pictured
from library.sampling.render import EncodedPrompts
from library.training import state
from library.training.gradients import Gradients, WholeGradients
from library.training.hooks.weight_decay import Observe
from library.training.previous import PreviousNetwork
from library.training.run import Position, Run, StepOptimizer
from library.training.slider import SliderLoss
from library.training.step import BatchLossOf, Objective, batch_loss
from networks.network import TrainableNetwork

logger = logging.getLogger(__name__)

Following = tuple[LRScheduler | None, Observe | None]
"""The schedule of the learning rates, and the function by which the adaptive weight decay observes the losses."""


def build(plan: Plan, record: RunFile | None = None) -> Run:
    """Load, encode, wrap: everything before the first step. Each part's memory is freed once it is no longer needed.

    `record`: is begun before the models are loaded; None: there is none. Raises UserError for options, models and
    files that do not fit together, and for files that would be replaced.
    """
    options = plan.options
    objective = make_objective(options.objective, plan.family)
    accelerator = start.make_accelerator(plan)
    per_step = accelerator.num_processes * options.training.gradient_accumulation_steps
    saves = start.plan_saves(plan, accelerator, batches_per_step=per_step)
    facts = _facts(plan, saves, batches_per_step=per_step)
    together.refuse_different(accelerator, facts)
    curves = curves_of(plan, total_steps=saves.total_steps)
    changed: frozenset[str] = frozenset()
    if plan.resume is not None:
        changed = state.refuse_other_run(
            plan.resume, now=facts, of_length=of_length(plan, curves), anyway=options.run.resume_anyway
        )
    plan = replace(plan, choice=curves.optimizer)
    if record is None:
        record = RunFile()  # does nothing
    elif accelerator.is_main_process:
        recording.begin(record, plan, saves)
    data = _data(plan, batches_per_step=per_step, total_steps=saves.total_steps)
    measured = _measured(plan)
    prompts = EncodedPrompts(plan.family, _texts_to_draw(plan))
    load_and_encode(
        plan.family,
        data,
        options,
        accelerator,
        base_weights.merged(options.network, plan.family),
        prompts,
        measured=measured.all(),
        cache=not options.run.dry_run,
    )
    apart = base_weights.attached(options, plan.family, accelerator.device)
    core, following = _core(plan, accelerator, objective, saves, data, curves)
    run = replace(core, hooks=make_hooks(plan, core, curves, Made(*following, measured, prompts, facts, record, apart)))
    if plan.resume is not None:
        state.load(plan.resume, run, changed=changed)
    if accelerator.is_main_process and options.trains:
        _refuse_full_disk(plan, run)
    if plan.resume is not None:
        for hook in run.hooks:
            hook.resumed(run)
    return run


def _data(plan: Plan, *, batches_per_step: int, total_steps: int) -> TrainingData:
    """The images, or the prompts of a slider."""
    steps = {"batches_per_step": batches_per_step, "total_steps": total_steps}
    if plan.settings:
        return PromptData(plan.prepared, plan.settings, seed=plan.seed, **steps)
    weight = plan.options.data.prior_loss_weight
    return TrainingData(plan.prepared, seed=plan.seed, prior_loss_weight=weight, **steps)


def _facts(plan: Plan, saves: SavePlan, *, batches_per_step: int) -> state.Facts:
    """The facts that a resumed run, and every process of this one, must agree on."""
    return state.facts_of(
        plan.options,
        plan.datasets,
        plan.prepared,
        seed=plan.seed,
        session_id=plan.session_id,
        started_at=plan.started_at,
        total_steps=saves.total_steps,
        batches_per_step=batches_per_step,
    )


def _core(
    plan: Plan, accelerator: Accelerator, objective: Objective, saves: SavePlan, data: TrainingData, curves: Curves
) -> tuple[Run, Following]:
    """The run without hooks, and the curves of its optimizer. Models must be loaded."""
    options, family = plan.options, plan.family
    network = make_network(
        options,
        family,
        arguments=plan.network_arguments,
        seed=plan.seed,
        device=accelerator.device,
    )
    together.same_start(accelerator, network)
    if options.compile.is_asked_for and not options.run.dry_run:
        compiled.compile_blocks(family, options)
    shares = shard.is_asked_for() and not options.run.dry_run and shard.shard(family, accelerator)
    if options.validation.forgetting_dir or plan.settings:
        _refuse_without_off(network)
    objective = replace(objective, more=_terms(plan, network, objective))
    groups, optimizer = _optimizer(plan, network)
    # before accelerate wraps the optimizer: it would restore a step() that the schedule has not patched
    schedule = None if curves.schedule is None else create_schedule(curves.schedule, optimizer)
    observe = weight_decay_choice.attach(curves.decay, optimizer)
    wrapped, gradients = _wrapped(plan, accelerator, network, groups, optimizer)
    loader = data.loader(
        workers=options.data.max_data_loader_n_workers,
        world_size=accelerator.num_processes,
        persistent=options.data.persistent_data_loader_workers,
        pin=accelerator.device.type == "cuda",
    )
    dummy = None
    if shares or gradients.sharded:
        dummy = next(data.batches([data.plan(0)[accelerator.process_index]], epoch=0, loader=loader))
    run = Run(
        accelerator=accelerator,
        family=family,
        network=network,
        groups=groups,
        optimizer=wrapped,
        gradients=gradients,
        data=data,
        loader=loader,
        objective=objective,
        batch_loss=_batch_loss(plan, network),
        train_text=trains_text(options),
        seed=plan.seed,
        accumulation=options.training.gradient_accumulation_steps,
        saves=saves,
        position=Position(total=saves.total_steps),
        dummy=dummy,
    )
    return run, (schedule, observe)


def _batch_loss(plan: Plan, network: TrainableNetwork) -> BatchLossOf:
    """The loss of a batch of images, or of a slider's prompts."""
    wanted = plan.options.slider
    if not plan.settings:
        return batch_loss
    return SliderLoss(network, wanted.max_denoising_steps, wanted.leco_denoise_guidance_scale)


def _terms(plan: Plan, network: TrainableNetwork, objective: Objective) -> tuple[LossTerm, ...]:
    """The terms beside the main loss. Raises UserError for a network that cannot be the base alone."""
    family, wanted = plan.family, plan.options.forgetting
    priors = {subset.prior for dataset in plan.datasets for subset in dataset.subsets if subset.prior}
    if "base" in priors:
        _refuse_without_off(network)
    contexts: dict[str, Active] = {"base": network.off}
    if "previous" in priors or wanted.distillation_weight:
        contexts["previous"] = PreviousNetwork(network).active
    terms: list[LossTerm] = []
    if priors:
        terms.append(Preservation(family.predict, {name: contexts[name] for name in sorted(priors)}, objective.main))
    if wanted.distillation_weight:
        weight, schedule = wanted.distillation_weight, wanted.distillation_schedule
        previous = contexts["previous"]
        logger.info("distillation: weight %g, %s, from %s", weight, schedule, plan.options.network.network_weights)
        terms.append(Distillation(family.predict, previous, objective.main, weight=weight, schedule=schedule))
    return tuple(terms)


def _refuse_without_off(network: TrainableNetwork) -> None:
    """Raise UserError now, not in the first step, for a network that cannot be switched off."""
    if refusal := network.refuses("off"):
        raise UserError(refusal)


def _optimizer(plan: Plan, network: TrainableNetwork) -> tuple[ParameterGroups, torch.optim.Optimizer]:
    """The network's parameters in groups, each with its rate, and the optimizer of them."""
    options, choice = plan.options, plan.choice
    groups = parameter_groups(network, options)
    optimizer = create_optimizer(
        choice, [dict(group) for group in groups], learning_rate=max(group["lr"] for group in groups)
    )
    groups = [{**group, "lr": own["lr"]} for group, own in zip(groups, optimizer.param_groups, strict=True)]
    return groups, optimizer


def _wrapped(
    plan: Plan,
    accelerator: Accelerator,
    network: TrainableNetwork,
    groups: ParameterGroups,
    optimizer: torch.optim.Optimizer,
) -> tuple[StepOptimizer, Gradients]:
    """The optimizer, by accelerate or sharded by ZeRO, and what computes its gradients."""
    options = plan.options
    wrapped, max_norm = accelerator.prepare_optimizer(optimizer), options.optimizer.max_grad_norm
    if zero.is_asked_for() and not options.run.dry_run:
        accumulation = options.training.gradient_accumulation_steps
        if accelerator.num_processes > 1 and (refusal := network.refuses("sharded_gradients")):
            raise UserError(refusal)
        sharded = zero.share_out(network, optimizer, accelerator, accumulation=accumulation, max_grad_norm=max_norm)
        if sharded is not None:
            return sharded, sharded
    parameters = [parameter for group in groups for parameter in group["params"]]
    return wrapped, WholeGradients(accelerator, wrapped, parameters, max_norm=max_norm)


def _refuse_full_disk(plan: Plan, run: Run) -> None:
    disk.refuse_full_disk(
        run.saves,
        after_step=run.position.done,
        of_file=disk.file_bytes(run.network.tensors(), plan.options.output.save_precision),
        # a lower bound: the size of the optimizer's state is not known before a step
        of_state=disk.file_bytes(run.network.state_dict(), None),
    )


def _measured(plan: Plan) -> MeasuredData:
    """The images that are measured, with the seed of validation."""
    seed = plan.options.validation.validation_seed

    def data(prepared: Prepared) -> TrainingData:
        return TrainingData(prepared, seed=plan.seed if seed is None else seed)

    held_out, trained = plan.prepared.validation, plan.prepared.trained
    return MeasuredData(
        held_out=None if held_out is None else data(held_out),
        trained=None if trained is None else data(trained),
        folders={use: {one.name: data(one.prepared) for one in plan.sets if one.use == use} for use in get_args(Use)},
    )


def _texts_to_draw(plan: Plan) -> list[str]:
    """Every text that samples and pictures need, including negative prompts."""
    samples = plan.samples.prompts if plan.samples is not None else ()
    texts = [text for item in samples for text in (item.prompt, item.negative_prompt)]
    compared = [*plan.options.output.compare_prompts, *pictured(plan.settings)]
    return [*texts, *compared, *([""] if compared else [])]
