"""Other programs' names for the tensors of an adapter, turned into kohya's, and back.

Five ways to write `W x + alpha / r * up(down(x))` occur in files for Stable Diffusion:

* kohya: `lora_unet_down_blocks_0_….lora_down.weight`, `.lora_up.weight`, `.alpha`;
* PEFT: `base_model.model.down_blocks.0.….lora_A.weight`, `.lora_B.weight`; alpha in `adapter_config.json` beside;
* diffusers: `unet.….lora.down.weight`, or PEFT's ends behind `unet.`; older files name the attention's processor
  (`….attn1.processor.to_q_lora.down.weight`). alpha, if any, in the file's metadata under `lora_adapter_metadata`;
* OneTrainer: kohya's ends and alpha behind `lora_unet.`, `lora_te1.` and the path with its dots, or, as its newer files
  have it, behind `unet.input_blocks.1.1.…`, `clip_l.`, `clip_g.`: the UNet's layers have their original names then;
* ComfyUI: the original names behind `diffusion_model.` and `text_encoders.clip_l.transformer.`, mostly without alpha.

Nothing here needs the model: names of Stable Diffusion's layers are the same in all of them but for dots, and the
original names of a UNet's layers. SDXL's UNet has those in kohya's files as well. Where a file does not tell that it is
for SDXL, that is settled when the model is known (`sites.in_names_of`).

FLUX's transformers and Chroma's have their original names in kohya's and ComfyUI's files, with query, key and value as
one layer, and diffusers' names behind `transformer.` in those of diffusers and ai-toolkit. FLUX.1 and FLUX.2 have the
same names in kohya's files, and of some of these layers different ones in diffusers': there a layer's sizes tell.
Stable Diffusion 3's are like FLUX's, and its last norms have their rows in another order in diffusers.
Anima's has its original names everywhere: kohya's are flat, and those of diffusers, too, are ComfyUI's,
`diffusion_model.blocks.0.self_attn.q_proj.lora_A.weight`. Z-Image's has diffusers' names in all of them; files that
were made on its original layout have query, key and value as one layer, which becomes three where it is read.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from library.errors import UserError
from library.files.json_text import Config, parse_json
from library.models.checkpoints import anima_names, flux2_names, flux_names, z_image_names
from library.models.checkpoints.adapter_file import KOHYA_OFT, KOHYA_PREFIXES, WrittenNaming
from library.models.checkpoints.checkpoint import original_unet_name, unet_name
from library.models.checkpoints.sd3 import names as sd3_names
from networks import kinds
from networks.formats import forms
from networks.formats.fused import PLAIN, can_fuse, fuse_pairs, split_pair
from networks.load_report import by_module
from networks.magnitude import DORA_SCALE

CONFIG_KEY = "lora_adapter_metadata"  # of diffusers, in a file's metadata
_WITHOUT_CONFIG = ("diffusion_model", "text_encoders")  # beginnings of the names of Anima and Z-Image

# (ending, what it is in kohya's files); PEFT may put the adapter's name before "weight" or behind the name
_ENDINGS = (
    (re.compile(r"\.lora_down\.weight"), "lora_down.weight"),
    (re.compile(r"\.lora_up\.weight"), "lora_up.weight"),
    (re.compile(r"\.lora_A(?:\.\w+)?\.weight"), "lora_down.weight"),
    (re.compile(r"\.lora_B(?:\.\w+)?\.weight"), "lora_up.weight"),
    (re.compile(r"(?:\.lora|\.lora_linear_layer|_lora)\.down\.weight"), "lora_down.weight"),
    (re.compile(r"(?:\.lora|\.lora_linear_layer|_lora)\.up\.weight"), "lora_up.weight"),
    (re.compile(r"\.lora_A(?:\.(?!bias)\w+)?"), "lora_down.weight"),  # of AdaLoRA
    (re.compile(r"\.lora_B(?:\.(?!bias)\w+)?"), "lora_up.weight"),
    (re.compile(r"\.lora_E(?:\.\w+)?"), forms.SINGULAR_VALUES),
    (re.compile(r"\.lora_magnitude_vector(?:\.\w+)*"), forms.MAGNITUDES),
    (re.compile(r"\.ia3_l(?:\.\w+)?"), forms.IA3),
)
_OWN_ENDING = re.compile(r"\.((?:hada|lokr)_\w+?)\.\w+")  # PEFT's, with the adapter's name behind
_OF_SEVERAL = ("alpha", "dora_scale", "rescale", "on_input")  # ends of names that no one kind has
_WRAPPER = "base_model.model."
# How the names of a part's tensors begin, by the program that writes them
_PARTS = {
    "transformer.": "transformer",
    "unet.": "unet", "text_encoder.": "text_encoder", "text_encoder_2.": "text_encoder_2",
    "lora_unet.": "unet", "lora_te.": "text_encoder", "lora_te1.": "text_encoder", "lora_te2.": "text_encoder_2",
    "clip_l.": "text_encoder", "clip_g.": "text_encoder_2", "diffusion_model.": "unet",
    "text_encoders.clip_l.transformer.": "text_encoder", "text_encoders.clip_h.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2", anima_names.DOTTED_TEXT: "text_encoder",
}  # fmt: skip
_OF_SDXL = "lora_te1."  # a prefix that OneTrainer has for SDXL only
_UNET_PATH = re.compile(r"(?:down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding)\b.*")
_LAYERS_PER_BLOCK = 2  # of SDXL's UNet
_FLUX_PATH = re.compile(r"(?:double|single)_blocks\.\d+\..*")
_SD3_PATH = re.compile(r"joint_blocks\.\d+\..*")
_ANIMA_PATH = re.compile(r"blocks\.\d+\.(?:self_attn|cross_attn|mlp|adaln_modulation_\w+)\..*")
_Z_IMAGE_PATH = re.compile(
    r"(?:layers|noise_refiner|context_refiner)\.\d+\.(?:attention|feed_forward|adaLN_modulation)\..*"
)
_ONLY_ANIMA = re.compile(r"transformer_blocks\.\d+\.(?:attn[12]|norm[123]\.linear_[12])\b.*")
_QWEN_PATH = re.compile(r"layers\.\d+\..*")
# The words of paths that have underscores of their own
_WORDS = re.compile(
    r"(?:input|output|down|up|transformer)_blocks|(?:middle|mid)_block|(?:in|out|emb)_layers|skip_connection|"
    r"time_emb_proj|conv_(?:shortcut|in|out)|proj_(?:in|out)|to_(?:q|k|v|out)|text_model|self_attn|(?:q|k|v|out)_proj|"
    r"[a-z0-9]+"
)
_ONLY_SDXL = re.compile(r"\.transformer_blocks\.[1-9]")  # of the others, each attention has but one
_PROJECTION = "text_projection"  # of SDXL's second text encoder, which OneTrainer adapts
_TEXT_PATH = re.compile(r"(?:text_model\.)?(?:encoder|embeddings|final_layer_norm)\b.*")
# the attention layers of a text encoder in the oldest files are called as a UNet's
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True)
class _Place:
    """The layer that a tensor belongs to: part "unet", "transformer", "text_encoder" or "text_encoder_2" and the path
    below it, in diffusers' names and without "text_model."; original names of transformers stay where ComfyUI has
    them."""

    part: str
    path: str


def to_kohya(tensors: Mapping[str, Tensor], *, config: Config | None = None, source: str) -> dict[str, Tensor]:
    """The tensors of another program's file under kohya's names, in LyCORIS' forms, each layer of a kind that has an
    alpha with one.

    `config`: what stands beside the tensors about their scale: PEFT's adapter_config.json, or the content of diffusers'
    `lora_adapter_metadata`. Without one alpha is the rank, as both programs have it. Raises UserError for a tensor
    that is read in no kind of adapter, because the others alone would act differently.
    """
    found: dict[_Place, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        place, end = _read(key, source)
        if found.setdefault(place, {}).setdefault(end, tensor) is not tensor:
            raise UserError(f"{source}: two tensors for one layer's {end}; the second is {key}")
    xl = any(place.part == "text_encoder_2" or _ONLY_SDXL.search(place.path) for place in found)
    xl = xl or any(key.startswith(_OF_SDXL) for key in tensors)
    several = xl or any(place.part == "transformer" for place in found)
    shapes = {place.path: _shapes(own) for place, own in found.items() if place.part == "transformer"}
    sd3 = sd3_names.is_sd3(shapes)
    anima = not sd3 and any(_ONLY_ANIMA.fullmatch(place.path) for place in found)
    converted: dict[str, Tensor] = {}
    for place, own in found.items():
        if anima and place.part == "transformer":
            place = _Place("transformer", anima_names.original_name(place.path))
        if place.part == "transformer" and sd3_names.has_halves(place.path, _shapes(own)):
            own = _exchanged(own, where=f"{source}: {place.path}")
        settings = _settings(config or {}, place, source)
        own = forms.to_lycoris(own, settings, where=f"{source}: {place.part}.{place.path}", path=place.path)
        name = _kohya_name(place, xl=xl, several=several, sd3=sd3)
        converted |= {f"{name}.{end}": tensor for end, tensor in own.items()}
    return _in_own_layers(converted)


def _shapes(own: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in own.values()]


def _exchanged(own: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """A pair, or DoRA of rows, on a layer whose rows have their halves in the other order. Raises UserError for another
    kind, whose tensors have no rows of their own."""
    rows, others = {"lora_up.weight", DORA_SCALE, forms.MAGNITUDES}, {"lora_down.weight", "alpha"}
    if other := own.keys() - rows - others:
        raise UserError(
            f"{where}.{min(other)}: the halves of this layer's rows are exchanged in files with other names"
        )
    return {end: tensor.roll(len(tensor) // 2, 0) if end in rows else tensor for end, tensor in own.items()}


def from_kohya(tensors: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """The tensors of a file in kohya's names with LyCORIS' prefixes and forms: kohya's networks.oft has a prefix of its
    own. Raises UserError for one of its layers with the constraint 0, which LyCORIS takes for none."""
    found: dict[str, Tensor] = {}
    for name, own in by_module(tensors).items():
        ours = name
        if name.startswith(KOHYA_OFT):
            ours = "lora_unet_" + name.removeprefix(KOHYA_OFT)
            alpha = own.get("alpha")
            if alpha is not None and not alpha.is_meta and float(alpha) == 0:
                raise UserError(f"{source}: {name}.alpha is 0: kohya's networks.oft allows this layer no rotation then")
        found |= {f"{ours}.{end}": tensor for end, tensor in forms.flat(own).items()}
    return _in_own_layers(found)


def _in_own_layers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layers of Z-Image's original layout as those of diffusers, which its adapters have: the pair of query, key and
    value as three. Another kind of adapter on these three together stays as it is."""
    found: dict[str, Tensor] = {}
    for name, own in by_module(tensors).items():
        names, apart = z_image_names.in_layers_of_their_own(name), [own]
        if len(names) > 1 and can_fuse([own]):
            rows = len(own["lora_up.weight"]) // len(names)
            apart = split_pair(own, [rows] * len(names)) if len(own["lora_up.weight"]) % len(names) == 0 else apart
        names = names if len(names) == len(apart) else [name]
        for place, part in zip(names, apart, strict=True):
            found |= {f"{place}.{end}": tensor for end, tensor in part.items()}
    return found


def _read(key: str, source: str) -> tuple[_Place, str]:
    """Which layer a tensor belongs to, and what it is there, in kohya's words."""
    if reason := forms.why_not_read(key):
        raise UserError(f"{source}: {key}: {reason}")
    for ending, end in _ENDINGS:
        match = ending.search(key)
        if match and match.end() == len(key):
            return _place(key[: match.start()], key, source, old=match[0].startswith("_lora")), end
    ends = {*_OF_SEVERAL, *(name for names in kinds.tensor_names().values() for name in names)}
    plain = key.removesuffix(match[0]) + f".{match[1]}" if (match := _OWN_ENDING.search(key)) else key
    for end in sorted(ends, key=len, reverse=True):
        if plain.endswith(f".{end}"):
            return _place(plain.removesuffix(f".{end}"), key, source, old=False), end
    raise UserError(f"{source}: {key}: no kind of adapter here reads it")


def _place(path: str, key: str, source: str, *, old: bool) -> _Place:
    prefix = next((prefix for prefix in _PARTS if path.startswith(prefix)), "")
    part = _PARTS.get(prefix)
    path = path.removeprefix(prefix).removeprefix(_WRAPPER).replace(".processor.", ".")
    originals = (_FLUX_PATH, _SD3_PATH, _ANIMA_PATH)
    if part in ("unet", None) and any(pattern.fullmatch(path) for pattern in originals):
        return _Place("transformer", path)
    if part in ("unet", "transformer", None) and _Z_IMAGE_PATH.fullmatch(path):
        return _Place("transformer", path)
    known = (_name_in_flux, sd3_names.original_name, anima_names.original_name)
    if part in ("transformer", None) and any(name(path) != path for name in known):
        return _Place("transformer", path)
    if part in ("unet", None):  # original names of a UNet's layers, which are no one else's, become diffusers'
        path = unet_name(f"{path}.weight", layers_per_block=_LAYERS_PER_BLOCK).removesuffix(".weight")
    if part is None:
        part = "unet" if _UNET_PATH.fullmatch(path) else "text_encoder" if _TEXT_PATH.fullmatch(path) else None
    if part in ("transformer", None):
        raise UserError(f"{source}: {key} names neither a UNet's layer nor a text encoder's")
    if part == "unet":
        if old and path.endswith(".to_out"):
            path += ".0"
        return _Place(part, path)
    above, dot, last = path.removeprefix("text_model.").rpartition(".")
    return _Place(part, f"{above}{dot}{_OLD_TEXT.get(last, last)}")


def _name_in_flux(path: str) -> str:
    """The original name of a layer of FLUX.1 or FLUX.2, or of a member of one: no path of either is another of the
    other's. Another path stays as it is."""
    name = flux_names.original_name(path)
    return flux2_names.original_name(path) if name == path else name


def _kohya_name(place: _Place, *, xl: bool, several: bool, sd3: bool) -> str:
    """xl, sd3: of SDXL or Stable Diffusion 3. several: the model has more than one text encoder."""
    if place.part == "transformer":
        name = sd3_names.original_name if sd3 else _name_in_flux
        return "lora_unet_" + name(place.path).replace(".", "_")
    if place.part == "unet":
        block = re.match(r"(?:down_blocks|mid_block|up_blocks)\.", place.path)
        path = original_unet_name(place.path, layers_per_block=_LAYERS_PER_BLOCK) if xl and block else place.path
        return "lora_unet_" + path.replace(".", "_")
    if _QWEN_PATH.fullmatch(place.path):
        return "lora_te_" + place.path.replace(".", "_")
    number = {"text_encoder": "1" if several else "", "text_encoder_2": "2"}[place.part]
    above = "" if place.path == _PROJECTION else "text_model_"  # it lies beside the text model
    return f"lora_te{number}_{above}" + place.path.replace(".", "_")


_MOVED_BASE = ("pissa", "olora", "corda", "lora_ga")  # beginnings of PEFT's words for it


def _settings(config: Config, place: _Place, source: str) -> forms.Settings:
    """What a configuration of diffusers or PEFT says about a layer; without one all is None. Raises UserError."""
    for key, value in config.items():
        if key.rpartition(".")[2] == "init_lora_weights" and str(value).startswith(_MOVED_BASE):
            raise UserError(
                f"{source}: with {key} {value} PEFT took the first values out of the base, which this file alone does "
                "not say; save it with path_initial_model_for_weight_conversion"
            )
    try:
        # diffusers keeps one configuration a part in one table, "unet.lora_alpha"; PEFT's file has one only
        own = {key.removeprefix(f"{place.part}."): value for key, value in config.items()}
        alpha = own.get("lora_alpha", own.get("alpha"))
        rank = own.get("r")
        for pattern, value in (own.get("alpha_pattern") or {}).items():
            if _is_meant(pattern, place):
                alpha = value
                break  # PEFT takes the first that matches
        for pattern, value in (own.get("rank_pattern") or {}).items():
            if not isinstance(value, list) and _is_meant(pattern, place):
                rank = value
                break
        return forms.Settings(
            alpha=None if alpha is None else float(alpha),
            rank=None if rank is None else float(rank),
            first_rank=None if own.get("init_r") is None else float(own["init_r"]),
            by_root=bool(own.get("use_rslora")),
        )
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise UserError(f"{source}: its LoRA configuration cannot be read: {error}") from error


def _is_meant(pattern: str, place: _Place) -> bool:
    return bool(re.fullmatch(rf"(?:.*\.)?(?:{pattern.removeprefix('text_model.')})", place.path))


def in_names_of(
    tensors: Mapping[str, Tensor], naming: WrittenNaming, *, source: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in kohya's names under those of `naming`, and the metadata that go with them. Raises UserError for what
    has no such names."""
    if naming == "kohya":
        return _with_fused_layers(tensors), {}
    converted = to_diffusers(tensors, source=source)
    config = _diffusers_config(converted)
    return converted, {CONFIG_KEY: json.dumps(config, sort_keys=True)} if config else {}


def _with_fused_layers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layers of FLUX.1 and Stable Diffusion 3 that are one in kohya's files as one; those that have no low-rank pair
    stay by themselves."""
    modules, prefix = by_module(tensors), "lora_unet_"
    flat = [name.removeprefix(prefix) for name in modules]
    groups = dict(filter(None, (flux_names.group_of(name) or sd3_names.group_of(name) for name in flat)))
    for fused, members in groups.items():
        own = {prefix + key: modules.get(prefix + key, {}) for key in members}
        if not can_fuse(list(own.values())):
            continue
        sizes = zip(own.values(), members.values(), strict=True)
        width = next(len(pair["lora_up.weight"]) // member.rows for pair, member in sizes if pair)
        pair = fuse_pairs(list(own.values()), [width * member.rows for member in members.values()])
        modules = {name: other for name, other in modules.items() if name not in own} | {prefix + fused: pair}
    return {f"{name}.{end}": tensor for name, own in modules.items() for end, tensor in own.items()}


def to_diffusers(tensors: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """The tensors of a kohya file under diffusers' names, `unet.….lora_A.weight`, for FLUX and Stable Diffusion 3
    `transformer.…` or for Anima and Z-Image `diffusion_model.…`, as `load_lora_weights` takes them.

    These names have none for alpha, so the scale goes into lora_B: exactly if alpha / rank is a power of two, else
    rounded once. Whoever ignores the file's `lora_adapter_metadata` scales it as it should be, too. Raises UserError
    for a file that holds more than low-rank pairs and DoRA's norms of rows. Z-Image's other kinds have their own ends
    behind these names: so ComfyUI reads them, which finds no attention layer of Z-Image under kohya's names.
    """
    converted: dict[str, Tensor] = {}
    for name, own in by_module(tensors).items():
        if own.keys() - PLAIN and (dotted := z_image_names.dotted_name(name)):
            converted |= {f"{dotted}.{end}": tensor for end, tensor in own.items()}
            continue
        if other := own.keys() - PLAIN - {DORA_SCALE}:
            raise UserError(
                f"{source}: {name}.{min(other)} has no name in diffusers, which knows plain LoRA and DoRA of rows alone"
            )
        if lacking := {"lora_down.weight", "lora_up.weight"} - own.keys():
            raise UserError(f"{source}: {name} has no {min(lacking)}")
        for place, one in _by_diffusers_path(name, own, source=source).items():
            path = place.removeprefix("transformer.")
            if path != place and sd3_names.has_halves(path, _shapes(one)):
                one = _exchanged(one, where=f"{source}: {name}")
            down, up = one["lora_down.weight"], one["lora_up.weight"]
            scale = float(one["alpha"]) / len(down) if "alpha" in one else 1.0
            converted |= {f"{place}.lora_A.weight": down, f"{place}.lora_B.weight": (up.float() * scale).to(up.dtype)}
            if DORA_SCALE in one:
                # transformers, which loads text encoders, wants the ".weight"; PEFT takes the name with and without it
                converted[f"{place}.lora_magnitude_vector.weight"] = forms.magnitudes(one, where=f"{source}: {name}")
    return converted


def _by_diffusers_path(name: str, own: dict[str, Tensor], *, source: str) -> dict[str, dict[str, Tensor]]:
    """The layers that a kohya layer is there: several, of one that is fused."""
    flat, rows, columns = name.removeprefix("lora_unet_"), len(own["lora_up.weight"]), own["lora_down.weight"].shape[1]
    of_flux = flux2_names if flux2_names.is_of_flux2(flat, rows, columns) else flux_names
    members = (of_flux.members_of(flat) or sd3_names.members_of(flat)) if flat != name else ()
    if not members:
        return {_diffusers_path(name, source=source): own}
    if len(members) == 1:
        return {f"transformer.{members[0].path}": own}
    whole, parts = len(own["lora_up.weight"]), sum(member.rows for member in members)
    if whole % parts or DORA_SCALE in own:
        what = f"{whole} rows are not those of {parts} equal parts" if whole % parts else "its dora_scale is of several"
        raise UserError(f"{source}: {name}: {what}")
    pairs = split_pair(own, [whole // parts * member.rows for member in members])
    return {f"transformer.{member.path}": pair for member, pair in zip(members, pairs, strict=True)}


def _diffusers_config(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """The `lora_adapter_metadata` of tensors in diffusers' names: the ranks, with the same alphas. With it versions of
    diffusers that take one rank for the whole file scale one of several ranks as it should be; none of them knows
    Anima."""
    config: dict[str, object] = {}
    parts: dict[str, dict[str, int]] = {}
    for key, tensor in tensors.items():
        if key.endswith(end := ".lora_A.weight"):
            part, _, path = key.removesuffix(end).partition(".")
            parts.setdefault(part, {})[path.removeprefix("text_model.")] = len(tensor)  # transformers 5 has it no more
    for part, ranks in parts.items():
        if part in _WITHOUT_CONFIG:
            continue
        usual = Counter(ranks.values()).most_common(1)[0][0]
        others = {path: rank for path, rank in ranks.items() if rank != usual}
        own = {"r": usual, "lora_alpha": usual, "rank_pattern": others, "alpha_pattern": others}
        own |= {"target_modules": sorted(ranks), "peft_type": "LORA"}
        own["use_dora"] = any(key.startswith(f"{part}.") and "lora_magnitude_vector" in key for key in tensors)
        config |= {f"{part}.{key}": value for key, value in own.items()}
    return config


def _diffusers_path(name: str, *, source: str) -> str:
    """Of a layer of another model than FLUX.

    For example lora_unet_input_blocks_4_1_proj_in → unet.down_blocks.1.attentions.0.proj_in. Raises UserError."""
    if dotted := anima_names.dotted_name(name) or z_image_names.dotted_name(name):
        return dotted
    parts = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder"}
    for prefix, part in {**parts, "lora_te2_": "text_encoder_2"}.items():
        if name.startswith(prefix):
            path = ".".join(_WORDS.findall(name.removeprefix(prefix)))
            if re.match(r"(?:input_blocks|middle_block|output_blocks)\.", path):
                path = unet_name(f"{path}.weight", layers_per_block=_LAYERS_PER_BLOCK).removesuffix(".weight")
            return f"{part}.{path}"
    raise UserError(f"{source}: {name} is not one of kohya's names, which begin with {', '.join(KOHYA_PREFIXES)}")


def read_config(text: str, where: str) -> dict[str, Any]:
    """A LoRA configuration in JSON."""
    config = parse_json(text, where)
    if not isinstance(config, dict):
        raise UserError(f"{where}: is not a table of settings")
    return config
