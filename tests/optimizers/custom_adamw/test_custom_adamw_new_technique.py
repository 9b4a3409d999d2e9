"""A technique is one file and one line: the one that docs/optimizer.md shows, as a user would add it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, copy_images

PAGE = (ROOT / "docs" / "optimizer.md").read_text(encoding="utf-8")
HERE = Path(__file__).parent
ADD = """
import json, sys
sys.path[:0] = [{folder!r}, {here!r}]
from library.optimizers.custom_adamw import techniques
techniques.TECHNIQUES["use_pauses"] = "mine.pauses.Pauses"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with the documented technique."""
    (source,) = (block for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL) if "Technique" in block)
    package = tmp_path_factory.mktemp("technique") / "mine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "pauses.py").write_text(source, encoding="utf-8")
    return package.parent


def program(folder: Path, text: str) -> Any:
    """What a program prints last, as JSON; the technique is in its registry."""
    code = ADD.format(folder=str(folder), here=str(HERE)) + text
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_it_has_flags_arguments_and_rows(folder: Path) -> None:
    text = """
from library.config.options import declared_options
from library.config.options_page import page as options_page
from library.config.registry import signature
from library.optimizers.custom_adamw import page
flags = {name: declared_options()[name].details.help for name in ("use_pauses", "pauses_every")}
found = signature("library.optimizers.CustomAdamW", where="")
torch_free = "torch" not in sys.modules
rows = [row for row in (page.table() + options_page() + page.stub()).splitlines() if "pauses" in row]
import inspect
from library.optimizers import CustomAdamW
parameters = inspect.signature(CustomAdamW).parameters
print(json.dumps([flags, found.parameters["pauses_every"], torch_free, rows, parameters["pauses_every"].default]))
"""
    assert program(folder, text) == [
        {
            "use_pauses": "halve one step of some (default: off)",
            "pauses_every": "of how many steps one is halved (default: 3)",
        },
        "int",
        True,
        [
            "| `--use_pauses` | off | halves one step of some | `--pauses_every` 3 | none: our own |",
            "| `--use_pauses` |  | halve one step of some (default: off) | ours |",
            "| `--pauses_every` |  | of how many steps one is halved (default: 3) | ours |",
            "    use_pauses: bool",
            "    pauses_every: int",
        ],
        3,
    ]


@pytest.mark.slow
def test_its_mistakes_are_refused(folder: Path) -> None:
    text = """
from adamw_problems import bag
from library.errors import UserError
from library.optimizers import CustomAdamW
from library.optimizers.create import choose_optimizer
def said(make):
    try:
        make()
    except UserError as error:
        return str(error)
print(json.dumps([
    said(lambda: CustomAdamW(bag(), use_pause=True)),
    said(lambda: CustomAdamW(bag(), pauses_every=0)),
    said(lambda: CustomAdamW([{"params": bag(), "use_pauses": 1}])),
    said(lambda: choose_optimizer("CustomAdamW", ["pauses_evry=2"])),
    said(lambda: choose_optimizer("CustomAdamW", ["pauses_every=often"])),
]))
"""
    said = program(folder, text)
    assert said[0] == "CustomAdamW: there is no argument 'use_pause', did you mean 'use_pauses'?"
    assert said[1] == "CustomAdamW: pauses_every = 0; it must be a number, 1 or more"
    assert said[2] == "CustomAdamW: use_pauses = 1; it must be True or False"
    assert "takes no 'pauses_evry', did you mean 'pauses_every'?" in said[3]
    assert said[4] == "--optimizer_args: pauses_every: 'often' is not a whole number"


def test_it_steps_in_its_own_tier_and_resumes(folder: Path) -> None:
    text = """
import io, logging
import torch
from adamw_problems import OFF, bag, flat, gradients
from library.optimizers import CustomAdamW
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("library").addHandler(handler)

def steps(named, optimizer, first, last, halved=False):
    for step in range(first, last):
        optimizer.param_groups[0]["lr"] = 1e-2 / 2 if halved and (step + 1) % 3 == 0 else 1e-2
        gradients(named, step)
        optimizer.step()

# alone: the steps of AdamW, every third one at half the rate
options = {**OFF, "lr": 1e-2, "weight_decay": 0.0, "optim_bits": 32}
ours, plain = bag(), bag()
steps(ours, CustomAdamW(ours, use_pauses=True, **options), 0, 8)
steps(plain, CustomAdamW(plain, implementation="eager", **options), 0, 8, halved=True)
alone = torch.equal(flat(ours), flat(plain))
# in one of two groups: the other one stays in its tier
lines.clear()
named = bag()
optimizer = CustomAdamW([{"params": named[:4], "use_pauses": True}, {"params": named[4:]}])
steps(named, optimizer, 0, 3)
info = optimizer.get_optimization_info()
told = [line for line in lines if "CPU kernel does not support" in line]
counts = [float(optimizer.state[p]["pauses_count"]) if "pauses_count" in optimizer.state[p] else None for _, p in named]
# with everything else, saved and resumed in 8 bits; then in 32, and from AdamW
resumed = []
for bits in (8, 32):
    whole, broken = bag(torch.bfloat16), bag(torch.bfloat16)
    everything = {"use_pauses": True, "use_adopt_stability": True, "use_tam": True, "use_alora": True}
    make = lambda named: CustomAdamW(named, lr=1e-2, optim_bits=bits, min_8bit_size=0, **everything)
    steps(whole, make(whole), 0, 9)
    before = make(broken)
    steps(broken, before, 0, 4)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    again = [(name, torch.nn.Parameter(p.detach().clone())) for name, p in broken]
    after = make(again)
    after.load_state_dict(torch.load(file, weights_only=True))
    steps(again, after, 4, 9)
    resumed.append(torch.equal(flat(whole), flat(again)))
adamw = torch.optim.AdamW([p for _, p in bag()])
steps(list(zip("abcdefg", adamw.param_groups[0]["params"])), adamw, 0, 2)
taken = bag()
optimizer = CustomAdamW([p for _, p in taken], use_pauses=True)
optimizer.load_state_dict(adamw.state_dict())
steps(taken, optimizer, 2, 3)
started = float(optimizer.state[taken[0][1]]["pauses_count"])
print(json.dumps([alone, info["implementation"], info["techniques"], told, counts, resumed, started]))
"""
    alone, implementation, techniques, told, counts, resumed, started = program(folder, text)
    assert alone
    assert resumed == [True, True]
    assert counts == [3.0] * 4 + [None] * 3
    assert started == 1.0
    assert "Pauses" in techniques
    if implementation != ["plain torch operations"]:  # there is a compiler
        assert implementation == ["native CPU kernel", "plain torch operations"]
        assert told == [
            "CustomAdamW: the CPU kernel does not support Pauses with these settings; its parameters use the plain "
            "step, which is slower"
        ]


@pytest.mark.slow
def test_it_trains_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    copy_images(tmp_path / "data" / "2_style")
    text = f"""
from pathlib import Path
from safetensors.torch import load_file
from tests.conftest import forget_accelerator, run_training
def run(name, *words):
    words = ("--optimizer_type", "CustomAdamW", "--use_pauses", *words, "--output_name", name)
    assert run_training(Path({str(tmp_path)!r}), *words) == 0
    forget_accelerator()
    return load_file({str(tmp_path / "out")!r} + f"/{{name}}.safetensors")
def same(a, b):
    return all((a[key] == b[key]).all().item() for key in a)
whole, plain = run("whole", "--pauses_every", "2"), run("plain", "--no-use_pauses")
run("broken", "--pauses_every", "2", "--max_train_steps", "2", "--save_state")
broken = run("broken", "--pauses_every", "2", "--resume", "latest", "--resume_anyway", "--overwrite")
print(json.dumps([same(whole, plain), same(whole, broken)]))
"""
    assert program(folder, text) == [False, True]
