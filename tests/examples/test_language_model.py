"""The language model of the example: it learns, it measures what it says, and it stops at the user's mistakes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

import finetune_language_model as script
from fine_tuning import small_models
from fine_tuning.batches import Sample, encode, tensors
from fine_tuning.instructions import read_line
from fine_tuning.language_models import load_base
from tests.conftest import PATIENCE, ROOT

SHORT = ("--steps", "3", "--batch_size", "4", "--answers", "4", "--max_new_tokens", "4")


def write(path: Path, task: str, count: int = 60) -> Path:
    path.write_text("\n".join(small_models.instructions(task, count)) + "\n", encoding="utf-8")
    return path


def run(*words: object) -> script.Result:
    return script.train(script.options([str(word) for word in words]))


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The message of a command that ends with code 2 before anything is trained."""
    assert script.main([str(word) for word in words]) == 2
    told = capsys.readouterr()
    assert "steps" not in told.out
    return told.err


class Fixed(nn.Module):
    """A model whose logits for the next token are a function of the token before."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        class Output:
            logits = self.table[input_ids]

        return Output


# -- what it measures


def test_the_perplexity_against_its_closed_form() -> None:
    """A uniform guess among v tokens has perplexity v; a known distribution the inverse geometric mean of its odds."""
    samples = [Sample((0, 1, 2, 3, 1), 2), Sample((2, 0, 1), 1)]
    batch = tensors(samples, fill=0)
    total, number = script.summed_loss(Fixed(torch.zeros(7, 7)), batch)
    assert number == 5  # of 2 3 1 and of 0 1
    assert math.exp(total / number) == pytest.approx(7)

    table = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    odds = table.softmax(-1)
    total, number = script.summed_loss(Fixed(table), batch)
    wanted = math.prod(odds[a, b].item() for a, b in [(1, 2), (2, 3), (3, 1), (2, 0), (0, 1)]) ** (-1 / 5)
    assert script.Quality((total / number).item(), 0).perplexity == pytest.approx(wanted, rel=1e-5)


def test_padding_changes_no_loss_and_no_answer() -> None:
    tokenizer = small_models.tokenizer()
    model = load_base(None, len(tokenizer), in_4bit=False, checkpointing=False)
    lines = [json.dumps({"instruction": "x" * n, "output": "yz"}) for n in (1, 5, 30)]
    samples, _ = encode([read_line(line, tokenizer, place="") for line in lines], tokenizer, longest=99)
    together, number = script.summed_loss(model, tensors(samples, fill=tokenizer.pad_token_id))
    alone = [script.summed_loss(model, tensors([sample], fill=0)) for sample in samples]
    assert number == sum(count for _, count in alone) == 9
    torch.testing.assert_close(together, sum(total for total, _ in alone))
    wanted = script.options(["--max_new_tokens", "5", "--batch_size", "3"])
    prompts = [sample.tokens[: sample.prompt] for sample in samples]
    written = script.answers(model, tokenizer, prompts, wanted)
    assert written == [script.answers(model, tokenizer, [prompt], wanted)[0] for prompt in prompts]


# -- that it learns


def test_it_begins_to_learn() -> None:
    found = run("--exercise", "double", "--steps", "60", "--answers", "20")
    assert found.before.right == 0
    assert found.before.perplexity > 100  # of 270 tokens, each as likely as the others
    assert found.after.perplexity < 0.2 * found.before.perplexity


@pytest.mark.slow
@pytest.mark.parametrize("task", ["reverse", "double"])
def test_it_learns_a_task(task: str) -> None:
    """From nothing to nearly all words that it has never seen."""
    found = run("--exercise", task)
    assert found.before.right <= 0.01  # a guess is right once in 26 ** 4
    assert found.after.right > 0.9


@pytest.mark.slow
def test_replay_protects_what_was_learnt_before(tmp_path: Path) -> None:
    reverse = write(tmp_path / "reverse.jsonl", "reverse", 2000)
    double = write(tmp_path / "double.jsonl", "double", 2000)
    first = run("--instructions", reverse, "--save_to", tmp_path / "first")
    assert first.after.right > 0.9
    then = ("--instructions", double, "--earlier", reverse, "--start_from", tmp_path / "first")
    plain, replayed = run(*then), run(*then, "--replay", "0.3")
    for found in (plain, replayed):
        assert found.after.right > 0.9
        assert found.earlier_before is not None
        assert found.earlier_before.right > 0.9
    assert plain.earlier_after is not None
    assert replayed.earlier_after is not None
    assert plain.earlier_after.right < 0.1  # 0.0 % was measured, and 78 % with replay
    assert replayed.earlier_after.right > 0.5


# -- what it does in a few steps


def test_the_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    data = write(tmp_path / "my.jsonl", "sort")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("--instructions", data, *SHORT, "--seed", seed, "--save_to", tmp_path / name)
    a, b, c = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "abc")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize("adapter", ["dora", "rslora"])
def test_other_adapters(adapter: str, tmp_path: Path) -> None:
    found = run("--instructions", write(tmp_path / "my.jsonl", "sort"), *SHORT, "--adapter", adapter)
    config = found.model.peft_config["default"]
    assert (config.use_dora, config.use_rslora) == (adapter == "dora", adapter == "rslora")


def test_adalora_spends_its_budget(tmp_path: Path) -> None:
    words = ("--instructions", write(tmp_path / "my.jsonl", "sort"), *SHORT, "--steps", "40", "--adapter", "adalora")
    found = run(*words, "--rank", "4")
    kept = sum(sum(layer) for layer in found.model.peft_config["default"].rank_pattern.values())
    layers = [values for name, values in found.model.named_parameters() if "lora_E" in name]
    assert len(layers) == 14
    assert kept == 2 * len(layers)  # half of rank 4, on average
    assert sum(int((values != 0).sum()) for values in layers) <= kept


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_base_in_four_bits(checkpointing: bool, tmp_path: Path) -> None:
    words = ["--instructions", write(tmp_path / "my.jsonl", "sort"), *SHORT, "--load_in_4bit"]
    found = run(*words, *["--checkpointing"] * checkpointing)
    kinds = {type(module).__name__ for module in found.model.modules() if hasattr(module, "quant_state")}
    names = [name for name, values in found.model.named_parameters() if values.dtype == torch.uint8]
    assert kinds or names
    assert len(names) == 14  # q, k, v, o, gate, up, down of two layers
    assert not any(values.requires_grad for name, values in found.model.named_parameters() if name in names)
    assert math.isfinite(found.after.loss)


def test_training_in_four_bits_after_an_evaluation_reaches_every_layer() -> None:
    """On some CPUs bitsandbytes lays weights out anew in an evaluation; no gradient flowed through them afterwards."""
    base = load_base(None, 300, in_4bit=True, checkpointing=False)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        model.eval()(input_ids=ids)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    trained = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    assert len(trained) == 2 * 2 * 2  # of two layers each, both factors
    assert all(grad is not None and grad.any() for grad in trained.values())


def test_checkpointing_changes_no_number(tmp_path: Path) -> None:
    words = ("--instructions", write(tmp_path / "my.jsonl", "sort"), *SHORT, "--dropout", "0")
    plain, checkpointed = run(*words), run(*words, "--checkpointing")
    assert checkpointed.model.is_gradient_checkpointing
    assert plain.after == checkpointed.after != plain.before


def test_a_step_of_two_batches_is_that_of_one_of_both(tmp_path: Path) -> None:
    """The mean is over all tokens of the step, whatever the lengths of its batches."""
    lines = [json.dumps({"instruction": f"say {n}", "output": "x" * (1 + 5 * (n % 4))}) for n in range(40)]
    (tmp_path / "my.jsonl").write_text("\n".join(lines), encoding="utf-8")
    words = ("--instructions", tmp_path / "my.jsonl", "--steps", "1", "--answers", "0", "--dropout", "0")
    whole = run(*words, "--batch_size", "40", "--save_to", tmp_path / "whole")
    parts = run(*words, "--batch_size", "4", "--accumulation", "9", "--save_to", tmp_path / "parts")
    assert whole.before.loss == pytest.approx(parts.before.loss, rel=1e-5)
    assert whole.after.loss == pytest.approx(parts.after.loss, rel=1e-4)


def test_a_stronger_ewc_moves_less(tmp_path: Path) -> None:
    data, earlier = write(tmp_path / "my.jsonl", "sort"), write(tmp_path / "earlier.jsonl", "reverse")
    words = ("--instructions", data, "--earlier", earlier, *SHORT, "--steps", "20")
    start = run("--instructions", earlier, *SHORT, "--save_to", tmp_path / "start")
    moved = []
    for ewc in [(), ("--ewc", "1e6")]:
        found = run(*words, "--start_from", tmp_path / "start", *ewc)
        pairs = zip(start.model.parameters(), found.model.parameters(), strict=True)
        moved.append(sum((one - other).square().sum().item() for one, other in pairs if other.requires_grad))
    assert moved[1] < 0.9 * moved[0]


def test_answers_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--instructions", write(tmp_path / "my.jsonl", "sort"), *SHORT, "--prompts", "Sort the letters: dcba")
    told = capsys.readouterr().out
    assert "Sort the letters: dcba\n  before: '" in told
    assert "54 answers, 0 of them cut at 512 tokens" in told
    assert "optimizer state" in told


def test_layers_have_their_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--instructions", write(tmp_path / "my.jsonl", "sort"), *SHORT)
    run(*words, "--layer_decay", "0.5", "--learning_rate", "1e-3")
    assert "rate 0.00025 to 0.001 by layer, cosine" in capsys.readouterr().out  # embeddings: below two layers


def test_a_model_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = small_models.tokenizer()
    load_base(None, len(tokenizer), in_4bit=False, checkpointing=False).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    found = run(
        "--model", tmp_path / "base", "--instructions", write(tmp_path / "my.jsonl", "sort"), *SHORT, "--as_chat"
    )
    told = capsys.readouterr().out
    assert "rate 5e-05, cosine after a warm-up of 0" in told  # of a small base, for generation
    trained = {name for name, values in found.model.named_parameters() if values.requires_grad}
    assert all("lora_" in name for name in trained)


# -- what is wrong


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--preset", "language_model"], "no preset 'language_model', did you mean 'language_model_finetune'"),
        (["--task", "generaton"], "no rate for 'generaton', did you mean 'generation'"),
        (["--size", "mediun"], "no 'mediun', did you mean 'medium'"),
        (["--adapter", "dra"], "no 'dra', did you mean 'dora'"),
        (["--exercise", "revers"], "no task 'revers', did you mean 'reverse'"),
        (["--layer_decay", "1.5"], "--layer_decay: 1.5 would raise the rate towards the input"),
        (["--instuctions", "my.jsonl"], "unknown option '--instuctions', did you mean '--instructions'"),
        (["--replay", "0.3"], "--replay: needs --earlier"),
        (["--ewc", "10"], "--ewc: needs --earlier"),
        (["--exercise", "sort", "--instructions", "my.jsonl"], "--exercise: has no effect with --instructions"),
        (["--epochs", "1", "--steps", "9"], "--epochs: has no effect with --steps"),
        (["--size", "large"], "--size: has no effect without --model"),
        (["--model", "x", "--size", "large", "--learning_rate", "1"], "--size: has no effect with --learning_rate"),
        (["--save_to", "README.md/new"], "--save_to README.md/new: cannot be made: a part of this path is a file"),
        (["--start_from", "nowhere"], "has no adapter_config.json"),
        (["--start_from", "nowhere", "--rank", "4"], "--rank: the adapter of --start_from has its own"),
        (["--save_to", "docs"], "--save_to docs: is not empty"),
        (["--instructions", "docs/optimizer.jsonl"], "did you mean 'docs/optimizer.md'"),
        (["--model", "./quickstrat"], "--model ./quickstrat: cannot be loaded, did you mean 'quickstart'"),
    ],
)
def test_a_wrong_option(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert said in refused(capsys, *words)


@pytest.mark.parametrize(
    "words",
    [
        *(["--steps", "0"], ["--replay", "1"], ["--learning_rate", "-1"], ["--rank", "x"]),
        *(["--held_out", "0"], ["--answers", "-1"]),
    ],
)
def test_a_number_out_of_range(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        script.main(words)
    assert end.value.code == 2
    assert f"argument {words[0]}: {words[1]} is " in capsys.readouterr().err.replace("'x'", "x")


def test_too_short_a_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "my.jsonl", "sort")
    assert "no sample is left of 54 lines" in refused(capsys, "--instructions", data, "--max_length", "4")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target_modules", "q_proj", "v_prj"], "no linear layer's name ends with 'v_prj', did you mean 'v_proj'"),
        (["--adapter", "adalora", "--steps", "1"], "--adapter adalora: one step is too few"),
    ],
)
def test_what_does_not_fit_the_model(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, "--exercise", "sort", *words)


def test_an_adapter_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = load_base(None, 99, in_4bit=False, checkpointing=False)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(base, config).save_pretrained(tmp_path, save_embedding_layers=False)
    said = refused(capsys, "--exercise", "sort", "--start_from", tmp_path)
    assert said.startswith(f"error: --start_from {tmp_path}: does not fit the model: ")


def test_texts_have_no_answers_that_could_be_right(tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").write_text("\n".join(f'{{"text": "{n} {n * n}"}}' for n in range(20)), encoding="utf-8")
    found = run("--instructions", tmp_path / "my.jsonl", "--steps", "1")
    assert found.after.right is None
    assert "right" not in str(found.after)


def test_an_exercise_as_chat(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = small_models.tokenizer()
    parts = script.read(script.options(["--exercise", "sort", "--as_chat"]), tokenizer)
    assert tokenizer.decode(parts.new[0].tokens).startswith("<|user|>Sort")


def test_a_wrong_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "my.jsonl", "sort")
    file.write_text(file.read_text(encoding="utf-8") + '{"instruction": "a", "ouput": "b"}\n', encoding="utf-8")
    said = f"error: {file}, line 61: has 'ouput', did you mean 'output'?\n"
    assert refused(capsys, "--instructions", file) == said
    assert refused(capsys, "--earlier", file) == said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune_language_model", "adapt_vision_transformer"])
def test_a_mistake_ends_the_program_without_a_traceback(name: str) -> None:
    words = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--preset", "no_such"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    # before it bitsandbytes may say what it has no kernel for on this processor
    assert done.stderr.splitlines()[-1].startswith("error: preset_arguments: no preset 'no_such'")
    assert "Traceback" not in done.stderr
