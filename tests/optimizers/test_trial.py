"""What is found of an optimizer before anything is loaded, against what real runs of it did.

For `AS_RUNS_WENT` the quickstart's model was trained for 12 steps with each optimizer and type of the weights, without
a trial: 174 optimizers, pytorch_optimizer's and torch's among them, and 522 runs. The trial lets pass each of the 366
that trained, and of the others three, whose weights became NaN at steps 7 to 11.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging

import pytest
import torch
from pytorch_optimizer import get_supported_optimizers, load_optimizer

from library.errors import UserError
from library.optimizers.create import choose_optimizer
from library.optimizers.custom_adamw.techniques import TECHNIQUES
from library.optimizers.registry import OPTIMIZERS
from library.optimizers.small_lora import GRADIENT, SmallLora
from library.optimizers.trial import refuse_useless
from tests.quick import quick, slow

STANDS_STILL, NAN = "no weight moves", "become NaN or infinite"
AS_RUNS_WENT = {  # in fp16, with the settings as by default; in fp32 and bf16 all of them train
    **dict.fromkeys(("AdamW", "AdamWScheduleFree", "RAdamScheduleFree"), NAN),
    **dict.fromkeys(("Prodigy", "DAdaptation", "DAdaptAdamPreprint", "DAdaptAdaGrad"), STANDS_STILL),
    **dict.fromkeys(("DAdaptAdam", "DAdaptAdan", "DAdaptAdanIP"), STANDS_STILL),
    "DAdaptSGD": "its step ends in ZeroDivisionError",
}
NOT_FOR_LORAS = {  # pytorch_optimizer's: why
    **dict.fromkeys(("AdaLOMO", "LOMO", "AdamMini"), "needs model"),
    **dict.fromkeys(("AdaGO", "AdaMuon", "Muon", "MuonClip", "NorMuon", "DistributedMuon"), "use_muon"),
    **dict.fromkeys(("AdaHessian", "SophiaH"), "does not require grad"),
    "AliG": "closure",
    "LBFGS": "'closure'",
    "BSAM": "needs num_data",
    "Ranger21": "needs num_iterations",
    "Magma": "needs optimizer",
    "DeMo": "process group",
}


def tried(
    name: str, *words: str, rate: float | None = None, precision: str = "", kernels: tuple[int, ...] = ()
) -> None:
    choice = choose_optimizer(name, list(words))
    rate = rate or (1.0 if choice.finds_its_rate else 1e-3)
    refuse_useless(choice, {"unet": rate, "text_encoder": rate / 2}, precision=precision, kernels=kernels)


@pytest.mark.parametrize("precision", quick(["", "full_bf16", "full_fp16"], "full_fp16"))
@pytest.mark.parametrize(
    "name", quick(OPTIMIZERS, "CustomAdamW", "AdamW", "Lion8bit", "Adafactor", "DAdaptAdam", "Prodigy")
)
def test_every_optimizer_by_name_is_judged_as_its_runs_went(name, precision):
    if precision == "full_fp16" and name in AS_RUNS_WENT:
        with pytest.raises(UserError, match=AS_RUNS_WENT[name]):
            tried(name, precision=precision)
    else:
        tried(name, precision=precision)


@pytest.mark.parametrize(
    ("name", "words", "precision", "message"),
    [
        ("Prodigy", [], "full_fp16", "Prodigy with --full_fp16: no weight moves.*leave --full_fp16 out"),
        ("AdamW", [], "full_fp16", "eps of 1e-08 is 0 in fp16.*eps=1e-4"),
        slow(("prodigyopt.Prodigy", [], "full_fp16", STANDS_STILL)),
        ("pytorch_optimizer.Prodigy", [], "full_fp16", STANDS_STILL),
        slow(("pytorch_optimizer.AvaGrad", [], "full_fp16", STANDS_STILL)),
        ("pytorch_optimizer.AdamW", [], "full_fp16", NAN),
        ("pytorch_optimizer.Adai", [], "full_bf16", "full_bf16: the weights become NaN"),
        ("LBFGS", [], "", "its step.. needs 'closure'"),
        slow(("schedulefree.AdamWScheduleFreeClosure", [], "", "its step.. needs 'closure'")),
        ("SparseAdam", [], "", "its step ends in RuntimeError: SparseAdam does not support dense"),
    ],
)
def test_what_cannot_train_is_refused_with_the_reason(name, words, precision, message):
    with pytest.raises(UserError, match=message):
        tried(name, *words, precision=precision)


@pytest.mark.parametrize(
    ("name", "words", "rate", "precision"),
    [
        ("AdamW", ["eps=1e-4"], 1e-4, "full_fp16"),
        ("AdamW", [], 1e-9, ""),
        ("AdamW", [], 1e-7, "full_bf16"),
        ("AdamWScheduleFree", ["warmup_steps=1000"], 1e-5, ""),
        ("AdamWScheduleFree", ["warmup_steps=10000", "eps=1e-4"], 1e-4, "full_fp16"),  # moves at step 4
        ("Adafactor", ["warmup_init=True"], 1e-4, "full_fp16"),  # with a rate of 1e-9 first, moves at step 8
        ("Prodigy", ["d0=1e-8"], 1.0, ""),
        ("SGD", [], 1e-6, ""),
        ("pytorch_optimizer.SPlus", [], 1e-3, ""),
        ("prodigyplus.ProdigyPlusScheduleFree", [], 1.0, "full_bf16"),
        ("torch.optim.Adafactor", [], 1e-2, ""),
    ],
)
def test_what_trains_is_let_through(name, words, rate, precision):
    tried(name, *words, rate=rate, precision=precision, kernels=(1, 3))


@pytest.mark.parametrize("precision", ["", "full_bf16", "full_fp16"])
@pytest.mark.parametrize("bits", [8, 32])
def test_custom_adamw_passes_with_each_technique(bits, precision):
    for technique in ("", *TECHNIQUES):
        off = [f"{name}={name == technique}" for name in TECHNIQUES]
        tried("CustomAdamW", f"optim_bits={bits}", *off, precision=precision)


SLOW = ("kron", "spectralsphere")  # a step of theirs takes seconds


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in get_supported_optimizers()],
)
def test_pytorch_optimizers_classes(name):
    found = load_optimizer(name)
    path = f"{found.__module__}.{found.__name__}"
    if importlib.util.find_spec(found.__module__) is None:
        pytest.skip(f"{path} is of another package")
    why = None if path.startswith("torch.") and found.__name__ != "LBFGS" else NOT_FOR_LORAS.get(found.__name__)
    if why is None:
        tried(path)
    else:
        with pytest.raises(UserError, match=why):
            tried(path)


def test_shapes_that_an_optimizer_does_not_take_are_found_where_the_network_has_them():
    with pytest.raises(UserError, match="Muon only supports 2D"):
        tried("torch.optim.Muon", kernels=(1,))
    tried("torch.optim.Muon")  # SDXL's layers are all linear


def test_one_that_needs_larger_gradients_is_warned_of(caplog):
    tried("SGD", rate=1e-4, precision="full_fp16")
    assert "with gradients of the usual size no weight moves" in caplog.text
    with pytest.raises(UserError, match=STANDS_STILL):
        tried("SGD", rate=1e-6, precision="full_fp16")


def test_parts_without_a_rate_are_left_out_and_a_run_without_any_is_others_business(caplog):
    choice = choose_optimizer("AdamW", [])
    refuse_useless(choice, {"unet": 0.0, "text_encoder": 1e-3})
    refuse_useless(choose_optimizer("AdamW", []), {"unet": 0.0}, precision="full_fp16")


def test_a_trial_leaves_no_trace(caplog, capsys):
    caplog.set_level(logging.INFO)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    tried("prodigyplus.ProdigyPlusScheduleFree", precision="full_bf16")  # prints, and rounds stochastically
    tried("CustomAdamW", "use_alora=True")  # warns where there are no pairs
    assert torch.equal(torch.rand(3), expected)
    assert not caplog.records
    assert capsys.readouterr().out == ""


# -- the small LoRA


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_its_gradients_are_those_of_a_loras_first_step(dtype):
    lora = SmallLora({"unet": 1.0, "text_encoder": 1.0}, dtype=dtype, kernels=(1, 3))
    lora.backward()
    unet, text = (group["params"] for group in lora.groups)
    ups = torch.cat([up.grad.float().flatten() for up in unet[1:4:2]])
    assert 0.3 < float(unet[1].grad.float().square().mean().sqrt()) / GRADIENT < 3
    assert 0.1 < float(ups.square().mean().sqrt()) / GRADIENT < 3
    for one, other in zip(unet, text, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one.grad, other.grad)
    assert all(not down.grad.any() for down in unet[::2])  # lora_up is 0
    assert [tuple(parameter.shape) for parameter in unet[4:]] == [
        *((4, 48, 1, 1), (48, 4, 1, 1)),
        *((4, 48, 3, 3), (48, 4, 1, 1)),
    ]


def test_its_gradients_point_to_its_target():
    """With normal inputs the mean gradient of lora_up = 0 is -0.1 · target · lora_downᵀ, times a constant. A thousand
    batches of four leave as much noise as that, and 192 numbers without it have a cosine of 0.07 by chance."""
    lora, mean = SmallLora({"unet": 1.0}), torch.zeros(48, 4)
    down, up = lora.parameters[:2]
    for _ in range(1000):
        lora.backward()
        mean += up.grad
    expected = -lora._targets[0] @ down.detach().T
    assert torch.cosine_similarity(mean.flatten(), expected.flatten(), dim=0) > 0.5


def test_every_pair_of_groups_sees_the_same_batches():
    alone, both = SmallLora({"unet": 1.0}), SmallLora({"unet": 1.0, "text_encoder": 1.0})
    for lora in itertools.chain([alone, both] * 2):
        lora.backward()
    for one, other in zip(alone.groups[0]["params"], both.groups[0]["params"], strict=True):
        assert torch.equal(one.grad, other.grad)
