"""Hub ids, with a hub that the tests play."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from library.errors import UserError
from library.models.checkpoints.hub import wanted
from library.models.checkpoints.open_file import locate

_FILES = [
    *("model_index.json", "README.md", "v1-5-pruned.ckpt", "v1-5-pruned.safetensors"),
    *("scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"),
    *("safety_checker/config.json", "safety_checker/model.safetensors"),
    *("unet/config.json", "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.safetensors"),
    *("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors"),
    *("vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors"),
    *("text_encoder/config.json", "text_encoder/model.safetensors.index.json"),
    *("text_encoder/model-00001-of-00002.safetensors", "text_encoder/model-00002-of-00002.safetensors"),
    *("text_encoder/pytorch_model.bin", "text_encoder/model.fp16.safetensors"),
]


def test_only_one_set_of_weights_is_fetched() -> None:
    assert wanted(_FILES) == [
        *("model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"),
        *("unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
        *("vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors"),
        *("text_encoder/config.json", "text_encoder/model.safetensors.index.json"),
        *("text_encoder/model-00001-of-00002.safetensors", "text_encoder/model-00002-of-00002.safetensors"),
    ]


def test_every_tokenizer_that_a_family_reads_is_fetched() -> None:
    assert wanted(["t5_tokenizer/tokenizer.json"]) == ["t5_tokenizer/tokenizer.json"]


def test_a_vae_has_a_repository_of_its_own() -> None:
    files = [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.bin",
        "diffusion_pytorch_model.safetensors",
        "sdxl.safetensors",
    ]
    assert wanted(files) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_a_repository_of_single_files_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = _Hub(monkeypatch, error=None, cached=tmp_path)
    hub.files = ["README.md", "noob-xl.safetensors"]
    with pytest.raises(
        UserError, match=r"someone/model: the hub has no diffusers folder .*noob-xl\.safetensors; fetch"
    ):
        locate("someone/model")


class _Hub:
    """What the two functions of huggingface_hub do when asked, and what they were asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, error: Exception | None, cached: Path | None) -> None:
        self.error, self.cached, self.patterns, self.files = error, cached, None, _FILES
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda _api, _name, **_rest: self.info())
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)

    def info(self) -> Any:
        if self.error:
            raise self.error
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.files])

    def download(self, _name: str, *, allow_patterns: Any = None, local_files_only: bool = False) -> str:
        if self.cached is None:
            raise FileNotFoundError
        assert local_files_only == (self.error is not None)
        self.patterns = allow_patterns
        return str(self.cached)


def test_a_hub_id_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = _Hub(monkeypatch, error=None, cached=tmp_path)
    assert locate("some-one/a-model.v1") == tmp_path
    assert hub.patterns == wanted(_FILES)


def test_without_a_network_the_cache_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    _Hub(monkeypatch, error=ConnectionError("no route"), cached=tmp_path)
    assert locate("someone/model") == tmp_path
    assert "is used from the cache" in caplog.text


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no route"), r"someone/model: no such file or folder.*no connection \(ConnectionError\)"),
        (RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None)), "nor does the hub have"),
    ],
)
def test_what_cannot_be_fetched_is_an_error(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    _Hub(monkeypatch, error=error, cached=None)
    with pytest.raises(UserError, match=message):
        locate("someone/model")


def test_paths_are_not_taken_for_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _Hub(monkeypatch, error=AssertionError("asked the hub"), cached=None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for path in ("models/missing", "other/model.safetensors", "./a/b", "a/b/c", "name"):
        with pytest.raises(UserError, match="no such file or folder") as caught:
            locate(path)
        assert "connection" not in str(caught.value)
