"""The checkpoint folder: whole or refused, whoever wrote it and whatever has happened to it since."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_tools import Canary, poison
from safetensors.torch import load_file, save_file

from mvsplit.training.checkpoints import convert
from mvsplit.training.folder import COMPLETE, MANIFEST, STATE, Saved, Slice, Tensors, newest, remove, write
from mvsplit.training.folder import write_safetensors as write_file
from mvsplit.utils.errors import AgreedError, UserError

TENSORS = {
    "weights": {"network.a": torch.arange(12.0).reshape(3, 4), "network.flag": torch.tensor([True, False])},
    "ema": {"network.a": torch.arange(12.0).reshape(3, 4) / 7},
    "optimizer": {"network.a/exp_avg": torch.randn(3, 4).bfloat16(), "network.s/step": torch.zeros(1)},
}


def save(path: Path, step: int = 5, **more: Any) -> Path:
    tensors = {kind: {name: Slice.whole(t) for name, t in named.items()} for kind, named in TENSORS.items()}
    write(path, {"global_step": step, "TheDataModule": {"samples": 8 * step}} | more, tensors, together=False)
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    saved = Saved(save(tmp_path / "last-00000005.ckpt", loops={"done": 3})).verify()
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
        with pytest.raises(UserError, match="the slices of 'w' do not make up the whole tensor"):
            Tensors(files[1:])


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not marked complete": (lambda p: (p / COMPLETE).unlink(), "one that is not complete"),
    "a file is missing": (lambda p: (p / STATE).unlink(), "state.pt is not as long as it was written"),
    "a file is cut": (lambda p: os.truncate(p / "ema-00000.safetensors", 100), "ema-00000.safetensors is not as long"),
    "one byte of weights": (lambda p: flip(p / "weights-00000.safetensors", -3), "weights-00000.safetensors fails its"),
    "one byte of state": (lambda p: flip(p / STATE, 300), "state.pt fails its checksum"),
    "one byte of the manifest": (lambda p: flip(p / MANIFEST, 30), "manifest.json fails its checksum"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_noticed_and_the_one_before_is_taken(tmp_path: Path, capsys: Any, kind: str) -> None:
    older, newer = save(tmp_path / "last-00000005.ckpt"), save(tmp_path / "last-00000010.ckpt", 10)
    assert newest(tmp_path, verify=True) == newer
    damage, message = DAMAGE[kind]
    damage(newer)
    with pytest.raises(UserError, match=message):
        Saved(newer).verify()
    assert newest(tmp_path, verify=True) == older
    assert f"passed over: {newer}" in capsys.readouterr().err
    damage(older)
    with pytest.raises(UserError, match=r"none of the 2 checkpoints in .* is whole"):
        newest(tmp_path, verify=True)


def test_others_are_refused(tmp_path: Path) -> None:
    assert newest(tmp_path, verify=True) is None
    (tmp_path / "folder.ckpt").mkdir()
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "file.ckpt")
    for name, message in (
        ("none", "no such file or folder"),
        ("file", "which is a folder"),
        ("folder", "not complete"),
    ):
        with pytest.raises(UserError, match=message):
            Saved(tmp_path / f"{name}.ckpt")


def test_a_poisoned_checkpoint_runs_nothing(tmp_path: Path) -> None:
    path, canary = save(tmp_path / "x.ckpt"), tmp_path / "canary"
    torch.save({"global_step": 5, "loops": Canary(canary)}, tmp_path / "poison.pt")
    poison(path, STATE, (tmp_path / "poison.pt").read_bytes())
    with pytest.raises(UserError, match=r"state\.pt holds more than data or is damaged"):
        Saved(path).verify().state()
    for kind in TENSORS:
        poison(path, f"{kind}-00000.safetensors", pickle.dumps(Canary(canary)))
        with pytest.raises(UserError, match="damaged, or not a file of slices"):
            Saved(path).verify().tensors(kind)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"] = {"../../escaped": manifest["files"][STATE]}
    (path / MANIFEST).write_text(json.dumps(manifest))
    (path / COMPLETE).write_text(hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest())
    with pytest.raises(UserError, match="not as long as it was written"):
        Saved(path)
    assert not canary.exists()


def test_a_failed_write_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "last-00000005.ckpt")
    with pytest.raises(AgreedError, match=r"could not be written: .*; earlier ones are untouched"):
        save(Path("/proc/last-00000006.ckpt"), 6)
    (tmp_path / "last-00000006.ckpt.partial").mkdir()  # what a kill leaves behind
    assert newest(tmp_path, verify=True) == path
    save(tmp_path / "last-00000007.ckpt", 7)
    assert {p.name for p in tmp_path.iterdir()} == {"last-00000005.ckpt", "last-00000007.ckpt"}
    save(tmp_path / "last-00000007.ckpt", 7, loops="anew")
    assert Saved(tmp_path / "last-00000007.ckpt").verify().state()["loops"] == "anew"
    remove(path)
    assert not path.exists()


def test_conversion_to_one_file(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    path = save(tmp_path / "checkpoints" / "last-00000005.ckpt")
    assert convert(path, tmp_path / "both.safetensors", ["ema", "raw"], torch.float32) == 4
    both = load_file(tmp_path / "both.safetensors")
    assert torch.equal(both["a"], TENSORS["ema"]["network.a"])
    assert torch.equal(both["raw.a"], TENSORS["weights"]["network.a"])
    assert both["flag"].dtype == torch.bool  # a buffer has no average, and keeps its type
    convert(path, tmp_path / "half.safetensors", ["ema"], torch.bfloat16)
    assert torch.equal(load_file(tmp_path / "half.safetensors")["a"], TENSORS["ema"]["network.a"].bfloat16())
    remove(path)
    del TENSORS["ema"]["network.a"]
    save(path)
    with pytest.raises(UserError, match="holds no averaged weights; allowed is raw"):
        convert(path, tmp_path / "none.safetensors", ["ema"], torch.float32)


def test_written_by_the_library_read_by_us(tmp_path: Path) -> None:
    save_file({"w": torch.arange(6.0)}, tmp_path / "w-0.safetensors", metadata={"slices": '{"w": [0, 2, 3]}'})
    assert Tensors([tmp_path / "w-0.safetensors"]).whole("w").tolist() == [[0, 1, 2], [3, 4, 5]]


def test_conversion_writes_only_where_it_can_harm_nothing(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    path = save(tmp_path / "checkpoints" / "last-00000005.ckpt")
    (tmp_path / "folder.safetensors").mkdir()
    for output, message in {
        path / "weights-00000.safetensors": "lies in a checkpoint",
        path: "a file that ends in .safetensors is needed",
        tmp_path / "folder.safetensors": "a file that ends in .safetensors is needed",
        Path("/dev/full"): "a file that ends in .safetensors is needed",
        tmp_path / "none" / "model.safetensors": "there is no such folder",
    }.items():
        with pytest.raises(UserError, match=message):
            convert(path, output, ["raw"], torch.float32)
    Saved(path).verify()
    # What a killed conversion leaves in the same folder does not keep a run from saving.
    (tmp_path / "checkpoints" / "model.safetensors.partial").touch()
    save(tmp_path / "checkpoints" / "last-00000006.ckpt", 6)
