"""The CPU kernel and the batched step, compiled or not: one result, no read-back, few operations, falling back."""

from __future__ import annotations

import ctypes
import logging
import shutil
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from adamw_problems import OFF, ON, LoraRegression, bag, combinations, distance, flat, gradients, label, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from library.errors import UserError
from library.optimizers import CustomAdamW
from library.optimizers.custom_adamw import batched, build, native, plan
from tests.quick import quick

try:
    native.library()
    KERNEL = True
except native.Unavailable:
    KERNEL = False
needs_kernel = pytest.mark.skipif(not KERNEL, reason="no C++ compiler")

# A sign that round-off turns (Cautious, Grams, SPD's condition) moves one number by a whole step, so the bounds are on
# the distance of the results relative to the distance moved. Measured: 3e-7 and 8e-5.
CLOSE_32, CLOSE_8 = 2e-6, 1e-3


@needs_kernel
@pytest.mark.parametrize("part", quick(range(12), 0))
@pytest.mark.parametrize("bits", [32, 8])
def test_the_kernel_agrees_in_every_combination(part: int, bits: Any) -> None:
    for options in combinations()[part::12]:
        options = {**options, "optim_bits": bits, "min_8bit_size": 0, "orthograd_target": "all", "lr": 1e-2}
        ours, _ = run("native", 8, **options)
        spec, _ = run("eager", 8, **options)
        apart = distance(ours, spec, bag())
        assert apart < (CLOSE_32 if bits == 32 else CLOSE_8), f"{label(options)}: {apart:.1e}"


@needs_kernel
@settings(max_examples=60)
@given(
    out=st.integers(1, 90),
    rank=st.integers(1, 40),
    inputs=st.integers(1, 300),
    bits=st.sampled_from([8, 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    exponent=st.integers(-6, 3),
    choice=st.integers(0, 383),
)
def test_the_kernel_agrees_on_any_shape(
    out: int, rank: int, inputs: int, bits: Any, dtype: torch.dtype, exponent: int, choice: int
) -> None:
    options = {**combinations()[choice], "optim_bits": bits, "min_8bit_size": 0, "lr": 1e-2}
    results = []
    for implementation in ("native", "eager"):
        g = torch.Generator().manual_seed(0)
        named = [
            ("x.lora_down.weight", nn.Parameter(torch.randn((rank, inputs), generator=g).to(dtype))),
            ("x.lora_up.weight", nn.Parameter(torch.randn((out, rank), generator=g).to(dtype) * 0.1)),
        ]
        start = flat(named)
        optimizer = CustomAdamW([{"params": named, "lora_scale": 0.3}], implementation=implementation, **options)
        for step in range(3):
            gradients(named, step + 1, size=10.0**exponent)
            optimizer.step()
        results.append(flat(named))
    moved = float((results[1] - start).norm())
    assert float((results[0] - results[1]).norm()) <= 2e-2 * moved + 1e-9  # one turned sign among few numbers


@needs_kernel
def test_threads_do_not_matter() -> None:
    results = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            g = torch.Generator().manual_seed(0)
            named = [(str(i), nn.Parameter(torch.randn(40_000, generator=g))) for i in range(6)]
            optimizer = CustomAdamW(named, implementation="native", **ON)
            for step in range(3):
                gradients(named, step)
                optimizer.step()
            results.append(flat(named))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(*results)


@needs_kernel
def test_the_kernels_codes_are_the_codecs() -> None:
    """Moments after one step without ADOPT: m = 0.1 g and v = 0.001 g^2, so that both codecs see the same numbers."""
    states = []
    for implementation in ("native", "eager"):
        g = torch.Generator().manual_seed(0)
        parameter = nn.Parameter(torch.zeros(3, 50_001))
        optimizer = CustomAdamW([("x", parameter)], implementation=implementation, **OFF)  # type: ignore[arg-type]
        size = 10 ** (-7 * torch.rand(parameter.shape, generator=g))
        parameter.grad = size * torch.randn(parameter.shape, generator=g).sign()
        optimizer.step()
        states.append(optimizer.state[parameter])
    for key in ("exp_avg", "exp_avg_sq"):
        # v is rounded once less in the kernel: 1e-7 of a maximum, and another code beside a midpoint
        torch.testing.assert_close(states[0][f"{key}_absmax"], states[1][f"{key}_absmax"], rtol=3e-7, atol=0)
        differing = states[0][key] != states[1][key]
        assert differing.float().mean() < 1e-4
        assert ((states[0][key].int() - states[1][key].int()).abs() <= 1).all()


@pytest.mark.slow  # torch.compile takes half a minute with a cold cache
@pytest.mark.parametrize(("bits", "techniques"), [(32, ON), (8, ON), (8, {**OFF, "orthogonalize": True})])
def test_the_compiled_step_agrees(bits: Any, techniques: dict[str, Any]) -> None:
    pytest.importorskip("torch._inductor")
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    options = {**techniques, "optim_bits": bits, "min_8bit_size": 0, "lr": 1e-2}
    problems = [LoraRegression(width=150, rank=5) for _ in range(3)]
    for problem, implementation in zip(problems, ("compiled", "eager"), strict=False):
        optimizer = CustomAdamW(problem.named, implementation=implementation, **options)  # type: ignore[arg-type]
        problem.train(optimizer, 12)
        expected = "compiled" if implementation == "compiled" else "plain torch operations"
        assert optimizer.get_optimization_info()["implementation"] == [expected]
    apart = distance(*(problem.named for problem in problems))
    assert apart < (CLOSE_32 if bits == 32 else CLOSE_8)


class Watch(TorchDispatchMode):
    """Counts operations and refuses whatever needs a tensor's value on the host."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        assert not name.startswith(self.READS), f"{name} reads a tensor back to the host"
        views = ("view", "_unsafe_view", "detach", "slice", "expand", "unsqueeze", "unbind", "t", "transpose", "select")
        if name not in views:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def operations(pairs: int, *, bits: Any, **options: Any) -> int:
    """Operations of one later step for some LoRA pairs of one shape, on the tier of every device."""
    named = []
    for index in range(pairs):
        named += [
            (f"{index}.lora_down.weight", nn.Parameter(torch.randn(4, 64))),
            (f"{index}.lora_up.weight", nn.Parameter(torch.randn(96, 4))),
        ]
    optimizer = CustomAdamW(named, implementation="eager", optim_bits=bits, min_8bit_size=0, **options)
    for step in range(3):
        gradients(named, step)
        with Watch() if step else nullcontext() as watch:  # the first step makes tables
            optimizer.step()
    assert watch is not None
    return sum(watch.counts.values())


@pytest.mark.parametrize(("bits", "most"), [(32, 210), (8, 400)])
@pytest.mark.parametrize(
    "options", [ON, {**ON, "use_grams": True, "spd_anchor": "initial", "tam_bias_correction": True}]
)
def test_operations_grow_with_shapes_not_with_tensors(
    bits: Any, most: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU waits for is launches: a class of tensors costs the same for 2 or 40 of them, without a read-back."""
    monkeypatch.setattr(batched, "CACHED", 2**40)
    few, many = operations(2, bits=bits, **options), operations(40, bits=bits, **options)
    assert many == few
    print(f"{bits} bits: {few} operations for two classes")
    assert few <= most


def test_taking_few_rows_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = []
    for cached in (1, 2**40):
        monkeypatch.setattr(batched, "CACHED", cached)
        problem = LoraRegression()
        problem.train(CustomAdamW(problem.named, implementation="eager", **ON), 5)
        problems.append(problem.named)
    assert distance(*problems, LoraRegression().named) < CLOSE_32  # sums over rows of a smaller or larger matrix


class TestFallingBack:
    def forget(self, monkeypatch: pytest.MonkeyPatch) -> None:
        native._load.cache_clear()
        monkeypatch.setattr(native, "_load", native._load.__wrapped__)

    def test_no_compiler(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        self.forget(monkeypatch)
        monkeypatch.setattr(build.shutil, "which", lambda name: None)
        problem = LoraRegression()
        optimizer = CustomAdamW(problem.named)
        with caplog.at_level(logging.WARNING):
            problem.train(optimizer, 3)
            optimizer.load_state_dict(optimizer.state_dict())
            problem.train(optimizer, 1)
        said = [record.message for record in caplog.records if "no CPU kernel" in record.message]
        assert len(said) == 1
        assert "no C++ compiler" in said[0]
        assert optimizer.get_optimization_info()["implementation"] == ["plain torch operations"]
        with pytest.raises(UserError, match=r"no C\+\+ compiler"):
            CustomAdamW(problem.named, implementation="native")

    @needs_kernel
    def test_a_compiler_that_fails(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        source = tmp_path / "source" / "broken.cpp"
        source.parent.mkdir()
        source.write_text("this is no C++")
        with pytest.raises(build.Unavailable, match=r"failed: .*broken\.cpp"):
            build.shared_library(source)

    @needs_kernel
    def test_a_cache_that_cannot_be_written(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("not a folder")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert isinstance(build.shared_library(native.SOURCES / "step.cpp", native.declarations()), ctypes.CDLL)

    @needs_kernel
    @pytest.mark.slow
    def test_compiled_once(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        build.shared_library(native.SOURCES / "step.cpp", native.declarations())
        monkeypatch.setattr(build, "compile_into", lambda *_: pytest.fail("compiled again"))
        build.shared_library(native.SOURCES / "step.cpp", native.declarations())
        assert [file.suffix for file in (tmp_path / "custom-adamw").iterdir()] == [".so"]

    def test_a_step_that_cannot_be_compiled(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(*_: Any, **__: Any) -> Any:
            raise RuntimeError("Cannot find a working triton installation")

        tier = batched.Batched(compiled=True)
        tier._advance = broken
        monkeypatch.setattr(batched, "tier", lambda **_: tier)
        problem, plain = LoraRegression(), LoraRegression()
        problem.train(CustomAdamW(problem.named, implementation="compiled"), 4)
        plain.train(CustomAdamW(plain.named, implementation="eager"), 4)
        assert sum("working triton" in record.message for record in caplog.records) == 1
        assert torch.equal(problem.weights(), plain.weights())


def test_what_the_kernel_does_not_know_goes_to_the_batched_step() -> None:
    named = bag()
    named[6] = ("big", nn.Parameter(torch.randn(100, 50).T))  # not contiguous
    named.append(("half", nn.Parameter(torch.randn(6, 6, dtype=torch.float16))))
    optimizer = CustomAdamW(named)
    gradients(named, 1)
    optimizer.step()
    gradients(named, 2)
    optimizer.step()
    assert all(parameter.isfinite().all() for _, parameter in named)
    expected = ["native CPU kernel", "plain torch operations"] if KERNEL else ["plain torch operations"]
    assert optimizer.get_optimization_info()["implementation"] == expected


@pytest.mark.parametrize("halves", [(torch.float32, torch.float16), (torch.float16, torch.float32)])
def test_a_pair_in_two_tiers_uses_lora_down_as_it_was(halves: tuple[torch.dtype, torch.dtype]) -> None:
    """One half in the kernel, the other not: lora_up's factors still come from lora_down before the step."""

    def make() -> Any:
        g = torch.Generator().manual_seed(0)
        down = nn.Parameter(torch.randn((4, 30), generator=g).to(halves[0]))
        up = nn.Parameter(torch.randn((20, 4), generator=g).to(halves[1]))
        down.grad, up.grad = torch.ones_like(down), torch.ones_like(up)
        return [("x.lora_down.weight", down), ("x.lora_up.weight", up)]

    results = []
    for implementation in ("auto", "eager"):
        named = make()
        optimizer = CustomAdamW(named, lr=0.3, implementation=implementation, **{**OFF, "use_alora": True})  # type: ignore[arg-type]
        optimizer.step()
        results.append(flat(named))
    assert torch.allclose(*results, rtol=1e-6)


def test_cuda_with_triton_compiles_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    assert plan.compiles("auto", "cuda")
    assert not plan.compiles("auto", "cpu")
    assert not plan.compiles("eager", "cuda")
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert not plan.compiles("auto", "cuda")
