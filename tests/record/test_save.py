from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.files import atomic
from library.record import saves as save
from library.record.saves import BrokenWeightsError, SavePlan, check_free, save_network
from library.run import disk


class Network:
    """Saves the tensors it was given, as network modules do."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors = tensors or {"lora_unet_x.lora_up.weight": torch.full((3, 2), 1.5)}

    def save(self, file, dtype, metadata) -> None:
        save_file({key: value.to(dtype or value.dtype) for key, value in self.tensors.items()}, file, metadata)


def adapters():
    """A real adapter network, of one layer."""
    from torch import nn

    from networks.lora import LoRA
    from networks.network import Network
    from networks.sites import Site

    return Network([LoRA(Site("lora_unet_x", "unet", "unet", nn.Linear(4, 4)), rank=2, alpha=1)])


def names(paths) -> list[str]:
    return [path.name for path in paths]


# -- the plan


def plan(**changes) -> SavePlan:
    given = {"folder": Path("out"), "name": "fox", "total_steps": 60, "steps_per_epoch": 20}
    return SavePlan(**(given | changes))


def test_only_the_final_file_is_due_by_default():
    assert plan().planned_files() == [Path("out/fox.safetensors")]
    assert [step for step in range(1, 61) if plan().due(step)] == [60]


def test_names_are_kohyas():
    saves = plan(every_n_steps=25, every_n_epochs=1)
    assert names(saves.planned_files()) == [
        "fox-000001.safetensors",
        "fox-step00000025.safetensors",
        "fox-000002.safetensors",
        "fox-step00000050.safetensors",
        "fox.safetensors",  # and no file of the third epoch: it would be the same
    ]
    unnamed = plan(name=None, every_n_steps=50, every_n_epochs=2)
    assert names(unnamed.planned_files()) == [
        "epoch-000002.safetensors",
        "at-step00000050.safetensors",
        "last.safetensors",
    ]


def test_what_is_due_agrees_with_what_is_planned():
    for every_steps, every_epochs, per_epoch in ((7, 2, 9), (20, 1, 20), (1, 1, 60), (0, 3, 4), (100, 0, 100)):
        saves = plan(every_n_steps=every_steps, every_n_epochs=every_epochs, steps_per_epoch=per_epoch)
        due = [file.path for step in range(1, 61) for file in saves.due(step)]
        assert due == saves.planned_files()
        assert len(set(due)) == len(due)
        after = [file.path for step in range(31, 61) for file in saves.due(step)]
        assert after == saves.planned_files(after_step=30)


def test_the_ending_follows_the_format():
    saves = plan(every_n_steps=25, every_n_epochs=2, ending="ckpt")
    assert names(saves.planned_files()) == [
        "fox-step00000025.ckpt",
        "fox-000002.ckpt",
        "fox-step00000050.ckpt",
        "fox.ckpt",
    ]


def test_the_epoch_in_a_file_counts_finished_epochs():
    saves = plan(total_steps=50, every_n_steps=10, every_n_epochs=1)
    assert [(file.path.name, file.epoch) for step in range(1, 51) for file in saves.due(step)] == [
        ("fox-step00000010.safetensors", 0),
        ("fox-step00000020.safetensors", 0),  # kohya writes it before the epoch ends
        ("fox-000001.safetensors", 1),
        ("fox-step00000030.safetensors", 1),
        ("fox-step00000040.safetensors", 1),
        ("fox-000002.safetensors", 2),
        ("fox-step00000050.safetensors", 2),
        ("fox.safetensors", 3),
    ]


def removed(saves: SavePlan) -> list[tuple[int, str]]:
    steps = range(1, saves.total_steps + 1)
    return [(step, file.remove.name) for step in steps for file in saves.due(step) if file.remove]


def test_last_n_steps_counts_steps():
    """Kohya's own example: every 10, 30 to keep: at step 50 the file of step 10 goes."""
    assert removed(plan(every_n_steps=10, last_n_steps=30)) == [
        (50, "fox-step00000010.safetensors"),
        (60, "fox-step00000020.safetensors"),
    ]
    assert removed(plan(every_n_steps=10, last_n_steps=25))[0] == (40, "fox-step00000010.safetensors")


def test_last_n_epochs_counts_files():
    saves = plan(total_steps=200, every_n_epochs=2, last_n_epochs=2)
    assert removed(saves) == [(120, "fox-000002.safetensors"), (160, "fox-000004.safetensors")]


@pytest.mark.parametrize("name", ["a/b", "..", "", "a\\b", "/abs"])
def test_a_name_is_not_a_path(name):
    with pytest.raises(UserError, match=r"output_name: .* is not a plain file name"):
        plan(name=name)


def test_names_with_dots_stay_whole():
    assert plan(name="fox-v1.5").last_file.name == "fox-v1.5.safetensors"


def test_epochs_from_ratio():
    """kohya: floor(epochs / ratio), at least 1."""
    assert [save.epochs_from_ratio(*given) for given in ((10, 5), (10, 3), (3, 5))] == [2, 3, 1]


# -- before training


def test_existing_files_stop_the_run_and_the_remedies_are_named(tmp_path):
    saves = plan(folder=tmp_path, every_n_epochs=1)
    check_free(saves.planned_files(), overwrite=False)
    (tmp_path / "fox-000002.safetensors").touch()
    (tmp_path / "unrelated.safetensors").touch()
    with pytest.raises(UserError, match=r"would replace \S*fox-000002.safetensors: .*--output_name .*--overwrite"):
        check_free(saves.planned_files(), overwrite=False)
    check_free(saves.planned_files(), overwrite=True)


def test_many_existing_files_are_counted(tmp_path):
    saves = plan(folder=tmp_path, every_n_steps=5)
    for path in saves.planned_files():
        path.touch()
    with pytest.raises(UserError, match=r"step00000015.safetensors and 10 more"):
        check_free(saves.planned_files(), overwrite=False)


def test_a_folder_in_the_place_of_a_file_is_an_error_even_with_overwrite(tmp_path):
    (tmp_path / "fox.safetensors").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        check_free(plan(folder=tmp_path).planned_files(), overwrite=True)


def test_the_output_folder_is_made_and_tried(tmp_path):
    save.prepare_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output_dir: cannot write in .*file"):
        save.prepare_folder(tmp_path / "file")


# -- writing


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [(None, torch.float32), ("float", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)],
)
def test_a_file_has_its_precision_metadata_and_hashes(tmp_path, precision, dtype):
    path = tmp_path / "made" / "fox.safetensors"
    save_network(Network(), path, precision=precision, metadata={"ss_output_name": "fox"})
    assert {value.dtype for value in load_file(path).values()} == {dtype}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"ss_output_name", "sshs_model_hash", "sshs_legacy_hash"}
    assert metadata["sshs_model_hash"].strip("0")
    assert names(path.parent.iterdir()) == ["fox.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_file_is_as_readable_as_any_other(tmp_path):
    """safetensors itself makes files that only their owner can read."""
    save_network(Network(), tmp_path / "fox.safetensors", precision=None, metadata={})
    (tmp_path / "other").touch()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("fox.safetensors", "other")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize(
    ("value", "precision", "message"),
    [
        (float("nan"), None, r"lora_unet_y.lora_up.weight contains NaN; training has diverged"),
        (float("-inf"), "bf16", r"lora_unet_y.lora_up.weight contains infinity; training has diverged"),
        (
            1e5,
            "fp16",
            r"contains infinity; values beyond 65504 do not fit into fp16: use --save_precision bf16 or float",
        ),
    ],
)
def test_a_broken_network_never_replaces_a_good_file(tmp_path, value, precision, message):
    path = tmp_path / "fox.safetensors"
    save_network(Network(), path, precision=None, metadata={})
    good = path.read_bytes()
    bad = torch.zeros(50, 3)
    bad[49, 2] = value
    network = Network(**{"lora_unet_x.alpha": torch.tensor(1.0), "lora_unet_y.lora_up.weight": bad})
    with pytest.raises(BrokenWeightsError, match=f"fox.safetensors: not written: .*{message}"):
        save_network(network, path, precision=precision, metadata={})
    assert path.read_bytes() == good
    assert names(tmp_path.iterdir()) == ["fox.safetensors"]


@pytest.mark.parametrize("ending", ["ckpt", "pt"])
@pytest.mark.parametrize(("precision", "dtype"), [(None, torch.float32), ("bf16", torch.bfloat16)])
def test_a_pickled_file_holds_tensors_alone(tmp_path, ending, precision, dtype):
    network, path = adapters(), tmp_path / f"fox.{ending}"
    save_network(network, path, precision=precision, metadata={"ss_output_name": "fox"})
    tensors = torch.load(path, weights_only=True)
    assert type(tensors) is dict
    assert {value.dtype for value in tensors.values()} == {dtype}
    assert all(torch.equal(tensors[key], value.to(dtype)) for key, value in network.state_dict().items())
    assert names(path.parent.iterdir()) == [path.name]


def test_a_broken_network_never_replaces_a_good_pickled_file(tmp_path):
    network, path = adapters(), tmp_path / "fox.ckpt"
    save_network(network, path, precision=None, metadata={})
    good = path.read_bytes()
    with torch.no_grad():
        next(network.parameters())[0, 0] = float("nan")
    with pytest.raises(BrokenWeightsError, match=r"fox.ckpt: not written: .*lora_down.weight contains NaN"):
        save_network(network, path, precision=None, metadata={})
    assert path.read_bytes() == good
    assert names(tmp_path.iterdir()) == ["fox.ckpt"]


def test_nothing_is_left_behind_when_writing_fails_half_way(tmp_path):
    class Interrupted(Network):
        def save(self, file, dtype, metadata) -> None:
            super().save(file, dtype, metadata)
            raise KeyboardInterrupt

    path = tmp_path / "fox.safetensors"
    save_network(Network(), path, precision=None, metadata={})
    good = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        save_network(Interrupted(), path, precision=None, metadata={})
    assert path.read_bytes() == good
    assert names(tmp_path.iterdir()) == ["fox.safetensors"]


def test_the_leftover_of_a_killed_run_is_replaced(tmp_path):
    path = tmp_path / "fox.safetensors"
    with atomic.replacing(path) as beside:
        beside.write_bytes(b"half")
        leftover = beside.name
    path.unlink()
    (tmp_path / leftover).write_bytes(b"half")
    save_network(Network(), path, precision=None, metadata={})
    assert names(tmp_path.iterdir()) == ["fox.safetensors"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), "safetensors"])
def test_a_full_disk_is_said_so(tmp_path, error):
    from safetensors import SafetensorError

    if error == "safetensors":  # the message of safetensors 0.8 on a full file system
        error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    class Full(Network):
        def save(self, file, dtype, metadata) -> None:
            Path(file).write_bytes(b"half")
            raise error

    with pytest.raises(UserError, match=r"fox.safetensors: not written: the disk is full"):
        save_network(Full(), tmp_path / "fox.safetensors", precision=None, metadata={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_a_write_that_the_system_really_refuses_leaves_the_old_file(tmp_path, ending):
    """A limit on the size of files, in a process of its own: every writer gets the system's own error."""
    code = """
        import resource, sys, torch
        from pathlib import Path
        from safetensors.torch import save_file
        from library.errors import UserError
        from library.record.saves import save_network

        class Network:
            def save(self, file, dtype, metadata):
                tensors = {"a": torch.ones(20_000)}
                save_file(tensors, file, metadata) if file.endswith("s") else torch.save(tensors, file)

        path = Path(sys.argv[1])
        save_network(Network(), path, precision=None, metadata={"ss_n": "1"})
        good = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        try:
            save_network(Network(), path, precision=None, metadata={"ss_n": "2"})
        except UserError as error:
            assert "not written" in str(error), error
            assert path.read_bytes() == good
            assert [p.name for p in path.parent.iterdir()] == [path.name]
            print("kept")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / f"fox.{ending}")],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "kept", done.stderr


def test_our_own_network_is_saved_whole(tmp_path):
    """Names, hashes and precision of a real adapter network, read back."""
    network = adapters()
    path = tmp_path / "fox.safetensors"
    save_network(network, path, precision="fp16", metadata={"ss_network_dim": "2"})
    tensors = load_file(path)
    assert tensors.keys() == {"lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight", "lora_unet_x.alpha"}
    assert tensors["lora_unet_x.alpha"].item() == 1.0
    assert torch.equal(
        tensors["lora_unet_x.lora_down.weight"], network.state_dict()["lora_unet_x.lora_down.weight"].half()
    )


def test_the_most_that_lies_on_the_disk_at_one_time(tmp_path):
    """Of ten files two stay, and a third is there until the oldest of them has gone."""
    every = {"folder": tmp_path, "name": "fox", "total_steps": 10, "steps_per_epoch": 4, "every_n_steps": 1}
    assert disk.most_at_once(save.SavePlan(**every), after_step=0, of_file=3, of_state=100) == 33
    few = save.SavePlan(**every, last_n_steps=1, states=True, last_n_steps_state=3)
    # at step 9 the files of 9, 8 and still 7; the states of 9 ... 6 and still 5
    assert len(few.planned_files()) == len(few.planned_states()) == 11
    assert disk.most_at_once(few, after_step=0, of_file=3, of_state=100) == 3 * 3 + 5 * 100
    assert disk.most_at_once(few, after_step=9, of_file=3, of_state=100) == 206


def test_no_room_is_an_error_before_training(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1_000_000))
    assert train("--save_every_n_steps", "1") == 2
    assert "the run writes 2.7 MiB at one time, and 976.6 KiB are free" in capsys.readouterr().err
    assert train("--save_every_n_steps", "1", "--save_last_n_steps", "1", "--save_precision", "bf16") == 0


@pytest.mark.slow
def test_the_dry_run_lists_files_states_and_bytes(train, tmp_path, capsys):
    words = ("--save_every_n_steps", "2", "--save_state", "--loss_plot")
    assert train(*words, "--dry_run") == 0
    said = capsys.readouterr().out
    assert train(*words) == 0
    (files,) = re.findall(r"3 files of ([\d.]+) KiB", said)
    (states,) = re.findall(r"3 states of ([\d.]+) MiB", said)
    real = (tmp_path / "out" / "test.safetensors").stat().st_size / 2**10
    assert 0.9 * real < float(files) < real
    real = sum(path.stat().st_size for path in (tmp_path / "out" / "test-state").iterdir()) / 2**20
    assert 0.75 * real < float(states) < real  # each of many small tensors has a header in the file
    for path in (tmp_path / "out").iterdir():
        assert str(path) in said


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="rights as POSIX has them")
def test_a_folder_without_the_right_to_write(tmp_path, image_folder):
    """Also where the tests run as root, who may write anywhere: the rights are given up in a process of its own."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    code = f"""
        import os
        from pathlib import Path
        from library.errors import UserError
        from library.record.saves import prepare_folder
        if os.geteuid() == 0:
            os.setuid(65534)
        for folder in ({str(closed)!r}, {str(closed / "new")!r}):
            try:
                prepare_folder(Path(folder))
            except UserError as error:
                print(error)
    """
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o005 != 0o005:
            if folder.owner() != Path(tmp_path).owner():
                break
            folder.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert done.stdout.count("cannot write in") == 2, done.stdout + done.stderr
    assert "there is no right to write to it" in done.stdout
