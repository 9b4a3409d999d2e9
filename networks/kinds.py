"""The kinds of adapters, and what `--network_module` and `--network_args` mean. Imports no torch.

A new kind is a file in this folder and a line in KINDS.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from library.config import kohya, registry, source
from library.errors import UserError
from networks import lycoris, sd3_arguments

if TYPE_CHECKING:
    from networks.adapter import Adapter
    from networks.settings import LayerSizes, RateSettings

KINDS = {
    "lora": "networks.lora.LoRA",
    "dora": "networks.dora.DoRA",
    "oft": "networks.oft.OFT",
    "boft": "networks.boft.BOFT",
    "ia3": "networks.ia3.IA3",
    "full": "networks.full.Full",
    "norm": "networks.norm.Norm",
    "lokr": "networks.lokr.LoKr",
    "loha": "networks.loha.LoHa",
    "lora_fa": "networks.lora_fa.LoRAFA",
    "dylora": "networks.dylora.DyLoRA",
    "adalora": "networks.adalora.AdaLoRA",
    "pissa": "networks.pissa.PiSSA",
    "vera": "networks.vera.VeRA",
    "glora": "networks.glora.GLoRA",
    "t_lora": "networks.t_lora.TLoRA",
}

ALIASES = dict.fromkeys(
    (
        *("networks.lora_flux", "networks.lora_flux_2", "networks.lora_anima", "networks.lora_zimage"),
        sd3_arguments.MODULE,
    ),
    "lora",
)
"""kohya's modules for one model, whose kind serves all models here."""

# Arguments of kohya's `create_network` that the trainer passes itself: no words of the user's
_GIVEN = (
    *("multiplier", "network_dim", "network_alpha", "file", "vae", "text_encoder", "unet"),
    *("neuron_dropout", "weights_sd", "for_inference", "targets", "seed"),
)
# What networks of other packages cannot do, as the error messages have it; {} is the module's name
_OURS_ONLY = {
    "lr_layer_decay": "--lr_layer_decay: {} has no rates by layer; networks.lora has",
    "fsdp": "--network_module {} with FSDP: only this program's kinds of adapters",
    "blocks_to_swap": "--blocks_to_swap with --network_module {}: modules of other packages read the layers' weights "
    "themselves, on the GPU, where swapped ones are not; the kinds of this package fetch them",
}


def kind_of(module: str, words: Iterable[str] = ()) -> str | None:
    """The kind that a `--network_module` stands for, with these `--network_args`: "lora" for "networks.lora"; None for
    other packages' modules. Raises UserError."""
    if module == lycoris.MODULE:
        return lycoris.kind_of(tuple(words))
    if module in ALIASES:
        return ALIASES[module]
    package, _, name = module.partition(".")
    return name if package == "networks" and name in KINDS else None


def refuses(module: str, capability: str) -> str | None:
    """Why networks of a `--network_module` cannot do something, a key of `_OURS_ONLY`; None if they can."""
    return None if source.is_ours(module) else _OURS_ONLY[capability].format(module)


def load(kind: str) -> type[Adapter]:
    """The class of a kind."""
    found: type[Adapter] = registry.load(KINDS, kind, where="networks.kinds")
    return found


def tensor_names() -> dict[str, tuple[str, ...]]:
    """The names that each kind's tensors can have in files."""
    return {kind: load(kind).NAMES for kind in KINDS}


def readers() -> dict[str, type[Adapter]]:
    """The class that reads a file's layer of each kind, by the names of `library.models.checkpoints.adapter_file`.

    Where several could, it is the first of KINDS.
    """
    found: dict[str, type[Adapter]] = {}
    for kind in KINDS:
        for read in load(kind).reads():
            found.setdefault(read, load(kind))
    return found


def creator(module: str, *, from_file: bool) -> str:
    """The function of a foreign module that makes the network, as kohya's protocol names it."""
    return f"{module}.{'create_network_from_weights' if from_file else 'create_network'}"


def arguments(module: str, words: Iterable[str], *, from_file: bool) -> tuple[dict[str, Any], list[str]]:
    """`--network_args` as arguments, and the names that could not be checked. Raises UserError.

    `from_file`: the sizes are a file's (`--dim_from_weights`). Values for our own kinds have the types that their
    settings declare; a foreign module gets text, as kohya's scripts hand it over.
    """
    registry.refuse_no_name(module, where="--network_module")
    if source.is_ours(module):
        return _of_kind(module, words, from_file=from_file), []
    return registry.bind(
        creator(module, from_file=from_file),
        words,
        reserved=_GIVEN,
        where="--network_args",
        named_by="--network_module",
        as_text=True,
    )


def _of_kind(module: str, words: Iterable[str], *, from_file: bool) -> dict[str, Any]:
    if module not in ALIASES:
        source.find(module, where="--network_module")
    given = words = tuple(words)
    if module == sd3_arguments.MODULE and not from_file:
        words = tuple(sd3_arguments.translate(words))
    if (kind := kind_of(module, words)) is None:
        known = ", ".join(f"networks.{kind}" for kind in (*KINDS, "lycoris"))
        raise UserError(f"--network_module {module}: is no kind of adapter; known: {known}")
    for name in registry.split_words(words, where="--network_args"):
        if name in kohya.NETWORK_ARGS_NOT_YET:
            hint = kohya.NETWORK_ARGS_NOT_YET[name]
            raise UserError(f"--network_args: {name} is known to kohya's scripts, not supported here yet ({hint})")
        if name == "algo" and module != lycoris.MODULE:
            raise UserError(f"--network_args: algo: {module} is one kind; --network_module {lycoris.MODULE} takes it")
        if name == "dora_wd" and kind == "lora" and module != lycoris.MODULE:
            raise UserError(f"--network_args: {module} takes no 'dora_wd'; --network_module networks.dora is DoRA")
    sizes, settings = f"networks.{kind}.Sizes", f"networks.{kind}.Settings"
    if module == lycoris.MODULE:
        of_sizes, of_settings = (
            list(registry.signature(path, where="--network_module").parameters) for path in (sizes, settings)
        )
        words = tuple(lycoris.translate(words, takes=of_sizes + of_settings, settled=of_sizes if from_file else ()))
    values, _ = registry.bind(
        settings if from_file else sizes,
        words,
        also=() if from_file else (settings,),
        reserved=_GIVEN,
        where="--network_args",
        named_by="--network_module",
        called=f"{module} with --dim_from_weights" if from_file else module,
    )
    if module == lycoris.MODULE:
        values["algo"] = lycoris.algorithm_of(given)  # for the metadata: no field of the kind's
    return values


def fields_of(schema: type[LayerSizes | RateSettings], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are fields of a dataclass."""
    names = {field.name for field in fields(schema)}
    return {name: value for name, value in values.items() if name in names}
