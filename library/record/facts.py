"""Typed facts about a run: model, network, data, length, rates. The summary in the console, `run.json` and the report
are made of these.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BaseWeight:
    """A LoRA file that the base model is trained with: merged into it, or `apart` from it, in effect in training alone.
    The hashes are None if nothing is trained; `model_hash`, which is over the tensors alone, is also None for pickled
    files."""

    file: str
    multiplier: float
    sha256: str | None = None
    model_hash: str | None = None
    apart: bool = False


@dataclass(frozen=True, kw_only=True)
class Model:
    """The base model. `path`: a file, a folder or a hub id. `precision`: "fp32", "fp16" or "bf16". `frozen_format`: of
    the denoiser's frozen weights, such as "nf4"; "": as they are computed with."""

    path: str
    version: str  # "sd_v1"
    prediction_type: str  # "epsilon", "v_prediction"
    vae: str | None
    precision: str
    device: str
    frozen_format: str = ""
    base_weights: tuple[BaseWeight, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """The adapters on one part of the model ("unet"), and their parameters. `layers`: how many on the layers of each
    name ("attn1.to_q"); empty where it is not known. `part_parameters`: of the part itself; 0: unknown."""

    part: str
    count: int
    parameters: int
    layers: tuple[tuple[str, int], ...] = ()
    part_parameters: int = 0


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """The trained embedding of a new word. `widths`: of a vector, by its name in files. `start`: the words, or the
    file, whose vectors it starts from; "": random ones."""

    word: str
    vectors: int
    widths: tuple[tuple[str, int], ...]
    start: str


@dataclass(frozen=True, kw_only=True)
class Network:
    """The trained network. `ranks`: the lowest and the highest of our own adapters; None for those of other packages,
    of which only the configured rank, `dim`, is known. `parameters`: the number of trained ones. `model_parameters`:
    of the whole base model; 0: unknown. `module` "": no adapters are trained, the embedding alone."""

    module: str
    dim: int | None
    ranks: tuple[int, int] | None
    alpha: float
    adapters: tuple[Adapters, ...]
    parameters: int
    model_parameters: int = 0
    embedding: Embedding | None = None


@dataclass(frozen=True, kw_only=True)
class Images:
    """One folder of images, or one metadata file, in one data set. Counts are of images, without repeats.

    `draws`: an epoch's, of all its images; `least`, `most`: of one of them. Where shares decide (`by_shares`), these
    are means. `part`: of the draws of the data set. `resolution`: set where the folder is trained at several.
    """

    source: str
    regularisation: bool
    images: int
    repeats: int
    draws: float
    least: float
    most: float
    part: float
    by_shares: bool
    resolution: tuple[int, int] | None
    held_out: int  # to validate on
    too_small: int  # left out
    captions_found: int
    captions_missing: int
    captions_empty: int


@dataclass(frozen=True, kw_only=True)
class Flaw:
    """A finding of the data check in one folder. `text` names the data sets where only some of several that have the
    folder have the flaw. `level`: "to fix", "to look at" or "to know". `files`: the first names
    of `count` files."""

    source: str
    name: str
    level: str
    text: str
    advice: str
    count: int
    files: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Example:
    """A caption as it is trained. `changing`: the settings that change its text each time, with their values; the value
    of a flag is empty."""

    text: str
    changing: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Captions:
    """`too_long`: the number of distinct captions cut off at `token_limit` tokens. `examples`: one a folder."""

    different: int
    too_long: int
    token_limit: int
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The validation on held-out images: `batches` at each of `timesteps` levels, `times` times in the run.
    `patience`: validations without improvement that end the run; None: it never ends early."""

    images: int
    batches: int
    timesteps: int
    times: int
    patience: int | None


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Images of one size. `size`: width, height in pixels. `draws`: images with repeats. `batches`: of an epoch, of the
    first one where shares decide (`by_shares`)."""

    dataset: int  # counted from 1
    size: tuple[int, int]
    images: int
    draws: int
    batches: int
    by_shares: bool


@dataclass(frozen=True, kw_only=True)
class Length:
    """Steps are the optimizer's."""

    steps: int
    steps_per_epoch: int
    batches_per_epoch: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """`sizes`: images of a batch, in rising order; several where the data sets differ."""

    sizes: tuple[int, ...]
    accumulation: int
    processes: int


@dataclass(frozen=True, kw_only=True)
class Rate:
    """The highest learning rate of a group of parameters; None: the optimizer sets it itself."""

    group: str
    rate: float | None


@dataclass(frozen=True, kw_only=True)
class Rates:
    """`schedule`: its name; None: the optimizer's own, or none. `warmup`: steps. `optimizer`: its name."""

    groups: tuple[Rate, ...]
    schedule: str | None
    warmup: int
    optimizer: str


@dataclass(frozen=True, kw_only=True)
class Decay:
    """The weight decay. `base`: as configured. `curve` None: it is constant."""

    base: float
    curve: DecayCurve | None = None


@dataclass(frozen=True, kw_only=True)
class DecayCurve:
    """How the weight decay changes with the steps, in the words of the options `--wd_…`.

    `held`: the last step with the base value (adaptive: the last one at the earliest). `changes`: whether it changes
    within the run. `at_end`: its value at the last step, at a steady speed. `stages`: (first step, share of the base
    value). `by_gradient`, `with_rate`: see `weight_decay_pace`.
    """

    schedule: str
    held: int
    changes: bool
    at_end: float
    transition_steps: int
    decay_factor: float
    min_ratio: float
    max_progress: float | None  # None: without an end
    stages: tuple[tuple[int, float], ...] = ()
    interpolate: bool = False
    by_gradient: bool = False
    with_rate: bool = False


@dataclass(frozen=True, kw_only=True)
class Preserved:
    """Images whose target is a prediction: that of the "base" model, or of the "previous" network. `region`: "all" of
    each image, or "outside_mask". `weight`: of their loss."""

    images: int
    prior: str
    region: str = "all"
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """The distance to the previous network's predictions is a part of the loss, times `weight`, which falls by
    `schedule`."""

    weight: float
    schedule: str


@dataclass(frozen=True, kw_only=True)
class Consolidated:
    """Elastic weight consolidation for some earlier images, those of `sources`. `strength`: its lambda; None: it is
    computed from them before the first step."""

    images: int
    sources: tuple[str, ...]
    strength: float | None = None


@dataclass(frozen=True, kw_only=True)
class Protections:
    """What keeps the network from forgetting. `previous`: the file whose predictions are kept; "": no network's."""

    preserved: tuple[Preserved, ...] = ()
    distilled: Distilled | None = None
    consolidated: Consolidated | None = None
    previous: str = ""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All of these. `validation` None: nothing is held out. `decay` None: the optimizer has no weight decay, or 0.
    `flaws`: those of the data, the worst of each folder first. `protections` None: nothing is kept from forgetting.
    `prompts`: what a slider is trained on, a line each."""

    model: Model
    network: Network
    images: tuple[Images, ...]
    captions: Captions
    validation: Validation | None
    buckets: tuple[Bucket, ...]
    length: Length
    batch: Batch
    rates: Rates
    decay: Decay | None
    flaws: tuple[Flaw, ...] = ()
    protections: Protections | None = None
    prompts: tuple[str, ...] = ()
