"""A1111's brackets, against the examples in its own documentation, and what they do to the states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from library.models.checkpoints.base_model import ASSETS
from library.models.modules import read_tokenizer
from library.models.opening import open_base_model
from library.models.stable_diffusion import StableDiffusion
from library.models.text.prompt_weights import weighted_texts
from library.models.text.prompts import chunked_ids, weighted_ids

BASE = Path(__file__).parents[2] / "quickstart" / "base"
EXAMPLES: dict[str, list[tuple[str, float]]] = {
    # those of parse_prompt_attention in A1111's prompt_parser.py
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        *[("a ", 1.0), ("house", 1.3 * 1.1 * 1.1), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.5 * 1.1)],
        *[(", sun, ", 1.1), ("sky", 1.1**4), (".", 1.1)],
    ],
    # ours
    "": [],
    "plain: text, with :3 and a) closing] brackets": [("plain: text, with :3 and a) closing] brackets", 1.0)],
    "(cat:1.0) (dog:1)": [("cat dog", 1.0)],
    "[[less]] (neg:-.5)": [("less", 1.1**-2), (" ", 1.0), ("neg", -0.5)],
    r"back\\slash \x": [("back\\slash x", 1.0)],
    "(odd:1.2.3)": [("odd:1.2.3", 1.1)],
    "(a [b) c]": [("a ", 1.1), ("b", 1.0), (" c", 1 / 1.1)],
    "tags_(copyright), x": [("tags_", 1.0), ("copyright", 1.1), (", x", 1.0)],
}


@pytest.mark.parametrize("caption", EXAMPLES)
def test_weights(caption: str) -> None:
    found, expected = weighted_texts(caption), EXAMPLES[caption]
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected], rel=1e-12)


def _loaded(family: Callable[..., StableDiffusion], base: str, **options: Any) -> StableDiffusion:
    made = family(open_base_model(base), **options)
    made.components.load_all(made.components.text_encoders, torch.float32, "cpu")
    return made


def _states(family: Callable[..., StableDiffusion], base: str, caption: str, **options: Any) -> torch.Tensor:
    return _loaded(family, base, **options).encode_prompts([caption])["hidden_states"]


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def base(request: pytest.FixtureRequest, tiny_v2: Path) -> str:
    return str(BASE if request.param == "sd1" else tiny_v2)


@pytest.mark.parametrize("limit", [75, 225])
@pytest.mark.parametrize("caption", ["", "a cat, on: a mat", "(a) cat".replace("(a)", "(a:1.0)"), "word " * 100])
def test_weights_of_one_change_no_bit(
    family: Callable[..., StableDiffusion], base: str, caption: str, limit: int
) -> None:
    plain = caption.replace("(a:1.0)", "a")
    found = _states(family, base, caption, max_token_length=limit, weighted_captions=True)
    assert torch.equal(found, _states(family, base, plain, max_token_length=limit))


@pytest.mark.parametrize(("limit", "clip_skip"), [(75, None), (75, 2), (225, 2)])
def test_states_are_multiplied(
    family: Callable[..., StableDiffusion], base: str, limit: int, clip_skip: int | None
) -> None:
    """Closed form: the states of the same tokens without weights, times the weight of each token's place."""
    options = {"max_token_length": limit, "clip_skip": clip_skip}
    before = "one two " * 37  # 74 tokens: with "big" the first chunk is full, and "dog" stands in the second
    caption, plain = before + "(big dog:1.5), [red] end", before + "big dog, red end"
    found = _states(family, base, caption, weighted_captions=True, **options)
    expected = _states(family, base, plain, **options)
    # tokens 74 and 75 are "big" and "dog", then ",", "red", "end"; the states begin with that of BOS
    for place, weight in ((75, 1.5), (76, 1.5), (78, 1 / 1.1)):
        if place <= limit:
            expected[:, place] *= weight
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)
    assert not torch.allclose(found, _states(family, base, plain, **options))


def test_ids_are_those_of_the_text_and_weights_stand_at_their_tokens() -> None:
    tokenizer = read_tokenizer(ASSETS / "clip_tokenizer", {})
    ids, weights = weighted_ids(tokenizer, ["a (cat:1.3)", "(" + "word " * 200], limit=150)
    assert torch.equal(ids, chunked_ids(tokenizer, ["a cat", "word " * 200], limit=150))
    assert weights.shape == (2, 152)
    assert weights[0].tolist() == pytest.approx([1, 1, 1.3] + [1] * 149)
    assert weights[1].tolist() == pytest.approx([1] + [1.1] * 150 + [1])


def test_tokens_are_counted_without_the_brackets(family: Callable[..., StableDiffusion]) -> None:
    assert family(open_base_model(str(BASE)), weighted_captions=True).count_tokens("a (cat:1.3)") == 2
    assert family(open_base_model(str(BASE))).count_tokens("a (cat:1.3)") > 2


def test_gradients_pass_through_the_weights(family: Callable[..., StableDiffusion]) -> None:
    made = _loaded(family, str(BASE), weighted_captions=True)
    weight = made.components["text_encoder"].encoder.layers[0].mlp.fc1.weight.requires_grad_(True)
    made.encode_prompts(["a (cat:2)"])["hidden_states"].sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
