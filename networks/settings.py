"""The settings of a network: `--network_args` as typed fields. Imports no torch.

A kind of adapter has two dataclasses of such fields. `Settings`: how it trains. `Sizes`: where it sits and how large it
is, which a file settles if the network takes its layers from one (`--dim_from_weights`). Fields are checked by name and
type before torch loads, so they are plain annotations, with a default each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from library.errors import UserError


def _rate(name: str, given: float | None) -> float:
    """A share that is left out, 0 if none is given. UserError outside of [0, 1)."""
    rate = given or 0.0
    if not 0 <= rate < 1:
        raise UserError(f"{name}: {rate} is not in [0, 1)")
    return rate


@dataclass(frozen=True, kw_only=True)
class RateSettings:
    """For every kind: learning rates within a part, by block, with kohya's numbers and words, and by pattern, as
    `networks.rates` reads the texts; and module_dropout, the share of forwards in training, in [0, 1), in which a
    layer's adapter is left out.
    """

    down_lr_weight: str | None = None
    mid_lr_weight: str | None = None
    up_lr_weight: str | None = None
    block_lr_zero_threshold: float = 0.0
    network_reg_lrs: str | None = None
    module_dropout: float | None = None

    @property
    def left_out(self) -> float:
        """module_dropout, 0 for none. Raises UserError."""
        return _rate("module_dropout", self.module_dropout)

    @property
    def by_section(self) -> dict[str, str | None]:
        """The block weights by the section of the model that they are for."""
        return {"down": self.down_lr_weight, "mid": self.mid_lr_weight, "up": self.up_lr_weight}


@dataclass(frozen=True, kw_only=True)
class PlusSettings:
    """LoRA+ (Hayou, Ghosh, Yu 2024, arXiv 2402.12354): how many times the rate the raised tensor of a kind gets."""

    loraplus_lr_ratio: float | None = None
    loraplus_unet_lr_ratio: float | None = None
    loraplus_text_encoder_lr_ratio: float | None = None

    @property
    def by_part(self) -> dict[str, float | None]:
        """A part's own ratio, or the one for both; 0 counts as not given, as kohya has it."""
        both = self.loraplus_lr_ratio
        return {
            "unet": self.loraplus_unet_lr_ratio or both or None,
            "text_encoder": self.loraplus_text_encoder_lr_ratio or both or None,
        }


@dataclass(frozen=True, kw_only=True)
class RankSettings(RateSettings, PlusSettings):
    """How an adapter with a rank trains. rank_dropout: the share of its ranks, in [0, 1), left out for each sample."""

    rank_dropout: float | None = None

    def with_values(self, dropout: float | None) -> dict[str, float]:
        """The dropouts and `--network_dropout`, the share of single values, 0 for none. Raises UserError."""
        return {
            "dropout": _rate("network_dropout", dropout),
            "rank_dropout": _rate("rank_dropout", self.rank_dropout),
            "module_dropout": self.left_out,
        }


@dataclass(frozen=True, kw_only=True)
class OwnFormSettings(RankSettings):
    """Of kinds that other programs read as plain LoRA. keep_form: write files in the kind's own form instead, with
    which a later run can go on (`--network_weights`)."""

    keep_form: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """Which layers get an adapter, for every kind. See `networks.layers` for what the texts mean.

    preset: a key of `networks.layers.PRESETS`; None: the kind's usual layers. train_blocks: a section of the denoiser's
    blocks ("double"), the only one with adapters; None and "all": all. train_block_indices: the numbers of the blocks
    with adapters, as kohya has them: "0-5,9", "all", "none". train_norm: by the kind "norm" the normalisation layers
    beside these as well.
    """

    preset: str | None = None
    train_blocks: str | None = None
    train_block_indices: str | None = None
    include_patterns: str | None = None
    exclude_patterns: str | None = None
    train_norm: bool = False


@dataclass(frozen=True, kw_only=True)
class RankSizes(LayerSizes):
    """Ranks and alphas beside `--network_dim` and `--network_alpha`: of convolutions, by block of the denoiser, and by
    pattern of the layers' names ("pattern=rank,pattern=rank", the first that matches).

    rs_lora: scale by alpha / sqrt(rank) instead of alpha / rank.
    """

    rs_lora: bool = False
    conv_dim: int | None = None
    conv_alpha: float | None = None
    block_dims: str | None = None
    block_alphas: str | None = None
    conv_block_dims: str | None = None
    conv_block_alphas: str | None = None
    network_reg_dims: str | None = None


@dataclass(frozen=True, kw_only=True)
class TuckerSizes(RankSizes):
    """use_tucker: on kernels wider than 1 x 1, a core of rank x rank x kernel between two 1 x 1 parts."""

    use_tucker: bool = False


@dataclass(frozen=True, kw_only=True)
class DecomposeSizes(TuckerSizes):
    """dora_wd: train the norms of the layer's input channels as well, or with wd_on_output those of its rows.

    ComfyUI, A1111 and Forge apply the first as trained. Rows, the default of LyCORIS since 3.2 and of PEFT, are applied
    as trained by LyCORIS, and by diffusers under its own names.
    """

    dora_wd: bool = False
    wd_on_output: bool = False


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options that are the same for every kind: `--network_dim`, `--network_alpha`, `--network_dropout`.

    None: not given. `seed`: initial weights are drawn by (seed, layer); None: from torch's stream. `is_lenient`:
    an option that a kind has no use for is logged, not refused: some configurations give it to all kinds.
    """

    dim: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    seed: int | None = None
    is_lenient: bool = False


@dataclass(frozen=True)
class LearningRates:
    """The learning rates of a run: `--text_encoder_lr`, `--unet_lr`, `--learning_rate`, `--lr_layer_decay`,
    `--embedding_lr`.

    None is `default`. `text_encoder` may be a list with one rate per text encoder; a list of one is for all.
    """

    text_encoder: float | Sequence[float] | None
    unet: float | None
    default: float | None
    layer_decay: float | None = None
    embedding: float | None = None
