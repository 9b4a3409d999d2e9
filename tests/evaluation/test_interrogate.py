"""The command `interrogate`, on the quickstart's base."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.config.command import run
from library.config.options import ModelOptions
from library.evaluation.base_model import BaseModel, open_base
from library.evaluation.candidates import read_candidates
from library.evaluation.interrogate import Change, changes, main, table
from library.evaluation.precision import PrecisionOptions
from library.models.opening import open_family
from networks import lora_interrogator
from tests.conftest import BASE, forget_accelerator
from tests.evaluation.conftest import Trained

MODEL = ("--pretrained_model_name_or_path", str(BASE))


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> int:
    """The vocabulary is cut to so many tokens, for speed."""
    from library.models.stable_diffusion import StableDiffusion

    whole = StableDiffusion.vocabulary
    monkeypatch.setattr(StableDiffusion, "vocabulary", lambda self: whole(self)[:700])
    return 700


def test_the_change_is_that_of_the_encoders_states(trained: Trained, tokens: int) -> None:
    """Computed here for a few tokens with the file merged by hand: states with it less those without."""
    model = ModelOptions(pretrained_model_name_or_path=str(BASE))
    (candidate,) = read_candidates([str(trained.both)])
    base = BaseModel.of(open_base(model, [candidate], given={}), PrecisionOptions(), no_half_vae=False)
    found = changes(base, candidate, batch_size=128)
    assert len(found) == tokens
    assert [one.change for one in found] == sorted((one.change for one in found), reverse=True)
    family = open_family(str(BASE))
    encoder = family.components.load("text_encoder", torch.float32, "cpu")
    few = [5, 320, 699]
    with torch.no_grad():
        before = family.token_states(few)
        own = load_file(trained.both)
        for name, layer in encoder.named_modules():
            key = f"lora_te_text_model_{name}".replace(".", "_")
            if f"{key}.lora_up.weight" in own:
                up, down = own[f"{key}.lora_up.weight"], own[f"{key}.lora_down.weight"]
                layer.weight += own[f"{key}.alpha"] / len(down) * up @ down  # type: ignore[operator]
        after = family.token_states(few)
    by_token = {one.token: one.change for one in found}
    expected = (after - before).abs().mean(dim=(1, 2)).tolist()
    # the same sums in another order
    assert [by_token[token] for token in few] == pytest.approx(expected, rel=1e-3)
    forget_accelerator()


def test_the_states_are_those_of_a_prompt_of_one_word() -> None:
    """A causal encoder: the padding behind a word changes nothing before it."""
    family = open_family(str(BASE))
    family.components.load("text_encoder", torch.float32, "cpu")
    (token,) = family.token_ids("cat")
    assert family.vocabulary()[token] == "cat"
    with torch.no_grad():
        alone, prompt = family.token_states([token]), family.encode_prompts(["cat"])["hidden_states"]
    torch.testing.assert_close(alone, prompt[:, :3], atol=1e-5, rtol=1e-5)


def test_the_table() -> None:
    found = [Change(7, "cat", 0.3), Change(8, "do…", 0.1), Change(9, "fox", 0.05)]
    assert list(table(found, top=2))[1:] == [
        "     7  cat                  0.30000  3.00 ×",
        "     8  do…                  0.10000  1.00 ×",
    ]


def test_the_command_and_kohyas_door(trained: Trained, tokens: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, [str(trained.both), *MODEL, "--top", "5"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 6
    forget_accelerator()
    assert lora_interrogator.main(["--sd_model", str(BASE), "--model", str(trained.both), "--batch_size", "512"]) == 0
    theirs = capsys.readouterr().out.splitlines()
    assert len(theirs) == 101
    assert [re.split(r" +", row)[1] for row in theirs[1:6]] == [re.split(r" +", row)[1] for row in rows[1:]]
    forget_accelerator()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{unet}"], "unet: has no layers in the text encoders, so that it changes no token there"),
        (["{unet}x"], "no such file: {unet}x, did you mean '{unet}'?"),
        (["{embedding}"], "is a textual inversion embedding, and no LoRA"),
    ],
)
def test_mistakes_are_named(
    words: list[str], said: str, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"emb_params": torch.ones(1, 64)}, tmp_path / "e.safetensors")
    places = {"unet": trained.unet, "embedding": tmp_path / "e.safetensors"}
    assert run(main, [*(word.format(**places) for word in words), *MODEL]) == 2
    assert said.format(**places) in capsys.readouterr().err


def test_both_encoders_of_sdxl(tiny_sdxl: Path) -> None:
    family = open_family(str(tiny_sdxl))
    family.components.load_all(family.components.text_encoders, torch.float32, "cpu")
    (token,) = family.token_ids("cat")
    with torch.no_grad():
        alone, prompt = family.token_states([token]), family.encode_prompts(["cat"])["hidden_states"]
    torch.testing.assert_close(alone[:, :2], prompt[:, :2], atol=1e-5, rtol=1e-5)
