"""All kinds of damage, done to real shards: found, named, counted, and survived if the policy says so."""

import io
import json
import os
import pickle
import struct
import tarfile
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from data_tools import (
    SUBSTITUTE,
    colour,
    datamodule,
    grey,
    index,
    jpeg_shards,
    latent_shards,
    picture,
    reader,
    shards,
    tar_of,
)
from PIL import Image

from mvsplit.data.faults import DataFault, FaultCounts, FaultPolicy, Finding
from mvsplit.data.formats import Images, Latents
from mvsplit.data.index import ShardIndex, lost_samples
from mvsplit.data.reader import ShardReader, collate
from mvsplit.data.transforms import CentreCrop
from mvsplit.utils.errors import UserError

SECOND = 1024 + 512 + 512  # class header and body, image header and body: the second sample of a shard begins here


def cut(place: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, place)


def overwrite(place: int, content: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[place : place + len(content)] = content
        path.write_bytes(data)

    return damage


# What is done to the second of three shards of ten samples: (damage, kind, samples that remain).
DAMAGE: dict[str, tuple[Callable[[Path], None], str, int]] = {
    "cut in a header": (cut(SECOND + 200), "truncated", 1),
    "cut in a member": (cut(SECOND + 1024 + 512 + 10), "truncated", 1),
    "cut at a sample": (cut(SECOND), "truncated", 1),
    "without its end": (cut(10 * SECOND), "truncated", 10),
    "corrupt header": (overwrite(SECOND + 20, b"\xff" * 40), "bad_header", 1),
    "no tar at all": (lambda path: path.write_bytes(b"hello" * 1000), "bad_header", 0),
    "empty file": (lambda path: path.write_bytes(b""), "empty_shard", 0),
    "empty tar": (lambda path: path.write_bytes(bytes(10240)), "empty_shard", 0),
    "missing": (lambda path: path.unlink(), "missing_shard", 0),
    "class is no number": (overwrite(SECOND + 512, b"x"), "bad_member", 9),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_found_before_training(tmp_path: Path, how: str) -> None:
    damage, kind, remain = DAMAGE[how]
    damage(shards(tmp_path, 30)[1])
    pattern = "train-{000000..000002}.tar"
    with pytest.raises(UserError, match=r"train-000001\.tar") as caught:
        index(tmp_path, pattern=pattern)
    assert "\n" not in str(caught.value)
    found = index(tmp_path, SUBSTITUTE, pattern)
    assert [shard.samples for shard in found.shards] == [10, remain, 10]
    assert [finding.kind for finding in found.findings] == [kind]
    assert "train-000001.tar" in found.findings[0].message
    lost = 1 if remain in (9, 10) else 10 - remain
    assert lost_samples(found.shards) == lost
    with pytest.raises(UserError, match=rf"max_rate = 0\.01: {lost} of about {20 + remain + lost} samples .*{kind} 1"):
        index(tmp_path, FaultPolicy("substitute", 0.01), pattern)
    with pytest.raises(UserError, match=r"train-000001\.tar"):  # also from the kept index
        index(tmp_path, pattern=pattern)


@pytest.mark.parametrize(
    ("members", "kind", "message"),
    [
        ({"a.png": picture(1)}, "missing_label", "sample 'a' has no class label"),
        ({"a.cls": b"1"}, "missing_member", "sample 'a' has no image"),
        ({"a.png": picture(1), "a.cls": b"cat"}, "bad_member", "has the class label b'cat', which is not a number"),
        ({"a.png": picture(1), "a.json": b"{"}, "bad_member", "has an invalid .json"),
        ({"a.png": picture(1), "a.json": b'{"label": "cat"}'}, "missing_label", "has no class label"),
        ({}, "empty_shard", "contains no samples"),
    ],
)
def test_incomplete_samples(tmp_path: Path, members: dict[str, bytes], kind: str, message: str) -> None:
    tar_of(tmp_path / "train-0.tar", members)
    with pytest.raises(UserError, match=message):
        index(tmp_path)
    tar_of(tmp_path / "train-1.tar", {"b.png": picture(1), "b.cls": b"1"})
    found = index(tmp_path, SUBSTITUTE)
    assert (len(found), [finding.kind for finding in found.findings]) == (1, [kind])


# What is done to the second shard after all were indexed: (damage, kind met when reading sample 13, or None if whole).
LATER: dict[str, tuple[Callable[[Path], None], str | None]] = {
    "a changed byte": (overwrite(3 * SECOND + 512 + 512 + 512 + 40, b"\0\1\2"), "checksum"),
    "cut before it": (cut(2 * SECOND), "truncated"),
    "cut in it": (cut(3 * SECOND + 1024 + 512 + 10), "truncated"),
    "cut behind it": (cut(5 * SECOND), None),
    "removed": (lambda path: path.unlink(), "missing_shard"),
    "empty": (lambda path: path.write_bytes(b""), "truncated"),
    "another shard": (lambda path: path.write_bytes(path.with_name("train-000002.tar").read_bytes()), "checksum"),
    "a longer shard": (
        lambda path: path.write_bytes(os.urandom(path.stat().st_size) + bytes(1024)),
        "replaced_shard",
    ),
}


@pytest.mark.parametrize("how", LATER)
def test_damage_after_indexing_is_found_when_read(tmp_path: Path, how: str) -> None:
    path = shards(tmp_path, 30)[1]
    source = reader(tmp_path)
    damage, kind = LATER[how]
    damage(path)
    if kind is None:
        assert source.read(0, 13)["label"] == 13 % 3
        return
    with pytest.raises(DataFault, match=r"train-000001\.tar") as caught:
        source.read(0, 13)
    assert caught.value.kind == kind
    assert source.read(0, 9)["label"] == 0
    # A reader does not raise: fatal hands on the finding, substitute another sample as well.
    item = source[0, 13]
    assert [finding.kind for finding in item["findings"]] == [kind]
    assert item["weight"] == 0
    source.policy = SUBSTITUTE
    items = [source[place, 13] for place in range(20)]
    others = {item["index"] for item in items}
    assert not others & set(range(13, 14))
    assert len(others) > 3  # spread over what is left
    assert [source[place, 13]["index"] for place in range(20)] == [item["index"] for item in items]
    assert all(item["findings"][0].kind == kind for item in items)
    assert all(float(item["image"].float().mean()) == item["index"] for item in items)


def test_validation_leaves_damaged_samples_out(tmp_path: Path) -> None:
    path = shards(tmp_path, 30)[1]
    module = datamodule(tmp_path, tmp_path, batch_size=6, faults=SUBSTITUTE)
    module.setup()
    cut(SECOND)(path)
    batches = list(module.val_dataloader())
    weights = torch.cat([batch["weight"] for batch in batches])
    assert weights.sum() == 21
    assert (weights[11:20] == 0).all()
    assert sum(len(batch["findings"]) for batch in batches) == 9


def test_a_shard_damaged_between_two_runs_keeps_its_numbers(tmp_path: Path) -> None:
    """Else a resume would find another data set than it was trained on."""
    path = shards(tmp_path, 30)[1]
    before = index(tmp_path, SUBSTITUTE)
    cut(4 * SECOND)(path)
    after = index(tmp_path, SUBSTITUTE)
    assert after.fingerprint == before.fingerprint
    assert len(after) == 30
    path.unlink()
    pattern = "train-{000000..000002}.tar"
    assert index(tmp_path, SUBSTITUTE, "*.tar").fingerprint != before.fingerprint  # it is not listed any more
    shards(tmp_path, 30)
    assert index(tmp_path, SUBSTITUTE, pattern).fingerprint == before.fingerprint
    path.unlink()
    assert index(tmp_path, SUBSTITUTE, pattern).fingerprint == before.fingerprint
    with pytest.raises(UserError, match="shard does not exist"):
        index(tmp_path, pattern=pattern)


def test_without_a_readable_substitute_the_run_stops(tmp_path: Path) -> None:
    paths = shards(tmp_path, 30)
    source = reader(tmp_path, SUBSTITUTE)
    for path in paths:
        path.unlink()
    item = source[0, 13]
    assert [finding.hopeless for finding in item["findings"]] == [False, True]
    with pytest.raises(UserError, match="no substitute could be read"):
        SUBSTITUTE.enforce(item["findings"])


# ------------------------------------------------------------------ pictures


def damaged_png() -> bytes:
    data = bytearray(picture(7, 64, 64))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


def png_bomb(side: int = 50_000) -> bytes:
    """A small PNG of compressed zeros that claims side² pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        + chunk(b"IEND", b"")
    )


UNREADABLE = {
    "garbage": b"no picture",
    "damaged": damaged_png(),
    "empty": b"",
    "pixel bomb": png_bomb(),
}


@pytest.mark.parametrize("how", UNREADABLE)
def test_pictures_that_cannot_be_read_are_named(tmp_path: Path, how: str) -> None:
    """Damaged before they were indexed, so that no checksum shows it."""
    tar_of(tmp_path / "train-0.tar", {"a.png": UNREADABLE[how], "a.cls": b"1", "b.png": picture(5), "b.cls": b"2"})
    source = reader(tmp_path)
    with pytest.raises(DataFault, match=r"train-0\.tar: sample 0 \('a'\) at byte 512 cannot be decoded") as caught:
        source.read(0, 0)
    assert caught.value.kind == "undecodable"
    source.policy = SUBSTITUTE
    assert source[0, 0]["label"] == 2


# ------------------------------------------------------------ rates and counts


def test_rates_are_checked_after_a_thousand_samples() -> None:
    policy = FaultPolicy("substitute", 0.01)
    finding = Finding("checksum", "train-0.tar: sample 3 fails its checksum")
    assert FaultCounts(Counter(checksum=500), 999).checkable == 0
    assert FaultCounts(Counter(checksum=11, retried=7), 1000).checkable == 11
    policy.enforce([finding], 10, 1000)
    policy.enforce([Finding("retried", "x")], 11, 1000)
    with pytest.raises(UserError, match=r"max_rate = 0\.01: 11 of 1000 samples are damaged; the last: train-0\.tar"):
        policy.enforce([finding], 11, 1000)
    with pytest.raises(UserError, match=r"train-0\.tar: sample 3 fails its checksum \(data\.faults\.action=substitute"):
        FaultPolicy().enforce([finding])
    FaultPolicy().enforce([Finding("retried", "x")])


def test_counts_add_up() -> None:
    counts = FaultCounts()
    counts.add([Finding("checksum", "a"), Finding("retried", "b")], 8, None)
    counts.add([Finding("checksum", "a")], 8, None)
    assert counts.counts == Counter(checksum=2, retried=1)
    assert (counts.faults, counts.samples) == (2, 16)


def test_a_fault_travels_between_processes() -> None:
    fault = pickle.loads(pickle.dumps(DataFault("network", "a: b")))
    assert (fault.kind, str(fault)) == ("network", "a: b")


# -------------------------------------------------------------- hostile shards


class Poison:
    """Creates the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.canary,)


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def hostile(name: str, canary: Path) -> list[tuple[tarfile.TarInfo, bytes]] | bytes:
    """Members of a shard (or its bytes) that try to run code, write files, or use up memory or time."""
    good = [member("z.png", picture(3)), member("z.cls", b"3")]
    poison = pickle.dumps(Poison(canary))
    array = io.BytesIO()
    np.save(array, np.array([Poison(canary)], dtype=object), allow_pickle=True)
    weights = io.BytesIO()
    torch.save(Poison(canary), weights)
    bad_size = bytearray(member("a.png", picture(1))[0].tobuf())
    bad_size[124:136] = b"\xff" * 12  # −1 in base 256
    bad_size[148:156] = b"%06o\0 " % (sum(bad_size[:148]) + sum(bad_size[156:]) + 8 * 32)
    cases: dict[str, list[tuple[tarfile.TarInfo, bytes]] | bytes] = {
        "pickle beside": [*good, member("z.pkl", poison)],
        "pyd beside": [*good, member("z.pyd", poison)],
        "weights beside": [*good, member("z.pth", weights.getvalue())],
        "pickle with a second suffix": [*good, member("z.png.pkl", poison)],
        "array of objects": [*good, member("z.npy", array.getvalue())],
        "pickle as picture": [member("a.png", poison), member("a.cls", b"1"), *good],
        "pickle as class": [member("a.png", picture(1)), member("a.cls", poison), *good],
        "code as class": [member("a.png", picture(1)), member("a.cls", b"__import__('os')"), *good],
        "nested json": [member("a.png", picture(1)), member("a.json", b"[" * 200_000), *good],
        "number of a million digits": [
            member("a.png", picture(1)),
            member("a.json", b'{"label": ' + b"9" * 10**6 + b"}"),
            *good,
        ],
        "absolute name": [member(f"{canary}", b"x"), *good],
        "name that leads up": [member(f"../../{canary.name}", b"x"), *good],
        "symbolic link": [member("a.png", type=tarfile.SYMTYPE, linkname=str(canary)), *good],
        "hard link": [member("a.png", type=tarfile.LNKTYPE, linkname="/etc/passwd"), *good],
        "device": [member("a.png", type=tarfile.CHRTYPE), *good],
        "pipe": [member("a.png", type=tarfile.FIFOTYPE), *good],
        "terminal codes in a name": [member("a\x1b[2J.png", picture(1)), *good],
        "pixel bomb": [member("a.png", png_bomb()), member("a.cls", b"1"), *good],
        "the same member twice": [member("a.png", picture(1)), member("a.png", poison), *good],
        "size below zero": bytes(bad_size) + bytes(2048),
        "enormous header": member("pax", type=tarfile.XHDTYPE, size=1 << 34)[0].tobuf() + bytes(4096),
        "packed tar": __import__("gzip").compress(bytes(10240)),
        "sparse member": [member("a.png", bytes(512), type=tarfile.GNUTYPE_SPARSE), *good],
    }
    return cases[name]


HOSTILE = {
    "pickle beside": "ignored", "pyd beside": "ignored", "weights beside": "ignored",
    "pickle with a second suffix": "ignored", "array of objects": "ignored",
    "pickle as picture": "undecodable", "pickle as class": "bad_member", "code as class": "bad_member",
    "nested json": "bad_member", "number of a million digits": "bad_member", "absolute name": "bad_member",
    "name that leads up": "bad_member", "symbolic link": "bad_member", "hard link": "bad_member",
    "device": "bad_member", "pipe": "bad_member", "terminal codes in a name": "bad_member",
    "pixel bomb": "undecodable", "the same member twice": "bad_member", "size below zero": "bad_header",
    "enormous header": "bad_header", "packed tar": "bad_header", "sparse member": "bad_member",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_shards_do_nothing_and_are_reported(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing runs, nothing is written outside the cache, the good sample is read, and the fault is reported."""
    canary, folder = tmp_path / "canary", tmp_path / "set"
    folder.mkdir()
    content = hostile(name, canary)
    if isinstance(content, bytes):
        (folder / "train-0.tar").write_bytes(content)
    else:
        with tarfile.open(folder / "train-0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            for info, data in content:
                tar.addfile(info, io.BytesIO(data))
    tar_of(folder / "train-1.tar", {"y.png": picture(4), "y.cls": b"4"})
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    began = time.monotonic()
    with caplog.at_level("INFO", logger="mvsplit"):
        source = reader(folder, SUBSTITUTE)
        items = source.__getitems__([(i, i) for i in range(len(source))])
    assert time.monotonic() - began < 5
    assert not canary.exists()
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before
    labels = {item["label"] for item in items if not item["findings"]}
    assert labels == ({3, 4} if name not in ("size below zero", "enormous header", "packed tar") else {4})
    expected = HOSTILE[name]
    met = [f.kind for f in source.index.findings] + [f.kind for item in items for f in item["findings"]]
    if expected == "ignored":
        assert met == []
        assert "that are never read, by suffix" in caplog.text
    else:
        assert set(met) == {expected}
    if expected not in ("ignored", "undecodable"):
        with pytest.raises(UserError, match=r"train-0\.tar") as caught:
            index(folder)
        assert str(caught.value).isprintable()


def test_an_index_from_elsewhere_cannot_lead_out_of_the_set(tmp_path: Path) -> None:
    """An index beside the shards is as untrusted as they are."""
    from mvsplit.data.index import write_index

    shards(tmp_path, 10)
    honest = index(tmp_path, pattern="train-*.tar")
    for file in (tmp_path / "cache" / "indices").iterdir():
        file.unlink()
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture(99))
    forged = [replace(honest.shards[0], files=("../secret.png",) * 10, stamp_ns=0)]
    write_index(tmp_path / "train.index.safetensors", ShardIndex(str(tmp_path), forged, honest.columns))
    found = index(tmp_path, pattern="train-*.tar")
    assert found.location(0) == str(tmp_path / "train-000000.tar")


def test_latents_are_never_unpickled(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    content = pickle.dumps(Poison(canary))
    huge = struct.pack("<Q", 1 << 40) + b"{}"
    members = {"a.safetensors": content, "a.cls": b"1", "b.safetensors": huge, "b.cls": b"1"}
    tar_of(tmp_path / "train-0.tar", members)
    latent_shards(tmp_path, 3, 3)
    source = reader(tmp_path, SUBSTITUTE, form=Latents([8, 8], 4, flip=False))
    kinds = [[f.kind for f in source[0, i]["findings"]][:1] for i in range(len(source))]
    assert kinds.count(["undecodable"]) == 2
    assert not canary.exists()


def test_faults_of_captions_count_too(tmp_path: Path) -> None:
    tar_of(tmp_path / "train-0.tar", {"a.png": picture(1), "a.cls": b"1", "a.txt": b"\xff\xfe not utf-8"})
    assert reader(tmp_path)[0, 0]["caption"] == "�� not utf-8"


def test_jpegs_go_through_collate_with_their_findings(tmp_path: Path) -> None:
    path = jpeg_shards(tmp_path, 12, 6)[0]
    form = Images([32, 32], 3, CentreCrop([32, 32]))
    source = ShardReader(index(tmp_path, form=form), reader(tmp_path).storage, form, SUBSTITUTE, train=True)
    row = source.index.columns
    overwrite(int(row["data.offset"][2]) + 50, b"\0\0\0\0")(path)
    batch = collate(source.__getitems__([(i, i) for i in range(12)]))
    assert batch["image"].shape == (12, 3, 32, 32)
    assert [finding.kind for finding in batch["findings"]] == ["checksum"]
    assert grey().members["data"] == form.members["data"]


# ------------------------------------------------- what looks whole and is not


@pytest.mark.parametrize(("stretch", "kind"), [(1024, "bad_header"), (4096, "bad_header"), (0, "truncated")])
def test_zeros_in_a_tar_are_not_taken_for_its_end(tmp_path: Path, stretch: int, kind: str) -> None:
    path = shards(tmp_path, 40, 40)[0]
    place = 10 * SECOND
    overwrite(place, bytes(stretch or path.stat().st_size - place))(path)
    found = index(tmp_path, SUBSTITUTE)
    assert len(found) == 10
    assert [finding.kind for finding in found.findings] == [kind]


def test_a_second_tar_after_the_first_is_found(tmp_path: Path) -> None:
    one, two = shards(tmp_path, 20, 10)
    one.write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(UserError, match=r"train-000000\.tar: zeros at byte \d+, .*, followed by more data"):
        index(tmp_path)


def test_relabelled_shards_are_scanned_again(tmp_path: Path) -> None:
    """Also if they have the size and the time of the old ones, or an older index beside them."""
    from mvsplit.data.index import read_index, write_index

    path = shards(tmp_path, 10)[0]
    before = index(tmp_path, pattern="train-*.tar")
    stat = path.stat()
    overwrite(512, b"7")(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert index(tmp_path, pattern="train-*.tar").columns["label"].tolist()[:3] == [7, 1, 2]
    for file in (tmp_path / "cache" / "indices").iterdir():
        file.unlink()
    write_index(tmp_path / "train.index.safetensors", before)
    assert read_index(tmp_path / "train.index.safetensors", str(tmp_path)) is not None
    time.sleep(0.02)
    overwrite(512, b"8")(path)
    assert index(tmp_path, pattern="train-*.tar").columns["label"][0] == 8


def timeless(found: ShardIndex) -> ShardIndex:
    """As `src/encode.py` writes it: valid wherever the shards are copied to."""
    return replace(found, shards=[replace(shard, stamp_ns=0) for shard in found.shards])


@pytest.mark.parametrize("member", ["a.cls", "a.json"])
def test_classes_changed_since_an_index_that_is_younger_are_seen(tmp_path: Path, member: str) -> None:
    """Relabelled in place, then copied: all times are the copy's, and the index beside the shards may come last."""
    from mvsplit.data.index import write_index

    content = {"a.cls": b"1", "a.json": b'{"label": 1}'}[member]
    path = tar_of(tmp_path / "train-0.tar", {member: content, "a.png": picture(1)})
    before = timeless(index(tmp_path, pattern="train-*.tar"))
    relabelled = path.read_bytes().replace(content + bytes(9), content.replace(b"1", b"7") + bytes(9), 1)
    for new in (path.read_bytes(), relabelled):
        for file in (tmp_path / "cache" / "indices").iterdir():
            file.unlink()
        path.write_bytes(new)
        time.sleep(0.02)
        write_index(tmp_path / "train.index.safetensors", before)
        found = index(tmp_path, pattern="train-*.tar")
        assert found.columns["label"].tolist() == [1 if new != relabelled else 7]
        assert index(tmp_path, pattern="train-*.tar").fingerprint == found.fingerprint


def test_an_index_written_with_its_shards_saves_reading_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their headers and classes are compared; pictures are verified when they are read."""
    from mvsplit.data import indexing as module
    from mvsplit.data.index import write_index

    shards(tmp_path, 10)
    write_index(tmp_path / "train.index.safetensors", timeless(index(tmp_path, pattern="train-*.tar")))
    for file in (tmp_path / "cache" / "indices").iterdir():
        file.unlink()
    monkeypatch.setattr(module, "scan_tar", None)
    assert len(index(tmp_path, pattern="train-*.tar")) == 10
    assert len(list((tmp_path / "cache" / "indices").iterdir())) == 1  # compared once


def test_classes_renumbered_by_the_training_set_are_seen(tmp_path: Path) -> None:
    """A new class there moves those of an unchanged validation set."""
    for place in ("train/a", "train/c", "val/a", "val/c"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "x.png").write_bytes(picture(1))

    def classes() -> list[int]:
        module = datamodule(tmp_path, tmp_path, layout="folders", train="train", val="val")
        module.setup()
        return module.indices["val"].columns["label"].tolist()

    assert classes() == [0, 1]
    (tmp_path / "train" / "b").mkdir()
    (tmp_path / "train" / "b" / "x.png").write_bytes(picture(1))
    assert classes() == [0, 2]
    (tmp_path / "val" / "c" / "x.png").rename(tmp_path / "val" / "a" / "y.png")  # and one that was moved
    assert classes() == [0, 0]


def test_a_shard_damaged_after_encoding_keeps_its_numbers(tmp_path: Path) -> None:
    """The index beside the shards is older than the damage, which makes the shard look rewritten."""
    from mvsplit.data.index import write_index

    path = shards(tmp_path, 30)[1]
    whole = index(tmp_path, pattern="train-*.tar")
    write_index(tmp_path / "train.index.safetensors", whole)
    for file in (tmp_path / "cache" / "indices").iterdir():
        file.unlink()
    time.sleep(0.02)
    cut(4 * SECOND)(path)
    with pytest.raises(UserError, match=r"train-000001\.tar"):
        index(tmp_path, pattern="train-*.tar")
    after = index(tmp_path, SUBSTITUTE, "train-*.tar")
    assert after.fingerprint == whole.fingerprint
    assert index(tmp_path, SUBSTITUTE, "train-*.tar").fingerprint == whole.fingerprint


def test_classes_of_validation_are_those_of_training(tmp_path: Path) -> None:
    for split, names in (("train", "abc"), ("val", "ac")):
        for name in (*names, ".hidden"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "x.png").write_bytes(picture(1))
    module = datamodule(tmp_path, tmp_path, layout="folders", train="train", val="val")
    module.setup()
    assert module.indices["train"].columns["label"].tolist() == [0, 1, 2]
    assert module.indices["val"].columns["label"].tolist() == [0, 2]
    (tmp_path / "val" / "d").mkdir()
    with pytest.raises(UserError, match="val/d is not a class of the training set"):
        datamodule(tmp_path, tmp_path, layout="folders", train="train", val="val").setup()


def test_a_picture_exchanged_in_place_is_seen(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / "train" / "a" / "deep").mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / "a" / "deep" / f"{i}.png").write_bytes(picture(i))

    def values() -> list[int]:
        module = datamodule(tmp_path, tmp_path, layout="folders", train="train", val="train")
        module.setup()
        reading = module.reader("train")
        return [int(reading.read(0, i)["image"].float().mean()) for i in range(len(reading))]

    assert values() == [0, 1, 2]
    (tmp_path / "train" / "a" / "deep" / "1.png").write_bytes(picture(9))
    (tmp_path / "train" / "a" / "deep" / "3.png").write_bytes(picture(3))
    assert values() == [0, 9, 2, 3]


def test_a_thin_picture_does_not_fill_the_memory() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (1, 6000)).save(buffer, "PNG")
    with pytest.raises(ValueError, match="would have to be scaled to 256 × 1536000"):
        colour(256).decode(buffer.getvalue(), 0, train=True)


def test_a_pipe_or_folder_in_a_shards_place_does_not_block(tmp_path: Path) -> None:
    paths = shards(tmp_path, 30)
    source = reader(tmp_path, SUBSTITUTE)
    for path, make in ((paths[0], os.mkfifo), (paths[1], os.mkdir)):
        path.unlink()
        make(path)
        with pytest.raises(DataFault, match=path.name):
            source.read(0, 10 * paths.index(path) + 3)
    assert [f.kind for f in index(tmp_path, SUBSTITUTE, "train-{000000..000002}.tar").findings] == []  # numbers kept
    assert index(tmp_path, SUBSTITUTE, "train-*.tar").shards[0].name == "train-000002.tar"


def test_a_validation_set_of_nothing_but_damage_has_no_loss(tmp_path: Path) -> None:
    path = shards(tmp_path, 10)[0]
    module = datamodule(tmp_path, tmp_path, batch_size=5, faults=SUBSTITUTE)
    module.setup()
    path.unlink()
    batches = iter(module.val_dataloader())
    module.on_after_batch_transfer(next(batches), 0)
    with pytest.raises(UserError, match="no other sample of the validation set can be read either"):
        module.on_after_batch_transfer(next(batches), 0)


def test_an_order_in_windows_belongs_to_the_shards_it_was_made_of(tmp_path: Path) -> None:
    prints = []
    for name, size in (("a", 8), ("b", 12)):
        shards(tmp_path / name, 48, size)
        for window in (0, 2):
            module = datamodule(tmp_path / name, tmp_path, window=window)
            module.setup()
            prints.append(module.source.fingerprint())
    assert prints[0] == prints[2]
    assert prints[1] != prints[3]


FORGED: list[dict[str, Any]] = [
    {"ignored": {"a": "b"}}, {"samples": 10.0}, {"samples": True}, {"samples": 10**30}, {"size": "x"}, {"size": 10**30},
    {"size": -1}, {"stamp_ns": None}, {"sha256": 1}, {"name": None}, {"samples": 9, "files": ("a.png",) * 10},
    {"files": ("a.png",)}, {"files": (1,) * 10}, {"findings": ((1, 2),)},
]  # fmt: skip


def test_forged_indices_and_manifests_are_refused(tmp_path: Path) -> None:
    """The set is indexed again; a manifest is refused in one line."""
    from mvsplit.data.index import read_index, write_index

    shards(tmp_path, 10)
    honest = index(tmp_path, pattern="train-*.tar")
    columns, shard = honest.columns, honest.shards[0]
    forged = {
        "no label": {k: v for k, v in columns.items() if k != "label"},
        "no data": {"label": columns["label"]},
        "two dimensions": columns | {"label": columns["label"].reshape(-1, 1)},
        "no numbers": columns | {"label": np.full(10, np.nan)},
        "negative": columns | {"label": columns["label"] - 5},
        "before the file": columns | {"data.offset": columns["data.offset"] - 10**6},
        "behind the file": columns | {"data.size": columns["data.size"] + 10**8},
        "behind any file": columns | {"data.offset": columns["data.offset"] | (2**63 - 1)},
        "unsigned": columns | {"data.offset": columns["data.offset"].astype("u8")},
        "less than nothing": columns | {"data.size": columns["data.size"] * 0 - 2},
    }
    place = tmp_path / "forged.index.safetensors"
    for name, bad in forged.items():
        write_index(place, ShardIndex(str(tmp_path), [shard], bad))
        assert read_index(place, str(tmp_path)) is None, name
    for change in FORGED:
        write_index(place, ShardIndex(str(tmp_path), [replace(shard, **change)], columns))
        assert read_index(place, str(tmp_path)) is None, change
    form = Latents([8, 8], 4, flip=False)
    good = {"shape": [4, 8, 8], "channel_mean": [0.0] * 4, "channel_std": [1.0] * 4}
    form.bind({"data"}, good)
    stds = [None, [1.0] * 3, ["a"] * 4, [0.0] * 4, [float("nan")] * 4, [[]] * 4]
    for change in ({"shape": None}, {"channel_mean": [float("inf")] * 4}, *({"channel_std": std} for std in stds)):
        with pytest.raises(UserError, match=r"the set's"):
            form.bind({"data"}, json.loads(json.dumps(good | change)))


def test_a_small_index_cannot_claim_a_large_set(tmp_path: Path) -> None:
    """Files of less than a kilobyte, refused before anything of the claimed size is allocated."""
    from mvsplit.data.index import _digest, read_index, write_index
    from mvsplit.data.tar_scan import Shard

    place, shard = tmp_path / "train.index.safetensors", Shard("train-0.tar", 2**40, samples=100_000_000)
    for columns in ({"label": np.zeros(0, "i8")}, {"label": np.zeros((0, 10**8), "i8")}, {}):
        about = json.dumps({"version": 1, "shards": [vars(shard)], "digest": _digest(columns, [vars(shard)])})
        place.write_bytes(safetensors.numpy.save(columns, metadata={"index": about}))
        assert place.stat().st_size < 1000
        tracemalloc.start()
        began = time.monotonic()
        assert read_index(place, str(tmp_path)) is None
        assert time.monotonic() - began < 1
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
    # Nor has a tar of this size room for so many samples, whatever the columns say.
    scanned = {"label": "i8", "data.offset": "i8", "data.size": "i4", "data.crc32": "u4"}
    few = replace(shard, size=512 * 9, samples=10)
    columns = {name: np.zeros(10, dtype) for name, dtype in scanned.items()}
    write_index(place, ShardIndex(str(tmp_path), [few], columns))
    assert read_index(place, str(tmp_path)) is None
    write_index(place, ShardIndex(str(tmp_path), [replace(few, size=512 * 10)], columns))
    assert read_index(place, str(tmp_path)) is not None


def test_odd_files_beside_the_shards_do_not_block(tmp_path: Path) -> None:
    """An endless, huge or silent file in the place of an index or a manifest."""
    shards(tmp_path, 10)
    makers: list[Callable[[Path], Any]] = [
        lambda place: place.symlink_to("/dev/zero"),
        os.mkfifo,
        lambda place: (place.touch(), os.truncate(place, 1 << 40)),
    ]
    for name in ("train.index.safetensors", "train.manifest.json"):
        for make in makers:
            make(tmp_path / name)
            tracemalloc.start()
            began = time.monotonic()
            assert len(index(tmp_path, pattern="train-*.tar")) == 10
            assert time.monotonic() - began < 2
            assert tracemalloc.get_traced_memory()[1] < 10 << 20
            tracemalloc.stop()
            (tmp_path / name).unlink()


def test_latents_of_other_types_are_damage() -> None:
    import safetensors.torch

    form = Latents([2, 2], 1)
    mean, std = torch.ones(1, 2, 2), torch.zeros(1, 2, 2)
    assert form.decode(safetensors.torch.save({"mean": mean, "std": std}), 0, True)["mean"].dtype == torch.bfloat16
    for bad in (mean.to(torch.float8_e4m3fn), mean.to(torch.complex64)):
        with pytest.raises(ValueError, match="latent"):
            form.decode(safetensors.torch.save({"mean": bad, "std": std}), 0, True)
