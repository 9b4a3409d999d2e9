"""The contents of an adapter file, from the names of its tensors: the kinds of its layers, their naming, and extras.

Every reader of base models, VAEs and LoRA files uses this module, as does their conversion. Neither torch nor a model
is needed. The names of the kinds are those of LyCORIS (lycoris/modules/*.py), of kohya's networks.oft
and of PEFT (peft/tuners/*/layer.py).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

Naming = Literal["kohya", "diffusers", "PEFT", "OneTrainer", "ComfyUI"]
WrittenNaming = Literal["kohya", "diffusers"]  # --save_naming

KOHYA_OFT = "oft_unet_"  # kohya's networks.oft has a prefix of its own
KOHYA_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", KOHYA_OFT)
_BUNDLE = "bundle_emb."  # a textual inversion embedding that is shipped in a LoRA file: bundle_emb.WORD.KEY

_LORA_ENDS = (
    r"lora_(?:down|up)\.weight|lora_[AB](?:\.\w+)?(?:\.weight)?|(?:lora|lora_linear_layer)\.(?:down|up)\.weight"
)


class _Kind(NamedTuple):
    title: str
    ends: str  # of its tensors' names, a regular expression
    lycoris: str  # the arguments by which LyCORIS makes it; "" where it does not


# If a layer has the tensors of several kinds, it is of the first: a DoRA is a LoRA with a dora_scale.
_KINDS = {
    "adalora": _Kind("an AdaLoRA", r"lora_E(?:\.\w+)?|lora_target", ""),
    "pissa": _Kind("a PiSSA", r"pissa_(?:down|up)\.weight", ""),
    "bias": _Kind("a LoRA with biases", r"lora_(?:B(?:\.\w+)?|up)\.bias|bias_(?:indices|values|size)", ""),
    "tucker": _Kind("a LoRA with Tucker cores (lora_mid)", r"lora_mid\.weight", "algo=lora use_tucker=True"),
    "loha": _Kind("a LoHa", r"hada_(?:w[12]_[ab]|t[12])", "algo=loha"),
    "lokr": _Kind("a LoKr", r"lokr_(?:w[12](?:_[ab])?|t[12])", "algo=lokr"),
    "dora": _Kind("a DoRA", r"dora_scale|lora_magnitude_vector(?:\.\w+)*", "algo=lora dora_wd=True"),
    "boft": _Kind("a BOFT", r"boft_[Rs](?:\.\w+)*", "algo=boft"),
    "oft": _Kind("an OFT", r"oft_(?:blocks|diag)|oft_R(?:\.\w+)*", "algo=diag-oft"),
    "glora": _Kind("a GLoRA", r"(?:a1|a2|b1|b2|bm)\.weight", "algo=glora"),
    "ia3": _Kind("an (IA)³", r"on_input|ia3_l(?:\.\w+)?", "algo=ia3"),
    "full": _Kind("a file of whole weight differences (diff)", r"diff(?:_b)?|set_weight|reshape_weight", "algo=full"),
    "norm": _Kind("a file of normalisation layers (w_norm)", r"[wb]_norm", "train_norm=True"),
    "vera": _Kind("a VeRA", r"vera_lambda_[bd](?:\.\w+)?|vera_projection", ""),
    "tlora": _Kind("a T-LoRA", r"[pq]_layer\.weight|lambda_layer", "algo=tlora"),
    "lora": _Kind("a LoRA", _LORA_ENDS, "algo=lora"),
}
_ORDER = list(_KINDS)
_SHORT = {"bias": "LoRA with bias", "tucker": "Tucker", "full": "diff", "norm": "norm", "ia3": "(IA)³"}
_END = re.compile("|".join(rf"\.(?P<{kind}>{ends})\Z" for kind, (_, ends, _) in _KINDS.items()))
_OLD_LORA = re.compile(r"(?P<path>.+\.to_\w+?)_lora\.(?:down|up)\.weight")  # the first files of diffusers
_SHARED = ("alpha", "scale", "scalar", "rescale", "weight")  # ends of names that belong to several kinds
_VERA_TABLES = ("vera_A", "vera_B")  # of the whole file, behind the prefix of PEFT
_WITH_DORA = ("loha", "lokr")  # kinds that can have a dora_scale as well

_LONGEST_ARGUMENTS = 500  # characters of ss_network_args that a message can hold

_ONETRAINER = ("lora_unet.", "lora_te.", "lora_te1.", "lora_te2.", "clip_l.", "clip_g.")
_ORIGINAL_UNET = re.compile(r"unet\.(?:input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\.")
_COMFYUI = ("diffusion_model.", "text_encoders.")
_PEFT = "base_model.model."
_DIFFUSERS_PARTS = ("unet.", "text_encoder.", "text_encoder_2.", "transformer.")


@dataclass(frozen=True)
class AdapterContents:
    """naming: the naming of the layers; None if it is unknown. layers: how many of each kind, by the keys of `_KINDS`.
    embeddings: the words of textual inversion embeddings beside them. unknown: names of no known kind.
    decomposed: whether LoHa or LoKr have DoRA's scales. made_by: the options by which LyCORIS made it, from its
    metadata, or else options by which it makes such layers; "" if it makes none.
    """

    naming: Naming | None
    layers: Mapping[str, int]
    embeddings: tuple[str, ...]
    unknown: tuple[str, ...]
    decomposed: bool
    made_by: str

    @property
    def is_plain(self) -> bool:
        """Whether it contains only low-rank pairs and, possibly, embeddings."""
        return self.holds_only(("lora",))

    def holds_only(self, kinds: Collection[str]) -> bool:
        """Whether it contains only layers of these kinds and, possibly, embeddings."""
        return bool(self.layers) and not self.unknown and set(kinds).issuperset(self.layers)

    @property
    def title(self) -> str:
        """For messages: "a LoHa", or a list of its kinds if there are several."""
        if len(self.layers) == 1 and not self.unknown:
            (kind,) = self.layers
            return (_KINDS[kind].title if kind in _KINDS else f"a {kind} adapter") + " with DoRA" * self.decomposed
        parts = [f"{count} layers of {short_title(kind)}" for kind, count in self.layers.items()]
        if self.unknown:
            parts.append(f"{len(self.unknown)} tensors of no known kind, such as {self.unknown[0]}")
        return f"an adapter of {' and '.join(parts)}"


def describe(
    names: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str] | None = None,
    *,
    more: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> AdapterContents | None:
    """The kinds of adapters in tensors of these names and shapes; None if there are none. `metadata`: of the file.

    `more`: kinds beside those of `_KINDS`, each with how the names of its tensors end.
    """
    kinds: dict[str, set[str]] = {}  # by layer
    embeddings: dict[str, None] = {}
    rest: list[str] = []
    for name, shape in names.items():
        if is_of_embedding(name):
            embeddings[name.removeprefix(_BUNDLE).partition(".")[0]] = None
        elif found := _layer_and_kind(name, shape) or _of_more(name, more):
            kinds.setdefault(found[0], set()).add(found[1])
        else:
            rest.append(name)
    if not kinds and not any(name.startswith(KOHYA_PREFIXES) for name in rest):
        return None
    unknown = [name for name in rest if not _belongs(name, kinds)]
    counted = Counter(map(_first, kinds.values()))
    layers = dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))
    decomposed = any("dora" in found for found in kinds.values() if found & set(_WITH_DORA))
    naming = naming_of(names)
    made_by = _made_by(metadata or {}) or _lycoris(layers, naming, decomposed=decomposed)
    return AdapterContents(naming, layers, tuple(embeddings), tuple(unknown), decomposed, made_by)


def layers_of(
    names: Mapping[str, tuple[int, ...]], *, more: Mapping[str, Collection[str]] = MappingProxyType({})
) -> dict[str, dict[str, tuple[int, ...]]]:
    """The layers of an adapter file in whatever naming: by their names there, the shapes of their tensors by the names
    behind the layer's. Embeddings and the tables that a VeRA shares are no layers."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    rest: list[str] = []
    for name, shape in names.items():
        if name.startswith(KOHYA_PREFIXES):
            layer, _, end = name.partition(".")
        elif marked := _layer_and_kind(name, shape) or _of_more(name, more):
            layer = marked[0]
            end = name.removeprefix(layer).lstrip("._")
        else:
            rest.append(name)
            continue
        found.setdefault(layer, {})[end] = shape
    for name in rest:
        layer, _, end = name.rpartition(".")
        if layer in found:
            found[layer][end] = names[name]
    return found


def kind_of_layer(tensors: Mapping[str, tuple[int, ...]], *, more: Mapping[str, Collection[str]]) -> str:
    """The kind of a layer, from the names behind its own and their shapes; "" for none that is known."""
    found = [_layer_and_kind(f".{end}", shape) or _of_more(f".{end}", more) for end, shape in tensors.items()]
    kinds = {kind for _, kind in filter(None, found)}
    return _first(kinds) if kinds else ""


def _first(kinds: Collection[str]) -> str:
    """The kind that counts, of those whose tensors a layer has."""
    return min(kinds, key=lambda kind: (_ORDER.index(kind) if kind in _ORDER else len(_ORDER), kind))


def _of_more(name: str, more: Mapping[str, Collection[str]]) -> tuple[str, str] | None:
    """The same as `_layer_and_kind` for kinds that are not in `_KINDS`."""
    for kind, ends in more.items():
        for end in ends:
            if name.endswith(f".{end}") and kind not in _KINDS:
                return name.removesuffix(f".{end}"), kind
    return None


def is_of_embedding(name: str) -> bool:
    """Whether a tensor is of an embedding that lies beside an adapter."""
    return name.startswith(_BUNDLE)


def naming_of(names: Iterable[str]) -> Naming | None:
    """The naming of these tensors; None if they are of no known adapter."""
    names = [name for name in names if not is_of_embedding(name)]
    if any(name.startswith(KOHYA_PREFIXES) for name in names):
        return "kohya"
    marked = [name for name in names if _layer_and_kind(name, ())]
    if any(name.startswith(_ONETRAINER) or _ORIGINAL_UNET.match(name) for name in marked):
        return "OneTrainer"
    if any(name.startswith(_COMFYUI) for name in marked):
        return "ComfyUI"
    if any(name.startswith(_PEFT) for name in marked) or any(
        re.search(r"\.lora_[AB](?:\.|\Z)", name) and not name.startswith(_DIFFUSERS_PARTS) for name in marked
    ):
        return "PEFT"
    if any(name.startswith(_DIFFUSERS_PARTS) for name in marked):
        return "diffusers"
    pairs = (_layer_and_kind(name, ()) for name in marked)
    return "diffusers" if any(found and found[1] == "lora" for found in pairs) else None


def _layer_and_kind(name: str, shape: tuple[int, ...]) -> tuple[str, str] | None:
    """The layer that a tensor belongs to, and the kind that its name is of."""
    if old := _OLD_LORA.fullmatch(name):
        return old["path"], "lora"
    match = _END.search(name)
    if match is None or match.lastgroup is None:
        return None
    # LyCORIS calls both oft_blocks; those of BOFT have an axis for its stages
    stages = match.lastgroup == "oft" and name.endswith("oft_blocks") and len(shape) == 4
    return name[: match.start()], "boft" if stages else match.lastgroup


def _belongs(name: str, layers: Mapping[str, object]) -> bool:
    """Whether a name that marks no kind is a part of one of these layers, or of all."""
    layer, _, end = name.rpartition(".")
    return (end in _SHARED and layer in layers) or end in _VERA_TABLES


def _made_by(metadata: Mapping[str, str]) -> str:
    """The options by which LyCORIS made the file, if its metadata has them."""
    module, text = metadata.get("ss_network_module", ""), metadata.get("ss_network_args", "{}")
    if not re.fullmatch(r"lycoris\.[\w.]+", module) or len(text) > _LONGEST_ARGUMENTS:
        return ""
    words = [f"--network_module {module}"]
    for option in ("network_dim", "network_alpha"):
        if re.fullmatch(r"[\d.e+-]+", value := metadata.get(f"ss_{option}", "")):
            words.append(f"--{option} {value}")
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = {}
    if isinstance(arguments, dict) and arguments:
        words += ["--network_args", *(f"{name}={value}" for name, value in arguments.items())]
    return " ".join(words)


def _lycoris(layers: Mapping[str, int], naming: Naming | None, *, decomposed: bool) -> str:
    """The LyCORIS arguments that make such a network; "" if it cannot: its files have kohya's names."""
    arguments = [_KINDS[kind].lycoris if kind in _KINDS else "" for kind in layers] + ["dora_wd=True"] * decomposed
    algorithms = [words for words in arguments if words.startswith("algo=")]
    if naming != "kohya" or not all(arguments) or len(algorithms) > 1 or layers.keys() == {"lora"}:
        return ""
    more = [words for words in arguments if words not in algorithms]
    return " ".join(["--network_module lycoris.kohya --network_args", *(algorithms or ["algo=lora"]), *more])


def short_title(kind: str) -> str:
    """A kind's name without its article, for messages."""
    return _SHORT.get(kind) or (_KINDS[kind].title.split(" ", 1)[1] if kind in _KINDS else kind)
