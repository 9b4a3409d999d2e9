"""What may be given to the optimizer, what it refuses, and what it says."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import pytest
import torch
from adamw_problems import OFF, ON, TECHNIQUES, LoraRegression, bag, gradients
from torch import nn

from library.errors import UserError
from library.optimizers import CustomAdamW
from library.optimizers.custom_adamw import paged, sharding


def lines(caplog: pytest.LogCaptureFixture, level: str) -> list[str]:
    return [record.message for record in caplog.records if record.levelname == level]


class TestParameters:
    def test_forms(self) -> None:
        problem = LoraRegression()
        names = [name for name, _ in problem.named]
        assert CustomAdamW(problem.named).get_optimization_info()["lora_pairs"] == 2
        assert CustomAdamW(problem.parameters).get_optimization_info()["lora_pairs"] == 0
        groups = [{"params": problem.named[:1], "lr": 1e-3}, {"params": problem.named[1:], "lr": 2e-3}]
        assert CustomAdamW(groups).get_optimization_info()["lora_pairs"] == 2
        assert CustomAdamW(iter(problem.named)).param_groups[0]["param_names"] == names
        model = nn.ModuleDict({"q": nn.ModuleDict({"lora_A": nn.Linear(6, 2), "lora_B": nn.Linear(2, 6)})})
        assert CustomAdamW(model.named_parameters()).get_optimization_info()["lora_pairs"] == 1

    def test_groups_keep_their_own_rates_and_options(self) -> None:
        named = bag()
        groups = [
            {"params": named[:4], "lr": 0.0, "weight_decay": 0.0},
            {"params": named[4:], "lr": 1e-2, "use_adopt_stability": False},
        ]
        optimizer = CustomAdamW(groups)
        before = [parameter.detach().clone() for _, parameter in named]
        gradients(named, 1)
        optimizer.step()
        moved = [not torch.equal(p, old) for (_, p), old in zip(named, before, strict=True)]
        assert moved == [False] * 4 + [True] * 3

    def test_add_param_group_later(self) -> None:
        problem = LoraRegression()
        optimizer = CustomAdamW(problem.named[:1])
        problem.train(optimizer, 2)
        optimizer.add_param_group({"params": problem.named[1:]})
        problem.train(optimizer, 2)
        assert optimizer.get_optimization_info()["lora_pairs"] == 2
        assert problem.parameters[1].any()

    def test_odd_ones(self) -> None:
        """No gradient, empty, scalar, 4-D, channels last: all ordinary."""
        conv = nn.Parameter(torch.randn(6, 5, 3, 3).to(memory_format=torch.channels_last))
        named = [
            ("idle", nn.Parameter(torch.ones(3))),
            ("empty", nn.Parameter(torch.zeros(0, 4))),
            ("scalar", nn.Parameter(torch.tensor(1.0))),
            ("one", nn.Parameter(torch.ones(1))),
            ("conv", conv),
        ]
        optimizer = CustomAdamW(named, min_8bit_size=0)
        for step in range(3):
            gradients(named, step)
            named[0][1].grad = None
            optimizer.step()
        assert torch.equal(named[0][1], torch.ones(3))
        assert named[0][1] not in optimizer.state
        assert all((p - 1).abs().max().item() > 0 for _, p in named[2:4])  # AGR does not hold single numbers
        assert conv.is_contiguous(memory_format=torch.channels_last)

    def test_nothing_has_a_gradient(self) -> None:
        optimizer = CustomAdamW(bag())
        optimizer.step()
        assert optimizer.get_optimization_info()["state_bytes"] == 0

    def test_closure(self) -> None:
        problem = LoraRegression()
        optimizer = CustomAdamW(problem.named, lr=1e-2)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = problem.loss()
            loss.backward()
            return loss

        first = optimizer.step(closure)
        for _ in range(30):
            last = optimizer.step(closure)
        assert last.requires_grad
        assert last < first

    @pytest.mark.parametrize("implementation", ["auto", "eager"])
    def test_a_stale_graph_is_noticed(self, implementation: Any) -> None:
        """Autograd must see that the weights have changed, also where the kernel wrote them."""
        problem = LoraRegression()
        optimizer = CustomAdamW(problem.named, implementation=implementation)
        loss = problem.loss()
        problem.train(optimizer, 1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_zero_grad_in_place(self) -> None:
        a, b = LoraRegression(), LoraRegression()
        first, second = CustomAdamW(a.named), CustomAdamW(b.named)
        for _ in range(3):
            for problem, optimizer, none in ((a, first, True), (b, second, False)):
                optimizer.zero_grad(set_to_none=none)
                problem.loss().backward()
                optimizer.step()
        assert torch.equal(a.weights(), b.weights())

    def test_schedulers(self) -> None:
        problem = LoraRegression()
        optimizer = CustomAdamW(problem.named, lr=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
        before = problem.weights()
        problem.backward()
        optimizer.step()
        scheduler.step()
        problem.train(optimizer, 2)
        assert optimizer.param_groups[0]["lr"] == 0
        assert torch.equal(problem.weights(), before)


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"lr": -1.0}, "lr = -1.0; it must be a number, 0 or more"),
            ({"betas": (0.9, 1.0)}, "betas"),
            ({"spd_lambda": 1.5}, "spd_lambda = 1.5; it must be a number, between 0 and 1"),
            ({"tam_beta": 1.0}, "tam_beta"),
            ({"alora_ratio": 0}, "alora_ratio"),
            ({"wd_transition_steps": 0}, "wd_transition_steps"),
            ({"wd_schedule": "cosin"}, "did you mean 'cosine'"),
            ({"wd_schedule": "cosine", "wd_max_progress": float("inf")}, "CustomAdamW: wd_max_progress = inf"),
            ({"wd_schedule": "multi_stage"}, "needs wd_stages"),
            ({"wd_schedule": "multi_stage", "wd_stages": "0:1"}, "must be pairs of a step and a ratio"),
            ({"wd_stages": ((0, 1.0, 2),)}, "must be pairs of a step and a ratio"),
            ({"wd_interpolate": 1}, "wd_interpolate = 1; it must be True or False"),
            ({"wd_flat": {"windw": 3}}, "wd_flat = {'windw': 3}"),
            ({"use_spd": "yes"}, "use_spd = 'yes'; it must be True or False"),
            ({"lr": float("nan")}, "lr"),
            ({"optim_bits": 16}, "optim_bits = 16; it must be 8 or 32"),
            ({"implementation": "nativ"}, "did you mean 'native'"),
            ({"spd_anchor": "inital"}, "did you mean 'initial'"),
            ({"amsgrad": True}, "amsgrad"),
        ],
    )
    def test_values_out_of_range(self, options: dict[str, Any], words: str) -> None:
        with pytest.raises(UserError) as error:
            CustomAdamW(bag(), **options)
        assert words in str(error.value)

    def test_a_group_with_a_bad_value_is_not_added(self) -> None:
        optimizer = CustomAdamW(bag()[:4])
        with pytest.raises(UserError, match="spd_lambda"):
            optimizer.add_param_group({"params": bag()[4:], "spd_lambda": 3})
        assert len(optimizer.param_groups) == 1

    def test_sparse_gradients(self) -> None:
        embedding = nn.Embedding(9, 4, sparse=True)
        optimizer = CustomAdamW(embedding.named_parameters())
        embedding(torch.tensor([1])).sum().backward()
        with pytest.raises(UserError, match="sparse"):
            optimizer.step()

    def test_complex_parameters(self) -> None:
        with pytest.raises(UserError, match="complex"):
            CustomAdamW([nn.Parameter(torch.zeros(3, dtype=torch.complex64))])

    def test_sharded_parameters(self) -> None:
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cpu", (1,))
            parameter = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Shard(0)]))
            with pytest.raises(UserError, match=r"x is sharded or flattened by DTensor.*AGR, ADOPT, TAM"):
                CustomAdamW([("x", parameter)], use_adopt_stability=True, use_tam=True)
        finally:
            dist.destroy_process_group()

    def test_fsdp(self) -> None:
        import torch.distributed as dist
        from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

        for original in (True, False):
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            try:
                module = FullyShardedDataParallel(
                    nn.Linear(8, 8),
                    use_orig_params=original,
                    device_id=torch.device("cpu"),
                    sharding_strategy=ShardingStrategy.NO_SHARD,
                )
                with pytest.raises(UserError, match="sharded or flattened by FSDP"):
                    CustomAdamW(module.named_parameters())
            finally:
                dist.destroy_process_group()

    def test_deepspeed(self) -> None:
        parameter = nn.Parameter(torch.zeros(0))
        parameter.ds_id = 3  # type: ignore[attr-defined]
        assert sharding.kind_of(parameter) == "DeepSpeed ZeRO-3"

    def test_parameters_replaced_by_flat_ones(self) -> None:
        """DeepSpeed ZeRO 1 and 2 put one flat partition in place of a group's parameters."""
        optimizer = CustomAdamW(bag())
        whole = nn.Parameter(torch.zeros(5000))
        whole.grad = torch.ones(5000)
        optimizer.param_groups[0]["params"] = [whole]
        with pytest.raises(
            UserError, match=r"the parameters of group 0 were replaced or cut \(\(4, 40\) became \(5000,\)"
        ):
            optimizer.step()


class TestMessages:
    def test_no_names(self, caplog: pytest.LogCaptureFixture) -> None:
        CustomAdamW(LoraRegression().parameters, **ON)
        said = [line for line in lines(caplog, "WARNING") if "ALoRA" in line]
        assert len(said) == 1
        assert "pass model.named_parameters()" in said[0]

    def test_no_pairs(self, caplog: pytest.LogCaptureFixture) -> None:
        CustomAdamW(nn.Linear(3, 3).named_parameters(), **ON)
        assert [line for line in lines(caplog, "WARNING") if "ALoRA needs LoRA pairs and found none" in line]
        assert [line for line in lines(caplog, "WARNING") if "OrthoGrad" in line and "orthograd_target='all'" in line]

    def test_nothing_to_say(self, caplog: pytest.LogCaptureFixture) -> None:
        CustomAdamW(LoraRegression().named)
        assert lines(caplog, "WARNING") == []

    def test_old_arguments(self, caplog: pytest.LogCaptureFixture) -> None:
        CustomAdamW(bag(), percentile_clipping=100, block_wise=True)
        said = lines(caplog, "WARNING")
        assert [word for word in ("percentile_clipping", "block_wise") if any(word in line for line in said)]
        assert len(said) == 2

    def test_paging_without_cuda(self, caplog: pytest.LogCaptureFixture) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is CUDA")
        assert paged.runtime() is None
        problem = LoraRegression()
        problem.train(CustomAdamW(problem.named, is_paged=True), 3)
        assert [line for line in lines(caplog, "WARNING") if "is_paged needs CUDA" in line]

    def test_vanished_weight_decay(self, caplog: pytest.LogCaptureFixture) -> None:
        problem = LoraRegression()
        curve: dict[str, Any] = {"wd_transition_steps": 1, "wd_decay_factor": 0.01, "wd_min_ratio": 0.0}
        optimizer = CustomAdamW(problem.named, weight_decay=1e-3, wd_max_progress=9.0, **curve)
        problem.train(optimizer, 9)
        assert len([line for line in lines(caplog, "WARNING") if "below 1e-8" in line]) == 1

    def test_summary(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO):
            CustomAdamW(LoraRegression().named, **{**ON, "use_spd": False})
        assert lines(caplog, "INFO") == [
            "CustomAdamW: 8-bit state, 4 tensors with 384 numbers, 2 LoRA pairs; on: "
            "ADOPT, AGR, ALoRA, Cautious, OrthoGrad, TAM, dynamic weight decay"
        ]


class TestInformation:
    def test_get_optimization_info(self) -> None:
        problem = LoraRegression()
        optimizer = CustomAdamW(
            problem.named, optim_bits=32, weight_decay=0.1, wd_transition_steps=2, **OFF | {"use_tam": True}
        )
        problem.train(optimizer, 3)
        info = optimizer.get_optimization_info()
        assert info["techniques"] == ["TAM"]
        assert (info["steps"], info["tensors"], info["parameters"], info["lora_pairs"]) == (3, 4, 384, 2)
        assert info["state_bytes"] == 384 * 8 + 4 * 4
        assert info["weight_decay"] == [0.1]
        optimizer.param_groups[0]["dynamic_weight_decay"] = True
        assert optimizer.get_optimization_info()["weight_decay"] == [pytest.approx(0.1 * 0.7**0.5)]

    def test_repr(self) -> None:
        problem = LoraRegression()
        groups = [{"params": problem.named[:2], "name": "unet"}, {"params": problem.named[2:], "lr": 5e-5}]
        assert repr(CustomAdamW(groups, **{**OFF, "use_spd": True}, betas=(0.9, 0.99))) == (
            "CustomAdamW(8-bit, 384 numbers, 2 LoRA pairs)\n"
            "  group unet: 2 tensors, lr 0.001, betas (0.9, 0.99), weight decay 0.01; SPD\n"
            "  group 1: 2 tensors, lr 5e-05, betas (0.9, 0.99), weight decay 0.01; SPD"
        )

    def test_the_documented_signature(self) -> None:
        parameters = inspect.signature(CustomAdamW).parameters
        defaults = {name: parameter.default for name, parameter in parameters.items()}
        documented: dict[str, Any] = {
            "lr": 1e-3,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "weight_decay": 1e-2,
            "optim_bits": 8,
            "min_8bit_size": 4096,
            "is_paged": False,
            "use_spd": True,
            "spd_lambda": 0.06,
            "use_cautious": True,
            "use_orthogonal_grad": False,
            "use_adopt_stability": False,
            "use_grams": False,
            "use_agr": True,
            "use_tam": False,
            "tam_beta": 0.9,
            "use_alora": False,
            "dynamic_weight_decay": True,
            "wd_transition_steps": 1000,
            "wd_decay_factor": 0.7,
            "wd_min_ratio": 0.1,
            "wd_max_progress": 2.0,
            "wd_schedule": "exponential",
            "wd_stages": (),
        }
        assert {name: defaults[name] for name in documented} == documented
        keyword_only = [name for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
        assert set(keyword_only) == set(parameters) - {"params", "lr", "betas", "eps", "weight_decay"}
        assert set(TECHNIQUES) <= set(keyword_only)
        assert set(ON) == set(TECHNIQUES)
