"""Trained embeddings: the word in the tokenizer, its vectors in the encoders, and their files, as other programs read
them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from library.errors import UserError
from library.files.hashes import safetensors_hashes
from library.files.header import read_metadata
from library.models.checkpoints.base_model import ASSETS
from library.models.family import ModelFamily, TokenTable
from library.models.modules import read_tokenizer
from library.models.opening import open_family
from library.models.text.prompts import content_tokens
from library.models.text.words import TokenizerWithWord
from library.record.saves import save_network
from networks.embeddings import files
from networks.embeddings.together import WithEmbedding
from networks.embeddings.vectors import Embedding, create
from networks.network import TrainableNetwork
from networks.settings import LearningRates
from tests.conftest import BASE

WORD, VECTORS = "<Zfox1>", 2
CAPTIONS = [
    "",
    "a photo of <zfox1>",
    "<zfox1>",
    "two of <zfox1>,<ZFOX1> and<zfox1>s, “quoted” <zfox1>",
    "no word here",
    "word " * 74 + "<zfox1> behind",
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return read_tokenizer(ASSETS / "clip_tokenizer", {})


# -- the word


@pytest.mark.parametrize("caption", CAPTIONS)
def test_the_word_is_read_as_transformers_reads_an_added_token(tokenizer: Any, caption: str) -> None:
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(str(ASSETS / "clip_tokenizer"))
    assert theirs.add_tokens(["<zfox1>"]) == 1
    ours = content_tokens(TokenizerWithWord(tokenizer, WORD, vectors=1), caption)
    assert ours == content_tokens(theirs, caption)
    several = content_tokens(TokenizerWithWord(tokenizer, WORD, vectors=3), caption)
    assert several == [token for one in ours for token in ([one, one + 1, one + 2] if one == 49408 else [one])]
    assert len(tokenizer) == 49408  # which others share


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("fox", "has this word already, as token 3240"),
        ("*", "has this word already"),
        ("sks", "has this word already"),  # only at the end of a word: sks</w>
        ("my fox", "without spaces"),
        ("fox,cat", "without spaces and without"),
        ("{fox}", "without spaces and without"),
        ("\ufeff", "captions are cleaned of such characters"),
    ],
)
def test_a_word_that_cannot_be_is_refused(tokenizer: Any, word: str, reason: str) -> None:
    with pytest.raises(UserError, match="--token_string") as error:
        TokenizerWithWord(tokenizer, word, vectors=1)
    assert reason in str(error.value)


# -- the vectors


def made_up(vocabulary: int = 10, width: int = 4) -> TokenTable:
    torch.manual_seed(0)
    table = nn.Embedding(vocabulary, width).requires_grad_(False)
    return TokenTable("emb_params", "embedding", table, first=vocabulary)


def test_the_rows_are_the_words_and_the_table_keeps_its_bits() -> None:
    table = made_up()
    before = table.table.weight.clone()
    ids = torch.tensor([[3, 10, 9, 11], [10, 0, 10, 1]])
    known = table.table(ids.clamp(max=9))
    embedding = create("w", [table], vectors=2, init=[7], seed=1)
    embedding.attach()
    (rows,) = embedding.parameters()
    assert rows.tolist() == [before[7].tolist()] * 2
    found = table.table(ids)
    torch.manual_seed(1)
    upstream = torch.randn_like(found)
    found.backward(upstream)
    new = ids >= 10
    assert torch.equal(found[~new], known[~new])
    assert torch.equal(found[new], rows.detach()[ids[new] - 10])
    assert rows.grad is not None
    expected = torch.stack([upstream[ids == 10].sum(0), upstream[ids == 11].sum(0)])
    torch.testing.assert_close(rows.grad, expected)
    assert table.table.weight.grad is None
    assert torch.equal(table.table.weight, before)


def test_detached_the_table_is_as_before() -> None:
    table = made_up()
    ids = torch.tensor([[3, 9]])
    before, embedding = table.table(ids), create("w", [table], vectors=1, init=[7], seed=1)
    embedding.attach()
    embedding.detach()
    assert "forward" not in vars(table.table)
    assert torch.equal(table.table(ids), before)


def test_off_is_the_word_before_training() -> None:
    table = made_up()
    embedding = create("w", [table], vectors=1, init=[7], seed=1)
    embedding.attach()
    start = table.table(torch.tensor([10]))
    with torch.no_grad():
        next(embedding.parameters()).add_(1)
    assert not torch.equal(table.table(torch.tensor([10])), start)
    with embedding.off():
        assert torch.equal(table.table(torch.tensor([10])), start)
    assert not torch.equal(table.table(torch.tensor([10])), start)


def test_first_words_are_repeated_or_cut_as_in_kohya() -> None:
    def rows(init: list[int], vectors: int) -> list[list[float]]:
        (found,) = create("w", [made_up()], vectors=vectors, init=init, seed=1).parameters()
        return found.tolist()  # type: ignore[no-any-return]

    weight = made_up().table.weight
    assert rows([1, 2], 5) == weight[[1, 2, 1, 2, 1]].tolist()
    assert rows([1, 2, 3], 2) == weight[[1, 2]].tolist()


def test_without_a_first_word_vectors_are_drawn_like_the_tables_by_seed() -> None:
    table = made_up(5000, 6)
    table.table.weight.mul_(torch.arange(1, 7)).add_(torch.arange(6))

    def rows(seed: int) -> torch.Tensor:
        return next(create("w", [table], vectors=4000, init=[], seed=seed).parameters()).detach()

    drawn = rows(1)
    assert torch.equal(drawn, rows(1))
    assert not torch.equal(drawn, rows(2))
    weight = table.table.weight
    torch.testing.assert_close(drawn.mean(0), weight.mean(0), atol=0.3, rtol=0)  # 3 standard errors of 6 / sqrt(4000)
    torch.testing.assert_close(drawn.std(0), weight.std(0), atol=0, rtol=0.05)


def test_its_rate_is_its_own_or_the_default() -> None:
    embedding = create("w", [made_up()], vectors=1, init=[1], seed=1)

    def rate(**more: float) -> float:
        (group,) = embedding.groups(LearningRates(text_encoder=None, unet=None, default=0.5, **more))
        assert group["name"] == "embedding"
        return group["lr"]  # type: ignore[no-any-return]

    assert rate() == 0.5
    assert rate(embedding=0.25) == 0.25
    with pytest.raises(UserError, match="it would not be trained"):
        rate(embedding=0)


# -- in a model


def test_a_family_without_such_words_says_so() -> None:
    with pytest.raises(UserError, match="embeddings of a toy model are not supported here yet"):
        ModelFamily.learn_word(SimpleNamespace(TITLE="a toy model"), "zfox", vectors=1)  # type: ignore[arg-type]


def opened(path: Path) -> tuple[ModelFamily, Embedding]:
    """The model with its text encoders, and a word with vectors of no other token."""
    family = open_family(str(path))
    family.learn_word(WORD, vectors=VECTORS)
    family.components.load_all(family.components.text_encoders, torch.float32, "cpu")
    embedding = create(WORD, family.token_tables(), vectors=VECTORS, init=[], seed=3)
    embedding.attach()
    return family, embedding


def test_diffusers_reads_the_file_as_the_run_does(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    family, embedding = opened(BASE)
    embedding.save(tmp_path / "fox.safetensors", None, {"a": "b"})
    theirs = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None, feature_extractor=None).to(
        torch.float32
    )
    theirs.load_textual_inversion(str(tmp_path / "fox.safetensors"), token="<zfox1>")
    for caption in ("a photo of <zfox1>, red", "no word"):
        with torch.no_grad():
            ours = family.encode_prompts([caption])["hidden_states"]
            expected, _ = theirs.encode_prompt(caption, "cpu", 1, False)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)  # attention in another order of batches


def test_diffusers_reads_the_file_for_sdxl_as_the_run_does(tmp_path: Path, tiny_sdxl: Path) -> None:
    """As docs/embeddings.md shows it. SDXL's own configuration has another end of a text, 2, with which transformers
    pools at the largest token: that of the word, unless it is told the true one."""
    from diffusers import StableDiffusionXLPipeline

    model = shutil.copytree(tiny_sdxl, tmp_path / "model")
    config = model / "text_encoder_2" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": 2}))
    family, embedding = opened(model)
    embedding.save(tmp_path / "fox.safetensors", None, None)
    theirs = StableDiffusionXLPipeline.from_pretrained(model)
    tensors = load_file(tmp_path / "fox.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        key: (VECTORS, width) for key, width in embedding.widths().items()
    }
    encoders = (theirs.text_encoder, theirs.tokenizer), (theirs.text_encoder_2, theirs.tokenizer_2)
    for key, (encoder, tokenizer) in zip(("clip_l", "clip_g"), encoders, strict=True):
        theirs.load_textual_inversion(tensors[key], token="<zfox1>", text_encoder=encoder, tokenizer=tokenizer)

    def encoded(caption: str) -> tuple[torch.Tensor, torch.Tensor]:
        states, _, pooled, _ = theirs.encode_prompt(caption, device="cpu", do_classifier_free_guidance=False)
        return states, pooled

    with torch.no_grad():
        ours = family.encode_prompts(["a photo of <zfox1>, red"])["pooled"]
        assert not torch.allclose(ours, encoded("a photo of <zfox1>, red")[1], rtol=0.01)
        theirs.text_encoder_2.text_model.eos_token_id = theirs.tokenizer_2.eos_token_id
        for caption in ("a photo of <zfox1>, red", "no word"):
            ours_too = family.encode_prompts([caption])
            states, pooled = encoded(caption)
            torch.testing.assert_close(ours_too["hidden_states"], states, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(ours_too["pooled"], pooled, atol=1e-5, rtol=1e-5)


# -- files

WIDTHS = {"emb_params": 4}
XL = {"clip_l": 4, "clip_g": 6}


def written(path: Path, content: dict[str, Any]) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.clone() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path)
    return path


def read(path: Path, widths: dict[str, int] = WIDTHS, vectors: int = 2) -> dict[str, torch.Tensor]:
    return files.read(path, word="zfox", widths=widths, vectors=vectors, where=f"--weights {path}")


ROWS = torch.arange(8.0).view(2, 4)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("kohya.safetensors", {"emb_params": ROWS}),
        ("kohya.pt", {"emb_params": ROWS.half()}),
        ("diffusers.safetensors", {"<other>": ROWS}),
        ("a1111.pt", {"string_to_token": {"*": 265}, "string_to_param": {"*": ROWS}, "name": "fox", "step": 7}),
        ("a1111-parameter.pt", {"string_to_param": {"*": nn.Parameter(ROWS)}, "name": "fox"}),
        ("lora.safetensors", {"bundle_emb.zfox.emb_params": ROWS, "bundle_emb.other.emb_params": ROWS + 1}),
        ("lora-of-a1111.safetensors", {"bundle_emb.zfox.string_to_param.*": ROWS}),
    ],
)
def test_files_of_other_programs_are_read(tmp_path: Path, name: str, content: dict[str, Any]) -> None:
    found = read(written(tmp_path / name, content))
    assert found.keys() == WIDTHS.keys()
    assert torch.equal(found["emb_params"], ROWS)


def test_of_one_vector_and_of_sdxl(tmp_path: Path) -> None:
    one = read(written(tmp_path / "one.safetensors", {"<fox>": ROWS[1].clone()}), vectors=1)
    assert torch.equal(one["emb_params"], ROWS[1:])
    content = {"clip_l": ROWS, "clip_g": torch.ones(2, 6)}
    found = read(written(tmp_path / "xl.safetensors", content), XL)
    assert found.keys() == XL.keys()
    assert torch.equal(found["clip_l"], ROWS)


def test_the_words_of_a_file(tmp_path: Path) -> None:
    def words(name: str, content: dict[str, Any]) -> tuple[str, ...]:
        return files.words(written(tmp_path / name, content))

    assert words("fox.safetensors", {"emb_params": ROWS}) == ("fox",)
    assert words("fox.pt", {"string_to_param": {"*": ROWS}, "name": "other"}) == ("fox",)
    assert words("xl.safetensors", {"clip_l": ROWS, "clip_g": ROWS}) == ("xl",)
    assert words("diffusers.safetensors", {"<fox>": ROWS}) == ("<fox>",)
    both = {f"bundle_emb.{word}.emb_params": ROWS for word in ("a", "b")}
    assert words("lora.safetensors", {**both, "lora_unet_x.alpha": torch.ones(())}) == ("a", "b")
    assert words("plain.safetensors", {"lora_unet_x.lora_up.weight": ROWS, "lora_unet_x.alpha": ROWS[0, :1]}) == ()
    save_file({"emb_params": ROWS.clone()}, tmp_path / "ours.safetensors", {"ss_token_string": "zfox"})
    assert files.words(tmp_path / "ours.safetensors") == ("zfox",)


def test_other_numbers_of_vectors_in_the_text_encoders_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "xl.safetensors", {"clip_l": ROWS, "clip_g": torch.ones(3, 6)})
    with pytest.raises(UserError, match="different numbers of vectors: clip_l 2, clip_g 3"):
        files.read(path, word="zfox", widths=XL, where="x")


@pytest.mark.parametrize(
    ("content", "widths", "reason"),
    [
        (
            {"clip_l": ROWS, "clip_g": ROWS},
            WIDTHS,
            "has no emb_params, but clip_g, clip_l: it is an embedding for SDXL",
        ),
        ({"emb_params": ROWS}, XL, "an embedding for Stable Diffusion 1.x or 2.x"),
        (
            {"emb_params": torch.ones(2, 5)},
            WIDTHS,
            "its vectors have 5 numbers, and those of this model's text encoder 4",
        ),
        ({"emb_params": torch.ones(3, 4)}, WIDTHS, "give --num_vectors_per_token 3"),
        ({"emb_params": torch.full((2, 4), torch.nan)}, WIDTHS, "holds NaN"),
        ({"bundle_emb.a.emb_params": ROWS, "bundle_emb.b.emb_params": ROWS}, WIDTHS, "embeddings of a, b, and none of"),
        ({"lora_unet_x.lora_up.weight": ROWS, "lora_unet_x.lora_down.weight": ROWS}, WIDTHS, "and no embedding"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    tmp_path: Path, content: dict[str, Any], widths: dict[str, int], reason: str
) -> None:
    with pytest.raises(UserError) as error:
        read(written(tmp_path / "wrong.safetensors", content), widths)
    assert reason in str(error.value)


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_a_saved_embedding_is_read_again(tmp_path: Path, ending: str) -> None:
    embedding = create("zfox", [made_up()], vectors=2, init=[1, 2], seed=1)
    embedding.save(tmp_path / f"e.{ending}", torch.float16, None)
    found = read(tmp_path / f"e.{ending}")
    assert torch.equal(found["emb_params"], made_up().table.weight[[1, 2]].half().float())


def test_a_lora_that_another_package_writes_gets_the_embedding_and_its_true_hash(tmp_path: Path) -> None:
    """Such packages write a hash over their own tensors."""

    class Theirs(TrainableNetwork):
        def save(self, file: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
            save_file({"lora_unet_x.alpha": torch.ones(1)}, file, {**(metadata or {}), "sshs_model_hash": "0xabc"})

    Theirs.__abstractmethods__ = frozenset()
    embedding = create("zfox", [made_up()], vectors=2, init=[1, 2], seed=1)
    both, path = WithEmbedding(Theirs(), embedding, bundle=True), tmp_path / "lora.safetensors"  # type: ignore[abstract]
    save_network(both, path, precision="fp16", metadata={"ss_a": "b"})
    tensors = load_file(path)
    assert tensors.keys() == {"lora_unet_x.alpha", "bundle_emb.zfox.emb_params"}
    assert torch.equal(tensors["bundle_emb.zfox.emb_params"], made_up().table.weight[[1, 2]].half())
    about = read_metadata(path)
    assert about["ss_a"] == "b"
    assert about["sshs_model_hash"] == safetensors_hashes(path)["sshs_model_hash"]
