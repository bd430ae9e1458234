"""Tar headers made to cost time and memory, padding of all kinds, and keys that come twice."""

import io
import os
import subprocess
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from data_tools import SUBSTITUTE, index, picture, shards, stream, tar_of

from mvsplit.data.reader import Sample
from mvsplit.data.shard_writer import write_shards
from mvsplit.data.tars import members
from mvsplit.utils.errors import UserError

GOOD = {"z.cls": b"3", "z.png": picture(3)}


def header(name: str, kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def extended(content: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return header("x", kind, len(content)) + content + bytes(-len(content) % 512)


def tar_bytes(members: dict[str, bytes] = GOOD) -> bytes:
    return b"".join(header(name, tarfile.REGTYPE, len(c)) + c + bytes(-len(c) % 512) for name, c in members.items())


END = bytes(1024)
# What stands before a good sample, all of it well-formed as far as headers go, and how long the file then claims to be.
COSTLY: dict[str, tuple[Callable[[], bytes], int]] = {
    "pax of 5 GiB that takes 4 KB of the disk": (lambda: header("x", tarfile.XHDTYPE, 5 << 30), 6 << 30),
    "long name of 5 GiB": (lambda: header("x", tarfile.GNUTYPE_LONGNAME, 5 << 30), 6 << 30),
    "global pax of 5 GiB": (lambda: header("x", tarfile.XGLTYPE, 5 << 30), 6 << 30),
    "pax of digits": (lambda: extended(b"1" * 60_000), 0),
    "pax with a long note": (lambda: extended(b"60011 note=" + b"1" * 59_999 + b"\n"), 0),
    "pax of overlapping records": (lambda: extended(b"2 " * 30_000 + b"="), 0),
    "pax in pax in pax": (lambda: extended(b"12 note=abc\n") * 20_000, 0),
    "names of names": (lambda: extended(b"a.png\0", tarfile.GNUTYPE_LONGNAME) * 20_000, 0),
    "sparse map without end": (lambda: extended(b"1" * 511 + b"\1", tarfile.GNUTYPE_SPARSE)[:512] + b"\1" * 10**7, 0),
    "pax sparse map": (
        lambda: extended(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n") + tar_bytes({"a.png": b"9" * 10**6}), 0,
    ),
    "pax with a size below zero": (lambda: extended(b"11 size=-1\n") + tar_bytes({"a.png": b"x"}), 0),
    "pax with an enormous size": (lambda: extended(b"4010 size=" + b"9" * 3999 + b"\n") + tar_bytes({"a.png": b""}), 0),
    "packed": (lambda: __import__("gzip").compress(bytes(1 << 28), 9), 0),
}  # fmt: skip


@pytest.mark.parametrize("way", ["index", "webdataset"])
@pytest.mark.parametrize("what", COSTLY)
def test_costly_headers_cost_nothing(tmp_path: Path, what: str, way: str) -> None:
    made, length = COSTLY[what]
    path = tmp_path / "train-0.tar"
    path.write_bytes(made() + tar_bytes() + END)
    if length:
        os.truncate(path, length)
    tar_of(tmp_path / "train-1.tar", {"y.cls": b"4", "y.png": picture(4)})
    tracemalloc.start()
    began = time.monotonic()
    try:
        if way == "index":
            messages = [finding.message for finding in index(tmp_path, SUBSTITUTE).findings]
        else:
            messages = all_findings(stream_until(tmp_path, 4))
        assert time.monotonic() - began < 3
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert bool(messages) == (what != "pax with a long note")
    assert all("train-0.tar: " in message and message.isprintable() for message in messages)


def stream_until(folder: Path, count: int) -> list[Sample]:
    samples = iter(stream(folder, SUBSTITUTE))
    return [next(samples) for _ in range(count)]


def all_findings(samples: list[Sample]) -> list[str]:
    return [finding.message for sample in samples for finding in sample["findings"]]


def test_many_members_after_a_global_header_take_no_longer() -> None:
    """Else each would carry all of it on."""
    records = b"".join(b"13 k%06d=v\n" % i for i in range(3000))
    content = extended(records, tarfile.XGLTYPE) + tar_bytes({f"{i}.cls": b"1" for i in range(10_000)}) + END
    began = time.process_time()
    assert len(list(members(io.BytesIO(content), len(content)))) == 10_000
    assert time.process_time() - began < 2


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_foreign_names_are_read(tmp_path: Path, form: int) -> None:
    long = "f" * 60 + "/" + "n" * 90
    names = [f"{long}.png", f"{long}.cls"] if form == tarfile.USTAR_FORMAT else [f"ü{long * 3}.png", f"ü{long * 3}.cls"]
    with tarfile.open(tmp_path / "train-0.tar", "w", format=form) as tar:
        for name, data in zip(names, (picture(1), b"1"), strict=True):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5  # type: ignore[assignment]
            tar.addfile(info, io.BytesIO(data))
    assert index(tmp_path).columns["label"].tolist() == [1]
    assert next(iter(stream(tmp_path)))["label"] == 1


# ------------------------------------------------------------------ padding


@pytest.mark.parametrize("blocks", [1, 2, 20, 40, 64, 512, 2048])
def test_padding_up_to_a_whole_record_is_no_damage(tmp_path: Path, blocks: int) -> None:
    """Of GNU tar itself."""
    for name, data in GOOD.items():
        (tmp_path / name).write_bytes(data)
    command = ["tar", "-b", str(blocks), "--sort=name", "-cf", "train-0.tar", *GOOD]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert (tmp_path / "train-0.tar").stat().st_size % (512 * blocks) == 0
    found = index(tmp_path)
    assert (len(found), found.findings) == (1, [])
    assert all_findings(stream_until(tmp_path, 3)) == []


@pytest.mark.parametrize("way", ["index", "webdataset"])
@pytest.mark.parametrize("record", [10240, 1 << 20])
def test_a_tail_that_was_never_written_is_found(tmp_path: Path, record: int, way: str) -> None:
    """From a member's start on, and from its middle; of a tar of two records of a megabyte, or of many small ones."""
    path = shards(tmp_path, 700, 700)[0]
    whole = path.read_bytes()
    whole += bytes(-len(whole) % record)
    for place in (200 * 2048, 200 * 2048 + 1024 + 512 + 30):
        if place % 2048 == 0 and record > 10240:
            place = 100 * 2048  # more than one such record from the end
        path.write_bytes(whole[:place] + bytes(len(whole) - place))
        if way == "index":
            (finding,) = index(tmp_path, SUBSTITUTE).findings
            assert (finding.kind, "nothing but zeros from byte" in finding.message) == ("truncated", True)
        else:
            assert "nothing but zeros from byte" in all_findings(stream_until(tmp_path, 500))[0]


def test_a_long_file_of_zeros_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "train-0.tar"
    path.write_bytes(tar_bytes())
    os.truncate(path, 1 << 40)
    began = time.monotonic()
    (finding,) = index(tmp_path, SUBSTITUTE).findings
    assert finding.kind == "truncated"
    assert time.monotonic() - began < 2


def test_a_picture_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    """Sparse, in an image folder: 4 KB of the disk at most."""
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "good.png").write_bytes(picture(1))
    (tmp_path / "train" / "a" / "huge.png").touch()
    os.truncate(tmp_path / "train" / "a" / "huge.png", 1 << 40)
    found = index(tmp_path, SUBSTITUTE, "train", layout="folders")
    assert (len(found), [finding.kind for finding in found.findings]) == (1, ["bad_member"])


# ------------------------------------------------------------- keys that come twice


def test_a_key_that_comes_again_is_named(tmp_path: Path) -> None:
    """Not side by side: `tar` of an unsorted folder, or two sets put into one shard."""
    pairs = [(f"{key}.{suffix}", c) for key in "abca" for suffix, c in (("cls", b"1"), ("png", picture(1)))]
    (tmp_path / "train-0.tar").write_bytes(b"".join(tar_bytes({name: c}) for name, c in pairs) + END)
    found = index(tmp_path, SUBSTITUTE)
    assert len(found) == 3
    assert [finding.kind for finding in found.findings] == ["bad_member"]
    with pytest.raises(UserError, match=r"train-0\.tar: sample 'a' occurs again: .* adjacent"):
        index(tmp_path)


def test_a_set_without_samples_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{tmp_path}: no samples to write for train$"):
        write_shards(tmp_path, "train", [], shard_size=10)
