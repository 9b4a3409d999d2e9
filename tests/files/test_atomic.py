"""Files and folders that are whole or not there."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from library.errors import UserError
from library.files import atomic

FILES = ("a", "b", "c")


def write(path: Path, text: str) -> None:
    with atomic.replacing_folder(path) as beside:
        for name in FILES:
            (beside / name).write_text(text)


def read(path: Path) -> str:
    """What a whole folder holds."""
    assert sorted(file.name for file in path.iterdir()) == list(FILES)
    (text,) = {(path / name).read_text() for name in FILES}
    return text


def killed_at(moment: int, act: Callable[[], None]) -> bool:
    """Do it in a child that ends, as by kill -9, before its `moment`th call of the file system; False: it came through.

    What the child would have cleaned up stays.
    """
    child = os.fork()
    if child == 0:
        calls = 0

        def end(event: str, _: object) -> None:
            nonlocal calls
            if event == "open" or event.startswith("os."):
                calls += 1
                if calls == moment:
                    os._exit(9)

        sys.addaudithook(end)
        act()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def kills(act: Callable[[], None], *, before: Callable[[], None]) -> Iterator[int]:
    """Kill it at each of its moments in turn, each time from the same beginning; yields after each kill."""
    for moment in itertools.count(1):
        before()
        if not killed_at(moment, act):
            break
        yield moment
    assert moment > 5, "it was hardly ever killed"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the one that is killed is a fork")
@pytest.mark.parametrize("earlier", [None, "old"])
def test_a_folder_is_whole_whenever_it_is_killed(tmp_path, earlier):
    path = tmp_path / "x-state"

    def before() -> None:
        atomic.remove(path)
        if earlier is not None:
            write(path, earlier)

    seen = set()
    for _ in kills(lambda: write(path, "new"), before=before):
        atomic.bring_back(path)
        seen.add(read(path) if path.exists() else None)
        write(path, "after")
        assert read(path) == "after"
        assert [file.name for file in tmp_path.iterdir()] == ["x-state"], "leftovers of the kill"
    assert seen == {earlier, "new"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the one that is killed is a fork")
def test_folders_within_a_folder_need_not_be_opened(tmp_path, monkeypatch):
    """Windows opens none."""
    sync = atomic._sync

    def files_only(path):
        if path.is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        sync(path)

    monkeypatch.setattr(atomic, "_sync", files_only)
    with atomic.replacing_folder(tmp_path / "model") as beside:
        (beside / "unet").mkdir()
        (beside / "unet" / "config.json").write_text("{}")
    assert (tmp_path / "model" / "unet" / "config.json").read_text() == "{}"


@pytest.mark.skipif(os.name != "posix", reason="folders are not opened elsewhere")
def test_a_folder_is_on_the_disk_with_its_names(tmp_path, monkeypatch):
    synced, sync = [], atomic._sync
    monkeypatch.setattr(atomic, "_sync", lambda path: (synced.append(path.name), sync(path)))
    write(tmp_path / "x-state", "new")
    assert sorted(synced[:3]) == list(FILES)
    assert synced[3:] == [".x-state.part", tmp_path.name]


def test_a_folder_that_is_removed_is_whole_or_gone(tmp_path):
    """Deleted file by file it once was half a state that --resume found."""
    path = tmp_path / "x-state"
    seen = set()
    for _ in kills(lambda: atomic.remove(path), before=lambda: write(path, "there")):
        atomic.bring_back(path)
        seen.add(read(path) if path.exists() else None)
        atomic.remove(path)
        assert list(tmp_path.iterdir()) == []
    assert seen == {"there", None}


def test_the_older_folder_stays_if_the_new_one_cannot_be_moved(tmp_path, monkeypatch):
    path = tmp_path / "x-state"
    write(path, "old")
    move = os.replace

    def refuse(source: Path, target: Path) -> None:
        if source.name.endswith(".part"):
            raise PermissionError(13, "Permission denied")
        move(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match=r"x-state: not written: Permission denied"):
        write(path, "new")
    assert read(path) == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["x-state"]


def test_what_was_half_replaced_is_found(tmp_path):
    write(tmp_path / "x-state", "old")
    os.replace(tmp_path / "x-state", tmp_path / ".x-state.old")
    assert atomic.half_replaced(tmp_path) == [tmp_path / "x-state"]
    atomic.bring_back(tmp_path / "x-state")
    assert read(tmp_path / "x-state") == "old"
    assert atomic.half_replaced(tmp_path) == []


def test_what_was_removed_does_not_come_back(tmp_path):
    write(tmp_path / "x-state", "old")
    os.replace(tmp_path / "x-state", tmp_path / ".x-state.old")
    atomic.remove(tmp_path / "x-state")
    assert list(tmp_path.iterdir()) == []


def test_old_files_go_and_absent_ones_do_not_matter(tmp_path):
    (tmp_path / "a").touch()
    atomic.remove(tmp_path / "a")
    atomic.remove(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_a_full_disk_under_a_folder_is_said(tmp_path):
    """A limit on the size of files, in a process of its own: torch gets the system's own error."""
    code = """
        import resource, sys, torch
        from pathlib import Path
        from library.errors import UserError
        from library.files import atomic

        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        try:
            with atomic.replacing_folder(Path(sys.argv[1])) as beside:
                torch.save(torch.ones(20_000), beside / "state.pt")
        except UserError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "x-state")],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert "x-state: not written: " in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []
