"""Which of a file's layers other programs find, and what they make of them: their rules as tables.

Read at ComfyUI 2025-10 (Z-Image: 2025-12, FLUX.2: 2026), A1111 1.10, Forge 2025-06, diffusers 0.39 (of transformers:
0.42), kohya's sd-scripts 0.11 and LyCORIS 4.1, for Stable Diffusion 1.x to 3.5, FLUX.1, FLUX.2 klein, Chroma, Anima
and Z-Image. A program finds a layer if it knows the naming, the place in the model and the kind; some reject a whole
file for one layer. Names and shapes are enough, so a file's header is. Imports no torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple, get_args

from library.models.checkpoints import anima_names, z_image_names
from library.models.checkpoints.adapter_file import (
    KOHYA_OFT,
    Naming,
    is_of_embedding,
    kind_of_layer,
    layers_of,
    naming_of,
)

Program = Literal["ComfyUI", "A1111", "Forge", "diffusers", "kohya", "LyCORIS"]
PROGRAMS: tuple[Program, ...] = get_args(Program)
Shapes = Mapping[str, tuple[int, ...]]

_WITH_DORA = ("loha", "lokr")  # kinds that may have a dora_scale as well
_AXES_OF_A_KERNEL = 4
_FORGE_PUTS_UP_WITH = 12  # tensors that it does not know; with more it rejects the file


class Rule(NamedTuple):
    """loads: whether a layer has an effect. note: why not, how it acts otherwise than in training, or what loads it.
    as_trained: whether it acts as in training. breaks: whether the program rejects the whole file for such a layer."""

    loads: bool
    note: str = ""
    as_trained: bool = True
    breaks: bool = False


def _otherwise(note: str) -> Rule:
    return Rule(True, note, as_trained=False)


def _not(note: str) -> Rule:
    return Rule(False, note, as_trained=False)


def _breaks(note: str) -> Rule:
    return Rule(False, note, as_trained=False, breaks=True)


def _kohya(module: str) -> Rule:
    return Rule(True, f"by networks.{module}")


_YES = Rule(True)
_NO, _RAISES = _not("it does not know this kind"), _breaks("it does not know this kind")
_PLAIN = _otherwise("as plain LoRA: dora_scale is ignored")
_NORM_OF_W = _otherwise("dora_scale is compared with the norm of W without the adapter")
_ONE_AXIS = _otherwise("dora_scale without its second axis: a wrong change, or none")
_NOT_FLAT = "hada_w1_b of a convolution has four axes, and has to be flat"


def _rules(**given: Rule) -> Mapping[Program, Rule]:
    """A row of the table. Where nothing is given, ComfyUI, Forge and kohya ignore such layers, and the others raise."""
    usual: dict[Program, Rule] = {
        "ComfyUI": _NO, "A1111": _RAISES, "Forge": _NO, "diffusers": _RAISES, "kohya": _NO, "LyCORIS": _RAISES
    }  # fmt: skip
    return {program: given.get(program, rule) for program, rule in usual.items()}


# By the forms that `_form` tells apart. A layer of LoHa or LoKr with a dora_scale follows its own row and DoRA's.
_FORMS: Mapping[str, Mapping[Program, Rule]] = {
    "lora": _rules(ComfyUI=_YES, A1111=_YES, Forge=_YES, diffusers=_YES, kohya=_YES, LyCORIS=_YES),
    "tucker": _rules(
        ComfyUI=_YES, A1111=_YES, Forge=_YES, kohya=_otherwise("the core lora_mid is ignored: a wrong change"),
        LyCORIS=_YES,
    ),
    "dora of rows": _rules(
        ComfyUI=_NORM_OF_W, A1111=_otherwise("dora_scale of rows is compared with norms of input channels"),
        Forge=_NORM_OF_W, diffusers=_PLAIN, kohya=_PLAIN, LyCORIS=_YES,
    ),
    "dora of input channels": _rules(
        ComfyUI=_YES, A1111=_YES, Forge=_YES, diffusers=_PLAIN, kohya=_PLAIN,
        LyCORIS=_breaks("it wants dora_scale of rows"),
    ),
    "dora of one axis": _rules(
        ComfyUI=_ONE_AXIS, A1111=_ONE_AXIS, Forge=_ONE_AXIS, diffusers=_PLAIN, kohya=_PLAIN,
        LyCORIS=_breaks("dora_scale without its second axis"),
    ),
    "dora of PEFT": _rules(
        ComfyUI=_otherwise("as plain LoRA: lora_magnitude_vector is ignored"),
        Forge=_otherwise("as plain LoRA: lora_magnitude_vector is ignored"), diffusers=_YES,
    ),
    "dora of PEFT, text encoder": _rules(
        ComfyUI=_otherwise("as plain LoRA: lora_magnitude_vector is ignored"),
        Forge=_otherwise("as plain LoRA: lora_magnitude_vector is ignored"),
        diffusers=_otherwise("of text encoders it reads lora_magnitude_vector.weight only"),
    ),
    "loha": _rules(ComfyUI=_YES, A1111=_YES, Forge=_YES, kohya=_kohya("loha"), LyCORIS=_YES),
    "loha of four axes": _rules(
        ComfyUI=_not(_NOT_FLAT), A1111=_YES, Forge=_not(_NOT_FLAT), kohya=_not(_NOT_FLAT), LyCORIS=_breaks(_NOT_FLAT)
    ),
    "lokr": _rules(ComfyUI=_YES, A1111=_YES, Forge=_YES, kohya=_kohya("lokr"), LyCORIS=_YES),
    "lokr with a core": _rules(
        ComfyUI=_YES, A1111=_YES, Forge=_YES, kohya=_kohya("lokr"),
        LyCORIS=_breaks("it takes the rank of lokr_t2 from another axis"),
    ),
    "oft": _rules(ComfyUI=_YES, A1111=_YES, LyCORIS=_YES),
    "oft with rescale": _rules(ComfyUI=_otherwise("rescale is ignored"), A1111=_YES, LyCORIS=_YES),
    "oft of few blocks": _rules(
        ComfyUI=_YES, A1111=_YES, LyCORIS=_breaks("it wants no block to be larger than their number")
    ),
    "oft of kohya": _rules(A1111=_YES, kohya=_kohya("oft"), LyCORIS=_not("the prefix is kohya's, oft_unet_")),
    "boft": _rules(ComfyUI=_YES, A1111=_YES, LyCORIS=_YES),
    "boft without alpha": _rules(ComfyUI=_not("no alpha"), A1111=_YES),
    "glora": _rules(ComfyUI=_YES, A1111=_otherwise("it reads the older form alone"), Forge=_YES, LyCORIS=_YES),
    "ia3": _rules(A1111=_YES, LyCORIS=_breaks("its loader fails on on_input")),
    "ia3 of a convolution": _rules(
        A1111=_otherwise("of a convolution, w is taken for the input's"),
        LyCORIS=_breaks("its loader fails on on_input"),
    ),
    "full": _rules(ComfyUI=_YES, A1111=_YES, Forge=_YES, LyCORIS=_YES),
    "norm": _rules(ComfyUI=_YES, A1111=_YES, Forge=_YES, LyCORIS=_YES),
    "norm without bias": _rules(ComfyUI=_YES, A1111=_breaks("no b_norm"), Forge=_YES, LyCORIS=_YES),
    "tlora": _rules(LyCORIS=_YES),
}  # fmt: skip
_UNKNOWN = _rules()
# Kinds without which LyCORIS' loader fails for want of an alpha; LoKr and the kinds that have none are left
_NEED_ALPHA = ("lora", "tucker", "dora", "loha", "oft", "boft", "glora", "tlora")

# Whose names each program knows
_NAMINGS: Mapping[Program, tuple[Naming, ...]] = {
    "ComfyUI": ("kohya", "diffusers", "ComfyUI"),
    "A1111": ("kohya",),
    "Forge": ("kohya", "diffusers", "ComfyUI"),
    "diffusers": ("kohya", "diffusers"),
    "kohya": ("kohya",),
    "LyCORIS": ("kohya",),
}
_IN_BLOCKS = re.compile(
    r"lora_unet_(?:(?:down|up)_blocks_\d+|mid_block|(?:input|output)_blocks_\d+_\d+|middle_block_\d)_\w+"
)
_OUTSIDE = re.compile(
    r"lora_unet_(?:conv_(?:in|out|norm_out)|(?:time|add)_embedding_linear_[12]|time_embed_[02]|label_emb_0_[02]|out_[02]|"
    r"input_blocks_0_0)"
)
_OF_TEXT = re.compile(r"lora_te[12]?_text_model_encoder_layers_\d+_(?:self_attn_(?:q|k|v|out)_proj|mlp_fc[12])")
_BESIDE_TEXT = re.compile(r"lora_te[12]?_(?:text_model_\w+|text_projection)")
_SGM = re.compile(r"lora_unet_(?:input_blocks|middle_block|output_blocks)_")
_OF_FLUX = re.compile(
    r"lora_unet_(?:double_blocks_\d+_(?:img|txt)_(?:mod_lin|attn_qkv|attn_proj|mlp_[02])|"
    r"single_blocks_\d+_(?:linear[12]|modulation_lin))"
)
_MODULATION = re.compile(r"_(?:mod_lin|modulation_lin)$")
_WITHOUT_FLUX = ("A1111", "LyCORIS")
_SD3 = ("medium", "5-medium", "5-large")  # kohya's words for its base models
_OF_SD3 = re.compile(
    r"lora_unet_(?:joint_blocks_\d+_(?:x|context)_block_(?:attn2?_(?:qkv|proj)|mlp_fc[12]|adaLN_modulation_1)|"
    r"context_embedder|x_embedder_proj|[ty]_embedder_mlp_[02]|final_layer_(?:linear|adaLN_modulation_1))"
)
_OF_FLUX2 = re.compile(
    r"lora_unet_(?:double_blocks_\d+_(?:img|txt)_(?:attn_qkv|attn_proj|mlp_[02])|single_blocks_\d+_linear[12])"
)
_OF_ANIMA = re.compile(
    r"lora_unet_blocks_\d+_(?:(?:self|cross)_attn_(?:[qkv]|output)_proj|mlp_layer[12]|"
    r"adaln_modulation_(?:self_attn|cross_attn|mlp)_[12])"
)
_WITHOUT_ANIMA = ("A1111", "Forge", "LyCORIS")
# of Z-Image and FLUX.2, and what does instead
_WITHOUT_MUSUBIS = {"A1111": "", "Forge": "", "kohya": "; musubi-tuner does", "LyCORIS": ""}
# ComfyUI's own names of its layers, without dots: of attention none that an adapter of ours has
_OF_Z_IMAGE = re.compile(
    r"lora_unet_(?:layers|noise_refiner|context_refiner)_\d+_"
    r"(?:attention_(?:qkv|out)|feed_forward_w[123]|adaLN_modulation_0)"
)
_PAIR_OF_PEFT = {"lora_A.weight", "lora_B.weight"}
_PAIRS = (_PAIR_OF_PEFT, {"lora_down.weight", "lora_up.weight"})
_DIFFUSERS_UNET = re.compile(r"lora_unet_(?:down_blocks|mid_block|up_blocks)_")


@dataclass(frozen=True)
class Verdict:
    """What a program makes of a file of `total` layers. found: layers that have an effect there. exact: those of them
    that act as trained. notes: what is not so, each with the number of layers, the most frequent first."""

    program: Program
    found: int
    exact: int
    total: int
    notes: tuple[str, ...]


def verdicts(
    shapes: Shapes,
    *,
    version: str = "",
    known: Collection[str] | None = None,
    more: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> list[Verdict]:
    """What each program makes of a file with tensors of these names and shapes.

    version: `ss_base_model_version` of the base model, where it is known. known: the names of the model's layers in
    kohya's files; None: what looks like a layer of Stable Diffusion counts as one. more: as `adapter_file.describe`.
    """
    layers = layers_of(shapes, more=more)
    naming = naming_of(shapes)
    bundled = any(map(is_of_embedding, shapes))
    found = []
    for program in PROGRAMS:
        rules = [
            _rule(program, naming, name, own, version=version, known=known, more=more) for name, own in layers.items()
        ]
        if bundled and program == "diffusers":
            rules = [_breaks("embeddings beside the layers")] * len(rules)
        unknown = sum(len(own) for own, rule in zip(layers.values(), rules, strict=True) if not rule.loads)
        found.append(_verdict(program, rules, unknown=unknown))
    return found


def _verdict(program: Program, rules: Sequence[Rule], *, unknown: int) -> Verdict:
    """`unknown`: tensors of the layers that are not found."""
    total, loads = len(rules), sum(rule.loads for rule in rules)
    if breaking := next((rule for rule in rules if rule.breaks), None):
        count = sum(rule == breaking for rule in rules)
        whole = "" if count == total else f"; it rejects the whole file for {count} such layers"
        return Verdict(program, 0, 0, total, (breaking.note + whole,))
    notes = Counter(rule.note for rule in rules if rule.note)
    lines = [f"{count} layers: {note}" if count < total else note for note, count in notes.most_common()]
    if program == "Forge" and loads and unknown > _FORGE_PUTS_UP_WITH:
        lines.append(f"it rejects the whole file for {unknown} tensors that it does not know")
        return Verdict(program, 0, 0, total, tuple(lines))
    return Verdict(program, loads, sum(rule.loads and rule.as_trained for rule in rules), total, tuple(lines))


def _rule(
    program: Program,
    naming: Naming | None,
    name: str,
    own: Shapes,
    *,
    version: str,
    known: Collection[str] | None,
    more: Mapping[str, Collection[str]],
) -> Rule:
    """The rule for one layer: the first that keeps the program from it, else that of its kind."""
    anima, z_image, flux2 = (version.startswith(start) for start in ("anima", "z_image", "flux_2"))
    dotted = (anima or z_image or flux2) and (program, naming) == ("diffusers", "ComfyUI")
    if naming not in _NAMINGS[program] and not dotted:
        return _not(f"names in {naming}'s style" if naming else "names of no known program")
    if flux2:
        place = _place_of_flux2(program, naming, name, own)
    elif version.startswith(("flux", "chroma")):
        place = _place_of_flux(program, naming, name, chroma=version.startswith("chroma"))
    elif version in _SD3:
        place = _place_of_sd3(program, naming, name)
    elif anima:
        place = _place_of_anima(program, naming, name, own)
    elif z_image:
        place = _place_of_z_image(program, naming, name)
    elif naming == "kohya":
        place = _place_of_kohya(program, name, version, known)
    else:
        place = _dotted_place(program, naming, name)
    if place:
        return _not(place)
    if z_image and program == "diffusers" and own.keys() - {"alpha"} not in _PAIRS:
        return _breaks("of Z-Image it knows plain pairs alone")
    kind = kind_of_layer(own, more=more)
    if version in _SD3 and program == "kohya" and kind not in ("lora", "dora"):
        return _NO
    rule = _FORMS.get(_form(kind, name, own), _UNKNOWN)[program]
    if rule.loads and kind in _WITH_DORA and (scale := own.get("dora_scale")) is not None:
        of_dora = _FORMS[_form_of_dora(scale)][program]
        rule = rule if of_dora == _YES else of_dora
    if program == "LyCORIS" and rule.loads and kind in _NEED_ALPHA and "alpha" not in own:
        return _breaks("no alpha")
    return rule


def _form(kind: str, name: str, own: Shapes) -> str:
    """A key of `_FORMS`, as far as it has the kind."""
    if kind == "dora" and "dora_scale" in own:
        return _form_of_dora(own["dora_scale"])
    if kind == "dora":
        text = name.startswith("text_encoder") and "lora_magnitude_vector" in own
        return "dora of PEFT, text encoder" if text else "dora of PEFT"
    if kind == "oft" and name.startswith(KOHYA_OFT):
        return "oft of kohya"
    if kind == "oft" and len(blocks := own.get("oft_blocks", ())) > 1 and blocks[0] < blocks[1]:
        return "oft of few blocks"
    variants = {
        "loha": ("of four axes", len(own.get("hada_w1_b", ())) == _AXES_OF_A_KERNEL),
        "lokr": ("with a core", "lokr_t2" in own),
        "oft": ("with rescale", "rescale" in own),
        "boft": ("without alpha", "alpha" not in own),
        "ia3": ("of a convolution", len(own.get("weight", ())) == _AXES_OF_A_KERNEL),
        "norm": ("without bias", "b_norm" not in own),
    }
    words, is_so = variants.get(kind, ("", False))
    return f"{kind} {words}" if is_so else kind


def _form_of_dora(scale: tuple[int, ...]) -> str:
    """Of a dora_scale: [out, 1, …] is of rows, [1, in, …] of input channels."""
    if len(scale) < 2:
        return "dora of one axis"
    return "dora of input channels" if scale[0] == 1 and scale[1] > 1 else "dora of rows"


def _place_of_kohya(program: Program, name: str, version: str, known: Collection[str] | None) -> str:
    """Why a layer in kohya's names is not found; "" if it is."""
    name = "lora_unet_" + name.removeprefix(KOHYA_OFT) if name.startswith(KOHYA_OFT) else name
    if known is not None and name not in known:
        return "not in this model"
    if known is None and not any(pattern.fullmatch(name) for pattern in (_IN_BLOCKS, _OF_TEXT, _OUTSIDE, _BESIDE_TEXT)):
        return "the name of no layer of Stable Diffusion"
    beside = name.startswith("lora_te") and not _OF_TEXT.fullmatch(name)
    if program in ("ComfyUI", "Forge") and beside and name != "lora_te2_text_projection":
        return "of a text encoder it knows attention and feed-forward layers only"
    if program in ("kohya", "LyCORIS"):
        if version.startswith("sdxl") and _DIFFUSERS_UNET.match(name):
            return "it has the original names of SDXL's UNet (input_blocks)"
        if version.startswith("sd_") and _SGM.match(name):
            return "it has diffusers' names of the UNet (down_blocks)"
    if program == "kohya" and not _IN_BLOCKS.fullmatch(name) and not _OF_TEXT.fullmatch(name):
        return "outside of the blocks that it adapts"
    return ""


def _place_of_flux(program: Program, naming: Naming | None, name: str, *, chroma: bool) -> str:
    """As `_place_of_kohya`, for layers of FLUX.1 and Chroma: query, key and value are one layer in kohya's names."""
    model = "Chroma" if chroma else "FLUX.1"
    if program in _WITHOUT_FLUX:
        return f"it knows no {model}"
    if naming == "kohya" and not (_OF_FLUX.fullmatch(name) or (_OF_TEXT.fullmatch(name) and not chroma)):
        return f"the name of no layer of {model} there, which has query, key and value as one"
    if chroma and naming == "kohya" and _MODULATION.search(name):
        return "the name of no layer of Chroma, which has no modulation in its blocks"
    if chroma and program == "Forge" and naming == "diffusers":
        return "of Chroma it wants kohya's names"
    return ""


def _place_of_sd3(program: Program, naming: Naming | None, name: str) -> str:
    """As `_place_of_kohya`, for layers of Stable Diffusion 3: query, key and value are one layer in kohya's names."""
    if program == "LyCORIS":
        return "it knows no Stable Diffusion 3"
    if program == "A1111":
        return "its reader for Stable Diffusion 3 fails on .alpha behind kohya's names"
    if program == "diffusers" and naming == "kohya":
        return "it wants names that begin with transformer. and text_encoder."
    if program == "Forge" and naming != "kohya":
        return "of Stable Diffusion 3 it knows kohya's names alone"
    if naming == "kohya" and not (_OF_SD3.fullmatch(name) or _OF_TEXT.fullmatch(name)):
        return "the name of no layer of Stable Diffusion 3 there, which has query, key and value as one"
    return ""


def _place_of_flux2(program: Program, naming: Naming | None, name: str, own: Shapes) -> str:
    """As `_place_of_kohya`, for layers of FLUX.2."""
    if (instead := _WITHOUT_MUSUBIS.get(program)) is not None:
        return f"it knows no FLUX.2{instead}"
    if naming == "kohya" and not _OF_FLUX2.fullmatch(name):
        return "the name of no layer of FLUX.2 there, which has query, key and value as one"
    if (program, naming) == ("diffusers", "ComfyUI") and "alpha" in own:
        return "behind diffusion_model. it wants no alpha"
    return ""


def _place_of_anima(program: Program, naming: Naming | None, name: str, own: Shapes) -> str:
    """As `_place_of_kohya`, for layers of Anima."""
    text = name.startswith(("lora_te", "text_encoder"))
    if program in _WITHOUT_ANIMA:
        return "it knows no Anima"
    if naming == "kohya" and not text and not _OF_ANIMA.fullmatch(name):
        return "the name of no layer of Anima"
    if program == "ComfyUI" and naming == "kohya" and text:
        return f"of the text encoder it wants names that begin with {anima_names.DOTTED_TEXT}"
    if program == "diffusers":
        if text:
            return "it adapts the transformer alone"
        if naming == "kohya":
            return f"it wants names that begin with {anima_names.DOTTED}"
        if own.keys() != _PAIR_OF_PEFT:
            return "it wants lora_A and lora_B alone"
    return ""


def _place_of_z_image(program: Program, naming: Naming | None, name: str) -> str:
    """As `_place_of_kohya`, for layers of Z-Image."""
    if (instead := _WITHOUT_MUSUBIS.get(program)) is not None:
        return f"it knows no Z-Image{instead}"
    if program == "ComfyUI" and naming == "kohya" and not _OF_Z_IMAGE.fullmatch(name):
        return f"it wants names that begin with {z_image_names.DOTTED}"
    return ""


def _dotted_place(program: Program, naming: Naming | None, name: str) -> str:
    """As `_place_of_kohya`, for names with dots."""
    if naming == "diffusers" and program in ("ComfyUI", "Forge"):
        if re.search(r"(?<!\.processor)\.to_(?:q|k|v|out)\b", name) or name.endswith(".to_out.0"):
            return "it wants .processor. in diffusers' names of attention layers"
        if name.startswith("text_encoder") and ".text_model." not in name:
            return "it wants text_model. in diffusers' names of text encoders"
    return ""


def is_about(version: str) -> bool:
    """Whether the tables are about base models of this `ss_base_model_version`."""
    of_transformers = ("flux1", "flux_2_klein", "chroma", "anima", "z_image")
    return version in _SD3 or version.startswith(("sd_v", "sdxl", *of_transformers))


def in_words(found: Sequence[Verdict]) -> list[str]:
    """The verdicts as lines: the programs that load all layers as trained together, then each other one."""
    whole = [one for one in found if one.exact == one.total]
    lines = []
    if whole:
        programs = ", ".join(f"{one.program}{_in_brackets(one.notes)}" for one in whole)
        lines.append(f"{whole[0].total} of {whole[0].total} layers load, as trained, in {programs}")
    others = [one for one in found if one not in whole]
    return lines + [
        f"{one.program}: {one.found or 'none'} of {one.total} layers load{_in_brackets(one.notes)}" for one in others
    ]


def _in_brackets(notes: Sequence[str]) -> str:
    return f" ({'; '.join(notes)})" if notes else ""
