"""State: its size, exact round trips, other precisions and optimizers, copies, moves, accelerate."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from adamw_problems import OFF, ON, LoraRegression, Named, bag, flat, full, gradients
from torch import nn

from library.optimizers import CustomAdamW

EVERYTHING: dict[str, Any] = {**ON, "wd_transition_steps": 4, "spd_anchor": "initial"}
VARIANTS: list[dict[str, Any]] = [
    {"optim_bits": 8, "min_8bit_size": 0},
    {"optim_bits": 8, "min_8bit_size": 300},
    {"optim_bits": 32},
    {"optim_bits": 8, "min_8bit_size": 0, **EVERYTHING},
    {"optim_bits": 32, "implementation": "eager"},
    {"optim_bits": 32, **OFF},
]


def steps(named: Named, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        gradients(named, step)
        optimizer.step()


def saved(optimizer: torch.optim.Optimizer) -> Any:
    """Its state dict after a journey through a file, read without unpickling code."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", VARIANTS)
def test_a_resume_continues_bit_for_bit(dtype: torch.dtype, options: dict[str, Any]) -> None:
    options = {**options, "stochastic_rounding": True, "lr": 1e-2}
    straight, cut = bag(dtype), bag(dtype)
    steps(straight, CustomAdamW(straight, **options), 0, 10)
    before = CustomAdamW(cut, **options)
    steps(cut, before, 0, 5)
    state = saved(before)
    resumed = [(name, nn.Parameter(parameter.detach().clone())) for name, parameter in cut]
    after = CustomAdamW(resumed, **options)
    after.load_state_dict(state)
    steps(resumed, after, 5, 10)
    assert torch.equal(flat(resumed), flat(straight))
    assert after.param_groups[0]["step"] == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_state_dict_is_exact(dtype: torch.dtype) -> None:
    """Codes stay uint8 and moments float32, whatever the parameters are (torch would cast both)."""
    named = bag(dtype)
    optimizer = full(named, min_8bit_size=1000)
    steps(named, optimizer, 0, 4)
    other = full(bag(dtype), min_8bit_size=1000)
    other.load_state_dict(saved(optimizer))
    for (_, a), (_, b) in zip(
        named,
        [(n, p) for g in [other.param_groups[0]] for n, p in zip(g["param_names"], g["params"], strict=True)],
        strict=True,
    ):
        mine, theirs = optimizer.state[a], other.state[b]
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            if isinstance(value, torch.Tensor):
                assert theirs[key].dtype == value.dtype
                assert torch.equal(theirs[key], value), key
            else:
                assert theirs[key] == value
    assert optimizer.state[named[6][1]]["exp_avg"].dtype == torch.uint8
    assert optimizer.state[named[0][1]]["exp_avg"].dtype == torch.float32


def test_loading_copies() -> None:
    """Two optimizers with one state dict do not share memory."""
    a, b = LoraRegression(), LoraRegression()
    first, second = full(a.named), full(b.named)
    a.train(first, 3)
    second.load_state_dict(first.state_dict())
    copied = second.state[b.parameters[1]]["exp_avg"].clone()
    a.train(first, 3)
    assert torch.equal(second.state[b.parameters[1]]["exp_avg"], copied)


@pytest.mark.parametrize(("old", "new"), [(8, 32), (32, 8)])
def test_other_precision(old: Any, new: Any, caplog: pytest.LogCaptureFixture) -> None:
    named, target = bag(), bag()
    optimizer = full(named, optim_bits=old)
    steps(named, optimizer, 0, 6)
    converted = full(target, optim_bits=new)
    with caplog.at_level(logging.WARNING):
        converted.load_state_dict(saved(optimizer))
    assert sum("another precision" in record.message for record in caplog.records) == 1
    steps(target, converted, 6, 7)
    big, same = named[6][1], target[6][1]
    assert (converted.state[same]["exp_avg"].dtype == torch.uint8) == (new == 8)
    assert ("exp_avg_absmax" in converted.state[same]) == (new == 8)
    exact = full(bag(), optim_bits=new)
    steps(big_named := bag(), exact := full(big_named, optim_bits=new), 0, 7)
    moved = flat(big_named) - flat(bag())
    assert big.shape == same.shape
    assert torch.isfinite(flat(target)).all()
    assert exact.state[big_named[6][1]]["step"] == converted.state[same]["step"] == 7
    assert moved.norm() > 0


def test_from_8_to_32_bits_the_values_stay(caplog: pytest.LogCaptureFixture) -> None:
    from library.optimizers.custom_adamw import codec

    named, target = bag(), bag()
    optimizer = full(named)
    steps(named, optimizer, 0, 6)
    converted = full(target, optim_bits=32, lr=0.0, betas=(0.9, 0.999))
    converted.load_state_dict(optimizer.state_dict())
    old = {key: value.clone() for key, value in optimizer.state[named[6][1]].items() if key.startswith("exp_avg")}
    for _, parameter in target:
        parameter.grad = None
    target[0][1].grad = torch.zeros_like(target[0][1])  # a step that leaves the others alone
    converted.step()
    values = codec.decode(old["exp_avg"].view(1, -1), old["exp_avg_absmax"].view(1, -1), codec.dynamic_map(signed=True))
    assert torch.equal(converted.state[target[6][1]]["exp_avg"].view(1, -1), values)


def test_a_state_of_torchs_adamw_loads() -> None:
    """Its moments and counts are taken over: with everything off the run goes on as AdamW would."""
    a, b, c = bag(), bag(), bag()
    adamw = torch.optim.AdamW([p for _, p in a], lr=1e-2, foreach=False)
    steps(a, adamw, 0, 5)
    for (_, ours), (_, theirs) in zip(b, a, strict=True):
        ours.data.copy_(theirs.data)
    optimizer = CustomAdamW([p for _, p in b], optim_bits=32, implementation="eager", **OFF)
    optimizer.load_state_dict(adamw.state_dict())
    assert optimizer.param_groups[0]["step"] == 5
    steps(a, adamw, 5, 9)
    steps(b, optimizer, 5, 9)
    assert torch.equal(flat(a), flat(b))
    assert flat(c).shape == flat(a).shape


@pytest.mark.parametrize("adopt", [False, True])
def test_a_count_of_steps_without_moments_starts_again(adopt: bool, caplog: pytest.LogCaptureFixture) -> None:
    """As RMSprop's state has it: with moments of zeros and the count of a thousand the first steps were three times
    too long."""
    named, fresh = bag(), bag()
    settings: Any = {**OFF, "optim_bits": 32, "implementation": "eager", "use_adopt_stability": adopt}
    optimizer = CustomAdamW(named, **settings)
    for _, parameter in named:
        optimizer.state[parameter] = {"step": 1000} | ({"adopt_k": torch.tensor(1000.0)} if adopt else {})
    steps(named, optimizer, 0, 3)
    steps(fresh, CustomAdamW(fresh, **settings), 0, 3)
    assert torch.equal(flat(named), flat(fresh))
    assert "their moments start again" in caplog.text


def test_options_of_a_checkpoint_replace_others_and_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = full(bag(), spd_lambda=0.3)
    other = full(bag())
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["spd_lambda"] == 0.3
    assert [record.message for record in caplog.records if "spd_lambda = 0.3 (was 0.06)" in record.message]
    caplog.clear()
    other.load_state_dict(other.state_dict())
    assert not caplog.records


def test_hooks_see_tensors() -> None:
    named = bag()
    optimizer = full(named)
    steps(named, optimizer, 0, 2)
    seen: list[type] = []

    def hook(_: Any, state_dict: dict[str, Any]) -> None:
        seen.extend(type(value) for value in state_dict["state"][0].values())

    other = full(bag())
    other.register_load_state_dict_pre_hook(hook)
    other.register_load_state_dict_post_hook(
        lambda opt: seen.append(type(opt.state[opt.param_groups[0]["params"][0]]["exp_avg"]))
    )
    other.load_state_dict(optimizer.state_dict())
    assert set(seen) == {torch.Tensor, int}
    assert seen[-1] is torch.Tensor


class TestBytes:
    def unet(self, rank: int, **options: Any) -> float:
        """Bytes of state per parameter for the widths of an SD 1.5 UNet, one attention block of each."""
        named: Named = []
        for width in (320, 640, 1280):
            for inputs, outputs in ((width, width), (768, width), (width, 8 * width), (4 * width, width)):
                name = f"{width}-{inputs}-{outputs}"
                named.append((f"{name}.lora_down.weight", nn.Parameter(torch.zeros(rank, inputs))))
                named.append((f"{name}.lora_up.weight", nn.Parameter(torch.zeros(outputs, rank))))
        optimizer = CustomAdamW(named, **options)
        for _, parameter in named:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        size = optimizer.get_optimization_info()["bytes_per_parameter"]
        counted = sum(
            value.untyped_storage().nbytes() / (value.untyped_storage().nbytes() / value.nbytes)
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )
        assert size == pytest.approx(counted / sum(p.numel() for _, p in named))
        return size

    def test_8_bits(self) -> None:
        assert self.unet(16) == 2 + 2 * 4 / 256

    def test_8_bits_with_everything_on(self) -> None:
        assert self.unet(16, **ON) <= 2.1

    def test_32_bits(self) -> None:
        assert 8 <= self.unet(16, optim_bits=32) < 8.01

    def test_small_parameters_keep_32_bits(self) -> None:
        named = [("small", nn.Parameter(torch.zeros(4095))), ("large", nn.Parameter(torch.zeros(4096)))]
        optimizer = full(named)
        gradients(named, 1)
        optimizer.step()
        assert [optimizer.state[p]["exp_avg"].dtype for _, p in named] == [torch.float32, torch.uint8]


def test_deepcopy_and_pickle() -> None:
    named = bag()
    optimizer = full(named, min_8bit_size=0, lr=1e-2)
    steps(named, optimizer, 0, 4)
    group = optimizer.param_groups[0]
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    steps(named, optimizer, 4, 8)
    for other in copies:
        theirs = list(zip(group["param_names"], other.param_groups[0]["params"], strict=True))
        steps(theirs, other, 4, 8)
        assert torch.equal(flat(theirs), flat(named))
        assert other.get_optimization_info() == optimizer.get_optimization_info()


class TestBetweenSteps:
    def test_parameters_that_are_cast(self) -> None:
        problem = LoraRegression()
        optimizer = full(problem.named, optim_bits=32)
        problem.train(optimizer, 3)
        down = problem.parameters[0]
        before = optimizer.state[down]["exp_avg"].clone()
        module = nn.ParameterList(problem.parameters)
        module.to(torch.bfloat16)
        for parameter in problem.parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        state = optimizer.state[down]
        assert state["exp_avg"].dtype == torch.float32
        assert torch.allclose(state["exp_avg"], 0.9 * before)
        assert state["step"] == 4

    def test_parameters_whose_memory_moves(self) -> None:
        moved, still = LoraRegression(), LoraRegression()
        ours, plain = full(moved.named), full(still.named)
        for _ in range(4):
            moved.train(ours, 1)
            still.train(plain, 1)
            for parameter in moved.parameters:
                parameter.data = parameter.data.clone()
        assert torch.equal(moved.weights(), still.weights())

    def test_a_state_that_is_cleared(self) -> None:
        again, fresh = LoraRegression(), LoraRegression()
        optimizer = full(again.named)
        again.train(optimizer, 3)
        optimizer.state.clear()
        for a, b in zip(again.parameters, fresh.parameters, strict=True):
            a.data.copy_(b.data)
        again.train(optimizer, 3)
        fresh.train(full(fresh.named), 3)
        assert torch.equal(again.weights(), fresh.weights())

    def test_options_that_change(self) -> None:
        problem = LoraRegression()
        optimizer = full(problem.named)
        problem.train(optimizer, 3)
        before = problem.weights()
        optimizer.param_groups[0]["use_tam"] = False
        optimizer.param_groups[0]["lr"] = 0.0
        problem.train(optimizer, 1)
        assert optimizer._plan is not None
        assert "TAM" not in [technique.name for technique in optimizer._plan.stacks[0].layout.recipe.techniques]
        assert (problem.weights() - before).norm() < 1e-6  # SPD and decay have no rate to act with

    @pytest.mark.parametrize("implementation", ["auto", "eager"])
    def test_gradients_that_come_and_go(self, implementation: Any) -> None:
        """Module dropout: parameters rest, with their own count of steps."""
        named, alone = bag(), bag()
        optimizer = full(named, implementation=implementation, min_8bit_size=0)
        for step in range(8):
            gradients(named, step)
            for index, (_, parameter) in enumerate(named):
                if (step + index // 2) % 3 == 0:
                    parameter.grad = None
            optimizer.step()
        rested = [optimizer.state[p]["step"] for _, p in named]
        assert rested == [sum((step + index // 2) % 3 != 0 for step in range(8)) for index in range(7)]
        # the bias is in no pair: alone it must have gone the same way
        bias = alone[4]
        single = full([bias], implementation=implementation, min_8bit_size=0)
        for step in range(8):
            gradients(alone, step)
            if (step + 4 // 2) % 3 == 0:
                bias[1].grad = None
            single.step()
        assert torch.allclose(bias[1], named[4][1], rtol=1e-6)


class TestAccelerate:
    def test_prepared_and_resumed(self, tmp_path: Path) -> None:
        accelerate = pytest.importorskip("accelerate")
        problem = LoraRegression()
        accelerator = accelerate.Accelerator(cpu=True)
        optimizer = accelerator.prepare(full(problem.named, min_8bit_size=0))

        def train(count: int) -> None:
            for _ in range(count):
                optimizer.zero_grad()
                accelerator.backward(problem.loss())
                optimizer.step()

        train(4)
        accelerator.save_state(str(tmp_path))
        kept = [parameter.detach().clone() for parameter in problem.parameters]
        train(3)
        end = problem.weights()
        for parameter, value in zip(problem.parameters, kept, strict=True):
            parameter.data.copy_(value)
        accelerator.load_state(str(tmp_path))
        train(3)
        assert torch.equal(problem.weights(), end)

    def test_gradients_of_ddp(self) -> None:
        """One process with gloo: gradients are views into DDP's buckets."""
        import torch.distributed as dist

        module = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False))
        plain = copy.deepcopy(module)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            wrapped = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
            for model, call in ((module, wrapped), (plain, plain)):
                optimizer = full(model.named_parameters())
                for _ in range(4):
                    optimizer.zero_grad()
                    call(torch.ones(2, 8)).square().sum().backward()
                    optimizer.step()
        finally:
            dist.destroy_process_group()
        torch.testing.assert_close(module[0].weight, plain[0].weight)  # gradients that lie elsewhere in memory
