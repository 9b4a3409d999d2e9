"""A trained embedding: vectors of a new word, in the token table of each text encoder.

Textual inversion (Gal et al. 2022, arXiv 2208.01618), in language models prompt tuning (Lester et al. 2021, arXiv
2104.08691). Only the new rows are parameters; the table, the text encoders and the denoiser are frozen, and gradients
flow through them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from library.errors import UserError
from library.rng import torch_generator
from networks.files import AdapterFile
from networks.load_report import LoadReport
from networks.network import Group, TrainableNetwork
from networks.settings import LearningRates

if TYPE_CHECKING:
    from library.models.family import TokenTable
    from networks.adapter import Capability


class Rows(nn.Module):
    """The new rows of one table, [vectors, width]; `start`: the rows before training.

    The table is held outside of the module tree, so that `state_dict` and `parameters` see the rows alone.
    """

    start: Tensor

    def __init__(self, table: TokenTable, start: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start.clone())
        self.register_buffer("start", start)
        self.first, self.key, self.section = table.first, table.key, table.section
        self._attached_to = (table.table,)
        self._of_table = table.table.forward
        self.is_off = False

    def attach(self) -> None:
        """Act on every forward of the table from now on."""
        vars(self._attached_to[0])["forward"] = self.forward

    def detach(self) -> None:
        """The table's own forward again."""
        vars(self._attached_to[0]).pop("forward", None)

    def forward(self, ids: Tensor) -> Tensor:
        """The vectors of the tokens [...] → [..., width]: those below `first` are the table's, bit for bit."""
        rows = self.start if self.is_off else self.weight
        places = ids - self.first
        known = self._of_table(ids.clamp(max=self.first - 1))
        new = F.embedding(places.clamp(min=0), rows).to(known.dtype)
        return torch.where((places >= 0)[..., None], new, known)


class Embedding(TrainableNetwork):
    """The vectors of a word, trained alone or, in `WithEmbedding`, beside a network of adapters."""

    def __init__(self, word: str, tables: Sequence[TokenTable], starts: Sequence[Tensor]) -> None:
        super().__init__()
        self.word = word
        self.rows = nn.ModuleList(Rows(table, start) for table, start in zip(tables, starts, strict=True))

    @property
    def embedding(self) -> Embedding:
        return self

    def _rows(self) -> Iterator[Rows]:
        for rows in self.rows:
            assert isinstance(rows, Rows)
            yield rows

    def widths(self) -> dict[str, int]:
        """How many numbers a vector has, by its name in files."""
        return {rows.key: rows.weight.shape[1] for rows in self._rows()}

    @property
    def vectors(self) -> int:
        return next(self._rows()).weight.shape[0]

    def attach(self, parts: Collection[str] = ()) -> None:
        """Act on all text encoders, whatever the parts that adapters act on."""
        for rows in self._rows():
            rows.attach()

    def detach(self) -> None:
        """Leave the text encoders as they were."""
        for rows in self._rows():
            rows.detach()

    @torch.no_grad()
    def begin_with(self, tensors: Mapping[str, Tensor]) -> None:
        """Take these rows, by their names in files, as those to begin with."""
        for rows in self._rows():
            for own in (rows.weight, rows.start):
                own.copy_(tensors[rows.key])

    def groups(self, learning_rates: LearningRates) -> list[Group]:
        """A group for each text encoder's rows."""
        rate = learning_rates.default if learning_rates.embedding is None else learning_rates.embedding
        if not rate:
            raise UserError("the embedding's learning rate is 0 (embedding_lr, learning_rate): it would not be trained")
        return [{"params": [rows.weight], "lr": rate, "name": rows.section} for rows in self._rows()]

    @contextmanager
    def at(self, multiplier: float) -> Iterator[None]:
        """At 0 the word means what it meant before training; a word has no other strength than the trained one."""
        self._set_off(multiplier == 0)
        try:
            yield
        finally:
            self._set_off(False)

    def _set_off(self, is_off: bool) -> None:
        for rows in self._rows():
            rows.is_off = is_off

    def tensors(self) -> dict[str, Tensor]:
        return {rows.key: rows.weight.detach() for rows in self._rows()}

    def save(self, file: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """kohya's names: "emb_params", or "clip_l" and "clip_g". As .pt or .ckpt the same table, pickled."""
        tensors = {key: value.to("cpu", dtype or value.dtype).contiguous() for key, value in self.tensors().items()}
        if str(file).endswith(".safetensors"):
            save_file(tensors, file, dict(metadata) if metadata else None)
        else:
            torch.save({key: value.clone() for key, value in tensors.items()}, file)

    def load(self, file: AdapterFile) -> LoadReport:
        raise AssertionError("--network_weights without a LoRA is refused before")

    def refuses(self, capability: Capability) -> str | None:
        if capability == "off":
            return None
        if capability == "scale_weight_norms":
            return "scale_weight_norms: an embedding has no adapters whose norms could be limited"
        return "--token_string with DeepSpeed's ZeRO-2: embeddings are not supported there yet"

    # -- nothing to do, or nothing to tell, for rows of a table

    def before_training(self, *, gradient_checkpointing: bool) -> None:
        """No-op: the base checkpoints its layers, and the rows need no activations."""

    def start_epoch(self) -> None:
        self.train()

    def before_batch(self) -> None:
        """No-op."""

    def at_noise(self, share_B: Tensor) -> None:
        """No-op."""

    def penalty(self) -> None:
        """An embedding adds no term to the loss."""

    def after_step(self, done: int, total: int) -> None:
        """No-op."""

    def layers(self) -> list[str]:
        return []

    def norms(self) -> None:
        """There are no adapted layers."""

    def limit_norms(self, limit: float) -> tuple[int, float, float]:
        raise UserError(self.refuses("scale_weight_norms") or "")

    def counts(self) -> dict[str, int]:
        return {}

    def layer_counts(self) -> dict[str, dict[str, int]]:
        return {}

    def parameter_counts(self) -> dict[str, int]:
        return {}

    def ranks(self) -> None:
        return None


@torch.no_grad()
def create(
    word: str, tables: Sequence[TokenTable], *, vectors: int, init: Sequence[int], seed: int | None
) -> Embedding:
    """A new embedding of so many vectors, in fp32.

    init: the tokens to begin with, repeated or cut to `vectors`, as in kohya's scripts. Without any, each number is
    drawn by (seed, table) from a normal with the mean and standard deviation that it has over the table's rows.
    """
    return Embedding(word, tables, [_start(table, vectors, init, seed) for table in tables])


def _start(table: TokenTable, vectors: int, init: Sequence[int], seed: int | None) -> Tensor:
    weight = table.table.weight
    shape = (vectors, weight.shape[1])
    if weight.is_meta:
        return torch.empty(shape, device="meta")
    if init:
        return weight[[init[number % len(init)] for number in range(vectors)]].float().cpu()
    assert seed is not None, "a run has a seed"
    known = weight.float().cpu()
    drawn = torch.randn(shape, generator=torch_generator(seed, table.key, "embedding"))
    return known.mean(0) + known.std(0) * drawn
