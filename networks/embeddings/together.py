"""An embedding trained together with a network of adapters (pivotal tuning): one run, one optimizer, two rates."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.files.hashes import UNKNOWN_HASHES
from library.files.header import read_metadata
from networks.embeddings.files import bundled
from networks.embeddings.vectors import Embedding
from networks.files import AdapterFile
from networks.load_report import LoadReport
from networks.network import Group, TrainableNetwork
from networks.settings import LearningRates

if TYPE_CHECKING:
    from networks.adapter import Capability

_EMBEDDING = "embedding."


class WithEmbedding(TrainableNetwork):
    """A network, of ours or of another package, and an embedding. What is about layers is the network's."""

    def __init__(self, network: TrainableNetwork, embedding: Embedding, *, bundle: bool) -> None:
        """`bundle`: the network's file has the embedding in it."""
        super().__init__()
        self.network, self._embedding, self._bundle = network, embedding, bundle

    @property
    def embedding(self) -> Embedding:
        return self._embedding

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The network's with its own names, as without an embedding, and the embedding's behind "embedding."."""
        of_embedding = {f"{_EMBEDDING}{name}": tensor for name, tensor in self._embedding.state_dict().items()}
        return {**self.network.state_dict(), **of_embedding}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        own = {name: tensor for name, tensor in state_dict.items() if name.startswith(_EMBEDDING)}
        self._embedding.load_state_dict({name.removeprefix(_EMBEDDING): tensor for name, tensor in own.items()})
        return self.network.load_state_dict({name: state_dict[name] for name in state_dict if name not in own})

    def attach(self, parts: Collection[str]) -> None:
        self.network.attach(parts)
        self._embedding.attach()

    def before_training(self, *, gradient_checkpointing: bool) -> None:
        self.network.before_training(gradient_checkpointing=gradient_checkpointing)

    def groups(self, learning_rates: LearningRates) -> list[Group]:
        return [*self.network.groups(learning_rates), *self._embedding.groups(learning_rates)]

    def start_epoch(self) -> None:
        self.network.start_epoch()
        self._embedding.start_epoch()
        self.training = self.network.training

    def before_batch(self) -> None:
        self.network.before_batch()

    def at_noise(self, share_B: Tensor) -> None:
        self.network.at_noise(share_B)

    def penalty(self) -> Tensor | None:
        return self.network.penalty()

    def after_step(self, done: int, total: int) -> None:
        self.network.after_step(done, total)

    @contextmanager
    def at(self, multiplier: float) -> Iterator[None]:
        """At 0 the base alone; the word means what it meant before training."""
        with self.network.at(multiplier), self._embedding.at(multiplier):
            yield

    def tensors(self) -> Mapping[str, Tensor]:
        return {**self.network.tensors(), **self._of_bundle()}

    def _of_bundle(self) -> dict[str, Tensor]:
        return bundled(self._embedding.word, self._embedding.tensors()) if self._bundle else {}

    def save(self, file: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """The network's file, written by the network itself, then with the embedding in it."""
        self.network.save(file, dtype, metadata)
        if not self._bundle:
            return
        own = {name: value.to("cpu", dtype or value.dtype).contiguous() for name, value in self._of_bundle().items()}
        if str(file).endswith(".safetensors"):
            about = read_metadata(Path(file))
            about |= {name: UNKNOWN_HASHES[name] for name in UNKNOWN_HASHES if name in about}  # those of the LoRA alone
            save_file(load_file(file) | own, file, about or None)
        else:
            written = torch.load(file, map_location="cpu", weights_only=True)
            torch.save(written | {name: value.clone() for name, value in own.items()}, file)

    def load(self, file: AdapterFile) -> LoadReport:
        return self.network.load(file)

    def layers(self) -> list[str]:
        return self.network.layers()

    def norms(self) -> Tensor | None:
        return self.network.norms()

    def limit_norms(self, limit: float) -> tuple[int, float, float]:
        return self.network.limit_norms(limit)

    def counts(self) -> dict[str, int]:
        return self.network.counts()

    def layer_counts(self) -> dict[str, dict[str, int]]:
        return self.network.layer_counts()

    def parameter_counts(self) -> dict[str, int]:
        return self.network.parameter_counts()

    def ranks(self) -> tuple[int, int] | None:
        return self.network.ranks()

    def refuses(self, capability: Capability) -> str | None:
        if capability == "sharded_gradients":
            return self._embedding.refuses(capability)
        return self.network.refuses(capability)
