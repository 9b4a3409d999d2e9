"""Torch checkpoints: every honest one loads, no malicious one does anything."""

from __future__ import annotations

import collections
import functools
import io
import pickle
import pickletools
import struct
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from library.errors import UserError
from library.files.index import read_index
from library.files.pickles import read_pickle_index
from library.models.checkpoints.weights import Reader


def _read_all(path: Path) -> dict[str, torch.Tensor]:
    with Reader() as reader:
        return {
            name: reader.read(e, dtype=getattr(torch, e.dtype), device=torch.device("cpu"), mapped=False).view(e.shape)
            for name, e in read_index(path).entries.items()
        }


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def save(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Any], Path]:
    """torch.save in each format."""

    def write(content: Any) -> Path:
        path = tmp_path / "model.ckpt"
        torch.save(content, path, _use_new_zipfile_serialization=request.param)
        return path

    return write


def _weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(40)
    return collections.OrderedDict(
        plain=torch.randn(3, 4),
        half=torch.randn(2, 3, 1, 1).half(),
        brain=torch.randn(5).bfloat16(),
        transposed=torch.randn(3, 5).t(),
        sliced=torch.randn(6, 6)[1:4, ::2],
        shared=base[8:20],
        sharing=base[12:40].view(4, 7),
        parameter=torch.nn.Parameter(torch.randn(2)),
        scalar=torch.tensor(3.5),
        whole=torch.arange(5),
        channels_last=torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        empty=torch.empty(0, 3),
    )


@pytest.mark.parametrize("nested", [True, False])
def test_tensors_of_every_form_are_read(save: Callable[[Any], Path], nested: bool) -> None:
    weights = _weights()
    found = _read_all(save({"state_dict": weights, "epoch": 3} if nested else weights))
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What Lightning's old checkpoints hold beside the weights: objects of its own classes and of others'."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")

    class ModelCheckpoint:
        def __init__(self) -> None:
            self.best = 1

    class AttributeDict(dict):
        pass

    class History(list):
        pass

    for made in (ModelCheckpoint, AttributeDict, History):
        made.__module__, made.__qualname__ = module.__name__, made.__name__
        setattr(module, made.__name__, made)
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    return {
        "callbacks": {ModelCheckpoint: {"best_model_score": torch.tensor(1.0), "history": History([1, 2])}},
        "hparams": AttributeDict(a=1, b={"c": [2]}),
        "loops": collections.defaultdict(list, {"x": [1]}),
        "object": ModelCheckpoint(),
        "partial": functools.partial(print, "hello"),
        "path": Path("somewhere"),
        "dtype": torch.float16,
        "size": torch.Size([1, 2]),
        "set": {1, 2},
        "bytes": b"abc",
    }


def test_a_lightning_checkpoint_loads_without_lightning(
    save: Callable[[Any], Path],
    lightning: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = save({**lightning, "state_dict": _weights(), "optimizer_states": [{"state": {0: {"a": torch.ones(2)}}}]})
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, name)
    caplog.set_level("INFO")
    assert _read_all(path).keys() == _weights().keys()
    assert "which are not executed" in caplog.text
    assert "pytorch_lightning" in caplog.text
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)


def _global(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


# Programs for the pickle machine, most of which would create the file `mark` if anything in them were executed.
def _attacks(mark: str) -> dict[str, bytes]:
    command, code = _text(f"touch {mark}"), _text(f"open({mark!r}, 'w').close()")
    system, rebuild = _global("os.system"), _global("torch._utils._rebuild_tensor_v2")
    getattr_ = _global("builtins.getattr")
    os_again = getattr_ + b"(" + _global("os.path") + _text("os") + b"tR"
    return {
        "os.system": system + b"(" + command + b"tR",
        "posix.system": _global("posix.system") + b"(" + command + b"tR",
        "eval": _global("builtins.eval") + b"(" + code + b"tR",
        "exec": _global("builtins.exec") + b"(" + code + b"tR",
        "stack global": _text("os") + _text("system") + b"\x93(" + command + b"tR",
        "inst": b"(" + command + b"ios\nsystem\n",
        "obj": b"(" + system + command + b"o",
        "newobj": system + b"(" + command + b"t\x81",
        "getattr chain": getattr_ + b"(" + os_again + _text("system") + b"tR(" + command + b"tR",
        "dotted name": _text("builtins") + _text("object.__subclasses__") + b"\x93)R(" + command + b"tR",
        "torch's own eval": _global("torch._inductor.codecache.eval") + b"(" + code + b"tR",
        "torch.load": _global("torch.load") + b"(" + command + b"tR",
        "torch storage bytes": _global("torch.storage._load_from_bytes") + b"(C\x04abcdtR",
        "rebuild from type": _global("torch._tensor._rebuild_from_type_v2") + b"(" + system + command + b"tR",
        "numpy": _global("numpy.testing._private.utils.runstring") + b"(" + code + b"}tR",
        "setstate": system + b")R}" + _text("x") + command + b"sb",
        "state of a stand-in": rebuild + b"}" + _text("__call__") + system + b"sb",
        "slots of a stand-in": rebuild + b"N}" + _text("__class__") + system + b"s\x86b",
        "a dict's own method": _global("collections.OrderedDict") + b")R}" + _text("items") + system + b"sb",
        "defaultdict": _global("collections.defaultdict") + b"(" + system + b"tR",
        "operator": _global("operator.methodcaller") + b"(" + _text("system") + command + b"tR(" + os_again + b"tR",
        "import": _global("builtins.__import__") + b"(" + _text("os") + b"tR",
        "apply": _global("builtins.map") + b"(" + system + b"]" + command + b"atR",
        "reference": b"(" + _text("storage") + system + command + b"NNtQ",
    }


_ATTACKS = list(_attacks("x"))


def _with_attack(content: bytes, attack: bytes) -> bytes:
    """The pickle of a checkpoint with the attack's value under a further name of its outermost table."""
    assert content.endswith(b".")
    return content[:-1] + _text("attack") + attack + b"s."


_WATCHED = ("os.system", "os.posix_spawn", "subprocess.Popen", "pickle.find_class")  # what the interpreter reports
_seen: list[str] | None = None


def _watch(event: str, _arguments: object) -> None:
    if _seen is not None and event in _WATCHED:
        _seen.append(event)


@pytest.fixture
def forbidden() -> Iterator[list[str]]:
    """Notes each event that no weights file may cause: a command, or a name that is looked up."""
    global _seen
    if not _hooked:
        sys.addaudithook(_watch)  # for good: there is no removing one
        _hooked.append(True)
    _seen = []
    yield _seen
    _seen = None


_hooked: list[bool] = []


@pytest.mark.parametrize("attack", _ATTACKS)
def test_nothing_in_a_zip_checkpoint_is_executed(tmp_path: Path, attack: str, forbidden: list[str]) -> None:
    honest, bad, mark = tmp_path / "honest.ckpt", tmp_path / "bad.ckpt", tmp_path / "executed"
    torch.save({"state_dict": {"w": torch.ones(3)}}, honest)
    with zipfile.ZipFile(honest) as source, zipfile.ZipFile(bad, "w") as target:
        for info in source.infolist():
            data = source.read(info)
            if info.filename.endswith("data.pkl"):
                data = _with_attack(data, _attacks(str(mark))[attack])
                pickletools.dis(data, out=io.StringIO())  # a well-formed program
            target.writestr(info, data)
    _read_or_refuse(bad)
    assert not mark.exists()
    assert forbidden == []


@pytest.mark.parametrize("attack", _ATTACKS)
def test_nothing_in_a_legacy_checkpoint_is_executed(tmp_path: Path, attack: str, forbidden: list[str]) -> None:
    mark = tmp_path / "executed"
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    head += pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)
    body = _with_attack(pickle.dumps({"state_dict": {"epoch": 1}}, 2), _attacks(str(mark))[attack])
    path = tmp_path / "bad.ckpt"
    path.write_bytes(head + body + pickle.dumps([], 2))
    with pytest.raises(UserError):
        read_index(path)
    # the attack may stand at any other place of the file just as well
    path.write_bytes(b"\x80\x02" + _attacks(str(mark))[attack] + b".")
    with pytest.raises(UserError):
        read_index(path)
    assert not mark.exists()
    assert forbidden == []


def _read_or_refuse(path: Path) -> None:
    """Either the weights come out unharmed or the file is called damaged; nothing else may happen."""
    try:
        entries = read_index(path).entries
    except UserError:
        return
    assert entries.keys() == {"w"}
    assert torch.equal(_read_all(path)["w"], torch.ones(3))


def test_the_attacks_would_work_on_an_ordinary_unpickler(tmp_path: Path) -> None:
    """Or the tests above would prove nothing."""
    mark = tmp_path / "executed"
    for name in ("os.system", "eval", "stack global", "inst", "obj"):
        pickle.loads(b"\x80\x04" + _attacks(str(mark))[name] + b".")
        assert mark.exists(), name
        mark.unlink()


class _Lie:
    """Pickles as a call of torch._utils._rebuild_tensor_v2 with false numbers."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.arguments


@pytest.mark.parametrize(
    ("start", "shape", "stride"),
    [
        (0, (1000,), (1,)),
        (5, (4,), (1,)),
        (-1, (4,), (1,)),
        (0, (2, 2), (1000, 1)),
        (0, (2,), (-1,)),
        (0, (2, 2), (1,)),
        (0, ("a",), (1,)),
        (0, (2.0,), (1,)),
        (0, [4], [1]),
        (True, (4,), (1,)),
        (0, (1 << 62,), (1 << 62,)),
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(
    save: Callable[[Any], Path], start: Any, shape: Any, stride: Any
) -> None:
    storage = torch.ones(8)[:8].untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    path = save({"w": _Lie(typed, start, shape, stride, False, {})})
    with pytest.raises(UserError, match=r"'w'|damaged"):
        read_index(path)


def test_cut_off_checkpoints_are_refused(save: Callable[[Any], Path]) -> None:
    path = save({"w": torch.randn(1000)})
    whole = path.read_bytes()
    for length in (len(whole) - 1500, 600, 100, 20):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"model\.ckpt"):
            read_index(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds no table of weights"),
        ({"a": 1}, "holds no table of weights"),
        (torch.ones(2), "holds no table of weights"),
        (torch.nn.Linear(2, 2), r"torch.nn|holds no table of weights"),
    ],
)
def test_checkpoints_without_weights_are_refused(save: Callable[[Any], Path], content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_index(save(content))


def test_other_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match="not one that torch wrote"):
        read_pickle_index(path)
    torch.save({"w": torch.ones(3)}, tmp_path / "honest.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "honest.ckpt") as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
    with pytest.raises(UserError, match="compressed"):
        read_pickle_index(path)
    path.write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(UserError, match="not one that torch wrote"):
        read_pickle_index(path)


def test_unsupported_elements_are_named(save: Callable[[Any], Path]) -> None:
    with pytest.raises(UserError, match="type that is not supported"):
        read_index(save({"w": torch.ones(2, dtype=torch.complex64)}))
