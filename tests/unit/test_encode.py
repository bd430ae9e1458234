"""Encoded sets: their contents, their sources, and that encoding resumes where it stopped."""

import hashlib
import io
import json
import os
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import scipy.io
import torch
import torchvision.datasets.imagenet
import webdataset as wds
from conftest import compose_config
from filelock import FileLock
from PIL import Image
from small_autoencoders import OPTION, SIZES, saved_autoencoder
from torchvision.io import encode_jpeg, encode_png

import encode
from mvsplit.data.autoencoders import Diffusers, Identity, Tiny
from mvsplit.data.datamodule import ShardDataModule
from mvsplit.data.formats import Latents
from mvsplit.data.index import read_index
from mvsplit.data.shard_encoder import ShardEncoder
from mvsplit.data.shard_writer import write_shard
from mvsplit.utils import console
from mvsplit.utils.config import build, to_plain
from mvsplit.utils.errors import UserError
from mvsplit.utils.images import to_uint8
from mvsplit.utils.rng import Stream, normal

LATENTS = ["kind=latents", "autoencoder=tiny"]
Encode = Callable[..., Path]


@pytest.fixture
def encode_here(data_dir: Path, tmp_path: Path) -> Encode:
    """`encode_here(*overrides)`: encode the digits, or what the overrides name, in this process."""

    def run(*overrides: str, output: str = "out") -> Path:
        paths = [f"paths.data_dir={data_dir}", f"paths.output_dir={tmp_path}", f"output={tmp_path / output}"]
        return encode.encode(compose_config("data=digits", *paths, "shard_size=400", *overrides, name="encode.yaml"))

    return run


def read_back(folder: Path, *overrides: str) -> ShardDataModule:
    paths = [f"paths.data_dir={folder.parent}", f"paths.output_dir={folder.parent}", f"data.folder={folder}"]
    data: ShardDataModule = build(to_plain(compose_config(*paths, *overrides))["data"])
    data.prepare_data()
    data.setup()
    return data


def latents_of(folder: Path, channels: int, side: int, *overrides: str) -> ShardDataModule:
    sizes = [f"data.channels={channels}", f"data.image_size=[{side},{side}]", "data.num_classes=10"]
    return read_back(folder, "data=imagenet_latents", "data.num_workers=0", *sizes, *overrides)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def manifest(folder: Path, name: str = "train") -> dict[str, Any]:
    return json.loads((folder / f"{name}.manifest.json").read_text())


def source(folder: Path, damaged: tuple[int, ...] = (), count: int = 12, captions: bool = False) -> Path:
    """Images of 8 × 8 in two shards, and the same number for validation; damaged ones consist of a PNG's header."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("train", "val"):
        samples = []
        for i in range(count):
            png = encode_png(torch.from_numpy(rng.integers(0, 255, (3, 8, 8), dtype=np.uint8))).numpy().tobytes()
            members = {"png": png[:30] if i in damaged and name == "train" else png, "cls": str(i % 3).encode()}
            samples.append((f"{i:04d}", members | ({"txt": f"picture {i}".encode()} if captions else {})))
        write_shard(folder / f"{name}-000000.tar", samples[: count // 2])
        write_shard(folder / f"{name}-000001.tar", samples[count // 2 :])
    return folder


def of(folder: Path) -> list[str]:
    return ["data=imagenet_images", f"data.folder={folder}", "data.image_size=[8,8]", "data.num_classes=3"]


# ---------------------------------------------------------------- pictures


def test_pictures_read_with_tarfile_and_with_plain_webdataset(encode_here: Encode, data_dir: Path) -> None:
    out = encode_here()
    digits = read_back(data_dir / "digits", "data=digits").reader("train")
    expected = [(int(s["label"]), s["image"]) for s in (digits[i, i] for i in range(1500))]
    shards = sorted(map(str, out.glob("train-*.tar")))
    assert [Path(s).name for s in shards] == [f"train-00000{i}.tar" for i in range(4)]

    members: list[tuple[str, bytes]] = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            members += [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    assert [name for name, _ in members[:4]] == [f"train{i:08d}.{e}" for i in (0, 1) for e in ("cls", "png")]
    contents = dict(members)
    assert len(contents) == len(members) == 3000

    plain = list(wds.WebDataset(shards, shardshuffle=False))
    assert len(plain) == 1500
    for number, (sample, (label, image)) in enumerate(zip(plain, expected, strict=True)):
        assert sample["__key__"] == f"train{number:08d}"
        assert sample["cls"] == contents[f"train{number:08d}.cls"] == str(label).encode()
        assert sample["png"] == contents[f"train{number:08d}.png"]
        assert torch.equal(torch.from_numpy(np.array(Image.open(io.BytesIO(sample["png"])))), image[0])


def test_index_and_manifest_describe_the_set(encode_here: Encode, data_dir: Path) -> None:
    out = encode_here()
    content = manifest(out)
    assert {k: content[k] for k in ("version", "kind", "split", "samples", "shape", "left_out", "encoder")} == {
        "version": 1, "kind": "images", "split": "train", "samples": 1500, "shape": [1, 8, 8], "left_out": {},
        "encoder": None,
    }  # fmt: skip
    assert sum(content["classes"]) == 1500
    assert len(content["classes"]) == 10
    assert [s["samples"] for s in content["shards"]] == [400, 400, 400, 300]
    for shard in content["shards"]:
        data = (out / shard["name"]).read_bytes()
        assert (shard["size"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert content["preprocessing"]["format.val_transform"]["name"] == "CentreCrop"
    digits = read_back(data_dir / "digits", "data=digits")
    assert content["source"]["fingerprint"] == digits.indices["train"].fingerprint
    assert manifest(out, "val")["samples"] == 297

    moved = out.rename(out.with_name("moved"))
    for shard in moved.glob("*.tar"):
        os.utime(shard)  # as if copied
    data = read_back(moved, "data=imagenet_images", "data.image_size=[8,8]", "data.channels=1", "data.num_classes=10")
    index = data.indices["train"]
    with safetensors.safe_open(moved / "train.index.safetensors", framework="numpy") as written:
        assert {name: written.get_tensor(name).tolist() for name in written.keys()} == {  # noqa: SIM118
            name: column.tolist() for name, column in index.columns.items()
        }
    beside = read_index(moved / "train.index.safetensors", str(out))
    assert beside is not None
    assert all(shard.stamp_ns == 0 for shard in beside.shards)  # it holds where the shards are copied to
    assert torch.equal(data.reader("val")[5, 5]["image"], digits.reader("val")[5, 5]["image"])


@pytest.mark.parametrize(("image_format", "tolerance"), [("jpg", 6.0), ("webp", 8.0)])
def test_other_formats(encode_here: Encode, data_dir: Path, image_format: str, tolerance: float) -> None:
    out = encode_here(f"image_format={image_format}", "splits=[val]")
    assert not list(out.glob("train*"))
    (shard,) = out.glob("val-*.tar")
    digits = read_back(data_dir / "digits", "data=digits").reader("val")
    for number, sample in enumerate(wds.WebDataset(str(shard), shardshuffle=False)):
        picture = Image.open(io.BytesIO(sample[image_format])).convert("L")
        error = np.abs(np.array(picture, dtype=float) - digits[number, number]["image"][0].numpy())
        assert error.mean() < tolerance
    assert number == 296
    assert manifest(out, "val")["settings"]["quality"] == 95


def test_captions_are_copied(encode_here: Encode, tmp_path: Path) -> None:
    out = encode_here(*of(source(tmp_path / "source", captions=True)))
    data = read_back(out, *of(out))
    assert [data.reader("train")[i, i]["caption"] for i in (0, 11)] == ["picture 0", "picture 11"]


def test_crop_is_that_of_the_config(encode_here: Encode, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for name in ("train", "val"):
        for label in ("cat", "dog"):
            (folder / name / label).mkdir(parents=True)
            pixels = torch.randint(0, 255, (3, 21, 40), dtype=torch.uint8)
            (folder / name / label / "a.JPEG").write_bytes(encode_jpeg(pixels).numpy().tobytes())
    data = ["data=image_folder", f"data.folder={folder}", "data.image_size=[8,16]", "data.num_classes=2"]
    out = encode_here(*data)
    assert manifest(out)["shape"] == [3, 8, 16]
    written = read_back(out, *of(out), "data.image_size=[8,16]").reader("train")
    read = read_back(folder, *data).reader("train")
    for i in (0, 1):
        assert torch.equal(written[i, i]["image"], read[i, i]["image"])
        assert written[i, i]["label"] == i


# ----------------------------------------------------------------- latents


def test_identity_latents_are_the_pixels(encode_here: Encode, data_dir: Path) -> None:
    out = encode_here("kind=latents", "autoencoder=identity")
    latents = latents_of(out, 1, 8).reader("train")
    digits = read_back(data_dir / "digits", "data=digits").reader("train")
    for i in (0, 7, 1499):
        sample, original = latents[i, i], digits[i, i]["image"]
        assert sample["mean"].dtype == torch.bfloat16
        assert torch.equal(to_uint8(Identity().decode(sample["mean"][None])), original[None])
        assert torch.equal(sample["std"], torch.zeros(1, 8, 8, dtype=torch.bfloat16))
        assert torch.equal(latents.read(i, i, "flipped")["mean"], sample["mean"].flip(-1))


def test_latents_are_normalised_by_the_set_they_are_in(encode_here: Encode) -> None:
    out = encode_here(*LATENTS)
    data = latents_of(out, 4, 4)
    reader = data.reader("train", train=True)
    samples = reader.__getitems__([(i, i) for i in range(1500)])
    batch = {key: torch.stack([s[key] for s in samples]) for key in ("mean", "std")}
    z = data.format.finish(batch | {"position": torch.arange(1500)}, train=True)["image"]
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=0.04, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), atol=0.04, rtol=0)

    means, squares = [], []  # the statistics once more, from the members of the shards
    for sample in wds.WebDataset(sorted(map(str, out.glob("train-*.tar"))), shardshuffle=False):
        for suffix in ("safetensors", "flipped.safetensors"):
            tensors = safetensors.torch.load(sample[suffix])
            means.append(tensors["mean"].double())
            squares.append(tensors["std"].double() ** 2)
    mean = torch.stack(means).transpose(0, 1).flatten(1)
    std = (torch.stack(squares).transpose(0, 1).flatten(1).mean(1) + mean.var(1, correction=0)).sqrt()
    content = manifest(out)
    torch.testing.assert_close(torch.tensor(content["channel_mean"], dtype=torch.float64), mean.mean(1))
    torch.testing.assert_close(torch.tensor(content["channel_std"], dtype=torch.float64), std)
    assert content["encoder"] == {"name": "Tiny", "channels": 1, "seed": 0}


def test_the_flip_is_of_the_picture_not_of_the_latent(encode_here: Encode) -> None:
    reader = latents_of(encode_here(*LATENTS), 4, 4).reader("train")
    (plain, flipped), tiny = (reader.read(3, 3, part)["mean"].float() for part in ("data", "flipped")), Tiny(1)
    pixels = tiny.decode(plain[None])
    torch.testing.assert_close(tiny.decode(flipped[None]), pixels.flip(-1), atol=0.02, rtol=0)
    assert not torch.equal(flipped, plain.flip(-1))


def test_without_the_flip_there_is_no_second_member(encode_here: Encode) -> None:
    out = encode_here(*LATENTS, "flip=false")
    with tarfile.open(out / "train-000000.tar") as tar:
        assert tar.getnames()[:3] == ["train00000000.cls", "train00000000.safetensors", "train00000001.cls"]
    with pytest.raises(UserError, match=r"data\.format\.flip = True: .* without mirrored"):
        latents_of(out, 4, 4)
    assert latents_of(out, 4, 4, "data.format.flip=false").indices["train"].parts == {"data"}


def test_a_channel_that_never_varies_can_be_divided_by(encode_here: Encode, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    png = encode_png(torch.full((3, 8, 8), 255, dtype=torch.uint8)).numpy().tobytes()
    for name in ("train", "val"):
        write_shard(folder / f"{name}-0.tar", [("a", {"png": png, "cls": b"0"})])
    content = manifest(encode_here(*of(folder), "kind=latents", "autoencoder=identity"))
    assert (content["channel_mean"], content["channel_std"]) == ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0])


# ---------------------------------------------------------------- resuming


def test_existing_shards_are_kept_and_missing_ones_encoded_again(encode_here: Encode) -> None:
    out = encode_here(*LATENTS)
    whole = files(out)
    times = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    (out / "train-000001.tar").unlink()
    (out / "train-000002.tar").write_bytes(whole["train-000002.tar"][:-512])
    (out / ".encode" / "val-000000.tar.json").write_text("{")  # killed between shard and record
    (out / "train.manifest.json").unlink()
    (out / "train-000003.tar.77.partial").write_bytes(b"half")
    strangers = ("thesis.partial", "train-000003.tar.partial", ".encode/mine.json.7.partial")
    theirs = {name: out / name for name in strangers}
    for path in theirs.values():
        path.write_bytes(b"somebody's")
    assert encode_here(*LATENTS) == out
    for path in theirs.values():
        assert path.read_bytes() == b"somebody's"
        path.unlink()
    assert files(out) == whole
    kept = {p.name for p in out.glob("*.tar") if p.stat().st_mtime_ns == times[p.name]}
    assert kept == {"train-000000.tar", "train-000003.tar"}


def test_an_unfinished_set_is_refused(encode_here: Encode, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_shard = ShardEncoder.encode

    def fail_at_the_third(self: Any, task: tuple[str, int], report: Any) -> None:
        if task == ("train", 2):
            raise KeyboardInterrupt
        encode_shard(self, task, report)

    monkeypatch.setattr("mvsplit.data.shard_encoder.ShardEncoder.encode", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        encode_here(*LATENTS, output="part")
    monkeypatch.undo()
    whole = encode_here(*LATENTS, output="whole")
    part = whole.with_name("part")
    assert sorted(p.name for p in part.iterdir()) == [".encode", "train-000000.tar", "train-000001.tar"]
    with pytest.raises(UserError, match=r"data\.folder = .*: src/encode\.py has not finished 'train'"):
        latents_of(part, 4, 4, "data.val=train-*.tar")
    assert encode_here(*LATENTS, output="part") == part
    assert files(part) == files(whole)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["shard_size=100"], "contains shards with shard_size = 400, not 100"),
        (["batch_size=8"], "batch_size = 32, not 8"),
        (["flip=false"], "flip = True, not False"),
        (["autoencoder.seed=1"], "autoencoder.seed = 0, not 1"),
        (["autoencoder=identity"], "autoencoder.channels = 1, not None"),
        (["kind=images"], "autoencoder.channels = 1, not None"),
        (["data.image_size=[4,4]"], "data.format.val_transform.image_size = [8, 8], not [4, 4]"),
        (["data.train=val-*.tar"], "source of train = "),
    ],
)
def test_other_settings_are_refused(encode_here: Encode, overrides: list[str], message: str) -> None:
    before = files(out := encode_here(*LATENTS, "splits=[train]"))
    with pytest.raises(UserError, match=r"^output = .*: choose another folder.*$") as caught:
        encode_here(*LATENTS, "splits=[train]", *overrides)
    assert message in str(caught.value)
    assert files(out) == before
    assert manifest(encode_here(*LATENTS, "splits=[val]"), "val")["samples"] == 297  # another set may come later


def test_shards_of_unknown_origin_are_not_overwritten(encode_here: Encode, tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    before = files(folder)
    with pytest.raises(UserError, match="unknown origin"):
        encode_here(*of(folder), output="source")
    assert {name: data for name, data in files(folder).items() if name != ".encode/lock"} == before


def test_two_at_once_are_refused(encode_here: Encode, tmp_path: Path) -> None:
    (tmp_path / "out" / ".encode").mkdir(parents=True)
    with (
        FileLock(tmp_path / "out" / ".encode" / "lock"),
        pytest.raises(UserError, match=r"output = .*: another process is writing there"),
    ):
        encode_here()


# ------------------------------------------------------------------ damage


def test_a_damaged_sample_stops_the_work_by_default(encode_here: Encode, tmp_path: Path) -> None:
    folder = source(tmp_path / "source", damaged=(7,))
    with pytest.raises(UserError, match=r"^[^\n]*train-000001\.tar: sample 7 \('0007'\)[^\n]*cannot be decoded[^\n]*$"):
        encode_here(*of(folder), "shard_size=4")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.tar")) == ["train-000000.tar"]  # none with a hole
    # With substitutes allowed, the same command continues.
    out = encode_here(*of(folder), "shard_size=4", "data.faults.action=substitute", "data.faults.max_rate=0.1")
    assert manifest(out)["samples"] == 11


def test_a_damaged_sample_is_left_out_where_that_is_allowed(encode_here: Encode, tmp_path: Path) -> None:
    folder = source(tmp_path / "source", damaged=(2, 7))
    tolerant = ["data.faults.action=substitute", "shard_size=4"]
    out = encode_here(*of(folder), *tolerant, "data.faults.max_rate=0.2")
    content = manifest(out)
    assert (content["samples"], content["left_out"]) == (10, {"undecodable": 2})
    assert [s["samples"] for s in content["shards"]] == [3, 3, 4]
    keys = [s["__key__"] for s in wds.WebDataset(sorted(map(str, out.glob("train-*.tar"))), shardshuffle=False)]
    assert keys == [f"train{i:08d}" for i in range(12) if i not in (2, 7)]
    assert manifest(out, "val")["left_out"] == {}
    with pytest.raises(UserError, match=r"data\.faults\.max_rate = 0\.1: 2 of the 12 samples"):
        encode_here(*of(folder), *tolerant, "data.faults.max_rate=0.1", output="strict")
    folder = source(tmp_path / "bad", damaged=tuple(range(4)))
    with pytest.raises(UserError, match="contains no samples"):
        encode_here(*of(folder), *tolerant, "data.faults.max_rate=1.0", output="none")


def test_sources_that_cannot_be_encoded(encode_here: Encode, data_dir: Path) -> None:
    with pytest.raises(UserError, match="must be indexed images"):
        encode_here("data.reader=webdataset")
    with pytest.raises(UserError, match=r"splits = \[\]"):
        encode_here("splits=[]")
    with pytest.raises(UserError, match=r"image_format = 'gif': must be 'png', 'jpg' or 'webp'"):
        encode_here("image_format=gif")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="accelerator = gpu: this machine has no GPU"):
            encode_here("accelerator=gpu")


def test_progress_shows_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [100.0], list[str]()
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(console, "info", said.append)
    with console.progress("encoding", 1000, done=400) as advance:
        for count in (10, 10, 80):
            now[0] += 10
            advance(count)
    assert said == ["encoding: 420/1000, about 0:09:40 left"]


# ---------------------------------------------------------------- ImageNet


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The three official archives in miniature: classes whose order in the devkit is not that of their names."""
    folder = tmp_path / "archives"
    folder.mkdir()
    rng = np.random.default_rng(0)
    wnids = ["n03", "n01", "n02"]

    def jpeg() -> bytes:
        return encode_jpeg(torch.from_numpy(rng.integers(0, 255, (3, 12, 10), dtype=np.uint8))).numpy().tobytes()

    def packed(contents: dict[str, bytes], mode: str = "w") -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode=mode) as tar:  # type: ignore[call-overload]
            for name, data in contents.items():
                add(tar, name, data)
        return file.getvalue()

    kind = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "f8")]
    synsets = np.array([(i + 1, wnid, f"word {wnid}", "", 0) for i, wnid in enumerate(wnids)], dtype=kind)
    mat = io.BytesIO()
    scipy.io.savemat(mat, {"synsets": synsets})
    top = "ILSVRC2012_devkit_t12/data"
    devkit = {f"{top}/meta.mat": mat.getvalue(), f"{top}/ILSVRC2012_validation_ground_truth.txt": b"2\n3\n1\n2\n"}
    contents = {
        "devkit": packed(devkit, "w:gz"),
        "train": packed({f"{w}.tar": packed({f"{w}_{i}.JPEG": jpeg() for i in range(3)}) for w in wnids}),
        "val": packed({f"ILSVRC2012_val_0000000{i}.JPEG": jpeg() for i in range(1, 5)}),
    }
    meta = {}
    for name, data in contents.items():
        file = torchvision.datasets.imagenet.ARCHIVE_META[name][0]
        (folder / file).write_bytes(data)
        meta[name] = (file, hashlib.md5(data).hexdigest())
    monkeypatch.setattr(torchvision.datasets.imagenet, "ARCHIVE_META", meta)
    return folder


def test_labels_of_torchvisions_imagenet(encode_here: Encode, archives: Path, tmp_path: Path) -> None:
    root = tmp_path / "imagenet"
    sizes = ["data.image_size=[8,8]", "data.num_classes=3"]
    data = ["data=torchvision_imagenet", f"data.folder={root}", f"data.prepare.archives={archives}", *sizes]
    out = encode_here(*data)
    assert sorted(p.name for p in root.iterdir()) == ["meta.bin", "train", "val"]
    crop = to_plain(compose_config(*data, "paths.output_dir=/x"))["data"]["format"]["val_transform"]
    for split, count in (("train", 9), ("val", 4)):
        theirs = torchvision.datasets.ImageNet(str(root), split, transform=lambda image: build(crop)(image, 0))
        written = read_back(out, *of(out)).reader(split)  # type: ignore[arg-type]
        assert len(theirs) == len(written) == count
        pairs = sorted((label, image.flatten().tolist()) for image, label in theirs)
        mine = [written[i, i] for i in range(count)]
        assert sorted((int(s["label"]), s["image"].flatten().tolist()) for s in mine) == pairs
    assert manifest(out, "val")["classes"] == [2, 1, 1]  # n01, n02, n03
    # A root that torchvision has unpacked is read as it is.
    again = encode_here("data=image_folder", f"data.folder={root}", *sizes, output="again")
    assert files(again)["train-000000.tar"] == files(out)["train-000000.tar"]


def test_missing_archives_are_named(encode_here: Encode, archives: Path, tmp_path: Path) -> None:
    (archives / "ILSVRC2012_img_val.tar").unlink()
    data = ["data=torchvision_imagenet", f"data.folder={tmp_path}/imagenet", f"data.prepare.archives={archives}"]
    with pytest.raises(UserError, match=r"data\.prepare\.archives = .*ILSVRC2012_img_val\.tar is not present"):
        encode_here(*data)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["archives", "out"]  # nothing half unpacked


def test_a_folder_with_other_things_is_not_filled(encode_here: Encode, archives: Path) -> None:
    with pytest.raises(UserError, match=r"data\.folder = .*: contains files other than data"):
        encode_here("data=torchvision_imagenet", f"data.folder={archives}", f"data.prepare.archives={archives}")


# ------------------------------------------------------------ autoencoders


def test_tiny_is_its_own_inverse_and_always_the_same() -> None:
    images = torch.rand(2, 3, 6, 8) * 2 - 1
    mean, std = Tiny(3, seed=5).encode(images)
    assert mean.shape == std.shape == (2, 12, 3, 4)
    assert (std > 0).all()
    torch.testing.assert_close(Tiny(3, seed=5).decode(mean), images, atol=1e-5, rtol=0)
    torch.manual_seed(9)
    assert torch.equal(Tiny(3, seed=5).encode(images)[0], mean)
    assert not torch.equal(Tiny(3, seed=6).encode(images)[0], mean)


def folded(latents: torch.Tensor) -> torch.Tensor:
    """As diffusers' `Flux2Pipeline._patchify_latents`: channel 4·c + 2·i + j holds rows i, i + 2, … and columns j, …"""
    parts = [latents[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return torch.stack(parts, dim=2).flatten(1, 2)


@pytest.mark.parametrize(("model", "fold"), [("AutoencoderKL", 1), ("AutoencoderKLFlux2", 2)])
def test_diffusers_autoencoders(encode_here: Encode, tmp_path: Path, model: str, fold: int) -> None:
    theirs = saved_autoencoder(tmp_path / "model" / "vae", model)
    chosen = [f"autoencoder={OPTION[model]}", f"autoencoder.path={tmp_path}/model", "autoencoder.subfolder=vae"]
    folder = source(tmp_path / "source")
    out = encode_here(*of(folder), "kind=latents", *chosen)
    channels, side = 3 * fold**2, 4 // fold
    assert manifest(out)["shape"] == [channels, side, side]
    reader = latents_of(out, channels, side).reader("train")
    pixels = torch.stack([s["image"] for s in (read_back(folder, *of(folder)).reader("train")[i, i] for i in (0, 1))])
    with torch.inference_mode():
        for part, images in (("data", pixels), ("flipped", pixels.flip(-1))):
            posterior = theirs.encode(images / 127.5 - 1).latent_dist
            mean, std = posterior.mean, posterior.std
            if fold == 2:
                mean, std = folded(mean), folded(std)
            for i in (0, 1):
                sample = reader.read(i, i, part)
                torch.testing.assert_close(sample["mean"].float(), mean[i], atol=1e-3, rtol=0.01)
                torch.testing.assert_close(sample["std"].float(), std[i], atol=1e-3, rtol=0.01)
        mine = Diffusers(str(tmp_path / "model"), model, "vae")  # type: ignore[arg-type]
        expected = theirs.decode(posterior.mean).sample
        torch.testing.assert_close(mine.decode(mine.encode(pixels.flip(-1) / 127.5 - 1)[0]), expected)
    about = manifest(out)["encoder"]
    assert about == mine.identity()
    theirs.encoder.conv_in.bias.data += 1
    theirs.save_pretrained(tmp_path / "model" / "vae")
    with pytest.raises(UserError, match=rf"autoencoder\.weights = {about['weights']}, not"):
        encode_here(*of(folder), "kind=latents", *chosen)


def test_the_manifest_records_the_choice_of_normalisation_and_posterior(encode_here: Encode, tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    vae = saved_autoencoder(tmp_path / "model", "AutoencoderKLFlux2")
    chosen = [*of(folder), "kind=latents", "autoencoder=flux2", f"autoencoder.path={tmp_path}/model",
              "autoencoder.subfolder=null"]  # fmt: skip
    out = encode_here(*chosen)
    drawn = files(out)["train-000000.tar"]
    assert manifest(out)["normalisation"] == {
        "by": "set",
        "mean": manifest(out)["channel_mean"],
        "std": manifest(out)["channel_std"],
    }
    # Another normalisation changes the manifest, not the shards.
    encode_here(*chosen, "normalisation=autoencoder")
    assert files(out)["train-000000.tar"] == drawn
    own = manifest(out)["normalisation"]
    assert own["by"] == "autoencoder"
    assert own["mean"] == vae.bn.running_mean.double().tolist()
    reader = latents_of(out, 12, 2)
    batch = next(reader.batches("val"))
    stored = reader.reader("val").read(0, 0, "data")
    noise = normal(0, Stream.VAL_LATENT, torch.tensor([0]), (12, 2, 2))
    z = stored["mean"].float() + stored["std"].float() * noise
    std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    expected = (z - vae.bn.running_mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    torch.testing.assert_close(batch["image"][:1], expected, atol=1e-5, rtol=1e-5)

    with pytest.raises(UserError, match="posterior = None, not mean"):
        encode_here(*chosen, "posterior=mean")
    means = encode_here(*chosen, "posterior=mean", output="means")
    assert manifest(means)["posterior"] == "mean"
    assert len(files(means)["train-000000.tar"]) <= len(drawn)
    only = latents_of(means, 12, 2)
    form = only.format
    assert isinstance(form, Latents)
    assert form.space is not None
    seen = next(only.batches("train"))
    part = form.choose(seen["position"].tolist(), train=True)[0]
    mean = only.reader("train").read(0, int(seen["index"][0]), part)["mean"].float()
    torch.testing.assert_close(seen["image"][0], form.space.normalise(mean[None])[0])  # nothing is drawn


def test_an_autoencoder_without_a_normalisation_of_its_own_is_refused(encode_here: Encode) -> None:
    with pytest.raises(UserError, match="normalisation = autoencoder: Tiny has none; use set"):
        encode_here(*LATENTS, "normalisation=autoencoder")


def test_diffusers_mistakes_are_reported_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.AutoencoderKL(**SIZES)
    with pytest.raises(UserError, match=r"^autoencoder\.path = [^\n]*$"):
        Diffusers(str(tmp_path))
    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert list((tmp_path / "pickled").glob("*.bin"))
    with pytest.raises(UserError, match=r"^autoencoder\.path = [^\n]*safetensors[^\n]*$"):
        Diffusers(str(tmp_path / "pickled"))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"data\.channels = 1: must be 3 for "):
        Diffusers(str(tmp_path / "model")).encode(torch.zeros(1, 1, 8, 8))
    diffusers.AutoencoderKLFlux2(**SIZES).save_pretrained(tmp_path / "flux")
    with pytest.raises(UserError, match=r"data\.image_size = \[6, 8\]: .* divisible by 2"):
        Diffusers(str(tmp_path / "flux"), "AutoencoderKLFlux2").encode(torch.zeros(1, 3, 6, 8))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[latents\]'"):
        Diffusers(str(tmp_path / "model"))
