"""The checkpoint folder: whole or refused, whoever wrote it and whatever has happened to it since."""

import hashlib
import json
import os
import pickle
import resource
import time
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_tools import (
    NESTED,
    Called,
    Canary,
    claimed,
    deflated,
    hand_made,
    nested_encoding,
    nested_storage,
    poison,
    tensor_of,
)
from safetensors.torch import load_file, save_file

from mvsplit.training.checkpoint_format import COMPLETE, MANIFEST, STATE, Saved, Slice, Tensors, newest, remove
from mvsplit.training.checkpoint_writer import CheckpointWriter
from mvsplit.training.checkpoint_writer import write_safetensors as write_file
from mvsplit.training.conversion import convert
from mvsplit.utils.errors import AgreedError, UserError

TENSORS = {
    "weights": {"network.a": torch.arange(12.0).reshape(3, 4), "network.flag": torch.tensor([True, False])},
    "ema": {"network.a": torch.arange(12.0).reshape(3, 4) / 7},
    "optimizer": {"network.a/exp_avg": torch.randn(3, 4).bfloat16(), "network.s/step": torch.zeros(1)},
}


def save(path: Path, step: int = 5, **more: Any) -> Path:
    tensors = {kind: {name: Slice.whole(t) for name, t in named.items()} for kind, named in TENSORS.items()}
    CheckpointWriter(path, {"global_step": step, "TheDataModule": {"samples": 8 * step}} | more, tensors).run()
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    saved = Saved(save(tmp_path / "step-00000005.ckpt", loops={"done": 3})).verify()
    assert saved.step == 5
    assert saved.manifest["data"] == {"samples": 40}
    assert saved.kinds == set(TENSORS)
    assert saved.state()["loops"] == {"done": 3}
    for kind, named in TENSORS.items():
        tensors = saved.tensors(kind)
        assert set(tensors) == set(named)
        for name, tensor in named.items():
            assert torch.equal(tensors.whole(name), tensor)
            assert tensors.dtypes[name] == tensor.dtype
    assert saved.tensors("weights").read("network.a", 5, 9).tolist() == [5, 6, 7, 8]
    assert len(saved.tensors("nothing")) == 0
    assert not list(tmp_path.glob("*.partial"))
    # The files are safetensors' own format, and the manifest tells the truth of them.
    file = saved.path / "weights-00000.safetensors"
    assert load_file(file)["network.a"].tolist() == list(range(12))
    assert saved.files[file.name]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("pieces", [[0, 12], [0, 5, 12], [0, 4, 4, 8, 12]])
def test_slices_of_any_cut_make_up_the_whole(tmp_path: Path, pieces: list[int]) -> None:
    whole, files = torch.randn(3, 4), []
    for number, (start, stop) in enumerate(pairwise(pieces)):
        if start < stop:
            part = whole.reshape(-1)[start:stop]
            files.append(tmp_path / f"weights-{number}.safetensors")
            write_file(
                files[-1], {"w": (part.dtype, (len(part),))}, [part], {"slices": json.dumps({"w": [start, 3, 4]})}
            )
    tensors = Tensors(reversed(files))
    assert torch.equal(tensors.whole("w"), whole)
    for start in range(12):
        for stop in range(start, 13):
            assert torch.equal(tensors.read("w", start, stop), whole.reshape(-1)[start:stop])
    if len(files) > 1:
        with pytest.raises(UserError, match="the slices of 'w' do not cover the whole tensor"):
            Tensors(files[1:])


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not marked complete": (lambda p: (p / COMPLETE).unlink(), "an incomplete one"),
    "a file is missing": (lambda p: (p / STATE).unlink(), "state.pt and the manifest differ in size"),
    "a file is cut": (
        lambda p: os.truncate(p / "ema-00000.safetensors", 100),
        "ema-00000.safetensors and the manifest differ",
    ),
    "one byte of weights": (lambda p: flip(p / "weights-00000.safetensors", -3), "weights-00000.safetensors fails its"),
    "one byte of state": (lambda p: flip(p / STATE, 300), "state.pt fails its checksum"),
    "one byte of the manifest": (lambda p: flip(p / MANIFEST, 30), "manifest.json fails its checksum"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_noticed_and_the_one_before_is_taken(tmp_path: Path, capsys: Any, kind: str) -> None:
    older, newer = save(tmp_path / "step-00000005.ckpt"), save(tmp_path / "step-00000010.ckpt", 10)
    assert newest(tmp_path, verify=True) == newer
    damage, message = DAMAGE[kind]
    damage(newer)
    with pytest.raises(UserError, match=message):
        Saved(newer).verify()
    assert newest(tmp_path, verify=True) == older
    assert f"skipped: {newer}" in capsys.readouterr().err
    damage(older)
    with pytest.raises(UserError, match=r"none of the 2 checkpoints in .* is intact"):
        newest(tmp_path, verify=True)


def test_others_are_refused(tmp_path: Path) -> None:
    assert newest(tmp_path, verify=True) is None
    (tmp_path / "folder.ckpt").mkdir()
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "file.ckpt")
    for name, message in (
        ("none", "no such file or folder"),
        ("file", "since it is not a folder"),
        ("folder", "an incomplete one"),
    ):
        with pytest.raises(UserError, match=message):
            Saved(tmp_path / f"{name}.ckpt")


def test_a_poisoned_checkpoint_runs_nothing(tmp_path: Path) -> None:
    path, canary = save(tmp_path / "x.ckpt"), tmp_path / "canary"
    torch.save({"global_step": 5, "loops": Canary(canary)}, tmp_path / "poison.pt")
    poison(path, STATE, (tmp_path / "poison.pt").read_bytes())
    with pytest.raises(UserError, match=r"state\.pt is damaged or unsafe"):
        Saved(path).verify().state()
    for kind in TENSORS:
        poison(path, f"{kind}-00000.safetensors", pickle.dumps(Canary(canary)))
        with pytest.raises(UserError, match="damaged, or not a file of slices"):
            Saved(path).verify().tensors(kind)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"] = {"../../escaped": manifest["files"][STATE]}
    (path / MANIFEST).write_text(json.dumps(manifest))
    (path / COMPLETE).write_text(hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest())
    with pytest.raises(UserError, match="and the manifest differ in size"):
        Saved(path)
    assert not canary.exists()


def stored(value: Any) -> Callable[[Path], bytes]:
    def make(file: Path) -> bytes:
        torch.save({"global_step": 5, "loops": value}, file)
        return file.read_bytes()

    return make


def inflating(file: Path) -> bytes:
    torch.save({"global_step": 5, "loops": torch.zeros(200 << 18)}, file)  # 200 MiB
    return deflated(file)


def claiming(file: Path) -> bytes:
    torch.save({"global_step": 5, "loops": torch.zeros(70_000)[:7]}, file)
    return claimed(file, 70_000, 700_000)


TEXT = b"X" + (1 << 20).to_bytes(4, "little") + b"a" * (1 << 20) + b"q\x00X\x06\x00\x00\x00latin1q\x01"

STATES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "compressed": (inflating, "it contains compressed records"),
    "expanded": (stored(torch.zeros(1).expand(1 << 40)), "a tensor claims more values than are stored"),
    "claimed": (claiming, "a tensor claims more values than are stored"),
    "made when it is read": (stored(Called(bytearray, 1 << 36)), "bytearray"),
    "called": (stored(Called(os.getpid)), "posix.getpid"),
    "a key that never hashes": (hand_made(b"\x80\x02" + NESTED + b"}h\x00K\x01s."), "a key is a container"),
    "keys that never hash": (hand_made(b"\x80\x02}(" + NESTED + b"K\x01u."), "a key is a container"),
    "a set that never hashes": (
        hand_made(b"\x80\x02c__builtin__\nset\n](" + NESTED + b"h\x00e\x85R."),
        "a set of containers",
    ),
    "made again and again": (
        hand_made(b"\x80\x02" + TEXT + b"](" + b"c_codecs\nencode\nh\x00h\x01\x86R" * 5000 + b"e."),
        "more than 2 MiB of containers",
    ),
    "a storage that never hashes": (hand_made(nested_storage), "a tensor without storage"),
    "an encoding that is never shown": (hand_made(nested_encoding), "bytes of another encoding than latin1"),
    "a long key": (hand_made(b"\x80\x02}(" + b"N" * 17 + b"tNs."), "a key is a container"),
    "a size of tuples": (hand_made(tensor_of(b"J\x00\x00\x00\x10)\x85")), "a tensor without a place"),
    "a size of text": (hand_made(tensor_of(b"J\x00\x00\x00\x10X\x01\x00\x00\x00a")), "a tensor without a place"),
    "many sizes": (hand_made(tensor_of(b"K\x01" * 60_000)), "a tensor without a shape"),
    "of small parts": (stored([[] for _ in range(400_000)]), "more than 2 MiB of containers"),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_is_read_in_memory_of_its_size(tmp_path: Path, kind: str) -> None:
    make, message = STATES[kind]
    path = save(tmp_path / "x.ckpt")
    poison(path, STATE, make(tmp_path / "state.pt"))
    saved = Saved(path).verify()
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=rf"state\.pt is damaged or unsafe \(.*{message}"):
        saved.state()
    assert time.monotonic() - begun < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_what_callbacks_keep_is_read_as_it_was(tmp_path: Path) -> None:
    tensors = [torch.tensor(1.5), torch.randn(3, 4).T, torch.arange(6)[2:], torch.tensor([True]), torch.zeros(0, 2),
               torch.randn(2).bfloat16(), torch.randn(2, dtype=torch.float64)]  # fmt: skip
    kept = {"tensors": tensors, "ordered": OrderedDict(a=1), "set": {1, 2}, "size": torch.Size([2, 3]),
            "dtype": torch.float32,
            "plain": (None, True, 1 << 70, 300, 1 << 20, 0.1, "x", b"y", float("nan"))}  # fmt: skip
    found = Saved(save(tmp_path / "x.ckpt", kept=kept)).state()["kept"]
    for ours, theirs in zip(found.pop("tensors"), kept.pop("tensors"), strict=True):  # type: ignore[call-overload]
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    assert repr(found) == repr(kept)


def test_a_failed_write_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "step-00000005.ckpt")
    with pytest.raises(AgreedError, match=r"could not be written: .*; earlier ones are untouched"):
        save(Path("/proc/step-00000006.ckpt"), 6)
    (tmp_path / "step-00000006.ckpt.partial").mkdir()  # what a kill leaves behind
    assert newest(tmp_path, verify=True) == path
    save(tmp_path / "step-00000007.ckpt", 7)
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000005.ckpt", "step-00000007.ckpt"}
    save(tmp_path / "step-00000007.ckpt", 7, loops="anew")
    assert Saved(tmp_path / "step-00000007.ckpt").verify().state()["loops"] == "anew"
    remove(path, path.parent)
    assert not path.exists()


def test_a_save_moves_and_removes_nothing_of_others(tmp_path: Path) -> None:
    path = save(tmp_path / "step-00000006.ckpt", 6)
    (path / "manifest.json").unlink()
    (tmp_path / "mine.ckpt.partial").mkdir()
    (tmp_path / "mine.ckpt.partial" / "notes.txt").touch()
    (tmp_path / "link.ckpt.partial").symlink_to(tmp_path)
    (tmp_path / "file.ckpt.partial").touch()
    before = {p.name for p in tmp_path.iterdir()}
    save(path, 6, loops="anew")
    assert Saved(path).verify().state()["loops"] == "anew"
    assert {p.name for p in tmp_path.iterdir()} == before | {"step-00000006.ckpt.unreadable"}
    assert (tmp_path / "step-00000006.ckpt.unreadable" / "COMPLETE").exists()


def test_nothing_but_a_checkpoint_of_the_folder_is_removed(tmp_path: Path) -> None:
    inside = tmp_path / "checkpoints"
    path, other = save(inside / "step-00000005.ckpt"), save(tmp_path / "other" / "step-00000005.ckpt")
    (inside / "notes.ckpt").mkdir()
    (inside / "link.ckpt").symlink_to(other)
    (tmp_path / "way").symlink_to(inside)
    spared = (other, inside / "notes.ckpt", inside / "link.ckpt", inside / ".." / "other" / path.name, inside,
              inside / "link.ckpt" / ".", inside / "none.ckpt")  # fmt: skip
    for place in spared:
        remove(place, inside)
    assert Saved(path).verify().step == Saved(inside / "link.ckpt").verify().step == 5
    assert (inside / "notes.ckpt").is_dir()
    remove(tmp_path / "way" / path.name, inside)
    assert sorted(p.name for p in inside.iterdir()) == ["link.ckpt", "notes.ckpt"]


def test_a_removal_that_is_killed_is_finished_by_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "step-00000005.ckpt")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda path: (path / MANIFEST).unlink())
        remove(path, tmp_path)
    assert not path.exists()
    save(path)
    assert Saved(path).verify().step == 5
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_conversion_to_one_file(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    path = save(tmp_path / "checkpoints" / "step-00000005.ckpt")
    assert convert(path, tmp_path / "both.safetensors", ["ema", "raw"], torch.float32) == 4
    both = load_file(tmp_path / "both.safetensors")
    assert torch.equal(both["a"], TENSORS["ema"]["network.a"])
    assert torch.equal(both["raw.a"], TENSORS["weights"]["network.a"])
    assert both["flag"].dtype == torch.bool  # a buffer has no average, and keeps its type
    convert(path, tmp_path / "half.safetensors", ["ema"], torch.bfloat16)
    assert torch.equal(load_file(tmp_path / "half.safetensors")["a"], TENSORS["ema"]["network.a"].bfloat16())
    remove(path, path.parent)
    del TENSORS["ema"]["network.a"]
    save(path)
    with pytest.raises(UserError, match="contains no averaged weights; use raw"):
        convert(path, tmp_path / "none.safetensors", ["ema"], torch.float32)


def test_written_by_the_library_read_by_us(tmp_path: Path) -> None:
    save_file({"w": torch.arange(6.0)}, tmp_path / "w-0.safetensors", metadata={"slices": '{"w": [0, 2, 3]}'})
    assert Tensors([tmp_path / "w-0.safetensors"]).whole("w").tolist() == [[0, 1, 2], [3, 4, 5]]


def test_conversion_writes_only_where_it_can_harm_nothing(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    path = save(tmp_path / "checkpoints" / "step-00000005.ckpt")
    (tmp_path / "folder.safetensors").mkdir()
    for output, message in {
        path / "weights-00000.safetensors": "must not be inside a checkpoint",
        path: "must be a file that ends in .safetensors",
        tmp_path / "folder.safetensors": "must be a file that ends in .safetensors",
        Path("/dev/full"): "must be a file that ends in .safetensors",
        tmp_path / "none" / "model.safetensors": "its folder does not exist",
    }.items():
        with pytest.raises(UserError, match=message):
            convert(path, output, ["raw"], torch.float32)
    Saved(path).verify()
    # What a killed conversion leaves in the same folder does not keep a run from saving.
    (tmp_path / "checkpoints" / "model.safetensors.partial").touch()
    save(tmp_path / "checkpoints" / "step-00000006.ckpt", 6)
