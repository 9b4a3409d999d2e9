"""A run that is stopped and resumed gives the bits of one that was not."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from library.config.data.dataset_config import plain_subset
from library.config.parser import parse
from library.errors import UserError
from library.optimizers.create import OptimizerChoice
from library.run.curves import Curves, of_length
from library.training import loop, snapshot, state
from tests.conftest import copy_images, forget_accelerator, run_training
from tests.quick import quick, slow
from tests.training.written import same, weights

Train = Callable[..., int]

SAVES = ("--save_every_n_steps", "2", "--save_state")


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run of four steps with a state after the second and the last."""
    folder = tmp_path_factory.mktemp("saved")
    copy_images(folder / "data" / "2_style")
    assert run_training(folder, *SAVES) == 0
    forget_accelerator()
    return folder / "out"


@pytest.fixture
def saved(four_steps: Path, tmp_path: Path) -> Path:
    """The same, for one test alone, in the place where `train` writes."""
    return shutil.copytree(four_steps, tmp_path / "out")


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C comes while that step runs."""
    one_step = loop.optimizer_step

    def interrupted(run: loop.Run, item: loop.StepBatches) -> loop.Step:
        loss = one_step(run, item)
        if item.step == step:
            loop.signal.raise_signal(loop.signal.SIGINT)
        return loss

    monkeypatch.setattr(loop, "optimizer_step", interrupted)


# An epoch has six steps (12 draws in batches of 2): stopped after the third, and on into the second epoch.
LONG = ("--max_train_steps", "7", "--lr_scheduler", "cosine", "--lr_warmup_steps", "2")


@pytest.mark.parametrize(
    "words",
    [
        slow((("--optimizer_type", "AdamW"),)),
        slow((("--optimizer_type", "AdamW8bit", "--network_dim", "64"),)),
        ("--optimizer_type", "CustomAdamW", "--network_dim", "64"),
        slow((("--optimizer_type", "CustomAdamW", "--optim_bits", "32", "--use_grams", "--no-use_cautious"),)),
        slow((("--optimizer_type", "AdamWScheduleFree", "--lr_scheduler", "constant", "--lr_warmup_steps", "0"),)),
        slow((("--optimizer_type", "pytorch_optimizer.ScheduleFreeAdamW", "--lr_scheduler", "constant"),)),
        slow((("--optimizer_type", "pytorch_optimizer.SPlus"),)),
        slow((("--optimizer_type", "prodigyplus.ProdigyPlusScheduleFree", "--learning_rate", "1"),)),
        slow((("--optimizer_type", "Prodigy", "--learning_rate", "1"),)),
        slow((("--mixed_precision", "bf16", "--full_bf16"),)),
        slow((("--mixed_precision", "bf16", "--full_bf16", "--optimizer_type", "Adafactor"),)),  # keeps fp32
        ("--shuffle_caption", "--flip_aug", "--network_dropout", "0.2"),
        slow((("--gradient_accumulation_steps", "2", "--max_train_steps", "5"),)),
        slow((("--no-cache_latents", "--max_data_loader_n_workers", "2", "--flip_aug"),)),
        slow((("--lr_scheduler", "cosine_with_restarts", "--lr_scheduler_num_cycles", "2", "--min_snr_gamma", "5"),)),
        slow((("--scale_weight_norms", "0.01", "--network_args", "conv_dim=2"),)),
    ],
    ids=lambda words: " ".join(word.removeprefix("--") for word in words),
)
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(
    words: tuple[str, ...], train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(*LONG, *words, "--output_name", "whole", "--save_state_on_train_end") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert train(*LONG, *words, "--output_name", "broken") == 130
    assert (tmp_path / "out" / "broken-step00000003.safetensors").exists()
    assert train(*LONG, *words, "--output_name", "broken", "--resume", "latest", "--save_state_on_train_end") == 0
    assert same(weights(tmp_path, "whole"), weights(tmp_path, "broken"))
    whole, broken = (
        torch.load(tmp_path / "out" / f"{name}-state" / state.TENSORS, weights_only=True)
        for name in ("whole", "broken")
    )
    assert flat(whole) == flat(broken)
    assert told(tmp_path, "whole") == told(tmp_path, "broken")


def told(folder: Path, name: str) -> list[dict[str, Any]]:
    """The lines of the steps in the run's metrics, but for the time that they took."""
    lines = [json.loads(line) for line in (folder / "out" / f"{name}-metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines if "loss" in line]


def flat(value: object) -> object:
    """Nested states in a form that == compares bit by bit."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [flat(item) for item in value]
    return value


@pytest.mark.slow
def test_files_states_and_facts_go_on_counting(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--max_train_steps", "12", "--save_every_n_steps", "2", "--save_state", "--save_last_n_steps_state", "2")
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert train(*words) == 130
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == [
        "test-step00000002-state",
        "test-step00000004-state",
        "test-step00000005-state",
    ]
    assert train(*words, "--resume", str(out / "test-step00000004-state")) == 0  # its own files may be replaced
    states = {path.name: state._read_facts(path) for path in out.iterdir() if path.is_dir()}
    assert {"test-state", "test-step00000010-state", "test-step00000012-state"} < set(states)
    assert states["test-state"].step == 12
    sessions = set()
    for path in out.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            sessions.add(file.metadata()["ss_session_id"])
    assert len(sessions) == 1
    losses = torch.load(out / "test-state" / state.TENSORS, weights_only=True)["losses"]
    assert len(losses) == 12


@pytest.mark.slow
def test_latest_is_of_this_name_only(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another run whose name begins the same is another run."""
    assert train("--save_state_on_train_end", "--output_name", "test-big") == 0
    assert train("--resume", "latest", "--max_train_steps", "6") == 2
    assert "no state of test in" in capsys.readouterr().err
    assert train("--resume", "latest", "--max_train_steps", "6", "--output_name", "test-big", "--overwrite") == 0


@pytest.mark.slow
def test_the_seed_is_the_states(train: Train, tmp_path: Path) -> None:
    words = ("--save_every_n_steps", "2", "--save_state", "--seed", "")
    assert train(*words) == 0
    first = weights(tmp_path, "test")
    assert train(*words, "--resume", str(tmp_path / "out" / "test-step00000002-state")) == 0
    assert same(first, weights(tmp_path, "test"))


def test_files_of_another_run_are_not_replaced(
    saved: Path, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move(saved / "test-step00000002-state", tmp_path / "kept")
    assert train("--overwrite") == 0  # another run takes the name
    assert train("--resume", str(tmp_path / "kept")) == 2
    assert "would replace" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--learning_rate", "2e-3"), "learning_rate: 0.001 then, 0.002 now"),
        slow((("--seed", "7"), "seed: 1 then, 7 now")),
        slow((("--gradient_accumulation_steps", "2"), "batches per step")),
        slow((("--network_alpha", "1"), "network_alpha: 2.0 then, 1.0 now")),
        slow((("--flip_aug",), "the data:")),
        (("--max_train_steps", "2"), "nothing is left to train"),
        (("--max_train_steps", "8", "--lr_scheduler", "linear"), "length: 4 steps then, 8 now"),
    ],
    ids=lambda value: value[0].removeprefix("--") if isinstance(value, tuple) else "",
)
def test_another_run_is_refused(
    words: tuple[str, ...], said: str, saved: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    resume = ("--resume", str(saved / "test-step00000002-state"))
    assert train(*resume, *words) == 2
    assert said in capsys.readouterr().err
    if "nothing is left" not in said:
        assert train(*resume, *words, "--resume_anyway", "--output_name", "anyway") == 0


NF4 = ("--base_format", "nf4")
NEEDED = (
    *("--pretrained_model_name_or_path", "m", "--train_data_dir", "d", "--output_dir", "o", "--max_train_steps", "2"),
    *("--learning_rate", "1"),
)


def _found(*words: str) -> state.State:
    """The state of a run with these options, of which nothing but its facts exists."""
    options = parse([*NEEDED, "--network_train_unet_only", *words])
    about = {"configuration": state.configuration(options), "harmless": state.configuration(options, harmless=True)}
    run = {
        "step": 1,
        "total_steps": 2,
        "seed": 1,
        "session_id": 1,
        "started_at": 0.0,
        "batches_per_step": 1,
        "data": "",
    }
    return state.State(Path("kept"), state.Facts(format=state.FORMAT, **run, **about))  # type: ignore[arg-type]


@pytest.mark.parametrize("kept", [lambda: 0, threading.Lock()])
def test_what_cannot_be_stored_is_named(kept: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule's or an optimizer's state of another package can hold anything."""
    monkeypatch.setattr(snapshot, "tensors_of", lambda run: {"optimizer": kept})
    run: Any = None
    with pytest.raises(UserError, match="x-state: not written: the optimizer's state cannot be stored: "):
        state.write(tmp_path / "x-state", run, _found().facts, 1)
    assert not (tmp_path / "x-state").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="names are Unicode")
def test_the_facts_of_a_state_can_have_names_that_are_no_utf_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "tensors_of", lambda run: {})
    facts = dataclasses.replace(_found().facts, harmless={"train_data_dir": os.fsdecode(b"\xff")})
    run: Any = None
    state.write(tmp_path / "x-state", run, facts, 1)
    assert state._read_facts(tmp_path / "x-state") == dataclasses.replace(facts, step=1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*NF4, "--text_encoder_format", "int8"), r'text_encoder_format: "" then, "int8" now'),
        ((*NF4, "--text_encoder_format", "none"), r'text_encoder_format: "" then, "none" now'),
        ((*NF4, "--text_encoder_format", "nf4"), ""),
        (
            (
                *NF4,
                "--cache_text_encoder_outputs",
            ),
            r"text_encoder_format: text encoders held in nf4 then, as they are now",
        ),
        ((*NF4, "--cache_text_encoder_outputs", "--text_encoder_format", "nf4"), ""),
        (("--base_format", "int8"), r"text encoders held in nf4 then, held in int8 now .*\n  base_format: "),
    ],
)
def test_another_format_of_the_text_encoders_is_noticed(words: tuple[str, ...], said: str) -> None:
    """By what it does, and not by its name alone: a cache of captions is not encoded in --base_format."""
    before, now = _found(*NF4), _found(*words).facts
    if not said:
        assert state.refuse_other_run(before, now=now, of_length=(), anyway=False) == frozenset()
        return
    with pytest.raises(UserError, match=said):
        state.refuse_other_run(before, now=now, of_length=(), anyway=False)
    assert "text_encoder_format" in state.refuse_other_run(before, now=now, of_length=(), anyway=True)


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (("--wd_transition_steps", "50%"), True),
        slow((("--wd_transition_steps", "3"), False)),
        slow((("--wd_transition_steps", "auto"), False)),  # 500 in either
    ],
)
def test_a_longer_run_must_not_change_the_curve_of_the_weight_decay(
    words: tuple[str, ...], changed: bool, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--dynamic_weight_decay", *words)
    assert train(*words, "--save_every_n_steps", "2", "--save_state") == 0
    resume = ("--resume", str(tmp_path / "out" / "test-step00000002-state"), "--output_name", "longer")
    assert train(*words, *resume, "--max_train_steps", "6") == (2 if changed else 0)
    line = "length: 4 steps then, 6 now, which changes the curve of the weight decay"
    assert (line in capsys.readouterr().err) is changed


@pytest.mark.parametrize("optimizer", quick(["AdamW", "CustomAdamW"], "CustomAdamW"))
def test_resume_anyway_takes_the_new_settings(optimizer: str, train: Train, tmp_path: Path) -> None:
    """Rates, and a weight decay with its curve: what the state's optimizer had is not what was asked for."""
    words = ("--optimizer_type", optimizer, "--lr_scheduler", "linear", "--max_train_steps", "8")
    old = ("--wd_transition_steps", "2", "--dynamic_weight_decay")
    assert train(*words, *old, "--save_every_n_steps", "4", "--save_state") == 0
    state = str(tmp_path / "out" / "test-step00000004-state")
    more = ("--learning_rate", "1e-4", "--unet_lr", "4e-4", "--weight_decay", "0.5")
    new = ("--dynamic_weight_decay", "--wd_transition_steps", "4", "--wd_decay_factor", "0.5")
    assert train(*words, *more, *new, "--resume", state, "--resume_anyway", "--output_name", "anyway") == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "anyway-metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if "rates" in line}
    assert sorted(steps) == [5, 6, 7, 8]
    for step, line in steps.items():
        left = (8 - (step - 1)) / 8
        assert line["rates"]["unet"] == pytest.approx(4e-4 * left)
        assert line["rates"]["text_encoder"] == pytest.approx(1e-4 * left)
        assert line["weight_decay"]["all"] == pytest.approx(0.5 * 0.5 ** ((step - 4) / 4))


def test_a_changed_caption_is_another_run(
    saved: Path, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    caption = next((tmp_path / "data" / "2_style").glob("*.txt"))
    caption.write_text("something else", encoding="utf-8")
    assert train("--resume", str(saved / "test-step00000002-state")) == 2
    assert "the data:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "rates", "decay"),
    [
        slow((("--learning_rate", "2e-4"), [2e-4, 2e-4], 0.1)),
        slow((("--unet_lr", "5e-4"), [1e-3, 5e-4], 0.1)),
        slow((("--lr_scheduler", "linear", "--learning_rate", "1e-2"), [5e-3, 2.5e-3], 0.1)),
        (("--weight_decay", "0.3", "--optimizer_args", "eps=1e-6"), [1e-3, 1e-3], 0.3),
        (("--optimizer_type", "AdamW8bit", "--network_dim", "64"), [1e-3, 1e-3], 0.1),
        slow((("--optimizer_type", "Lion", "--lr_scheduler", "cosine"), [5e-4, 1.464466e-4], 0.1)),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_changed_settings_take_effect_anyway(
    words: tuple[str, ...], rates: list[float], decay: float, train: Train, tmp_path: Path
) -> None:
    """Two steps of four are done; the rates are those of both parts, or of the last two steps."""
    common = ("--network_dim", "64") if "--network_dim" in words else ()
    begun = ("--weight_decay", "0.1", *common, "--no-cache_latents")
    assert train(*begun, "--save_every_n_steps", "2", "--save_state") == 0
    resumed = ("--resume", str(tmp_path / "out" / "test-step00000002-state"), "--resume_anyway")
    assert train(*begun, *resumed, "--output_name", "more", *words) == 0
    third, fourth = told(tmp_path, "more")
    if "--lr_scheduler" in words:
        assert [step["rates"]["unet"] for step in (third, fourth)] == pytest.approx(rates)
    else:
        assert [third["rates"]["text_encoder"], third["rates"]["unet"]] == pytest.approx(rates)
    assert fourth["weight_decay"] == {"all": pytest.approx(decay)}


def test_a_state_of_an_earlier_version_goes_on(train: Train, tmp_path: Path) -> None:
    """It knows nothing of options, and of a data set's keys, that are newer."""
    assert train("--save_state_on_train_end") == 0
    file = tmp_path / "out" / "test-state" / state.FACTS
    facts = json.loads(file.read_text())
    for name in ("ip_noise_gamma", "max_grad_norm", "weighting_scheme", "base_weights"):
        del facts["configuration"][name]
    facts["configuration"] |= {"gone": False, "gone_too": None}
    file.write_text(json.dumps(facts))
    assert train("--resume", "latest", "--max_train_steps", "5") == 0
    assert train("--resume", str(file.parent), "--max_train_steps", "5", "--max_grad_norm", "2") == 2
    file.write_text(json.dumps(facts | {"configuration": facts["configuration"] | {"gone": 0.5}}))
    assert train("--resume", str(file.parent), "--max_train_steps", "5") == 2


def test_a_new_key_of_data_sets_leaves_their_hash(image_folder: Path) -> None:
    from library.config.data.dataset_config import DatasetSpec, SubsetSpec, load_datasets
    from library.config.parser import parse
    from library.data.prepared import Prepared

    words = ("--pretrained_model_name_or_path", "x", "--output_dir", "out", "--train_data_dir", str(image_folder))
    specs = load_datasets(parse([*words, "--caption_extension", ".txt", "--resolution", "64"]))
    later = [
        dataclasses.make_dataclass(
            "Later", [("new", int, dataclasses.field(default=3, kw_only=True))], bases=(kind,), frozen=True
        )
        for kind in (DatasetSpec, SubsetSpec)
    ]

    def as_later(spec: Any, kind: Any, **more: Any) -> Any:
        return kind(**{field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)} | more)

    newer = tuple(
        as_later(spec, later[0], subsets=tuple(as_later(sub, later[1]) for sub in spec.subsets)) for spec in specs
    )
    nothing = Prepared.__new__(Prepared)
    for name in ("samples", "placements", "validation"):
        object.__setattr__(nothing, name, None if name == "validation" else ())
    assert state.data_hash(newer, nothing) == state.data_hash(specs, nothing)
    changed = as_later(newer[0], later[0], new=4)
    assert state.data_hash((changed,), nothing) != state.data_hash(specs, nothing)


@pytest.mark.slow
def test_harmless_changes_are_listed(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*SAVES) == 0
    words = ("--resume", str(tmp_path / "out" / "test-step00000002-state"), "--no-cache_latents")
    assert train(*words, "--output_name", "other", "--save_precision", "fp16", "--max_train_steps", "6") == 0
    said = capsys.readouterr().err.split("harmless changes since the state:\n")[1].split("adapted layers")[0]
    changes = [line.strip() for line in said.splitlines() if line.startswith("  ")]
    assert changes == [
        "cache_latents: true then, false now",
        'output_name: "test" then, "other" now',
        "save_every_n_steps: 2 then, not set now",
        'save_precision: not set then, "fp16" now',
        "save_state: true then, false now",
    ]


def damaged(saved: Path, *, file: str, content: bytes | None) -> Path:
    folder = saved / "test-state"
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("state.json", None, "there is no state.json in it"),
        ("state.json", b"{", "state.json cannot be read"),
        ("state.json", b'{"format": 1}', "state.json cannot be read"),
        ("state.pt", None, "there is no state.pt in it"),
        ("state.pt", b"PK\x03\x04", "damaged or not a state"),
        ("state.pt", b"\x80\x04cos\nsystem\n(S'true'\ntR.", "damaged or not a state"),
    ],
)
def test_damaged_states(
    file: str, content: bytes | None, said: str, saved: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = damaged(saved, file=file, content=content)
    assert train("--resume", str(folder), "--max_train_steps", "6", "--output_name", "more") == 2
    assert said in capsys.readouterr().err


def test_where_frozen_weights_lie_is_harmless() -> None:
    """As after an error of memory; the bits are the same (tests/offload, tests/gpu). Also for states of earlier
    versions, which had these options among those that matter."""
    swaps = ("--gradient_checkpointing", "--cpu_offload_checkpointing", "--blocks_to_swap", "50%")
    less, more = _found(), _found(*swaps)
    moved = {name: more.facts.harmless[name] for name in ("blocks_to_swap", "cpu_offload_checkpointing")}
    harmless = {name: value for name, value in more.facts.harmless.items() if name not in moved}
    earlier = dataclasses.replace(more.facts, configuration=more.facts.configuration | moved, harmless=harmless)
    for before, now in ((less, more), (more, less), (state.State(more.folder, earlier), less)):
        assert state.refuse_other_run(before, now=now.facts, of_length=(), anyway=False) == frozenset()


def written(folder: Path, **facts: Any) -> Path:
    """A state with these facts, of a run that began with step 1."""
    folder.mkdir(parents=True)
    found = dataclasses.replace(_found().facts, **facts)
    (folder / state.FACTS).write_text(json.dumps(dataclasses.asdict(found)))
    torch.save({"losses": torch.zeros(1)}, folder / state.TENSORS)
    return folder


def test_the_latest_state_is_of_the_run_that_began_last(tmp_path: Path) -> None:
    """A run that --overwrite began anew has fewer steps than what is left of the one before."""
    written(tmp_path / "test-step00000008-state", step=8, started_at=1.0)
    newer = written(tmp_path / "test-step00000002-state", step=2, started_at=2.0)
    assert state.find("latest", output_dir=tmp_path, output_name="test").folder == newer


def test_only_states_are_brought_back(tmp_path: Path) -> None:
    """A folder that was killed between two moves is a state's; other hidden files are the user's."""
    written(tmp_path / ".test-state.old")
    (tmp_path / ".notes.old").write_text("mine")
    assert state.find("latest", output_dir=tmp_path, output_name="test").folder == tmp_path / "test-state"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".notes.old", "test-state"]


@pytest.mark.parametrize(
    ("words", "warmup", "names"),
    [
        ((), 100.0, []),
        ((), 0.5, ["token warm-up"]),
        (("--network_module", "networks.adalora"), 0.0, ["ranks"]),
        (("--distillation_weight", "1", "--network_weights", "w"), 0.0, []),
        (
            ("--distillation_weight", "1", "--network_weights", "w", "--distillation_schedule", "linear"),
            0.0,
            ["distillation"],
        ),
    ],
)
def test_what_depends_on_the_length(words: tuple[str, ...], warmup: float, names: list[str]) -> None:
    subset = dataclasses.replace(plain_subset(Path("d"), origin=""), token_warmup_step=warmup)
    plan = SimpleNamespace(
        options=parse([*NEEDED, *words]),
        resume=_found(),
        choice=OptimizerChoice("AdamW", "torch.optim.AdamW", {}),
        prepared=SimpleNamespace(train_images=1),
        parameters=None,
        datasets=[SimpleNamespace(subsets=[subset])],
    )
    assert of_length(plan, Curves(None, None, plan.choice)) == names  # type: ignore[arg-type]


def test_where_there_is_none(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--resume", str(tmp_path / "out" / "test-stat")) == 2
    assert "no such folder" in capsys.readouterr().err
    assert train("--resume", "latest") == 2
    assert "no state of test" in capsys.readouterr().err
    (tmp_path / "kohyas").mkdir()
    (tmp_path / "kohyas" / "train_state.json").write_text(json.dumps({"current_step": 3}))
    assert train("--resume", str(tmp_path / "kohyas")) == 2
    assert "a state of kohya's scripts" in capsys.readouterr().err
