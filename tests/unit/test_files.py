"""Files are complete or absent, also on a full disk."""

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_tools import datamodule, index, picture, shards

from mvsplit.data.digits import write_digits
from mvsplit.data.index import ShardIndex, write_index
from mvsplit.data.shard_encoder import write_json
from mvsplit.data.shard_writer import write_shard
from mvsplit.data.tar_scan import Shard
from mvsplit.utils.entry import explain
from mvsplit.utils.files import remove_partial, whole_file

LARGE = ShardIndex("there", [Shard("a.tar", 10**9, samples=50_000)], {"label": np.arange(50_000)})
WRITERS: dict[str, Callable[[Path], Any]] = {
    "shard": lambda path: write_shard(path, [(str(i), {"png": picture(i), "cls": b"1"}) for i in range(200)]),
    "index": lambda path: write_index(path, LARGE),
    "manifest": lambda path: write_json(path, list(range(100_000))),
}


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A disk of 100 KB."""
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.mark.parametrize("what", WRITERS)
def test_a_full_disk_names_the_file_and_keeps_the_old_one(full: Path, what: str) -> None:
    path = full / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="No space left on device") as caught:
        WRITERS[what](path)
    assert explain(caught.value) == f"{path}: No space left on device"
    assert {p.name: p.read_bytes() for p in full.iterdir()} == {"file": b"old"}


@pytest.mark.parametrize("what", WRITERS)
def test_a_quota_does_too(tmp_path: Path, what: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            WRITERS[what](tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert explain(caught.value) == f"{tmp_path}/file: File too large"
    assert list(tmp_path.iterdir()) == []


def test_a_set_that_does_not_fit_is_named_and_removed(full: Path, tmp_path: Path) -> None:
    module = datamodule(full / "digits", tmp_path, prepare=write_digits)
    with pytest.raises(OSError, match="No space left on device") as caught:
        module.provide()
    assert explain(caught.value).startswith(f"{full}/")
    assert list(full.iterdir()) == []


def test_an_index_that_cannot_be_stored_is_reported(
    full: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards(tmp_path / "set", 30)
    with suppress(OSError), (full / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    (tmp_path / "set" / "cache").symlink_to(full)
    with caplog.at_level("INFO", logger="mvsplit"):
        assert len(index(tmp_path / "set")) == 30
    assert ".safetensors: No space left on device)" in caplog.text


def test_what_a_killed_process_left_is_not_written_through(tmp_path: Path) -> None:

    (tmp_path / "victim").write_bytes(b"theirs")
    (tmp_path / f"file.{os.getpid()}.partial").symlink_to(tmp_path / "victim")
    with whole_file(tmp_path / "file") as file:
        file.write(b"ours")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"victim": b"theirs", "file": b"ours"}


def test_preparing_removes_only_what_it_made(tmp_path: Path) -> None:
    """Of two processes that start at once, one is the first."""
    theirs = tmp_path / f".set.{os.getpid()}"
    theirs.mkdir()
    (theirs / "thesis.tex").touch()

    def prepare(folder: Path) -> None:
        shards(folder, 10)
        shards(tmp_path / "set", 20)  # the other process was first

    datamodule(tmp_path / "set", tmp_path, prepare=prepare).provide()
    assert (theirs / "thesis.tex").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [theirs.name, "set"]
    assert len(list((tmp_path / "set").iterdir())) == 2


def test_leftovers_of_killed_processes_are_removed_but_nothing_behind_a_link(tmp_path: Path) -> None:
    folder, other = tmp_path / "set", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    for name in ("a.png.12.partial", "a.png", "b.partial", "12.partial.txt"):
        (folder / name).touch()
        (other / name).touch()
    (folder / "linked.34.partial").symlink_to(other / "a.png.12.partial")
    (folder / "linked").symlink_to(other)
    remove_partial(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["12.partial.txt", "a.png", "b.partial", "linked"]
    remove_partial(folder / "linked")
    remove_partial(folder / "nowhere")
    assert len(list(other.iterdir())) == 4
