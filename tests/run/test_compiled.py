"""Compilation block by block: one graph for equal blocks, with the adapters inside, and the results of eager blocks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch._dynamo
from PIL import Image
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

from library.config.parser import parse
from library.errors import UserError
from library.models import FAMILIES
from library.run import compiled
from library.run.build import build
from library.run.plan import make_plan
from library.training import loop
from library.training.run import Run
from tests import toy_family
from tests.conftest import BASE, IMAGES, copy_images, forget_accelerator
from tests.quick import quick

Made = Callable[..., Run]
EAGER = ("--compile", "--compile_backend", "eager")
WHOLE = (*EAGER, "--compile_fullgraph")
# warnings about what torch's compiler itself does, which it or Python hides; here they would be errors before
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
BF16 = ("--mixed_precision", "bf16")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with mock.patch.dict(toy_family.SIZES, transformer={**toy_family.SIZES["transformer"], "layers": 3}):
        return toy_family.write(tmp_path_factory.mktemp("toy"))


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    config = torch._dynamo.config
    with config.patch(
        recompile_limit=config.recompile_limit, accumulated_recompile_limit=config.accumulated_recompile_limit
    ):
        torch._dynamo.reset()
        counters.clear()
        yield
        torch._dynamo.reset()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path) -> Made:
    """`made(*words, base=…)`: a run on two images of the toy family."""
    monkeypatch.setitem(FAMILIES, "toy", "tests.toy_family.Toy")
    copy_images(tmp_path / "data" / "1_style", 2)

    def make(*words: str, base: Path = model) -> Run:
        forget_accelerator()
        sizes = () if "--network_module" in words else ("--network_dim", "4", "--network_alpha", "2")
        given = [
            *("--pretrained_model_name_or_path", str(base), "--train_data_dir", str(tmp_path / "data")),
            *("--caption_extension", ".txt", "--resolution", "64", "--train_batch_size", "2", "--seed", "1"),
            *("--output_dir", str(tmp_path / "out"), "--max_data_loader_n_workers", "0", "--no-loss_plot"),
            *("--no-report", "--no-monitoring", "--max_train_steps", "3", "--learning_rate", "1e-2"),
            *("--network_train_unet_only", "--cache_latents", *sizes, *words),
        ]
        return build(make_plan(parse(given)))

    return make


def losses(run: Run) -> list[float]:
    """Of its three steps."""
    return [loop.optimizer_step(run, item).loss for item in loop.step_batches(run)]


def trained(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in run.network.tensors().items()}


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_equal_blocks_share_a_graph(made: Made) -> None:
    """The names and weights of their adapters differ, the graph does not. The first has one of its own: nothing that
    is trained lies before it, so that its input has no gradient."""
    run = made(*WHOLE)
    assert len(list(run.family.compiled_blocks())) == 3
    losses(run)
    assert graphs() == 2
    assert not counters["graph_break"]


@pytest.mark.slow
def test_another_size_is_no_other_graph(made: Made, tmp_path: Path) -> None:
    for number, size in enumerate(((64, 96), (96, 64), (128, 64))):
        for name in sorted((IMAGES / "train").glob("*.png"))[2 * number : 2 * number + 2]:
            Image.open(name).resize(size).save(tmp_path / "data" / "1_style" / f"{number}{name.name}")
            shutil.copy(name.with_suffix(".txt"), tmp_path / "data" / "1_style" / f"{number}{name.stem}.txt")
    words = ("--enable_bucket", "--min_bucket_reso", "32", "--bucket_reso_steps", "16", "--max_train_steps", "8")
    run = made(*WHOLE, *words, "--compile_dynamic", "true")
    shapes = {batch.moments[0].shape for item in loop.step_batches(run) for batch in item.batches}
    assert len(shapes) >= 3
    losses(run)
    assert graphs() == 2


@pytest.mark.parametrize("backend", quick(["eager", "aot_eager"], "eager"))
def test_the_results_are_those_of_eager_blocks(made: Made, backend: str) -> None:
    plain, first, second = made(), made("--torch_compile", "--dynamo_backend", backend), None
    expected = losses(plain)
    assert losses(first) == pytest.approx(expected, rel=1e-5)  # sums in another order
    second = made("--torch_compile", "--dynamo_backend", backend)
    losses(second)
    assert graphs() >= 1
    ours, again, theirs = trained(first), trained(second), trained(plain)
    for name, tensor in ours.items():
        assert torch.equal(tensor, again[name]), name
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "words",
    [
        (*BF16, "--base_format", "nf4"),
        *(
            pytest.param(words, marks=pytest.mark.slow)
            for words in (
                ("--gradient_checkpointing",),
                (*BF16, "--fp8_base"),
                (*BF16, "--base_format", "int8", "--gradient_checkpointing"),
                ("--network_args", "rank_dropout=0.3"),
                ("--network_dropout", "0.3"),
            )
        ),
    ],
    ids=" ".join,
)
def test_a_block_is_one_graph(made: Made, words: tuple[str, ...]) -> None:
    assert losses(made(*WHOLE, *words)) == pytest.approx(losses(made(*words)), rel=1e-5)
    assert graphs() >= 1


@pytest.mark.parametrize("kind", quick(["dora", "loha", "lokr", "oft"], "lokr"))
def test_every_kind_has_the_results_of_eager_blocks(made: Made, kind: str) -> None:
    words = ("--network_module", f"networks.{kind}", "--network_dim", "4")
    assert losses(made(*EAGER, *words)) == pytest.approx(losses(made(*words)), rel=1e-5)
    assert graphs() >= 1


@pytest.mark.slow
def test_the_whole_adapter_can_be_left_out(made: Made) -> None:
    """Module dropout draws a number in each forward: no graph may keep the first one."""
    words = ("--network_args", "module_dropout=0.5")
    assert losses(made(*EAGER, *words)) == pytest.approx(losses(made(*words)), rel=1e-5)


@pytest.mark.slow
def test_off_is_the_base(made: Made) -> None:
    run, plain = made(*WHOLE), made()
    losses(run)
    block = next(iter(run.family.compiled_blocks()))
    x, mask = torch.randn(2, 5, 32), torch.ones(2, 5, dtype=torch.bool)
    bare = next(iter(plain.family.compiled_blocks()))
    with torch.no_grad(), plain.network.off():
        base = bare(x, mask)
    with torch.no_grad():
        on = block(x, mask)
        with run.network.off():
            assert torch.equal(block(x, mask), base)
        assert torch.equal(block(x, mask), on)
    assert not torch.equal(on, base)


def test_where_a_block_is_no_graph_the_run_ends(train: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--network_args", "module_dropout=0.5", "--network_train_unet_only")
    assert train(*WHOLE, *words, "--max_train_steps", "1") == 2
    said = capsys.readouterr().err
    assert "--compile: " in said
    assert "Traceback" not in said


def test_a_missing_compiler_is_named(made: Made) -> None:
    with (
        mock.patch.object(cpp_builder, "get_cpp_compiler", side_effect=InvalidCxxCompiler),
        pytest.raises(UserError, match=r"^--compile: compiling for a CPU needs a C\+\+ compiler, .* install g\+\+"),
    ):
        made("--compile")
    options = parse([*_WORDS, "--compile"])
    with (
        mock.patch("torch.utils._triton.has_triton", return_value=False),
        pytest.raises(UserError, match=r"^--compile: compiling for a GPU needs Triton, .*: pip install triton"),
    ):
        compiled.refuse_what_cannot_be(options, torch.device("cuda"))


_WORDS = ["--pretrained_model_name_or_path", str(BASE), "--output_dir", "out", "--train_data_dir", "data"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--compile --compile_backend indutcor", "indutcor.*inductor"),
        ("--compile --compile_mode fast", "fast"),
        ("--torch_compile --dynamo_backend no", "--dynamo_backend no with --torch_compile"),
        ("--compile --torch_compile --dynamo_backend eager", "--compile_backend inductor and --dynamo_backend eager"),
        ("--compile --compile_backend eager --compile_mode max-autotune", "--compile_mode max-autotune is for"),
    ],
)
def test_options_that_do_not_fit(words: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse([*_WORDS, *words.split()])


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        ("--blocks_to_swap 1", {}, "--blocks_to_swap with --compile"),
        ("--gradient_checkpointing --cpu_offload_checkpointing", {}, "--cpu_offload_checkpointing with --compile"),
        ("", {"ACCELERATE_USE_FSDP": "true"}, "--compile with FSDP"),
        ("--compile_mode max-autotune", {}, "--compile_mode max-autotune: its CUDA graphs"),
    ],
)
def test_what_cannot_be_beside_it(words: str, environment: dict[str, str], said: str) -> None:
    options = parse([*_WORDS, "--compile", *words.split()])
    with (
        mock.patch.dict("os.environ", environment),
        mock.patch("torch.utils._triton.has_triton", return_value=True),
        pytest.raises(UserError, match=said),
    ):
        compiled.refuse_what_cannot_be(options, torch.device("cuda"))


@pytest.mark.slow
def test_inductor(made: Made) -> None:
    try:
        cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("no C++ compiler")
    expected = losses(made())
    assert losses(made("--compile")) == pytest.approx(expected, rel=1e-4)  # fused operations round less often
    assert graphs() == 2
