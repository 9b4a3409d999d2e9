"""A model family: the interface that the rest of the project uses, and the code that all families share.

A family is one file with a subclass of `ModelFamily`, and one line in `library.models.FAMILIES`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from library.errors import UserError
from library.models.components import NOTHING, Components, PartKind

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from library.diffusion.latents import LatentSpace
    from library.diffusion.process import Process
    from library.files.json_text import Config
    from library.files.tensors import WeightsIndex
    from library.models.blocks import Blocks
    from library.models.checkpoints.adapter_file import WrittenNaming
    from library.models.checkpoints.base_model import BaseModel, Folder
    from library.models.modules import Pipeline
    from library.offload.swap import Block


@dataclass(frozen=True)
class AdapterTargets:
    """The modules of one part that adapters attach to, by their paths below `root`.

    part: "unet" or "text_encoder". prefix: the beginning of keys in adapter files. linear: paths of the Linear and
    1 × 1 convolution targets. conv: paths of further targets, if convolutions are adapted. name: from a path to the
    dotted name that keys use (dots become underscores). blocks: the part's numbered blocks, if it has any. layer: for
    parts without blocks, a pattern of the dotted names, whose first group is a layer's number, counted from the input.
    more, choices: see `library.models.components.PartKind`.
    fused: the dotted name that a layer shares with others if files hold them as one; else "". place: where its rows are
    among theirs.
    """

    part: str
    prefix: str
    root: nn.Module
    linear: re.Pattern[str]
    conv: re.Pattern[str]
    name: Callable[[str], str]
    blocks: Blocks | None = None
    layer: re.Pattern[str] | None = None
    more: re.Pattern[str] = NOTHING
    choices: Mapping[str, re.Pattern[str]] = field(default_factory=dict)
    fused: Callable[[str], str] = lambda name: ""
    place: Callable[[str], int] = lambda name: 0


@dataclass(frozen=True)
class TokenTable:
    """A text encoder's table of token embeddings, which a trained embedding adds rows to.

    key: of the rows in embedding files. section: as rates have it, "embedding" or, of several encoders, "embedding_1".
    first: the first token behind the vocabulary: the first of the new word.
    """

    key: str
    section: str
    table: nn.Embedding
    first: int


@dataclass(frozen=True)
class Rendering:
    """How a family's samples are rendered where their prompt says nothing.

    steps: of the sampler. scale: of classifier-free guidance, 1 without. compared: the same of --compare_prompts.
    guidance: that a distilled model is told (--g); None: it is told none.
    """

    steps: int = 30
    scale: float = 7.5
    compared: float = 4.0
    guidance: float | None = None


class ModelFamily(ABC):
    """A base model. Making one reads headers and configurations; weights come with `components.load`, frozen.

    The keyword-only parameters of a family's constructor beside `vae` are its options: those of the command line that
    have the same names. An option of another family is refused where it was given (`library.models.opening`).
    """

    NAME: ClassVar[str]
    """As in FAMILIES."""
    TITLE: ClassVar[str]
    """The family's name in messages: "an SDXL model"."""
    PARTS: ClassVar[Mapping[str, PartKind]]
    """By "denoiser", "vae", "text_encoder", … in the order in which they are checked."""

    STATED: ClassVar[Mapping[str, str]] = {}
    """Options that only say what the model is, with their one right value: another one contradicts the file."""
    WITHOUT_EFFECT: ClassVar[Mapping[str, tuple[object, str]]] = {}
    """Options of kohya's script for this model that change nothing: the one value that says so, and the reason."""
    UNUSABLE: ClassVar[Mapping[str, str]] = {}
    """Options of the objective that would harm a model of this family, each with the reason."""
    LEAVE_TEXT_ENCODERS: ClassVar[str] = ""
    """Why --recommend advises against training the text encoders; "" where it does not."""
    TIMESTEP_SAMPLING: ClassVar[Literal["sigmoid", "shift", "flux2_shift"] | None] = None
    """The --timestep_sampling of kohya's script for this model where the user gives none, if it is not "sigma"."""
    FILE_NAMING: ClassVar[WrittenNaming] = "kohya"
    """Whose names a plain LoRA's file has where --save_naming is not given."""
    NAMES_EVERY_KIND: ClassVar[bool] = False
    """Whether files of other kinds have them, too; else those have kohya's."""

    path: str  # as the user gave it
    vae_path: str | None  # as the user gave it with --vae
    base_model_version: str  # kohya's ss_base_model_version: "sd_v1", "sd_v2", …
    architecture: str  # modelspec.architecture, without "/lora"
    implementation: str  # modelspec.implementation: whose names the adapters' keys follow
    clip_skip: int | None = None  # as kohya counts: 1 is the text encoder's last layer
    native_resolution: int  # pixels
    distilled: bool = False  # to a few steps, which training unlearns
    token_limit: int  # the number of a caption's tokens that are read
    longest_side: int | None = None  # of images, in pixels; None: there is none
    latents: LatentSpace

    def __init__(self, base: BaseModel, *, vae: str | None) -> None:
        """`base` has the VAE of `vae` already."""
        self.path, self.vae_path = base.path, vae
        self.components = Components(self.PARTS, base.parts)

    @property
    def settings(self) -> dict[str, object]:
        """Settings of the family's own, for the metadata of files, under kohya's names without "ss_"."""
        return {}

    @property
    def trains_text_encoders(self) -> bool:
        """Whether adapters can sit on any of them."""
        return any(kind.section == "text_encoder" for kind in self.PARTS.values())

    # -- recognising and opening

    @classmethod
    @abstractmethod
    def claims(cls, content: WeightsIndex | Folder) -> bool:
        """Whether a file or a folder holds a model of this family that can be trained. Every family is asked."""

    @classmethod
    @abstractmethod
    def read(cls, path: str, location: Path) -> BaseModel:
        """The parts of a file or folder that the family claims, with their configurations. Raises UserError."""

    @classmethod
    def usual_configs(cls) -> Mapping[str, Config]:
        """The configurations of the true model's parts, by their folders. Where a family has none, a model without one
        of its parts is of no use."""
        return {}

    # -- images

    @property
    def size_divisor(self) -> int:
        """The sides of images are multiples of this many pixels."""
        return self.latents.factor

    @property
    @abstractmethod
    def process(self) -> Process:
        """The diffusion process: how noise is added, and what the network predicts."""

    def encode_images(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, each [B, C, h, w] in float32, scaled; pixels in [-1, 1]."""
        return self.latents.encode(self.components["vae"], pixels_BCHW)

    def decode_latents(self, latents_BCHW: Tensor) -> Tensor:
        """The pixels, [B, 3, H, W] in about [-1, 1], of latents scaled as by `encode_images`."""
        return self.latents.decode(self.components["vae"], latents_BCHW)

    def vae_fingerprint(self) -> str:
        """A hash of everything that `encode_images` depends on except the precision; reads the VAE's weights once."""
        return self.components.fingerprint("vae")

    # -- texts

    @abstractmethod
    def text_fingerprint(self) -> str:
        """A hash of everything that `encode_prompts` depends on except the precision; reads the encoders' weights."""

    @abstractmethod
    def count_tokens(self, caption: str) -> int:
        """How many tokens the caption has, without those that begin and end every text."""

    @abstractmethod
    def encode_prompts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The states of the text encoders by name, each [B, …]. Differentiable.

        The second axis may be as long as the longest caption. Caches pad shorter rows with zeros, so such a family also
        returns a mask, which is 0 there.
        """

    # -- a new word, of a trained embedding

    def learn_word(self, word: str, *, vectors: int) -> None:
        """Read this word as that many new tokens from now on. `UserError` if the tokenizer has it already."""
        raise UserError(f"--token_string: embeddings of {self.TITLE} are not supported here yet")

    def forget_word(self) -> None:
        """Read the word that was learnt as any other text again."""
        raise NotImplementedError

    def token_ids(self, text: str) -> list[int]:
        """The tokens of a text, without those that begin and end it."""
        raise NotImplementedError

    def has_word(self, text: str) -> bool:
        """Whether a text has the word that was learnt."""
        raise NotImplementedError

    def token_tables(self) -> list[TokenTable]:
        """The table of each loaded text encoder, in their order, for the word that was learnt."""
        raise NotImplementedError

    # -- single tokens

    def vocabulary(self) -> list[str]:
        """The text of each token, with "…" behind those that end no word. `UserError` where there is no such list."""
        raise UserError(f"the tokens of {self.TITLE} cannot be compared one by one yet")

    def token_states(self, tokens: Sequence[int]) -> Tensor:
        """The text encoders' states of texts of one token each, [B, 3, D]: BOS, the token, EOS."""
        raise NotImplementedError

    # -- the network

    def condition(
        self,
        texts: Mapping[str, Tensor],
        *,
        original_sizes: Sequence[tuple[int, int]],
        crops: Sequence[tuple[int, int]],
        target_size: tuple[int, int],
    ) -> dict[str, Tensor]:
        """The condition of `predict`, each [B, …]: `texts` as from `encode_prompts`, and further inputs of the family.

        Sizes are (width, height) in pixels: of each image on disk, and the common size of the crops. crops: (left, top)
        of each crop in the image after resizing and, if the view is mirrored, mirroring.
        """
        return dict(texts)

    def with_text_dropout(
        self, condition: Mapping[str, Tensor], draws: Callable[[str], Sequence[float]]
    ) -> Mapping[str, Tensor]:
        """The condition of a batch that is trained on, without the texts that the family's options leave out there.

        draws: for a purpose a number in [0, 1) for each sample, the same each time.
        """
        return condition

    @abstractmethod
    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The network's prediction for noisy latents at noise levels of `process`, of the same shape."""

    @abstractmethod
    def denoiser_blocks(self) -> Iterable[nn.Module]:
        """The blocks of the loaded denoiser, which hold nearly all of its weights and run one after the other."""

    def swap_blocks(self) -> Sequence[Block]:
        """The layers of the denoiser in the blocks of --blocks_to_swap, which run one after the other: small ones of
        similar size, since two buffers of the largest one's size are needed."""
        from library.offload.swap import layers_in

        return [layers_in(block) for block in self.denoiser_blocks()]

    def compiled_blocks(self) -> Iterable[nn.Module]:
        """The parts of the loaded denoiser that --compile compiles, each by itself; equal ones share a graph."""
        return self.denoiser_blocks()

    # -- adapters

    def outlined(self) -> AbstractContextManager[None]:
        """See `Components.outlined`."""
        return self.components.outlined()

    def adapter_targets(self, *names: str) -> list[AdapterTargets]:
        """The targets of each of these parts that is loaded; of all parts if none is named."""
        kinds = {name: kind for name, kind in self.PARTS.items() if kind.section and name in self.components}
        return [
            AdapterTargets(
                *(kind.section, kind.prefix, self.components[name], kind.linear, kind.conv),
                name=lambda path, part=name: self.adapter_name(part, path),  # type: ignore[misc]
                blocks=kind.blocks,
                layer=kind.layer,
                more=kind.more,
                choices=kind.choices,
                fused=lambda name, part=name: self.fused_name(part, name),  # type: ignore[misc]
                place=lambda name, part=name: self.fused_place(part, name),  # type: ignore[misc]
            )
            for name, kind in kinds.items()
            if not names or name in names
        ]

    def adapter_name(self, part: str, path: str) -> str:
        """The dotted name that keys in adapter files have for a layer of a part."""
        return path

    def fused_name(self, part: str, name: str) -> str:
        """The dotted name under which files hold a layer together with others (query, key and value); "" for none."""
        return ""

    def fused_place(self, part: str, name: str) -> int:
        """Where the layer's rows are among those of the layers that it shares a name with, counted from 0; the same for
        all: in the model's order."""
        return 0

    def expected_modules(self, *, conv: bool = False) -> dict[str, int] | None:
        """The number of targets of each part, with those of `conv` or without; None for a model of unknown size.

        Parts are named as in `networks.network.Site.section`.
        """
        return None

    def third_party_views(self) -> tuple[Any, Any]:
        """The `text_encoder` and `unet` that a network module of kohya's protocol gets."""
        encoders = self.components.loaded(*self.components.text_encoders)
        denoiser = self.components.get("denoiser")
        return (encoders[0] if len(encoders) == 1 else encoders), denoiser

    # -- sampling

    @property
    def rendering(self) -> Rendering:
        """kohya's defaults."""
        return Rendering()

    @abstractmethod
    def pipeline_arguments(self, positive: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Any]:
        """The pipeline's own names for two prompts, each as of `encode_prompts`."""

    @abstractmethod
    def pipeline(self) -> Pipeline:
        """A diffusers pipeline over the loaded parts, or an object with the same call.

        With the arguments of `pipeline_arguments`, num_inference_steps, guidance_scale, width, height, generator and
        output_type="latent" it returns an object whose `images` are latents [1, C, h, w]; `scheduler` is set before.
        Where `rendering` has a guidance, it gets one as `embedded_guidance` as well.
        """
