"""Loads a language model with its tokenizer, in 4 bits if wanted, and gives it an adapter."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from fine_tuning import small_models
from fine_tuning.instructions import Tokenizer
from fine_tuning.optimizing import in_a_line, unloadable
from library.errors import UserError, did_you_mean, nearest_path

ADAPTERS = ("lora", "dora", "rslora", "adalora")
_CHECKPOINTING = {"use_reentrant": False}  # torch's advice; the other kind needs inputs with gradients
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load_tokenizer(model: str | None) -> Tokenizer:
    if model is None:
        return small_models.tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise unloadable(model, error) from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {model}: its tokenizer has no token for the end of a text")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(model: str | None, words: int, *, in_4bit: bool, checkpointing: bool) -> Any:
    """The frozen base. In 4 bits: nf4 with double quantisation; norms and embeddings stay as they are."""
    kind = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # few CPUs compute in bf16
    options: dict[str, Any] = {"dtype": kind, "device_map": {"": DEVICE}}
    if in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=kind
        )
    if model is None:
        base = _made(words, options if in_4bit else None)
    else:
        try:
            base = AutoModelForCausalLM.from_pretrained(model, **options)
        except (OSError, ValueError) as error:
            raise unloadable(model, error) from None
    base.name_or_path = model or "small_models.py"
    base.config.use_cache = False
    if in_4bit:
        _keep_the_layout_of_training(base)
        return prepare_model_for_kbit_training(
            base, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs=_CHECKPOINTING
        )
    if checkpointing:
        base.gradient_checkpointing_enable(_CHECKPOINTING)
    return base


def _keep_the_layout_of_training(base: Any) -> None:
    """On CPUs with bf16 kernels bitsandbytes 0.50 lays the weights out anew in the first evaluation. No gradient flows
    through them then: training after it would leave layers untaught, with a warning only."""
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _made(words: int, options: dict[str, Any] | None) -> Any:
    """The small model; read from a folder where `options` say so, as quantisation wants it."""
    made = small_models.language_model(words)
    if options is None:
        return made.to(DEVICE)
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, **options)


def _check_targets(base: torch.nn.Module, targets: Sequence[str]) -> None:
    """Raises UserError for a name of --target_modules that no layer has: peft is content if one of them fits."""
    names = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            known = sorted({name.rpartition(".")[2] for name in names})
            hint = did_you_mean(target, known) or f"; there are {', '.join(known)}"
            raise UserError(f"--target_modules: no linear layer's name ends with '{target}'{hint}")


def with_adapter(base: Any, wanted: argparse.Namespace, *, steps: int) -> Any:
    """The base with a new adapter, or with that of --start_from, to be trained."""
    if wanted.start_from is not None:
        try:
            return PeftModel.from_pretrained(base, wanted.start_from, is_trainable=True)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"--start_from {wanted.start_from}: does not fit the model: {in_a_line(error)}") from None
    _check_targets(base, wanted.target_modules or ())
    options: dict[str, Any] = {
        "r": wanted.rank, "lora_alpha": wanted.alpha, "lora_dropout": wanted.dropout, "bias": "none",
        "target_modules": wanted.target_modules or "all-linear", "task_type": "CAUSAL_LM",
        "modules_to_save": ["embed_tokens", "lm_head"] if wanted.model is None else None,
    }  # fmt: skip
    if wanted.adapter == "adalora":
        if steps < 2:
            raise UserError("--adapter adalora: one step is too few to move its budget")
        del options["r"]
        options["target_modules"] = wanted.target_modules or _linear(base)
        options |= {"init_r": wanted.rank, "target_r": max(1, wanted.rank // 2), "total_step": steps}
        options |= {"tinit": steps // 10, "tfinal": steps // 4, "deltaT": max(1, steps // 100)}
        return get_peft_model(base, AdaLoraConfig(**options))
    return get_peft_model(
        base, LoraConfig(**options, use_dora=wanted.adapter == "dora", use_rslora=wanted.adapter == "rslora")
    )


def check_adapter(folder: Path) -> None:
    """Raises UserError for a folder without an adapter that can go on."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise UserError(f"--start_from {folder}: has no {file.name}{'' if folder.exists() else nearest_path(folder)}")
    if PeftConfig.from_pretrained(str(folder)).peft_type == PeftType.ADALORA:
        raise UserError(f"--start_from {folder}: an AdaLoRA has spent its budget; start from another kind")


def _linear(base: torch.nn.Module) -> list[str]:
    """The last names of all linear layers but the head, which AdaLoRA's configuration has no word for."""
    names = {name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    return sorted(names - {"lm_head", "embed_out"})
