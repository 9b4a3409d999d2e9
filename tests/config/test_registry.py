"""Names to targets and `key=value` words to arguments, strict for our own, as far as possible for third parties."""

from __future__ import annotations

import inspect
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from library.config import registry, source
from library.config.annotations import describe, fit
from library.config.registry import bind, load, load_path, parse_words, signature, split_words
from library.errors import UserError
from library.losses import LOSSES
from library.optimizers.registry import OPTIMIZERS

WORDS: dict[str, Any] = {
    "a=true": True,
    "a=True": True,
    "a=FALSE": False,
    "a=none": None,
    "a=1": 1,
    "a=1e-3": 1e-3,
    "a=-0.5": -0.5,
    "a=0.9,0.99": (0.9, 0.99),
    "a=(0.9, 0.99)": (0.9, 0.99),
    "a=[1,2]": [1, 2],
    "a=text": "text",
    "a='quoted text'": "quoted text",
    'a="5"': "5",
    "a=b=c": "b=c",
    "a=x.y.Z": "x.y.Z",
    "a=": "",
    "a = 3 ": 3,
    "a=__import__('os')": "__import__('os')",
}


@pytest.mark.parametrize("word", WORDS)
def test_words(word: str) -> None:
    found = parse_words([word], where="--x_args")["a"]
    assert found == WORDS[word]
    assert type(found) is type(WORDS[word])


FITS: list[tuple[str, str, Any]] = [
    ("4", "int", 4),
    ("4", "float", 4.0),
    ("4", "int | None", 4),
    ("None", "int | None", None),
    ("None", "Optional[int]", None),
    ("1", "bool", True),
    ("false", "bool", False),
    ("5", "str", "5"),
    ("5", "str | None", "5"),
    ("none", "str | None", None),
    ("5", "int | str", 5),
    ("0.9,0.99", "tuple[float, float]", (0.9, 0.99)),
    ("1,2,3", "Sequence[float]", (1.0, 2.0, 3.0)),
    ("1,2,3", "tuple[int, ...]", (1, 2, 3)),
    ("up", "Literal['down', 'up']", "up"),
    ("8", "Literal[8, 32]", 8),
    ("anything", "", "anything"),
    ("anything", "some.Unknown", "anything"),
]
MISFITS = [
    ("x", "int", "a whole number"),
    ("4.5", "int", "a whole number"),
    ("true", "int", "a whole number"),
    ("true", "float | None", "a number or none"),
    ("2", "bool", "true or false"),
    ("yes", "bool", "true or false"),
    ("0.9", "tuple[float, float]", "2 values with commas between them, each a number"),
    ("1,2,3", "tuple[float, float]", "2 values with commas between them, each a number"),
    ("1,x", "Sequence[float]", "values with commas between them, each a number"),
    ("left", "Literal['down', 'up']", "one of down, up"),
]


@pytest.mark.parametrize(("text", "annotation", "expected"), FITS)
def test_fit(text: str, annotation: str, expected: Any) -> None:
    found = fit(registry.parse_value(text), text, annotation)
    assert found == (expected,)
    assert found is not None
    assert type(found[0]) is type(expected)


@pytest.mark.parametrize(("text", "annotation", "described"), MISFITS)
def test_misfit(text: str, annotation: str, described: str) -> None:
    assert fit(registry.parse_value(text), text, annotation) is None
    assert describe(annotation) == described


def message(*arguments: Any, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        bind(*arguments, **{"where": "--x_args", **more})
    return str(caught.value)


# A third party's module, as an import would find it
def open_target(unet: object, rank: int = 4, **kwargs: object) -> None: ...


def closed_target(unet: object, rank: int = 4) -> None: ...


@pytest.fixture(autouse=True)
def third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("thirdparty")
    module.open_target, module.closed_target = open_target, closed_target  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "thirdparty", module)


def test_third_party_names_are_checked_where_they_can_be() -> None:
    found = bind("thirdparty.open_target", ["rank=8", "algo=lokr"], given=("unet",), where="--x_args")
    assert found == ({"rank": 8, "algo": "lokr"}, ["algo"])
    assert message("thirdparty.closed_target", ["ranks=8"], given=("unet",)) == (
        "--x_args: thirdparty.closed_target takes no 'ranks', did you mean 'rank'? It takes: unet, rank"
    )


def test_values_as_text_are_understood_by_modules_written_for_text() -> None:
    words = ["a=true", "b=False", "c=none", "d=8", "e=1,2", "rank=4"]
    found, _ = bind("thirdparty.open_target", words, given=("unet",), where="--x_args", as_text=True)
    assert found == {"a": "True", "b": False, "c": None, "d": "8", "e": "1,2", "rank": "4"}


def test_what_the_caller_fills() -> None:
    assert message("thirdparty.closed_target", []) == "--x_args: thirdparty.closed_target needs unet=..."
    assert message("thirdparty.closed_target", ["unet=1"], reserved=("unet",)) == (
        "--x_args: 'unet' is set by the program and cannot be given here"
    )
    assert bind("thirdparty.closed_target", ["rank=2"], given=("unet", "rank"), where="")[0] == {"rank": 2}


def test_a_list_may_have_spaces_after_its_commas() -> None:
    words = ["network_reg_lrs=attn2=1e-4, mlp=1e-5"]
    assert split_words(words, where="") == {"network_reg_lrs": "attn2=1e-4, mlp=1e-5"}


def test_mistakes_in_words() -> None:
    assert message("thirdparty.open_target", ["rank"]) == "--x_args: 'rank' is not of the form name=value"
    assert message("thirdparty.open_target", ["=8"]) == "--x_args: '=8' is not of the form name=value"
    assert message("thirdparty.open_target", ["a=8 b=9"]) == "--x_args: 'a=8 b=9' is one word: write a=… and b=… as two"
    assert message("thirdparty.open_target", ["a=8", "a=9"]) == "--x_args: 'a' is given twice: 8 and 9"


def test_our_own_targets_are_checked_strictly() -> None:
    path = "networks.lora.Sizes"
    found, unchecked = bind(path, ["conv_dim=4", "conv_alpha=1"], where="--network_args")
    assert (found, unchecked) == ({"conv_dim": 4, "conv_alpha": 1.0}, [])
    assert "takes no 'conv_dims', did you mean 'conv_dim'?" in message(path, ["conv_dims=4"])
    assert message(path, ["conv_dim=big"]) == "--x_args: conv_dim: 'big' is not a whole number or none"


MISSING = {
    "nopackage.sub.Thing": "--t: 'nopackage.sub': the package 'nopackage' is not installed: pip install nopackage",
    "lycoris_typo": "--t: 'lycoris_typo' is not a path such as package.module.Name",
    "json.decoders.X": "--t: there is no module 'json.decoders', did you mean 'json.decoder'?",
    "json.decoder.JSONDecoders": "--t: module 'json.decoder' has no 'JSONDecoders', did you mean 'JSONDecoder'?",
    "networks.lorra.LoRA": "--t: there is no module 'networks.lorra', did you mean 'networks.lora'?",
    "networks.lora.LoRa": "--t: module 'networks.lora' has no 'LoRa', did you mean 'LoRA'?",
}


@pytest.mark.parametrize("path", MISSING)
def test_targets_that_are_not_there(path: str) -> None:
    assert message(path, [], named_by="--t") == MISSING[path]
    with pytest.raises(UserError):
        load_path(path, where="--t")


def test_pip_knows_some_packages_by_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._PIP_NAMES, "nopackage", "no-package")
    expected = "--t: 'nopackage.kohya': the package 'nopackage' is not installed: pip install no-package"
    assert message("nopackage.kohya.create_network", [], named_by="--t") == expected
    assert registry._PIP_NAMES["lycoris"] == "lycoris-lora"


def test_a_module_that_needs_an_absent_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("import absent_package\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="'mine' needs the package 'absent_package', which is not installed"):
        registry.load_module("mine", where="--t")


def test_load() -> None:
    assert load(LOSSES, "L2") is load_path("library.losses.l2.l2", where="")
    with pytest.raises(UserError, match=r"^--loss: 'l3' is unknown\. Known: l2$"):
        load({"l2": "x"}, "l3", where="--loss")


@pytest.mark.parametrize(
    "path", ["networks.lora.Sizes", "networks.lora.Settings", "library.optimizers.CustomAdamW", *LOSSES.values()]
)
def test_source_and_import_agree(path: str) -> None:
    """What is read from the source is what Python sees after the import."""
    found = signature(path, where="")
    assert found.ours
    parameters = list(inspect.signature(load_path(path, where="")).parameters.values())
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    assert list(found.parameters) == [p.name for p in named]
    assert found.required == {p.name for p in named if p.default is p.empty}
    assert found.takes_any == (len(named) < len(parameters))


def test_source_follows_imports_and_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "library_like"
    (package / "sub").mkdir(parents=True)
    (package / "__init__.py").write_text("from .sub import Child\nfrom json import dumps\n", encoding="utf-8")
    (package / "sub" / "__init__.py").write_text("from library_like.sub.child import Child\n", encoding="utf-8")
    (package / "sub" / "child.py").write_text(
        "class Base:\n    def __init__(self, a: int, *, b: float = 1.0, c, **kw): ...\nclass Child(Base): ...\n"
        "class Bare: ...\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(source, "_PACKAGES", ("library_like",))
    found = source.read_signature("library_like.Child", where="")
    assert found == source.SourceSignature({"a": "int", "b": "float", "c": ""}, frozenset({"a", "c"}), takes_any=True)
    assert source.read_signature("library_like.dumps", where="") is None
    bare = source.read_signature("library_like.sub.child.Bare", where="")
    assert bare == source.SourceSignature({}, frozenset(), takes_any=False)


def test_keywords_of_a_typed_dict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`**options: Unpack[Keywords]` stands for the keys of Keywords, which may be made at run time."""
    package = tmp_path / "library_of_keywords"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "keywords.py").write_text(
        "from typing import Literal, TypedDict\n"
        "Keywords = TypedDict('Keywords', {'a': float, 'b': Literal['x', 'y']}, total=False)\n"
        "class Needed(TypedDict):\n    c: int\n",
        encoding="utf-8",
    )
    (package / "target.py").write_text(
        "from typing import TypedDict\nfrom typing_extensions import Unpack\n"
        "from .keywords import Keywords, Needed\n"
        "class Target:\n    def __init__(self, first: int, **options: Unpack[Keywords]): ...\n"
        "def needs(**options: Unpack[Needed]): ...\n"
        "def loose(**options: int): ...\n"
        "class Own(TypedDict):\n    d: int\n"
        "def own(**options: Unpack[Own]): ...\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(source, "_PACKAGES", ("library_of_keywords",))
    found = {
        name: source.read_signature(f"library_of_keywords.target.{name}", where="")
        for name in ("Target", "needs", "loose", "own")
    }
    annotations = {"first": "int", "a": "float", "b": "Literal['x', 'y']"}
    assert found["Target"] == source.SourceSignature(annotations, frozenset({"first"}), takes_any=False)
    assert found["needs"] == source.SourceSignature({"c": "int"}, frozenset({"c"}), takes_any=False)
    assert found["own"] == source.SourceSignature({"d": "int"}, frozenset({"d"}), takes_any=False)
    assert found["loose"] == source.SourceSignature({}, frozenset(), takes_any=True)
    assert fit("x", "x", annotations["b"]) == ("x",)
    assert describe(annotations["b"]) == "one of x, y"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_registered_optimizer_can_be_bound(name: str) -> None:
    pytest.importorskip(OPTIMIZERS[name].partition(".")[0])
    assert bind(OPTIMIZERS[name], [], given=("params", "lr"), where="--optimizer_args") == ({}, [])
