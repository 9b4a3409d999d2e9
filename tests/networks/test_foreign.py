"""Network modules of others, made-up ones and the real LyCORIS."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_models import foreign, randomize, sd_family
from torch import nn

from library.errors import UserError
from networks.files import AdapterFile, read
from networks.settings import LearningRates
from tests.quick import quick


class Other(nn.Module):
    """A module of someone else, whose `prepare_optimizer_params` is given."""

    def __init__(self, prepare) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.prepare_optimizer_params = lambda *rates: None
        self.prepare_optimizer_params = prepare.__get__(self)


def groups(network, text_encoder_lr=1e-5):
    found = foreign(network).groups(LearningRates(text_encoder_lr, 1e-4, 1e-3))
    assert all(isinstance(group["params"], list) for group in found)
    return [(group["name"], group["lr"], len(group["params"])) for group in found]


def test_groups_without_names_get_some():
    def prepare(self, text_encoder_lr, unet_lr, default_lr):
        return [{"params": iter([self.a]), "lr": text_encoder_lr}, {"params": {"b": self.b}.values()}]

    assert groups(Other(prepare)) == [("group_0", 1e-5, 1), ("group_1", 1e-3, 1)]


def test_descriptions_become_names():
    def prepare(self, text_encoder_lr, unet_lr, default_lr):
        return [{"params": [self.a], "lr": 1.0}, {"params": [self.b], "lr": unet_lr}], ["textencoder", "unet plus"]

    assert groups(Other(prepare)) == [("text_encoder", 1.0, 1), ("unet_plus", 1e-4, 1)]


def test_names_that_occur_twice_are_numbered():
    def prepare(self, text_encoder_lr, unet_lr, default_lr):
        return [{"params": [self.a], "lr": 1.0}, {"params": [self.b], "lr": 2.0}], ["unet", "unet"]

    assert groups(Other(prepare)) == [("unet_0", 1.0, 1), ("unet_1", 2.0, 1)]


def test_the_oldest_modules_know_no_default_rate():
    def prepare(self, text_encoder_lr, unet_lr):
        return [{"params": [self.a, self.b], "lr": unet_lr, "name": "all"}]

    assert groups(Other(prepare)) == [("all", 1e-4, 2)]


def test_a_list_of_rates_goes_to_those_who_take_it():
    def one(self, text_encoder_lr, unet_lr, default_lr):
        return [{"params": [self.a], "lr": text_encoder_lr}]

    def several(text_encoder_lr, unet_lr, default_lr):
        return [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in text_encoder_lr]

    network = Other(one)
    assert groups(network, [2e-5]) == [("group_0", 2e-5, 1)]
    with pytest.raises(UserError, match="this network module takes one rate"):
        groups(network, [2e-5, 3e-5])
    network.prepare_optimizer_params_with_multiple_te_lrs = several
    assert groups(network, [2e-5, 3e-5]) == [("group_0", 2e-5, 1), ("group_1", 3e-5, 1)]


def test_no_group_at_all_is_an_error():
    with pytest.raises(UserError, match="trains nothing"):
        groups(Other(lambda self, *rates: []))


def test_what_a_module_lacks_is_said():
    network = foreign(Other(lambda self, *rates: []))
    refusal = network.refuses("scale_weight_norms")
    assert refusal == "scale_weight_norms: this network module does not support it (it has no such method)"
    with pytest.raises(UserError, match="cannot be switched off"), network.off():
        pass
    network.before_batch()  # no hook, no error
    assert network.norms() is None
    assert (network.layers(), network.counts()) == ([], {})


def test_states_have_the_modules_own_names():
    module = Other(lambda self, *rates: [])
    network = foreign(module)
    assert network.state_dict().keys() == module.state_dict().keys() == {"a", "b"}
    network.load_state_dict({"a": torch.ones(1), "b": torch.ones(1)})
    assert module.a.item() == 1
    assert {id(parameter) for parameter in network.parameters()} == {id(module.a), id(module.b)}
    network.eval()
    assert not module.training


def test_modules_with_a_hook_get_it_before_each_batch():
    module, seen = Other(lambda self, *rates: []), []
    module.on_step_start = lambda text_encoder, unet: seen.append((text_encoder, unet))
    module.on_epoch_start = lambda text_encoder, unet: module.train()
    network = foreign(module, "text", "unet")
    network.before_batch()
    assert seen == [(None, "unet")]
    network.eval()
    network.start_epoch()
    assert network.training


# -- LyCORIS


def lycoris_network(tiny, algo: str):
    """On the layers that networks.lora has, too."""
    kohya = pytest.importorskip("lycoris.kohya")
    unet, text_encoder = tiny
    text_encoder, _ = sd_family(unet, text_encoder).third_party_views()  # LyCORIS takes names from its paths
    network = kohya.create_network(
        1.0, 4, 2.0, None, text_encoder, unet, neuron_dropout=None, algo=algo, preset="attn-mlp"
    )
    wrapped = foreign(network, text_encoder, unet)
    wrapped.attach(("text_encoder", "unet"))
    return wrapped


def run(tiny) -> torch.Tensor:
    unet, text_encoder = tiny
    generator = torch.Generator().manual_seed(0)
    condition = text_encoder(torch.tensor([[49406, 320, 1125, 49407]])).last_hidden_state
    return unet(torch.randn(1, 4, 16, 16, generator=generator), torch.tensor([500]), condition).sample


@pytest.mark.parametrize("algo", quick(["lora", "loha", "ia3"], "loha"))
def test_lycoris_trains_like_our_own(tiny, algo, tmp_path: Path):
    base = run(tiny).detach()
    network = lycoris_network(tiny, algo)
    # 100 Linear and 20 1x1 convolutions in the attention blocks, and the two of the time embedding; 3 layers of text
    assert (len(network.network.unet_loras), len(network.network.text_encoder_loras)) == (122, 18)
    names = {key.split(".")[0] for key in network.state_dict()}
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q" in names
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj" in names
    assert torch.allclose(run(tiny), base, atol=1e-6)

    found = network.groups(LearningRates(1e-2, 2e-2, 1.0))
    assert [(group["name"], group["lr"]) for group in found] == [("text_encoder", 1e-2), ("unet", 2e-2)]
    assert sum(len(group["params"]) for group in found) == len(list(network.parameters()))
    network.before_training(gradient_checkpointing=False)
    network.start_epoch()
    network.before_batch()
    optimizer = torch.optim.AdamW(found)
    losses = []
    for _ in range(4):
        loss = (run(tiny) - base - 0.5).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]

    assert network.refuses("scale_weight_norms") is None
    network.eval()
    trained = run(tiny).detach()
    with network.off():
        assert torch.allclose(run(tiny), base, atol=1e-5)
    file = str(tmp_path / "lycoris.safetensors")
    network.save(file, None, {"ss_output_name": "lycoris"})
    randomize(network)
    assert not torch.allclose(run(tiny), trained, atol=1e-3)
    assert not network.load(read(file)).missing
    assert torch.allclose(run(tiny), trained, atol=1e-6)


def test_a_lycoris_file_that_fits_nowhere_is_an_error(tiny, tmp_path):
    from safetensors.torch import save_file

    save_file({"lora_unet_x.alpha": torch.ones(())}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="nothing in it fits"):
        lycoris_network(tiny, "lora").load(read(tmp_path / "other.safetensors"))


def test_another_alpha_is_refused_where_the_module_would_keep_its_own(tiny, tmp_path):
    network = lycoris_network(tiny, "lora")
    tensors = {key: value.clone() for key, value in network.state_dict().items()}
    key = next(key for key in tensors if key.endswith(".alpha"))
    network.load(AdapterFile.of({k: v for k, v in tensors.items() if k != key}, "same"))  # not said: as it is
    with pytest.raises(UserError, match=r"alpha is 8 there and 2 here.*--dim_from_weights"):
        network.load(AdapterFile.of(tensors | {key: torch.tensor(8.0)}, "other"))
