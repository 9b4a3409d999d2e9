from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import safetensors.torch
import torch

from library.errors import UserError
from library.files import hashes
from library.record import metadata as md
from library.record.dataset_metadata import DatasetFacts, SubsetFacts
from library.record.modelspec import ModelSpec, data_url, spec_metadata

FACTS = md.RunFacts(
    session_id=123,
    training_started_at=1700000000.5,
    output_name="fox",
    learning_rate=1e-4,
    text_encoder_lr=[5e-5],
    unet_lr=None,
    num_train_images=60,
    num_reg_images=4,
    num_batches_per_epoch=30,
    num_epochs=2,
    max_train_steps=60,
    lr_scheduler="cosine",
    network_module="networks.lora",
    network_dim=8,
    network_alpha=4.0,
    mixed_precision="no",
    v2=False,
    base_model_version="sd_v1",
    seed=42,
    optimizer="torch.optim.adamw.AdamW(weight_decay=0.1)",
    max_grad_norm=1.0,
)

FOX = SubsetFacts(
    image_dir=Path("/home/someone/secret/10_fox"),
    img_count=3,
    num_repeats=10,
    captions=("a fox,  Red , a fox", "a fox, ", "red"),
    class_tokens="fox",
    shuffle_caption=True,
)
REG = SubsetFacts(image_dir=Path("/data/reg/1_animal"), img_count=4, num_repeats=1, is_reg=True)

DATASET = DatasetFacts(
    batch_size=2,
    num_train_images=30,
    num_reg_images=4,
    resolution=(512, 768),
    enable_bucket=True,
    min_bucket_reso=256,
    max_bucket_reso=1024,
    bucket_no_upscale=False,
    subsets=(FOX, REG),
    buckets=(((512, 768), 24), ((640, 640), 0), ((768, 512), 6)),
    mean_img_ar_error=0.125,
)

SPEC = ModelSpec(
    architecture="stable-diffusion-v1",
    title="fox",
    resolution=(512, 768),
    prediction_type="epsilon",
    implementation_version="lora-trainer/0.1.0",
    author="Someone",
    timestep_range=(0, 900),
    encoder_layer=2,
)

# kohya's keys: sd-scripts 0.10, train_network.py:1004-1303
ALWAYS = """session_id training_started_at output_name learning_rate text_encoder_lr unet_lr num_train_images
num_validation_images num_reg_images num_batches_per_epoch num_epochs gradient_checkpointing gradient_accumulation_steps
max_train_steps lr_warmup_steps lr_scheduler network_module network_dim network_alpha network_dropout mixed_precision
full_fp16 v2 base_model_version clip_skip max_token_length cache_latents seed lowram noise_offset
multires_noise_iterations multires_noise_discount adaptive_noise_scale zero_terminal_snr training_comment
sd_scripts_commit_hash optimizer max_grad_norm caption_dropout_rate caption_dropout_every_n_epochs
caption_tag_dropout_rate face_crop_aug_range prior_loss_weight min_snr_gamma scale_weight_norms ip_noise_gamma
debiased_estimation noise_offset_random_strength ip_noise_gamma_random_strength loss_type huber_schedule huber_scale
huber_c fp8_base fp8_base_unet validation_seed validation_split max_validation_steps validate_every_n_epochs
validate_every_n_steps resize_interpolation training_finished_at steps epoch sd_model_name tag_frequency dataset_dirs"""
FROM_FOLDERS = """batch_size_per_device total_batch_size resolution color_aug flip_aug random_crop shuffle_caption
enable_bucket bucket_no_upscale min_bucket_reso max_bucket_reso keep_tokens reg_dataset_dirs bucket_info"""


DATASET_KEYS = """is_dreambooth batch_size_per_device num_train_images num_reg_images resolution enable_bucket
min_bucket_reso max_bucket_reso tag_frequency bucket_info resize_interpolation subsets"""
SUBSET_KEYS = """img_count num_repeats color_aug flip_aug random_crop shuffle_caption keep_tokens keep_tokens_separator
secondary_separator enable_wildcard caption_prefix caption_suffix resize_interpolation image_dir class_tokens is_reg"""


def run(**changes) -> md.RunMetadata:
    given = {"facts": FACTS, "datasets": (DATASET,), "spec": SPEC, "model": "someone/base", "vae": None}
    given |= {"total_batch_size": 4, "from_dataset_config": False}
    return md.RunMetadata(**(given | changes))


def ss(names: str) -> set[str]:
    return {f"ss_{name}" for name in names.split()}


def keys(metadata: dict[str, str], prefix: str = "ss_") -> set[str]:
    return {key for key in metadata if key.startswith(prefix)}


def test_the_keys_are_exactly_kohyas():
    metadata = run().at(steps=60, epoch=2)
    assert keys(metadata) == ss(ALWAYS) | ss(FROM_FOLDERS)
    assert keys(run(network_args={"conv_dim": "4"}).at(steps=1, epoch=0)) - keys(metadata) == {"ss_network_args"}
    assert keys(run(from_dataset_config=True).at(steps=1, epoch=0)) == ss(ALWAYS) | {"ss_datasets"}
    assert keys(metadata) | keys(metadata, "modelspec.") == set(metadata)
    assert all(isinstance(value, str) for value in metadata.values())


def test_values_are_plain_strings():
    metadata = run(network_args={"conv_dim": "4"}).at(steps=60, epoch=2, now=1700000123.75)
    assert metadata["ss_learning_rate"] == "0.0001"
    assert metadata["ss_unet_lr"] == "None"
    assert metadata["ss_text_encoder_lr"] == "[5e-05]"
    assert metadata["ss_v2"] == "False"
    assert metadata["ss_network_alpha"] == "4.0"
    assert metadata["ss_network_args"] == '{"conv_dim": "4"}'
    assert metadata["ss_resolution"] == "(512, 768)"
    assert metadata["ss_training_finished_at"] == "1700000123.75"
    assert (metadata["ss_steps"], metadata["ss_epoch"]) == ("60", "2")


def test_only_the_minimum_is_kept_without_metadata(tmp_path):
    model = tmp_path / "base.safetensors"  # not there when asked: nothing may read it
    metadata = run(no_metadata=True, network_args={"conv_dim": "4"}, model=str(model)).at(steps=60, epoch=2)
    assert keys(metadata) == set(md.MINIMUM_KEYS)
    assert keys(metadata, "modelspec.")  # as kohya has it
    assert keys(run(no_metadata=True).at(steps=60, epoch=2)) == set(md.MINIMUM_KEYS) - {"ss_network_args"}


def test_json_about_the_data():
    metadata = run().at(steps=1, epoch=0)
    assert json.loads(metadata["ss_tag_frequency"]) == {"10_fox": {"a fox": 3, "red": 2}, "1_animal": {}}
    assert json.loads(metadata["ss_dataset_dirs"]) == {"10_fox": {"n_repeats": 10, "img_count": 3}}
    assert json.loads(metadata["ss_reg_dataset_dirs"]) == {"1_animal": {"n_repeats": 1, "img_count": 4}}
    assert json.loads(metadata["ss_bucket_info"]) == {
        "buckets": {
            "0": {"resolution": [512, 768], "count": 24},
            "1": {"resolution": [768, 512], "count": 6},
        },
        "mean_img_ar_error": 0.125,
    }
    plain = run(datasets=(replace(DATASET, enable_bucket=False),)).at(steps=1, epoch=0)
    assert plain["ss_bucket_info"] == "null"


def test_tags_lie_between_the_separators_of_their_subset():
    captions = ("Red Fox;night sky, stars; hill", "red fox; ;")
    fox = replace(FOX, captions=captions, caption_separator=";")
    metadata = run(datasets=(replace(DATASET, subsets=(fox, *DATASET.subsets[1:])),)).at(steps=1, epoch=0)
    frequencies = json.loads(metadata["ss_tag_frequency"])["10_fox"]
    assert frequencies == {"red fox": 2, "night sky, stars": 1, "hill": 1}


def test_json_about_several_datasets():
    """A folder that is used twice has two entries; its tags count once. No path is published."""
    other = replace(DATASET, resolution=(256, 256), subsets=(replace(FOX, num_repeats=2),))
    metadata = run(datasets=(DATASET, other), from_dataset_config=True).at(steps=1, epoch=0)
    assert json.loads(metadata["ss_dataset_dirs"]) == {
        "10_fox": {"n_repeats": 10, "img_count": 3},
        "10_fox (2)": {"n_repeats": 2, "img_count": 3},
    }
    assert json.loads(metadata["ss_tag_frequency"])["10_fox"] == {"a fox": 3, "red": 2}
    first, second = json.loads(metadata["ss_datasets"])
    assert second["resolution"] == [256, 256]
    assert first.keys() == set(DATASET_KEYS.split())
    assert first["subsets"][0].keys() == set(SUBSET_KEYS.split())
    assert [subset["image_dir"] for subset in first["subsets"]] == ["10_fox", "1_animal"]
    assert "secret" not in json.dumps(metadata)


def test_modelspec():
    metadata = run().at(steps=1, epoch=0, now=1700000123.75)
    date = metadata.pop("modelspec.date")
    assert len(date) == len("2023-11-14T22:15:23")
    assert {key: value for key, value in metadata.items() if key.startswith("modelspec.")} == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.implementation_version": "lora-trainer/0.1.0",
        "modelspec.title": "fox",
        "modelspec.author": "Someone",
        "modelspec.resolution": "512x768",
        "modelspec.prediction_type": "epsilon",
        "modelspec.timestep_range": "0,900",
        "modelspec.encoder_layer": "2",
    }
    spec = replace(SPEC, architecture="stable-diffusion-v2-768-v", prediction_type="v_prediction")
    metadata = spec_metadata(spec, now=0.0)
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert metadata["modelspec.prediction_type"] == "v"
    assert "modelspec.prediction_type" not in spec_metadata(replace(SPEC, prediction_type="velocity"), now=0.0)


def test_a_thumbnail_becomes_a_data_url(tmp_path):
    image = tmp_path / "fox.png"
    image.write_bytes(b"\x89PNG")
    assert data_url(str(image)) == "data:image/png;base64,iVBORw=="
    assert data_url("data:image/png;base64,AA==") == "data:image/png;base64,AA=="
    with pytest.raises(UserError, match=r"--metadata_thumbnail: .*none.png is neither a file nor a data URL"):
        data_url(str(tmp_path / "none.png"))
    with pytest.raises(UserError, match="is neither a file nor a data URL"):
        data_url("iVBORw0KGgo" * 40)  # an image as text, too long for a file's name


# -- more than a file's header holds


LONG = replace(FOX, captions=tuple(f"{number} 狐が走る " * 40 for number in range(500)) + ("a fox",) * 3)


@pytest.mark.parametrize("from_config", [False, True])
def test_tables_of_tags_are_cut_to_what_a_header_holds(monkeypatch, tmp_path, caplog, from_config):
    datasets = (replace(DATASET, subsets=(LONG, REG)),)
    whole = run(datasets=datasets, from_dataset_config=from_config).at(steps=1, epoch=0)
    assert len(json.loads(whole["ss_tag_frequency"])["10_fox"]) == 501
    assert not caplog.text
    for room, kept in ((md.size_of(whole) - 100, 100), (60_000, 0)):
        caplog.clear()
        monkeypatch.setattr(md, "MOST_METADATA", room)
        metadata = run(datasets=datasets, from_dataset_config=from_config).at(steps=1, epoch=0)
        assert md.size_of(metadata) < room + 200  # the time, the step
        frequencies = json.loads(metadata["ss_tag_frequency"])["10_fox"]
        assert len(frequencies) == kept
        assert next(iter(frequencies), "a fox") == "a fox"  # the most frequent one
        if from_config:
            assert json.loads(metadata["ss_datasets"])[0]["tag_frequency"]["10_fox"] == frequencies
        said = f"the {kept} most frequent tags of each folder" if kept else "none of them"
        assert f"ss_tag_frequency has {said}" in caplog.text
        assert whole.keys() == metadata.keys()


def test_the_size_is_that_in_the_file(tmp_path):
    for metadata in (METADATA, run(datasets=(replace(DATASET, subsets=(LONG,)),)).at(steps=1, epoch=0)):
        safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", metadata)
        header = int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little")
        assert 0 < header - md.size_of(metadata) < 100  # the tensor


# -- the base model


def test_a_models_hashes_are_those_of_the_web_uis(tmp_path):
    content = bytes(range(256)) * 5000  # 1.28 MB: the old hash covers 64 KiB from 1 MiB on
    model = tmp_path / "base.safetensors"
    model.write_bytes(content)
    assert hashes.model_metadata("sd_model", str(model)) == {
        "ss_sd_model_name": "base.safetensors",
        "ss_sd_model_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
        "ss_new_sd_model_hash": hashlib.sha256(content).hexdigest(),
    }
    assert hashes.model_metadata("vae", str(model)).keys() == {"ss_vae_name", "ss_vae_hash", "ss_new_vae_hash"}


def test_folders_and_hub_ids_have_a_name_only(tmp_path):
    (tmp_path / "my-base").mkdir()
    assert hashes.model_metadata("sd_model", f"{tmp_path}/my-base/") == {"ss_sd_model_name": "my-base"}
    assert hashes.model_metadata("sd_model", "someone/base") == {"ss_sd_model_name": "someone/base"}


def test_a_base_model_that_cannot_be_read_any_more_has_a_name_only(tmp_path, monkeypatch, caplog):
    model = tmp_path / "base.safetensors"
    model.write_bytes(b"x")
    monkeypatch.setattr(hashes, "old_hash", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    assert run(model=str(model)).at(steps=1, epoch=0)["ss_sd_model_name"] == "base.safetensors"
    assert "base.safetensors: the metadata has no hash of this file: Input/output error" in caplog.text


def test_the_base_model_is_hashed_once_and_only_when_a_file_is_saved(tmp_path, monkeypatch):
    model = tmp_path / "base.safetensors"
    model.write_bytes(b"x")
    reads = []
    true = hashes.sha256
    monkeypatch.setattr(hashes, "sha256", lambda path, **options: reads.append(path) or true(path, **options))
    metadata = run(model=str(model))
    assert not reads
    first, second = metadata.at(steps=1, epoch=0), metadata.at(steps=2, epoch=0)
    assert reads == [model]
    assert first["ss_new_sd_model_hash"] == second["ss_new_sd_model_hash"] == hashlib.sha256(b"x").hexdigest()


# -- the file's own hashes


def kohya_hashes(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> dict[str, str]:
    """Kohya's rule (train_util.py, precalculate_safetensors_hashes), with the whole file in memory."""
    content = safetensors.torch.save(tensors, {key: value for key, value in metadata.items() if key[:3] == "ss_"})
    stream = BytesIO(content)
    (size,) = struct.unpack("<Q", stream.read(8))
    model = hashlib.sha256(content[8 + size :]).hexdigest()
    stream.seek(0x100000)
    return {"sshs_model_hash": model, "sshs_legacy_hash": hashlib.sha256(stream.read(0x10000)).hexdigest()[:8]}


METADATA = {"ss_a": 'quotes " \\ and \n\t\x01\x7f', "ss_name": "狐 é \U0001f98a", "modelspec.title": "x" * 333}


@pytest.mark.parametrize("size", [10, 262_000, 262_144, 270_000, 700_000])  # fp32 values: around and beyond 1 MiB
@pytest.mark.parametrize("metadata", [METADATA, {}], ids=["metadata", "none"])
def test_a_files_hashes_are_kohyas(tmp_path, size, metadata):
    values = torch.randn(size, generator=torch.Generator().manual_seed(0))
    tensors = {"b.weight": values, "a.weight": values[:7].half(), "a.alpha": torch.tensor(4.0)}
    path = tmp_path / "file.safetensors"
    safetensors.torch.save_file(tensors, path, {**metadata, **hashes.UNKNOWN_HASHES})
    expected = kohya_hashes(tensors, metadata)
    assert hashes.safetensors_hashes(path) == expected
    hashes.write_hashes(path)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {**metadata, **expected}
        assert all(torch.equal(file.get_tensor(key), value) for key, value in tensors.items())


def test_a_header_that_reaches_into_the_hashed_block_is_part_of_it(tmp_path):
    """Tag frequencies can make a header of megabytes. One `ss_` key, as safetensors keeps no order among several."""
    for length in (0xFFF00, 0x108000, 0x120000):
        metadata = {"ss_tag_frequency": "t" * length}
        tensors = {"a": torch.arange(50_000.0)}
        path = tmp_path / "file.safetensors"
        safetensors.torch.save_file(tensors, path, {**metadata, **hashes.UNKNOWN_HASHES})
        assert hashes.safetensors_hashes(path) == kohya_hashes(tensors, metadata)


def test_hashes_that_a_module_wrote_itself_are_left_alone(tmp_path):
    path = tmp_path / "file.safetensors"
    given = {"sshs_model_hash": "0x12", "ss_note": '"sshs_legacy_hash":"00000000"'}
    safetensors.torch.save_file({"a": torch.ones(2)}, path, given)
    hashes.write_hashes(path)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == given
