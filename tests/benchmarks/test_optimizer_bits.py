"""The comparison of two versions: repeatable, and it sees a bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import optimizer_bits
from library.optimizers.custom_adamw import native
from library.optimizers.custom_adamw.techniques import tam


@pytest.mark.slow
def test_it_is_repeatable_and_sees_the_last_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        native.library()
    except native.Unavailable:
        pytest.skip("no C++ compiler")
    first = dict(optimizer_bits.hashes(["use_tam"], tmp_path))
    assert dict(optimizer_bits.hashes(["use_tam"], tmp_path)) == first
    monkeypatch.setattr(tam, "EPS", 1e-6)
    changed = dict(optimizer_bits.hashes(["use_tam"], tmp_path))
    assert {label for label in first if changed[label] != first[label]} == {
        label for label in first if "eager" in label
    }
