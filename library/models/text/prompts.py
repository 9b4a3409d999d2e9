"""From captions to the states of a CLIP text encoder, in chunks of 75 tokens.

CLIP reads 77 tokens, the first of which is BOS and one of which is EOS. A longer caption is cut into chunks of 75, each
with its own BOS and end, encoded separately; the states are put one after another with one BOS in front and one end
behind. This is what kohya's sd-scripts do (library/strategy_base.py and strategy_sd.py), and what LoRAs that were
trained on 150 or 225 tokens expect. Weighted captions multiply the states of their tokens, as there.

Before that a caption is cleaned by ftfy, as the texts were that CLIP was trained on, and as kohya's scripts and A1111
clean it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import ftfy
import torch
from torch import Tensor, nn

from library.gpu import to_device
from library.models.text.prompt_weights import weighted_texts

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

CHUNK = 75  # tokens of a caption that fit between BOS and EOS
CLEANING = f"ftfy {ftfy.__version__}, lower case"
"""What `cleaned` does, for fingerprints: another version of ftfy may give other tokens."""


def cleaned(text: str) -> str:
    """The text as CLIP was trained on texts: “a” is "a", a full-width comma a comma, &amp; an &, mojibake is repaired.

    It is put into lower case here, since the tokenizer's own lower case is letter by letter: a Σ that ends a word is ς.
    """
    return ftfy.fix_text(text).lower()


def content_tokens(tokenizer: CLIPTokenizer, caption: str) -> list[int]:
    """The caption's tokens without BOS and EOS, however many there are: those of transformers 4's CLIPTokenizer with
    ftfy, which kohya's scripts use."""
    # verbose=False: a caption longer than the model reads is expected here; the caller that counts tokens reports it
    return tokenizer(cleaned(caption), truncation=False, padding=False, verbose=False).input_ids[1:-1]


def chunked_ids(tokenizer: CLIPTokenizer, captions: Sequence[str], *, limit: int, pad: int | None = None) -> Tensor:
    """Token ids [B, limit / 75, 77]; `limit`: 75, 150 or 225. Tokens beyond it are cut off.

    `pad`: the padding token; None is the tokenizer's own.
    """
    rows = [_chunks(tokenizer, content_tokens(tokenizer, caption)[:limit], limit, pad) for caption in captions]
    return torch.tensor(rows, dtype=torch.long)


def chunk_mask(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Of one chunk a caption, [B, 1, 77]: 0 where there is padding behind the first EOS."""
    lengths = [min(len(content_tokens(tokenizer, caption)), CHUNK) + 2 for caption in captions]
    return (torch.arange(CHUNK + 2) < torch.tensor(lengths)[:, None])[:, None].long()


def weighted_tokens(tokenizer: CLIPTokenizer, caption: str) -> tuple[list[int], list[float]]:
    """The tokens of a caption with weights in brackets, without BOS and EOS, and the weight of each."""
    tokens: list[int] = []
    weights: list[float] = []
    for text, weight in weighted_texts(caption):
        of_text = content_tokens(tokenizer, text)
        tokens += of_text
        weights += [weight] * len(of_text)
    return tokens, weights


def weighted_ids(
    tokenizer: CLIPTokenizer, captions: Sequence[str], *, limit: int, pad: int | None = None
) -> tuple[Tensor, Tensor]:
    """Token ids as of `chunked_ids`, and a weight for each of the joined states [B, limit + 2]."""
    rows, weights = [], []
    for caption in captions:
        tokens, of_tokens = weighted_tokens(tokenizer, caption)
        rows.append(_chunks(tokenizer, tokens[:limit], limit, pad))
        of_tokens = of_tokens[:limit]
        weights.append([1.0, *of_tokens, *[1.0] * (limit + 1 - len(of_tokens))])  # BOS, tokens, end and padding
    return torch.tensor(rows, dtype=torch.long), torch.tensor(weights)


def ids_and_weights(
    tokenizer: CLIPTokenizer, captions: Sequence[str], *, limit: int, weighted: bool, pad: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Token ids as of `chunked_ids`; weights as of `weighted_ids` if the captions are `weighted` by brackets."""
    if weighted:
        return weighted_ids(tokenizer, captions, limit=limit, pad=pad)
    return chunked_ids(tokenizer, captions, limit=limit, pad=pad), None


def weigh(states_BLD: Tensor, weights_BL: Tensor | None) -> Tensor:
    """States times the weights of their words, where there are any."""
    if weights_BL is None:
        return states_BLD
    return states_BLD * to_device(weights_BL[:, :, None], states_BLD.device).to(states_BLD)


def count_tokens(tokenizer: CLIPTokenizer, caption: str, *, weighted: bool) -> int:
    """The number of the caption's tokens, without BOS and EOS; `weighted`: brackets weight words and do not count."""
    return len(weighted_tokens(tokenizer, caption)[0] if weighted else content_tokens(tokenizer, caption))


def _chunks(tokenizer: CLIPTokenizer, content: list[int], limit: int, pad: int | None) -> list[list[int]]:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if pad is None else pad
    row = [*content, eos, *[pad] * (limit - len(content))]  # one longer than `limit`: its last is EOS or padding
    chunks = [[bos, *row[start : start + CHUNK], row[-1]] for start in range(0, limit, CHUNK)]
    if limit == CHUNK or pad == eos:  # SD 1.x pads with EOS, so each chunk ends as it should
        return chunks
    for chunk in chunks:  # SD 2.x and XL: a full chunk ends with EOS, an empty one begins with it
        if chunk[-2] not in (eos, pad):
            chunk[-1] = eos
        if chunk[1] == pad:
            chunk[1] = eos
    return chunks


def encode(text_encoder: nn.Module, ids_BN77: Tensor, *, clip_skip: int | None, layers: int) -> Tensor:
    """The states [B, 75 N + 2, D] of N chunks a caption.

    `clip_skip`: take the states before the last clip_skip - 1 layers of `layers`, through the final norm all the same;
    None and 1 are the end of the encoder.
    """
    batch, chunks, width = ids_BN77.shape
    flat = ids_BN77.reshape(batch * chunks, width)
    if clip_skip is None or clip_skip == 1:
        states = text_encoder(flat).last_hidden_state
    else:
        hidden = text_encoder(flat, output_hidden_states=True).hidden_states
        # hidden[0] are the embeddings, hidden[i] the output of layer i. Counted from the front, because versions of
        # transformers differ in whether the last entry has gone through the final norm
        states = text_encoder.get_submodule("final_layer_norm")(hidden[layers + 1 - clip_skip])
    return _joined(states.view(batch, chunks, width, -1))


def encode_penultimate(
    text_encoder: nn.Module, ids_BN77: Tensor, *, layers: int, mask_BN77: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As SDXL reads an encoder of `layers` layers: the states [B, 75 N + 2, D] before the last layer, without the final
    norm, and the state [B, P] of the first chunk's end, projected by an encoder that has a projection. mask: 0 where
    the encoder shall not look."""
    batch, chunks, width = ids_BN77.shape
    flat, mask = (None if each is None else each.reshape(batch * chunks, width) for each in (ids_BN77, mask_BN77))
    out = text_encoder(flat, attention_mask=mask, output_hidden_states=True)
    states = out.hidden_states[layers - 1]  # [0] are the embeddings
    pooled: Tensor = out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output
    return _joined(states.view(batch, chunks, width, -1)), pooled.view(batch, chunks, -1)[:, 0]


def _joined(states_BN77D: Tensor) -> Tensor:
    """The chunks' inner states in a row, between the first chunk's BOS and the last one's end."""
    inner = states_BN77D[:, :, 1:-1].flatten(1, 2)
    return torch.cat([states_BN77D[:, 0, :1], inner, states_BN77D[:, -1, -1:]], dim=1)
