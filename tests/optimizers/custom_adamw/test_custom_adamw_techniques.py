"""Each formula's invariants, on random shapes and sizes (section A (iv) of the papers' summary)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from library.optimizers import CustomAdamW, weight_decay
from library.optimizers.custom_adamw import adopt, agr, alora, cautious, grams, orthograd, pairs, rounding, spd, tam


@st.composite
def rows(draw: st.DrawFn, dtype: torch.dtype = torch.float64, smallest: int = 1) -> tuple[Tensor, Tensor]:
    """Two matrices [k, n] of one shape, of any size between 1e-6 and 1e4, some entries zero."""
    k, n = draw(st.integers(1, 4)), draw(st.integers(smallest, 300))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    made = []
    for _ in range(2):
        size = 10.0 ** draw(st.integers(-6, 4))
        zeros = torch.rand((k, n), generator=g) < draw(st.sampled_from([0.0, 0.3]))
        made.append((torch.randn((k, n), generator=g, dtype=torch.float64) * size).masked_fill(zeros, 0).to(dtype))
    return made[0], made[1]


def norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


class TestAGR:
    @given(rows())
    def test_alpha_sums_to_one_and_shrinks(self, given: tuple[Tensor, Tensor]) -> None:
        g = given[0]
        sums = agr.alpha(g).sum(-1)
        assert torch.allclose(sums, (g != 0).any(-1).double())
        out = agr.regularize(g)
        assert (out.abs() <= g.abs()).all()
        assert (out * g >= 0).all()

    def test_equal_entries(self) -> None:
        assert torch.allclose(agr.regularize(torch.full((1, 5), 2.0)), torch.full((1, 5), 2 * (1 - 1 / 5)))

    def test_a_single_entry_and_zeros_become_zero(self) -> None:
        assert torch.equal(agr.regularize(torch.tensor([[0.0, 3.0], [0.0, 0.0]])), torch.zeros(2, 2))


class TestOrthoGrad:
    @given(rows(smallest=2))
    def test_orthogonal_and_as_long(self, given: tuple[Tensor, Tensor]) -> None:
        w, g = given
        out = orthograd.project(w, g)
        assume(bool((norm(out) > 0).all()))
        assert (dot(out, w).abs() <= 1e-6 * norm(g) * norm(w)).all()
        assert torch.allclose(norm(out), norm(g), rtol=1e-9)

    @given(rows())
    def test_weights_of_zero_change_nothing(self, given: tuple[Tensor, Tensor]) -> None:
        g = given[0]
        assert torch.allclose(orthograd.project(torch.zeros_like(g), g), g, rtol=1e-12)

    @given(rows(dtype=torch.float32), st.sampled_from([-1.5, 1e-3, 1.0, 200.0]))
    def test_parallel_becomes_zero(self, given: tuple[Tensor, Tensor], factor: float) -> None:
        w = given[0]
        assert torch.equal(orthograd.project(w, factor * w), torch.zeros_like(w))

    def test_a_zero_gradient_stays_zero(self) -> None:
        assert torch.equal(orthograd.project(torch.ones(1, 3), torch.zeros(1, 3)), torch.zeros(1, 3))


class TestADOPT:
    @given(rows(), st.integers(1, 10_000))
    def test_bounded_by_the_clip(self, given: tuple[Tensor, Tensor], k: int) -> None:
        g, v = given[0], given[1] ** 2
        count = torch.full((g.shape[0], 1), float(k), dtype=g.dtype)
        out = adopt.normalize(g, v, count, eps=1e-6, clip=0.25)
        assert (out.abs() <= k**0.25 * (1 + 1e-12)).all()
        assert (out * g >= 0).all()

    def test_eps_is_a_floor(self) -> None:
        v = torch.tensor([[0.0, 4.0]])
        out = adopt.normalize(torch.tensor([[1e-7, 1.0]]), v, torch.ones(1, 1), eps=1e-6, clip=0.25)
        assert torch.allclose(out, torch.tensor([[0.1, 0.5]]))

    def test_counts_from_the_first_gradient_that_is_not_zero(self) -> None:
        k = torch.zeros(3, 1)
        k = adopt.count(k, torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, -1.0]]))
        assert k.flatten().tolist() == [0, 1, 1]
        assert adopt.count(k, torch.zeros(3, 2)).flatten().tolist() == [0, 2, 2]


class TestTAM:
    @given(rows(), st.sampled_from([1e-5, 1.0, 1e6]))
    def test_alignment_is_a_cosine_and_knows_no_scale(self, given: tuple[Tensor, Tensor], factor: float) -> None:
        m, g = given
        cosine = tam.alignment(m, g)
        assert (cosine.abs() <= 1 + 1e-9).all()
        assert torch.allclose(tam.alignment(m, factor * g), cosine, atol=1e-9)
        assert torch.allclose(tam.alignment(g, g), (g != 0).any(-1, keepdim=True).double())

    def test_no_momentum_no_alignment(self) -> None:
        assert torch.equal(tam.alignment(torch.zeros(1, 3), torch.ones(1, 3)), torch.zeros(1, 1))

    @pytest.mark.parametrize(("cosine", "limit"), [(1.0, 1.0), (-1.0, 0.0), (0.0, 0.5)])
    def test_damping_goes_geometrically_to_its_limit(self, cosine: float, limit: float) -> None:
        s = torch.zeros(1, 1, dtype=torch.float64)
        for step in range(1, 100):
            s = tam.smooth(s, torch.full((1, 1), cosine, dtype=torch.float64), 0.9)
            assert float(tam.damping(s)) - limit == pytest.approx(-cosine / 2 * 0.9**step)
            assert float(tam.damping(tam.unbias(s, 0.9, float(step)))) == pytest.approx(limit)

    def test_without_smoothing_it_is_the_present_cosine(self) -> None:
        s = tam.smooth(torch.full((1, 1), 0.7), torch.full((1, 1), -0.4), 0.0)
        assert float(tam.damping(s)) == pytest.approx((1 - 0.4) / 2)


class TestGrams:
    @given(rows())
    def test_the_gradients_sign_the_updates_size(self, given: tuple[Tensor, Tensor]) -> None:
        u, g = given
        out = grams.redirect(u, g)
        assert torch.equal(out.abs(), u.abs() * (g != 0))
        assert torch.equal(out.sign(), g.sign() * (u != 0))
        assert (dot(out, g) >= 0).all()

    def test_leaves_the_gradient_alone(self) -> None:
        g = torch.tensor([[-2.0, 3.0]])
        grams.redirect(torch.ones(1, 2), g)
        assert torch.equal(g, torch.tensor([[-2.0, 3.0]]))


class TestCautious:
    @given(rows())
    def test_never_against_the_gradient(self, given: tuple[Tensor, Tensor]) -> None:
        u, g = given
        out = cautious.mask(u, g, least=1e-3)
        assert (out * g >= 0).all()
        mean = cautious.agreement(u, g).mean(-1, keepdim=True)
        kept = out.where(u == 0, out / u.where(u != 0, 1))
        scale = kept.amax(-1, keepdim=True)
        assert torch.allclose((mean * scale)[mean >= 1e-3], torch.ones_like(mean[mean >= 1e-3]))

    def test_all_agree_all_disagree(self) -> None:
        u = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
        assert torch.equal(cautious.mask(u, u, least=1e-3), u)
        assert torch.equal(cautious.mask(u, -u, least=1e-3), torch.zeros(2, 2))

    def test_tiny_numbers_agree_too(self) -> None:
        u = torch.full((1, 2), 1e-30)
        assert torch.equal(cautious.mask(u, u, least=1e-3), u)


class TestSPD:
    @given(rows(), st.sampled_from([0.0, 0.06, 1.0]), st.booleans())
    def test_selects_and_projects(self, given: tuple[Tensor, Tensor], strength: float, anchored: bool) -> None:
        old, move = given
        anchor = move.flip(-1) * 0.5 if anchored else None
        new, away = old + move, old if anchor is None else old - anchor
        assert torch.equal(spd.project(new, old, -away, anchor, strength=strength), new)  # <g, w - w0> <= 0: c >= 0
        out = spd.project(new, old, away, anchor, strength=strength)  # c < 0, unless away is zero
        end, out_end = (new, out) if anchor is None else (new - anchor, out - anchor)
        outward = (norm(end) > norm(away) * (1 + 1e-6)) & (norm(away) > 0)
        inward = norm(end) < norm(away) * (1 - 1e-6)
        expected = norm(end) - strength * (norm(end) - norm(away))
        assert torch.allclose(norm(out_end)[outward], expected[outward], rtol=1e-6)
        assert torch.equal(out[inward[:, 0]], new[inward[:, 0]])
        if strength == 0:
            assert torch.equal(out, new)

    def test_zeros_stay_zeros(self) -> None:
        zero = torch.zeros(1, 3)
        assert torch.equal(spd.project(zero, zero, torch.ones(1, 3), None, strength=1.0), zero)

    def test_the_halves_of_a_pair_decide_alike(self) -> None:
        g = torch.Generator().manual_seed(0)
        up, down, total = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((9, 2), (2, 7), (9, 7)))
        grad_up, grad_down = total @ down.T, up.T @ total
        of_up = spd.condition(grad_up.reshape(1, -1), up.reshape(1, -1))
        of_down = spd.condition(grad_down.reshape(1, -1), down.reshape(1, -1))
        assert torch.allclose(of_up, of_down, rtol=1e-12)


class TestALoRA:
    def pair(self) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(1)
        return (
            torch.randn((3, 11, 4), generator=g, dtype=torch.float64),
            torch.randn((3, 4, 29), generator=g, dtype=torch.float64),
        )

    def test_the_gram_trick_is_exact(self) -> None:
        up, down = self.pair()
        brute = torch.linalg.vector_norm(up @ down, dim=-1)
        assert torch.allclose(alora.row_norms(up, down), brute, rtol=1e-12)

    def test_ratio_at_zero_for_every_row(self) -> None:
        up, down = self.pair()
        assert torch.equal(
            alora.row_factors(0 * up, down, ratio=4.0, eta=2.0, scale=0.5), torch.full((3, 11), 4.0).double()
        )

    def test_falls_as_a_row_grows(self) -> None:
        up, down = self.pair()
        factors = [alora.row_factors(size * up, down, ratio=4.0, eta=2.0, scale=0.5) for size in (0.1, 1.0, 10.0)]
        assert (factors[0] > factors[1]).all()
        assert (factors[1] > factors[2]).all()

    def test_no_ratio_no_eta_no_effect(self) -> None:
        up, down = self.pair()
        assert (alora.row_factors(up, down, ratio=1.0, eta=0.0, scale=1.0) == 1).all()

    def test_scale_and_eta_stand_under_the_root(self) -> None:
        up, down = torch.ones(1, 1, 1), torch.full((1, 1, 1), 3.0)
        assert float(alora.row_factors(up, down, ratio=5.0, eta=2.0, scale=0.25)) == pytest.approx(5 / 2.0)


class TestPairs:
    @pytest.mark.parametrize(
        ("down", "up"),
        [
            ("lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight"),
            ("base.q.lora_A.default.weight", "base.q.lora_B.default.weight"),
            ("q.lora_A.weight", "q.lora_B.weight"),
            ("to_q_lora.down.weight", "to_q_lora.up.weight"),
            ("q.lora.down.weight", "q.lora.up.weight"),
            ("q.lora_linear_layer.down.weight", "q.lora_linear_layer.up.weight"),
            ("emb.lora_embedding_A.default", "emb.lora_embedding_B.default"),
            ("lora_A.weight", "lora_B.weight"),
        ],
    )
    def test_names(self, down: str, up: str) -> None:
        a, b = torch.zeros(4, 6), torch.zeros(5, 4)
        assert pairs.find_pairs([(up, b), ("other.lora_down.weight", torch.zeros(4, 6)), (down, a)]) == {id(b): a}
        assert (pairs.role_of(down), pairs.role_of(up)) == ("down", "up")

    @pytest.mark.parametrize("name", ["lora_unet_down_blocks_0.weight", "x.lora_downs.weight", "mlp.up.weight", "lora"])
    def test_other_names(self, name: str) -> None:
        assert pairs.role_of(name) == ""

    def test_what_does_not_fit_is_no_pair(self) -> None:
        a, b = torch.zeros(4, 6), torch.zeros(5, 3)
        assert pairs.find_pairs([("x.lora_down.weight", a), ("x.lora_up.weight", b)]) == {}

    def test_two_adapters_of_one_module_are_two_pairs(self) -> None:
        tensors = [torch.zeros(4, 6), torch.zeros(5, 4), torch.zeros(4, 6), torch.zeros(5, 4)]
        names = [f"m.lora_{half}.{adapter}.weight" for adapter in ("one", "two") for half in "AB"]
        found = pairs.find_pairs(zip(names, tensors, strict=True))
        assert {key: id(value) for key, value in found.items()} == {
            id(tensors[1]): id(tensors[0]),
            id(tensors[3]): id(tensors[2]),
        }

    def test_declared_roles_do_what_names_do(self) -> None:
        """To the bit, after loading a state too, and for names that mean something else."""

        def run(declared: bool) -> tuple[list[Tensor], list[str]]:
            draws = torch.Generator().manual_seed(3)
            down, up = (torch.nn.Parameter(torch.randn(s, generator=draws)) for s in ((4, 64), (32, 4)))
            group: dict[str, object] = {"params": [down, up], "lr": 1e-2}
            if declared:
                group |= {"param_names": ["x.a", "y.lora_down"], "roles": ["down", "up"], "partners": [None, down]}
            else:
                group |= {"param_names": ["x.lora_down.weight", "x.lora_up.weight"]}
            optimizer = CustomAdamW([group], use_alora=True, optim_bits=32)
            assert optimizer.get_optimization_info()["lora_pairs"] == 1
            for number in range(4):
                if number == 2:
                    optimizer.load_state_dict(optimizer.state_dict())
                for parameter in (down, up):
                    parameter.grad = torch.randn(parameter.shape, generator=draws)
                optimizer.step()
            assert optimizer.get_optimization_info()["lora_pairs"] == 1
            return [down.detach(), up.detach()], sorted(optimizer.state_dict()["param_groups"][0])

        (ours, keys), (named, keys_of_named) = run(declared=True), run(declared=False)
        assert all(torch.equal(*pair) for pair in zip(ours, named, strict=True))
        assert keys == keys_of_named  # states are the same, too

    def test_declared_roles_are_as_many_as_the_parameters(self) -> None:
        weights = [torch.nn.Parameter(torch.zeros(4, 4)) for _ in range(2)]
        with pytest.raises(ValueError, match="zip"):
            CustomAdamW([{"params": weights, "roles": ["down"], "partners": [None]}])

    def test_tucker_is_no_plain_product(self) -> None:
        named = [("x.lora_down.weight", torch.zeros(4, 6, 1, 1)), ("x.lora_up.weight", torch.zeros(5, 4, 1, 1))]
        assert len(pairs.find_pairs(named)) == 1
        assert pairs.find_pairs([*named, ("x.lora_mid.weight", torch.zeros(4, 4, 3, 3))]) == {}


class TestWeightDecay:
    @pytest.mark.parametrize(
        ("step", "factor"), [(1, 1.0), (1000, 1.0), (1500, 0.8367), (2000, 0.7), (3000, 0.49), (99999, 0.49)]
    )
    def test_the_documented_values(self, step: int, factor: float) -> None:
        value = weight_decay.exponential(step, transition_steps=1000, decay_factor=0.7, min_ratio=0.1, max_progress=2.0)
        assert value == pytest.approx(factor, abs=5e-5)

    @pytest.mark.parametrize(
        ("step", "factor"), [(5000, 0.2401), (7000, 0.1176), (7455, 0.1000), (7456, 0.1), (9000, 0.1)]
    )
    def test_without_the_cap(self, step: int, factor: float) -> None:
        value = weight_decay.exponential(
            step, transition_steps=1000, decay_factor=0.7, min_ratio=0.1, max_progress=float("inf")
        )
        assert value == pytest.approx(factor, abs=5e-5)
        assert value >= 0.1


class TestStochasticRounding:
    def test_right_on_average_and_always_a_neighbour(self) -> None:
        value = 1 + 0.3 * 2**-7  # between two bfloat16 numbers, 30 % of the way up
        x = torch.full((4, 20_000), value)
        out = rounding.to_bfloat16(x, ordinals=torch.arange(4)[:, None], step=3.0).float()
        assert set(out.unique().tolist()) == {1.0, 1 + 2**-7}
        assert ((out > 1).float().mean(-1) - 0.3).abs().max() < 0.02

    def test_keyed_by_parameter_and_step(self) -> None:
        x = torch.full((2, 1000), 1.003)
        first = rounding.to_bfloat16(x, ordinals=torch.tensor([[0], [1]]), step=1.0)
        again = rounding.to_bfloat16(x, ordinals=torch.tensor([[0], [1]]), step=1)
        later = rounding.to_bfloat16(x, ordinals=torch.tensor([[0], [1]]), step=2.0)
        assert torch.equal(first, again)
        assert not torch.equal(first, later)
        assert not torch.equal(first[0], first[1])

    def test_what_fits_stays_and_infinities_too(self) -> None:
        x = torch.tensor([[1.0, -0.5, float("inf"), float("-inf"), float("nan"), 0.0]])
        out = rounding.to_bfloat16(x, ordinals=torch.zeros(1, 1, dtype=torch.long), step=1)
        assert torch.equal(out[:, :4], x.bfloat16()[:, :4])
        assert out[0, 4].isnan()
