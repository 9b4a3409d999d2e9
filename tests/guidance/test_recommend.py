"""--recommend: what drives the advice, that it loads and trains nothing, and that the file it writes trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import toml
from hypothesis import given
from hypothesis import strategies as st

from library.config import wishes
from library.config.options import declared_options
from library.config.parser import parse
from library.guidance import card_advice, fit, recommend, rules
from library.guidance.advice import Advice
from library.guidance.card import Card
from library.guidance.fit import Choice
from library.models import FAMILIES
from library.models.components import Components
from library.models.stable_diffusion import StableDiffusion
from library.run.plan import make_plan
from tests.conftest import BASE


@pytest.fixture
def advice(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`advice(images, *words)`: option → value, for as many images."""

    def make(images: int, *words: str) -> dict[str, Any]:
        given = ("--pretrained_model_name_or_path", str(BASE), "--train_data_dir", str(image_folder))
        output = ("--caption_extension", ".txt", "--resolution", "64", "--output_dir", str(tmp_path / "out"))
        plan = make_plan(parse([*given, *output, *words]))
        monkeypatch.setattr(type(plan.prepared), "train_images", images)
        found, _ = card_advice.for_card(plan, recommend.advise(plan))
        assert all(item.option in declared_options() and len(item.why) > 10 for item in found)
        return {item.option: item.value for item in found}

    return make


def test_the_number_of_images_drives_it(advice: Any) -> None:
    sizes = [advice(images) for images in (20, 200, 2_000, 10_000, 50_000)]
    assert [found["network_dim"] for found in sizes] == [16, 32, 64, 128, 128]
    assert [found["network_alpha"] for found in sizes] == [8, 16, 32, 64, 64]
    assert [found["train_batch_size"] for found in sizes] == [2, 4, 8, 8, 8]
    assert [found["wd_decay_factor"] for found in sizes] == [0.8, 0.8, 0.7, 0.65, 0.6]
    assert [found["wd_min_ratio"] for found in sizes] == [0.2, 0.2, 0.15, 0.12, 0.1]
    steps = [found["max_train_steps"] for found in sizes]
    assert steps == sorted(steps)
    assert (steps[0], steps[3]) == (1207, 12559)
    transition = [found["wd_transition_steps"] for found in sizes]
    assert transition == [500, 600, 573, 1507, 3298]
    assert all(start < steps for start, steps in zip(transition, steps, strict=True))


@given(st.integers(1, 10**6))
def test_more_images_are_seen_more_often_together_and_less_often_each(images: int) -> None:
    assert rules.views(images) <= rules.views(images + 1)
    assert rules.views(images) / images * 1.001 >= rules.views(images + 1) / (images + 1)


def test_what_the_user_has_said_counts(advice: Any) -> None:
    assert advice(20, "--gradient_accumulation_steps", "4")["max_train_steps"] == 302
    assert "unet_lr" in advice(20, "--unet_lr", "1e-3")
    epochs = advice(20, "--max_train_epochs", "3")
    assert "max_train_steps" not in epochs
    assert epochs["max_train_epochs"] == 201  # six images twice, two a step
    assert "dynamic_weight_decay" not in epochs  # three epochs are 18 steps, and the command line's are what counts
    assert advice(20, "--network_dim", "64")["network_alpha"] == 32
    assert not {"network_dim", "network_alpha"} & advice(20, "--network_module", "lycoris.kohya").keys()
    short = advice(20, "--gradient_accumulation_steps", "8")
    assert not [name for name in short if name.startswith("wd_")]


def test_the_optimizer_has_its_say(advice: Any) -> None:
    prodigy = advice(20, "--optimizer_type", "Prodigy")
    assert (prodigy["learning_rate"], "dynamic_weight_decay" in prodigy) == (1.0, False)
    adafactor = advice(20, "--optimizer_type", "Adafactor")
    assert not {"learning_rate", "lr_scheduler", "dynamic_weight_decay"} & adafactor.keys()
    assert "lr_scheduler" not in advice(20, "--optimizer_type", "AdamWScheduleFree")


def test_nothing_is_advised_that_has_no_effect(advice: Any) -> None:
    unet = advice(20, "--network_train_unet_only")
    assert ("learning_rate" in unet, "text_encoder_lr" in unet) == (True, False)
    text = advice(20, "--network_train_text_encoder_only", "--unet_lr", "1e-3")
    assert ("unet_lr" in text, "text_encoder_lr" in text) == (False, True)
    assert "lr_warmup_steps" not in advice(20, "--lr_scheduler", "constant")  # the command line's wins
    assert "dynamic_weight_decay" not in advice(20, "--no-dynamic_weight_decay")
    linear = advice(20, "--wd_schedule", "linear", "--dynamic_weight_decay")
    assert {name for name in linear if name.startswith("wd_")} == {"wd_transition_steps", "wd_min_ratio"}
    assert "dynamic_weight_decay" not in advice(20, "--max_train_steps", "400")  # which the file does not change
    assert advice(20, "--max_train_steps", "4000")["wd_transition_steps"] == 500


def test_a_task_that_is_named_decides_the_factor(advice: Any) -> None:
    found = advice(20, "--dynamic_weight_decay", "--task", "text_to_image", "--max_train_steps", "4000")
    assert (found["wd_decay_factor"], found["wd_min_ratio"], found["wd_transition_steps"]) == (0.65, 0.2, 720)


def test_it_names_where_the_preset_for_anything_differs() -> None:
    same = [Advice("network_dim", 16, ""), Advice("text_encoder_lr", 5e-5, "")]
    assert recommend._against_preset(same) == ""
    other = [*same, Advice("wd_decay_factor", 0.8, ""), Advice("max_train_steps", 9, "")]
    assert "stable_diffusion_lora has wd_decay_factor 0.65: it is for any images" in recommend._against_preset(other)


def test_lion_gets_smaller_rates(advice: Any) -> None:
    lion = advice(20, "--optimizer_type", "Lion")
    assert (lion["learning_rate"], lion["text_encoder_lr"]) == (3e-4, 1.5e-4)


def test_it_loads_and_trains_nothing_and_its_file_trains(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from train_network import main

    def loaded(*words: Any) -> None:
        raise AssertionError("weights were loaded")

    with monkeypatch.context() as patch:
        patch.setattr(Components, "load", loaded)
        assert train("--recommend", "--optimizer_type", "CustomAdamW") == 0
    said = capsys.readouterr().out
    path = tmp_path / "out" / "test-recommended.toml"
    assert list((tmp_path / "out").iterdir()) == [path]
    text = path.read_text(encoding="utf-8")
    assert text in said
    assert "6 images, 12 an epoch with repeats, 64 × 64; 6 have captions" in said
    assert "network_dim" in said.split("why\n")[1].splitlines()[0]
    assert "(the command line's wins)" in said
    assert f"--config_file {path}" in said
    found = toml.loads(text)
    assert found["network_dim"] == 16

    data = ("--pretrained_model_name_or_path", str(BASE), "--train_data_dir", str(tmp_path / "data"))
    more = ("--caption_extension", ".txt", "--resolution", "64", "--output_dir", str(tmp_path / "trained"))
    assert main(["--config_file", str(path), *data, *more, "--max_train_steps", "2", "--no-loss_plot"]) == 0
    assert (tmp_path / "trained" / "last.safetensors").exists()
    options = parse(["--config_file", str(path), *data, *more])
    assert options.optimizer.learning_rate == found["learning_rate"] == 1e-3
    assert options.training.max_train_steps == found["max_train_steps"]


def test_advice_that_was_edited_is_not_replaced(train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out" / "test-recommended.toml"
    for _ in range(2):  # the same advice may be written again
        assert train("--recommend") == 0
    assert train("--recommend", "--output_dir", "x" * 300) == 2
    assert "xxx" in capsys.readouterr().err
    path.write_text("network_dim = 7\n", encoding="utf-8")
    assert train("--recommend") == 2
    assert "test-recommended.toml exists with other contents" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == "network_dim = 7\n"
    assert train("--recommend", "--overwrite") == 0
    assert "network_dim = 16" in path.read_text(encoding="utf-8")


def test_with_a_config_file_it_says_where_to_put_them(
    tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from train_network import main

    config = tmp_path / "mine.toml"
    config.write_text(f"train_data_dir = '{image_folder}'\nresolution = 64\ncaption_extension = '.txt'\n", "utf-8")
    words = ("--pretrained_model_name_or_path", str(BASE), "--output_dir", str(tmp_path / "out"))
    assert main(["--config_file", str(config), *words, "--recommend"]) == 0
    assert f"put these lines into {config}" in capsys.readouterr().out


def test_a_base_of_full_size_and_sdxl(advice: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.models.latent_diffusion.native_resolution", lambda *given, **more: 512)
    full = advice(20)
    assert (full["learning_rate"], full["text_encoder_lr"]) == (1e-4, 5e-5)
    monkeypatch.setattr(StableDiffusion, "LEAVE_TEXT_ENCODERS", "they are easily spoilt")
    found = advice(20)
    assert (found["learning_rate"], found["network_train_unet_only"], "text_encoder_lr" in found) == (1e-4, True, False)
    assert "text_encoder_lr" not in advice(20, "--optimizer_type", "Prodigy")


# -- what the user says about the job


def test_a_subject_has_the_rank_of_its_preset(advice: Any) -> None:
    for subject in wishes.SUBJECTS:
        preset, found = recommend._of_preset(f"sd15_{subject}"), advice(20, "--recommend", subject)
        assert (found["network_dim"], found["network_alpha"]) == (preset["network_dim"], preset["network_alpha"])
    assert advice(20, "--recommend")["network_dim"] == 16  # by the number of images
    assert recommend._of_preset("sd15_style")["network_dim"] == 32


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_presets_of_subjects(family: str) -> None:
    assert rules.preset_of(family, "style").endswith("_style")
    assert rules.preset_of(family, "character").endswith("_character")
    assert bool(rules.preset_of(family, "concept")) == (family in recommend.FAMILIES_OF_PRESET)
    assert rules.preset_of(family, "") == ""


def test_other_families_than_stable_diffusion_have_their_own_presets(
    advice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = rules.preset_of
    monkeypatch.setattr(rules, "preset_of", lambda family, subject: find("flux", subject))
    monkeypatch.setattr(recommend, "FAMILIES_OF_PRESET", ())
    assert (advice(200, "--recommend", "style")["network_dim"], advice(200)["network_alpha"]) == (16, 32)
    assert advice(200, "--recommend", "style")["network_alpha"] == 16  # as flux_style: the rank
    assert advice(200, "--recommend", "concept")["network_dim"] == 32  # there is no preset


def test_every_word_has_an_effect_or_is_named(advice: Any, caplog: pytest.LogCaptureFixture) -> None:
    advice(200, "--recommend", "style,hard", "--network_module", "networks.lokr")
    said = [record.getMessage() for record in caplog.records if "--recommend" in record.getMessage()]
    assert [line.partition(":")[0] for line in said] == ["--recommend style", "--recommend hard"]
    assert all("no effect with --network_module networks.lokr" in line for line in said)


def test_difficulties() -> None:
    assert rules.BY_DIFFICULTY.keys() == rules.METHODS.keys() == set(wishes.DIFFICULTIES)


def test_difficulty_changes_rank_and_method(advice: Any) -> None:
    easy, normal, hard = (advice(200, "--recommend", word) for word in ("easy", "normal", "hard"))
    assert [found["network_dim"] for found in (easy, normal, hard)] == [16, 32, 64]
    assert [found.get("network_module") for found in (easy, normal, hard)] == [None, None, "networks.dora"]
    assert advice(50_000, "--recommend", "hard")["network_dim"] == 128  # no more
    own = advice(200, "--recommend", "hard", "--network_args", "use_tucker=True")
    assert "network_module" not in own


def test_the_time_bounds_the_steps(advice: Any) -> None:
    assert advice(20, "--recommend", "1h,2s")["max_train_steps"] == 1207  # as without: there is time for 1,800
    assert advice(20, "--recommend", "1h,4s")["max_train_steps"] == 900
    short = advice(20, "--recommend", "10min,2s")
    assert short["max_train_steps"] == 300
    epochs = advice(20, "--recommend", "10min,2.05s", "--max_train_epochs", "3")
    assert epochs["max_train_epochs"] == 48  # of 6 steps: 292 fit, which are 48.7
    assert "wd_transition_steps" not in short  # it would never begin to fall


# -- the card


def test_what_fits_is_left_alone(advice: Any) -> None:
    assert advice(20) == advice(20, "--gpu_memory", "24GB")


@pytest.mark.slow
def test_a_small_card_gets_what_fit_would_set(
    advice: Any, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usable = 60 * 2**20  # 71 MiB are needed as it is
    monkeypatch.setattr(Card, "usable", property(lambda card: usable))
    plain, small = advice(20, "--recommend", "concept"), advice(20, "--recommend", "concept", "--gpu_memory", "8GB")
    added = {name: value for name, value in small.items() if plain.get(name) != value}
    assert added

    given = ("--pretrained_model_name_or_path", str(BASE), "--train_data_dir", str(image_folder))
    output = ("--caption_extension", ".txt", "--resolution", "64", "--output_dir", str(tmp_path / "out"))
    advised = ("--network_dim", "16", "--train_batch_size", "2")
    plan = make_plan(parse([*given, *output, *advised, "--gpu_memory", "8GB"]))
    chosen: Choice = fit.choose(plan, Card("8 GB", 2**33, 2**33))
    assert {name: value for lever in chosen.levers for name, value in lever.changes.items()} == added


@pytest.mark.slow
def test_where_nothing_fits_it_says_so(
    train: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Card, "usable", property(lambda card: 2**20))
    assert train("--recommend", "--gpu_memory", "8GB") == 0
    assert "card     nothing fits into the 1.0 MiB" in capsys.readouterr().out


def test_it_compares_with_the_preset_of_the_subject(train: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--recommend", "style") == 0
    said = capsys.readouterr().out
    assert "that of sd15_style; 16 by its 6 images" in said
    assert "The preset sd15_style has network_alpha 16, learning_rate 0.0001" in said
    for name in rules.NOT_ADVISED:
        assert f"  {name}: " in said
