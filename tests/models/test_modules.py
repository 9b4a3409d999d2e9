"""What is imported when: the first step should not wait for packages that nothing needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from library.models.modules import read_fast_tokenizer

ROOT = Path(__file__).parents[2]

_OPEN = """
import sys
from library.models.opening import open_family
family = open_family("quickstart/base")
"""
_STEP = """
import torch
family.components.load("vae", torch.float32, "cpu")
family.encode_images(torch.zeros(1, 3, 64, 64))
family.components.load_all(family.components.text_encoders, torch.float32, "cpu")
family.components.load("denoiser", torch.float32, "cpu")
family.predict(torch.zeros(1, 4, 16, 16), torch.tensor([1]), family.encode_prompts(["a cat"]))
family.pipeline()
"""
_LOADED = "print(*sorted({name.split('.')[0] for name in sys.modules}))"


def _run(program: str) -> tuple[set[str], str]:
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT)
    return set(result.stdout.split()), result.stderr


def test_opening_a_model_imports_nothing_heavy() -> None:
    loaded, _ = _run(_OPEN + _LOADED)
    assert "library" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "diffusers", "huggingface_hub", "safetensors"}


def test_a_step_imports_no_optional_package_and_says_nothing() -> None:
    loaded, errors = _run(_OPEN + _STEP + _LOADED)
    assert {"torch", "diffusers", "transformers"} <= loaded
    assert not loaded & {"bitsandbytes", "peft"}
    assert errors == ""


_LORA_AFTERWARDS = """
pipeline = family.pipeline()
names = [n for n, m in pipeline.unet.named_modules() if n.endswith("to_q")]
states = {}
for name in names:
    module, key = pipeline.unet.get_submodule(name), "lora_unet_" + name.replace(".", "_")
    states[f"{key}.lora_down.weight"] = torch.ones(2, module.in_features)
    states[f"{key}.lora_up.weight"] = torch.ones(module.out_features, 2)
    states[f"{key}.alpha"] = torch.tensor(2.0)
pipeline.load_lora_weights(states, adapter_name="a")
print(pipeline.get_list_adapters()["unet"][0])
pipeline.set_adapters(["a"], [0.5])
pipeline.unload_lora_weights()
"""


@pytest.mark.slow
def test_diffusers_can_still_load_a_lora_afterwards() -> None:
    printed, _ = _run(_OPEN + _STEP + _LORA_AFTERWARDS)
    assert printed == {"a"}


def test_a_tokenizer_that_was_written_after_use_neither_pads_nor_cuts_off(tmp_path: Path) -> None:
    made = Tokenizer(WordLevel({"?": 0, "a": 1, "fox": 2}, unk_token="?"))
    made.pre_tokenizer = Whitespace()
    made.enable_padding(length=8)
    made.enable_truncation(2)
    made.save(str(tmp_path / "tokenizer.json"))
    assert read_fast_tokenizer(tmp_path).encode("a fox a").ids == [1, 2, 1]
