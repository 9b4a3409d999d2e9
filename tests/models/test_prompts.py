"""Tokens and their states, against the tokenizer's own padding, diffusers' pipeline and a computation by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from library.models.checkpoints.base_model import ASSETS
from library.models.modules import read_tokenizer
from library.models.opening import open_base_model
from library.models.stable_diffusion import StableDiffusion
from library.models.text.prompts import chunked_ids, content_tokens, weighted_tokens

BASE = Path(__file__).parents[2] / "quickstart" / "base"
BOS, EOS = 49406, 49407
_CAPTIONS = [
    "",
    "a photo of a cat",
    "1girl, solo, (smile:1.2), [hat], :3, long hair",
    "Ünïcödé  ÀÉ   spaces\tand\nlines, 猫と犬 😀 it's we'll",
    "word " * 74,
    "word " * 75,
    "word " * 76,
    "a <|endoftext|> in the middle",
]


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    options = {"pad_token": "!"} if request.param == "sd2" else {}
    return read_tokenizer(ASSETS / "clip_tokenizer", options)


def test_the_shipped_vocabulary_is_clips(tokenizer: Any) -> None:
    assert tokenizer("a photo of a cat").input_ids == [BOS, 320, 1125, 539, 320, 2368, EOS]
    assert len(tokenizer) == 49408
    assert tokenizer.pad_token_id in (0, EOS)
    folder = read_tokenizer(BASE / "tokenizer", {})
    if tokenizer.pad_token_id == EOS:
        for caption in _CAPTIONS:
            assert tokenizer(caption).input_ids == folder(caption).input_ids


@pytest.mark.parametrize("caption", _CAPTIONS)
def test_one_chunk_is_what_the_tokenizer_pads(tokenizer: Any, caption: str) -> None:
    expected = tokenizer(caption, padding="max_length", truncation=True, max_length=77).input_ids
    assert chunked_ids(tokenizer, [caption], limit=75)[0, 0].tolist() == expected


def test_all_tokens_are_counted_without_a_warning(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert len(content_tokens(tokenizer, "word " * 300)) == 300
    assert content_tokens(tokenizer, "") == []
    assert not caplog.records


def test_tokens_are_those_of_the_tokenizer_that_kohyas_scripts_use(tokenizer: Any) -> None:
    """captions.jsonl: 411 captions in 13 scripts with emoji, and what punctuation, entities, mojibake and control
    characters there are, each with its tokens by CLIPTokenizer of transformers 4.44.0 and ftfy 6.1.1 on CLIP's
    vocabulary. Without ftfy 108 of them have others, without a lower case that knows of the final sigma 10.

    SD 2 pads with "!", and so each "!" of a caption is that token, there and here. There a full-width one is not, since
    it is looked for before the cleaning."""
    lines = (Path(__file__).parent / "captions.jsonl").read_text(encoding="utf-8").split("\n")
    corpus = [json.loads(line) for line in lines if line]
    assert len(corpus) == 411
    assert len({script for script, _, _ in corpus}) == 14  # the last is no script
    if tokenizer.pad_token == "!":
        corpus = [line for line in corpus if not {"!", "！"} & set(line[1])]
        assert len(corpus) > 350
        assert content_tokens(tokenizer, "hi! there") == content_tokens(tokenizer, "hi！ there") == [1883, 0, 997]
    assert [text for _, text, ids in corpus if content_tokens(tokenizer, text) != ids] == []


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("“a”, ‘b’", "\"a\", 'b'"),
        ("fox，snow；night！", "fox,snow;night!"),
        ("salt &amp; pepper", "salt & pepper"),
        ("cafÃ©", "café"),
        ("ΟΔΟΣ", "οδος".replace("σ", "ς")),
    ],
)
def test_what_looks_the_same_has_the_same_tokens(tokenizer: Any, written: str, plain: str) -> None:
    assert content_tokens(tokenizer, written) == content_tokens(tokenizer, plain)
    weighted = weighted_tokens(tokenizer, f"({written}:1.5)")
    assert weighted == (content_tokens(tokenizer, plain), [1.5] * len(weighted[0]))


def test_curly_quotes_do_not_cut_a_caption(tokenizer: Any) -> None:
    assert len(content_tokens(tokenizer, " ".join(["“a”"] * 20))) == 60  # three each, and five without cleaning


def test_long_captions_are_cut_into_chunks_as_kohya_does(tokenizer: Any) -> None:
    """The expected rows are written by hand after kohya's strategy_base.py, `_get_input_ids`."""
    v2 = tokenizer.pad_token_id == 0
    pad = 0 if v2 else EOS
    word = 2653  # "word"
    ids = chunked_ids(tokenizer, ["word " * 80, "word " * 150, "word " * 500, "word " * 75, "word"], limit=150)
    assert ids.shape == (5, 2, 77)
    full, empty = [BOS, *[word] * 75, EOS], [BOS, EOS, *[pad] * 75]
    # five words, EOS, padding; the last place is padding, too
    assert ids[0].tolist() == [full, [BOS, *[word] * 5, EOS, *[pad] * 70]]
    assert ids[1].tolist() == [full, full]
    assert ids[2].tolist() == [full, full]
    assert ids[3].tolist() == [full, empty]
    assert ids[4].tolist() == [[BOS, word, EOS, *[pad] * 74], empty]


@pytest.mark.parametrize("count", [0, 1, 74, 75, 76, 149, 150, 151, 224, 225, 226, 300])
@pytest.mark.parametrize("limit", [75, 150, 225])
def test_windows(tokenizer: Any, limit: int, count: int) -> None:
    """Which token of the caption stands where: token n is in chunk n // 75 at place n % 75 + 1.

    Kohya's chunks are cut from one row of BOS, the tokens, EOS and padding, whose last place ends every chunk; with
    SD 2 a full chunk ends with EOS, and one of padding alone begins with it.
    """
    words = tokenizer("cat dog red blue one two big small").input_ids[1:-1]
    content = [words[i % 8] for i in range(count)]
    caption = " ".join(["cat", "dog", "red", "blue", "one", "two", "big", "small"][i % 8] for i in range(count))
    pad, kept = tokenizer.pad_token_id, content[:limit]
    (chunks,) = chunked_ids(tokenizer, [caption], limit=limit).tolist()
    assert len(chunks) == limit // 75
    for number, chunk in enumerate(chunks):
        of_chunk = kept[75 * number : 75 * number + 75]
        assert len(chunk) == 77
        assert chunk[0] == BOS
        assert chunk[1 : 1 + len(of_chunk)] == of_chunk
        rest = chunk[1 + len(of_chunk) :]
        # SD 1: EOS everywhere; SD 2: one EOS, then padding
        assert rest == [EOS] + [pad] * (len(rest) - 1)


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def base(request: pytest.FixtureRequest, tiny_v2: Path) -> str:
    return str(BASE if request.param == "sd1" else tiny_v2)


def _loaded(family: Callable[..., StableDiffusion], base: str, **options: Any) -> StableDiffusion:
    made = family(open_base_model(base), **options)
    made.components.load_all(made.components.text_encoders, torch.float32, "cpu")
    return made


@pytest.mark.parametrize("clip_skip", [None, 1, 2, 3])
def test_states_equal_those_of_diffusers_pipeline(
    family: Callable[..., StableDiffusion], base: str, clip_skip: int | None
) -> None:
    made = _loaded(family, base, clip_skip=clip_skip)
    made.components.load("vae", torch.float32, "cpu")
    made.components.load("denoiser", torch.float32, "cpu")
    captions = ["a cat", "", "a dog, running on the beach at night"]
    found = made.encode_prompts(captions)["hidden_states"]
    # diffusers counts the skipped layers, kohya the layer's place from the end
    skipped = None if clip_skip is None else clip_skip - 1
    encoder = made.components["text_encoder"]
    # where diffusers 0.42 looks for the norm, a level that transformers 5 no longer has
    object.__setattr__(encoder, "text_model", SimpleNamespace(final_layer_norm=encoder.final_layer_norm))
    expected, _ = made.pipeline().encode_prompt(captions, "cpu", 1, False, clip_skip=skipped or None)
    assert found.shape == (3, 77, made._text_width)
    assert torch.allclose(found, expected, atol=1e-6)
    assert made.count_tokens("a cat") == 2


def test_skipping_layers_changes_the_states(family: Callable[..., StableDiffusion], base: str) -> None:
    states = [_loaded(family, base, clip_skip=n).encode_prompts(["a cat"])["hidden_states"] for n in (None, 1, 2, 3)]
    assert torch.equal(states[0], states[1])
    assert not torch.allclose(states[1], states[2], atol=1e-2)
    assert not torch.allclose(states[2], states[3], atol=1e-2)


@pytest.mark.parametrize("limit", [150, 225])
def test_the_states_of_chunks_are_joined(family: Callable[..., StableDiffusion], base: str, limit: int) -> None:
    made = _loaded(family, base, max_token_length=limit)
    captions = ["one two three " * 40, "a cat"]
    found = made.encode_prompts(captions)["hidden_states"]
    assert found.shape[:2] == (2, limit + 2)
    encoder, ids = made.components["text_encoder"], chunked_ids(made._tokenizer, captions, limit=limit)
    for row in range(2):
        parts = [encoder(ids[row, i : i + 1]).last_hidden_state[0] for i in range(limit // 75)]
        expected = torch.cat([parts[0][:1], *[part[1:76] for part in parts], parts[-1][76:]])
        assert torch.allclose(found[row], expected, atol=1e-6)


def test_captions_within_the_limit_are_the_same_however_long_it_is(
    family: Callable[..., StableDiffusion], base: str
) -> None:
    short = _loaded(family, base).encode_prompts(["a cat"])["hidden_states"]
    long = _loaded(family, base, max_token_length=225).encode_prompts(["a cat"])["hidden_states"]
    assert torch.allclose(short[:, :76], long[:, :76], atol=1e-6)


def test_gradients_reach_the_text_encoder(family: Callable[..., StableDiffusion]) -> None:
    made = _loaded(family, str(BASE), clip_skip=2)
    weights = [layer.mlp.fc1.weight.requires_grad_(True) for layer in made.components["text_encoder"].encoder.layers]
    made.encode_prompts(["a cat"])["hidden_states"].sum().backward()
    assert weights[0].grad is not None
    assert weights[0].grad.abs().sum() > 0
    assert weights[-1].grad is None or weights[-1].grad.abs().sum() == 0  # skipped
