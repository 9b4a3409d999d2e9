"""A base model whose parts are loaded one after the other, with adapter files switched on it without reloading it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from library import gpu, log
from library.errors import UserError
from library.models.opening import open_family
from library.run.encode import DTYPES, dtype_of_vae
from networks import base_weights, files
from networks.create import create_to_merge
from networks.embeddings.files import is_embedding
from networks.embeddings.vectors import create as create_embedding
from networks.files import AdapterFile
from networks.load_report import some_names

if TYPE_CHECKING:
    from library.config.options import ModelOptions
    from library.evaluation.candidates import Candidate
    from library.evaluation.precision import PrecisionOptions
    from library.evaluation.trained_words import TrainedWord
    from library.models.family import ModelFamily
    from networks.network import Network

logger = logging.getLogger(__name__)


def open_base(
    model: ModelOptions,
    candidates: Sequence[Candidate],
    *,
    given: Mapping[str, str],
    more: Mapping[str, object] = MappingProxyType({}),
    embeddings: bool = False,
) -> ModelFamily:
    """The family of the base model, after every file of the candidates was checked against it by its header and on the
    model's outline. Raises UserError, before any weights are loaded. `given`, `more`: as `options` of `open_family`.
    `embeddings`: files of embeddings alone are none of its business; `trained_words` checks them."""
    paths = list(dict.fromkeys(part.path for one in candidates for part in one.parts))
    paths = [path for path in paths if not (embeddings and is_embedding(path))]
    for path in paths:
        files.check(path, purpose="is applied")
        if trained_on := base_weights.read(path):
            logger.warning("%s: acts as it was trained only on top of %s", path, base_weights.in_words(trained_on))
    options = {**vars(model), **more}
    family = open_family(model.pretrained_model_name_or_path, vae=model.vae, options=options, given=given)
    with family.outlined(), torch.no_grad():
        targets = family.adapter_targets()
        for path in paths:
            with log.errors_only():
                content = files.read(path)
                report, _ = create_to_merge(content, targets, multiplier=1.0).compare(content)
            if report.mismatched:
                raise UserError(
                    f"{path}: {len(report.mismatched)} layers are not those of {family.path}:"
                    f"{some_names(report.mismatched)}"
                )
            if report.unexpected:
                logger.warning(
                    "%s: %d modules are not in %s and are left out:%s",
                    *(path, len(report.unexpected), family.path, some_names(report.unexpected)),
                )
    return family


@dataclass(kw_only=True)
class BaseModel:
    """A base model on a device, in the precision of `mixed_precision`: as a run has it. `words`: the embeddings of
    files, which act where their file does; others are left out."""

    family: ModelFamily
    accelerator: Accelerator
    vae_dtype: torch.dtype
    words: Mapping[Path, TrainedWord] = field(default_factory=dict)
    _files: dict[Path, AdapterFile] = field(default_factory=dict)
    _networks: dict[tuple[Path, tuple[str, ...]], Network | None] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        family: ModelFamily,
        precision: PrecisionOptions,
        *,
        no_half_vae: bool,
        words: Mapping[Path, TrainedWord] = MappingProxyType({}),
    ) -> BaseModel:
        """`UserError` for a precision that the device does not have."""
        try:
            accelerator = Accelerator(mixed_precision=precision.mixed_precision)
        except ValueError as error:
            raise UserError(f"--mixed_precision {precision.mixed_precision}: {error}") from error
        if accelerator.num_processes > 1:
            raise UserError("one process is enough: start it without a launcher")
        if accelerator.device.type == "cuda":
            gpu.settle(deterministic=True, allow_tf32=precision.allow_tf32)
        dtype = dtype_of_vae(family, DTYPES[precision.mixed_precision], no_half_vae=no_half_vae)
        return cls(family=family, accelerator=accelerator, vae_dtype=dtype, words=words)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def autocast(self) -> AbstractContextManager[object]:
        return self.accelerator.autocast()

    def load(self, *names: str) -> None:
        """Load these parts: "vae", "denoiser", the names of text encoders."""
        dtype = DTYPES[self.accelerator.mixed_precision]
        for name in names:
            self.family.components.load(name, self.vae_dtype if name == "vae" else dtype, self.device)

    def release(self, *names: str) -> None:
        """Free the memory of these parts, and of the adapters that sit on them."""
        self.family.components.release(*names)
        self._networks = {key: network for key, network in self._networks.items() if not set(key[1]) & set(names)}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def acts_on(self, candidate: Candidate, *names: str) -> bool:
        """Whether it has layers in these parts, or an embedding in text encoders among them."""
        has_word = self._word(candidate, names) is not None
        return has_word or any(self._part(part.path, names).layers for part in candidate.parts)

    @contextmanager
    def adapted(self, candidate: Candidate, *names: str) -> Iterator[None]:
        """A context in which the candidate's files act on these loaded parts; afterwards the base is as it was."""
        attached: list[Network] = []
        try:
            for part in candidate.parts:
                network = self._network(part.path, names)
                if network is None:
                    continue
                network.set_multiplier(part.multiplier)
                network.to(self.device)
                with log.errors_only():
                    network.attach()
                attached.append(network)
            with self._reading(self._word(candidate, names)):
                yield
        finally:
            for network in reversed(attached):
                network.detach()
                if self.device.type != "cpu":
                    network.to("cpu")  # of a whole sweep of files only one candidate's lie on the device

    def _word(self, candidate: Candidate, names: Collection[str]) -> TrainedWord | None:
        """The candidate's embedding, if these parts have text encoders."""
        if not set(names) & set(self.family.components.text_encoders):
            return None
        return next((self.words[part.path] for part in candidate.parts if part.path in self.words), None)

    @contextmanager
    def _reading(self, word: TrainedWord | None) -> Iterator[None]:
        """A context in which the loaded text encoders read this word as its embedding."""
        if word is None:
            yield
            return
        with word.learnt_by(self.family):
            tables, vectors = self.family.token_tables(), word.count
            embedding = create_embedding(word.word, tables, vectors=vectors, init=[0], seed=None)
            embedding.begin_with(word.vectors)
            embedding.to(self.device)
            embedding.attach()
            try:
                yield
            finally:
                embedding.detach()

    def _part(self, path: Path, names: tuple[str, ...]) -> AdapterFile:
        """A file's layers in these parts."""
        if path not in self._files:
            word = self.words.get(path)
            no_layers = word is not None and word.alone
            read = files.read(path, keep_embeddings=word is not None) if not no_layers else AdapterFile(str(path), {})
            self._files[path] = read
        prefixes = {kind.prefix for name, kind in self.family.PARTS.items() if name in names and kind.prefix}
        return self._files[path].beginning_with(*(f"{prefix}_" for prefix in sorted(prefixes)))

    def _network(self, path: Path, names: tuple[str, ...]) -> Network | None:
        """The adapters of a file on these loaded parts, made once; None if it has no layers there."""
        if (path, names) not in self._networks:
            content, network = self._part(path, names), None
            if content.layers:
                with log.errors_only(), torch.no_grad():  # its warnings came with `open_base`
                    network = create_to_merge(content, self.family.adapter_targets(*names), multiplier=1.0)
                    network.load(content)
                network.requires_grad_(False).eval()
            self._networks[path, names] = network
        return self._networks[path, names]
