"""Shards, index, formats and the training stream, on real tar files."""

import io
import os
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from data_tools import (
    SUBSTITUTE,
    colour,
    datamodule,
    grey,
    index,
    jpeg_shards,
    latent_shards,
    photograph,
    picture,
    read_by_ranks,
    reader,
    shards,
    storage,
    tar_of,
)
from PIL import Image
from sklearn.datasets import load_digits

from mvsplit.data.digits import NUM_VAL
from mvsplit.data.formats import Images, Latents
from mvsplit.data.indexing import load_index
from mvsplit.data.order import StreamOrder
from mvsplit.data.reader import collate
from mvsplit.data.shard_set import ShardSet, set_name
from mvsplit.data.transforms import CentreCrop
from mvsplit.utils.errors import UserError


def test_digits_are_all_there_and_unchanged(data_dir: Path, tmp_path: Path) -> None:
    seen = []
    for name in ("train", "val"):
        found = load_index(ShardSet(storage(tmp_path), str(data_dir / "digits"), f"{name}-*.tar", grey()))
        source = datamodule(data_dir / "digits", tmp_path)
        source.indices["val"] = found
        for item in source.reader("val").__getitems__([(i, i) for i in range(len(found))]):
            pixels = (item["image"].float() * (16 / 255)).round().int().flatten().tolist()  # back to 0 … 16
            seen.append((*pixels, item["label"]))
    digits = load_digits()
    assert len(found) == NUM_VAL
    expected = [(*map(int, row), int(label)) for row, label in zip(digits.data, digits.target, strict=True)]
    assert sorted(seen) == sorted(expected)


def test_write_and_read_back(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    assert [p.name for p in paths] == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    assert not list(tmp_path.glob("*.partial"))
    source = reader(tmp_path)
    assert len(source) == 25
    item = source[7, 13]
    assert item["label"] == 13 % 3
    assert (item["position"], item["index"], item["weight"], item["findings"]) == (7, 13, 1.0, [])
    assert torch.equal(item["image"], torch.full((1, 8, 8), 13, dtype=torch.uint8))
    batch = source.form.finish(collate([item]), train=True)
    torch.testing.assert_close(batch["image"], torch.full((1, 1, 8, 8), 13 / 127.5 - 1))


def test_shards_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    first, second = shards(tmp_path / "a"), shards(tmp_path / "b")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_webdataset_and_tarfile_read_our_shards(tmp_path: Path) -> None:
    import webdataset as wds

    paths = shards(tmp_path)
    samples = list(wds.WebDataset([str(p) for p in paths], shardshuffle=False))
    assert len(samples) == 25
    assert samples[13]["cls"] == b"1"
    assert samples[13]["png"] == picture(13)
    with tarfile.open(paths[1]) as tar:
        assert tar.getnames()[6:8] == ["train00000013.cls", "train00000013.png"]


def published(folder: Path, count: int = 7) -> Path:
    """A shard as ImageNet is published: by webdataset's own writer, with jpg, cls and json members."""
    import webdataset as wds

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "imagenet1k-train-0000.tar"
    with path.open("wb") as file, wds.TarWriter(file) as writer:
        for i in range(count):
            about = {"label": i, "width": 120, "caption": f"picture {i}"}
            writer.write({"__key__": f"n0144076{i}/n0144076{i}_{i}", "jpg": photograph(i), "cls": i, "json": about})
    return path


def test_published_shards_read_here_with_their_captions(tmp_path: Path) -> None:
    published(tmp_path)
    source = reader(tmp_path, form=colour())
    items = source.__getitems__([(i, i) for i in range(7)])
    assert [item["label"] for item in items] == list(range(7))
    assert collate(items)["caption"] == [f"picture {i}" for i in range(7)]
    expected = CentreCrop([32, 32])(Image.open(io.BytesIO(photograph(3))), 0)
    assert torch.equal(items[3]["image"], expected)
    assert source.index.key(source.storage, 3) == "imagenet1k-train-0000.tar:n01440763/n01440763_3"


def test_a_label_may_be_in_the_json_alone_and_a_caption_in_a_txt(tmp_path: Path) -> None:
    members = {"a.png": picture(1), "a.json": b'{"label": 7}', "b.png": picture(2), "b.cls": b"3", "b.txt": b"two"}
    tar_of(tmp_path / "train-0.tar", members)
    items = reader(tmp_path).__getitems__([(0, 0), (1, 1)])
    assert [(item["label"], item["caption"]) for item in items] == [(7, ""), (3, "two")]


def test_index_is_kept_and_renewed(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    first = index(tmp_path)
    (kept,) = (tmp_path / "cache" / "indices").iterdir()
    stamp = kept.stat().st_mtime_ns
    assert index(tmp_path).fingerprint == first.fingerprint
    assert kept.stat().st_mtime_ns == stamp
    data = bytearray(kept.read_bytes())
    for place in (60, len(data) - 5):
        damaged = bytearray(data)
        damaged[place] ^= 1
        for content in (bytes(damaged), b"", bytes(data[:50])):
            kept.write_bytes(content)
            again = index(tmp_path)
            assert again.fingerprint == first.fingerprint
            assert [s.sha256 for s in again.shards] == [s.sha256 for s in first.shards]
    shards(tmp_path, count=26)
    assert len(index(tmp_path)) == 26
    assert len(paths) == len(index(tmp_path).shards)


def test_interrupted_indexing_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mvsplit.data import indexing as index_file

    shards(tmp_path)
    scanned: list[str] = []
    plain = index_file.scan_tar

    def scan(store: object, folder: str, name: str, form: object) -> object:
        if len(scanned) == 2:
            raise KeyboardInterrupt
        scanned.append(name)
        return plain(store, folder, name, form)  # type: ignore[arg-type]

    monkeypatch.setattr(index_file, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(index_file, "scan_tar", scan)
    with pytest.raises(KeyboardInterrupt):
        index(tmp_path)
    monkeypatch.setattr(index_file, "scan_tar", lambda *a: scanned.append(a[2]) or plain(*a))
    assert len(index(tmp_path)) == 25
    assert scanned == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]  # none twice


def test_patterns_name_shards(tmp_path: Path) -> None:
    shards(tmp_path)
    store = storage(tmp_path)
    names = [Path(p).name for p in store.expand(str(tmp_path), "train-{000000..000002}.tar")]
    assert names == [Path(p).name for p in store.expand(str(tmp_path), "train-*.tar")]
    assert store.expand("https://host/x", "t-{00..02}.tar")[2] == "https://host/x/t-02.tar"
    assert set_name("imagenet1k-train-{0000..1023}.tar") == "imagenet1k-train"
    assert (
        set_name("train-*.tar")
        == set_name("train-{000..146}.tar")
        == set_name("train-000000.tar")
        == set_name("train")
        == "train"
    )
    for folder, pattern, message in [
        (str(tmp_path / "nowhere"), "*.tar", "folder does not exist"),
        (str(tmp_path), "test-*.tar", r"no shards match 'test-\*\.tar'"),
        (str(tmp_path), "../x.tar", "is outside"),
        ("https://host", "t-*.tar", "http cannot list files"),
        ("ftp://host", "t.tar", "must be a local path or an address of https"),
        ("simplecache::https://host", "t.tar", "must be a local path or an address of https"),
        (str(tmp_path), "t-{0..99999999}.tar", "more than 1000000 shards"),
    ]:
        with pytest.raises(UserError, match=message):
            store.expand(folder, pattern)


@pytest.mark.parametrize(("suffix", "kind"), [("jpg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_format_gives_the_configured_channels(tmp_path: Path, suffix: str, kind: str, channels: int) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 200, dtype=np.uint8)).save(buffer, kind)
    tar_of(tmp_path / "train-0.tar", {f"a.{suffix}": buffer.getvalue(), "a.cls": b"1"})
    image = reader(tmp_path, form=Images([8, 8], channels, CentreCrop([8, 8])))[0, 0]["image"]
    assert image.shape == (channels, 8, 8)
    assert (image.int() - 200).abs().max() <= 2


def test_labels_beyond_num_classes(tmp_path: Path) -> None:
    shards(tmp_path)
    module = datamodule(tmp_path, tmp_path, num_classes=2)
    with pytest.raises(UserError, match=r"data\.num_classes = 2: .*train-000000\.tar contains class 2"):
        module.setup()


def adm_crop(image: Image.Image, size: int) -> np.ndarray:
    """The published preprocessing, reimplemented for square images."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)  # type: ignore[attr-defined]
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)  # type: ignore[attr-defined]
    pixels = np.array(image)
    y, x = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[y : y + size, x : x + size]


@pytest.mark.parametrize(("height", "width"), [(96, 120), (33, 32), (31, 57), (130, 64), (500, 375)])
def test_the_crop_is_adms(height: int, width: int) -> None:
    image = Image.open(io.BytesIO(photograph(height, height, width)))
    ours = CentreCrop([32, 32])(image, 0)
    assert np.array_equal(ours.permute(1, 2, 0).numpy(), adm_crop(image, 32))


def test_flips_follow_the_place() -> None:
    pixels = np.zeros((16, 32), dtype=np.uint8)
    pixels[:, 16:] = 255
    image = Image.fromarray(pixels)
    out = CentreCrop([8, 8])(image, 0)
    assert (out[0, 4, 0], out[0, 4, -1]) == (0, 255)
    flipping = CentreCrop([8, 8], flip=True, seed=1)
    flipped = [bool(flipping(image, p)[0, 4, 0] == 255) for p in range(200)]
    assert 70 < sum(flipped) < 130
    assert flipped == [bool(flipping(image, p)[0, 4, 0] == 255) for p in range(200)]


def test_image_folders_are_numbered_as_torchvision_numbers_them(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    for name in ("cat", "ant", "bee"):
        for i in range(4):
            path = tmp_path / "train" / name / ("deep" if i == 3 else "") / f"{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photograph(len(name) + i))
    module = datamodule(tmp_path, tmp_path, layout="folders", train="train", val="train", format=colour())
    module.setup()
    theirs = ImageFolder(str(tmp_path / "train"))
    found = module.indices["train"]
    assert [(found.location(i), int(found.columns["label"][i])) for i in range(12)] == theirs.samples
    item = module.reader("train")[5, 5]
    assert torch.equal(item["image"], CentreCrop([32, 32])(theirs[5][0], 0))
    (tmp_path / "train" / "ant" / "new.png").write_bytes(picture(3))
    fresh = datamodule(tmp_path, tmp_path, layout="folders", train="train", val="train", format=colour())
    fresh.setup()
    assert len(fresh.indices["train"]) == 13


def test_latents_are_drawn_and_normalised(tmp_path: Path) -> None:
    form = Latents([4, 4], 2, flip=True, seed=5)
    mean = torch.arange(2.0).view(2, 1, 1).expand(2, 4, 4).contiguous().bfloat16()
    members = {}
    for suffix, sign in (("safetensors", 1), ("flipped.safetensors", -1)):
        members[f"a.{suffix}"] = safetensors.torch.save({"mean": mean * sign, "std": torch.full_like(mean, 0.5)})
    tar_of(tmp_path / "train-0.tar", members | {"a.cls": b"1"})
    manifest = {"shape": [2, 4, 4], "channel_mean": [0.0, 1.0], "channel_std": [1.0, 2.0]}
    source = reader(tmp_path, form=form)
    form.bind(source.index.parts, manifest)
    places = list(range(4000))
    items = source.__getitems__([(p, 0) for p in places])
    assert items[0]["mean"].dtype == torch.bfloat16
    batch = form.finish(collate(items), train=True)
    assert set(batch) == {"image", "label", "index", "position", "weight", "findings"}
    z = batch["image"] * torch.tensor([1.0, 2.0]).view(-1, 1, 1) + torch.tensor([0.0, 1.0]).view(-1, 1, 1)
    sign = torch.tensor([1.0 if item["mean"][1, 0, 0] > 0 else -1.0 for item in items])
    assert 1800 < (sign > 0).sum() < 2200
    noise = (z - sign.view(-1, 1, 1, 1) * mean.float()) / 0.5
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    again = form.finish(collate(source.__getitems__([(p, 0) for p in places[1000:1010]])), train=True)
    assert torch.equal(again["image"], batch["image"][1000:1010])  # a function of the place, not of the batch
    source.train = False
    validated = [form.finish(collate([source[p, 0]]), train=False)["image"] for p in (0, 1)]
    assert torch.equal(*validated)  # in validation a function of the sample


def test_latents_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    latent_shards(tmp_path, 5, 5)
    found = reader(tmp_path, form=Latents([8, 8], 4)).index
    statistics = {"shape": [4, 8, 8], "channel_mean": [0.0] * 4, "channel_std": [1.0] * 4}
    Latents([8, 8], 4).bind(found.parts, statistics)
    with pytest.raises(UserError, match="no manifest with channel statistics"):
        Latents([8, 8], 4).bind(found.parts, None)
    with pytest.raises(UserError, match=r"image_size = 4, \[16, 16\]: the set's latents have the shape \[4, 8, 8\]"):
        Latents([16, 16], 4).bind(found.parts, statistics)
    with pytest.raises(UserError, match="encoded without mirrored images"):
        Latents([8, 8], 4).bind({"data"}, statistics)
    wrong = reader(tmp_path, SUBSTITUTE, form=Latents([4, 4], 4))
    assert wrong[0, 0]["findings"][0].kind == "undecodable"


@pytest.mark.parametrize(("micro", "world"), [(12, 1), (4, 1), (6, 2), (3, 2), (1, 4)])
def test_every_split_reads_the_same_stream(micro: int, world: int) -> None:
    stream = partial(read_by_ranks, lambda: StreamOrder(25, seed=3))
    whole = stream(10, 12, 1)
    assert stream(10, micro, world) == whole
    assert stream(10, micro, world, first=4) == whole[4:]  # after a resume, across an epoch's end


def test_stream_takes_every_sample_once_per_epoch() -> None:
    def order(seed: int = 3) -> StreamOrder:
        return StreamOrder(25, seed)

    for epoch in range(3):
        assert sorted(order().take(epoch * 25, 25)) == list(range(25))
    assert order().take(0, 25) != order().take(25, 25)
    assert order().take(0, 50) == order().take(0, 20) + order().take(20, 30)
    assert order().take(0, 25) != order(4).take(0, 25)


def test_seeking_costs_nothing_that_grows_with_the_place() -> None:
    """The order of 1.28 M samples takes less than half a second of CPU, wherever it begins."""

    def seconds(place: int) -> float:
        began = time.process_time()
        StreamOrder(1_281_167, seed=0).take(place, 256)
        return time.process_time() - began

    assert min(seconds(0) for _ in range(5)) < 0.5
    assert min(seconds(1_281_167 * 300 + 1_200_000) for _ in range(5)) < 0.5


def test_workers_read_the_same_as_the_main_process(data_dir: Path, tmp_path: Path) -> None:
    batches = []
    for workers in (0, 2):
        module = datamodule(data_dir / "digits", tmp_path, batch_size=50, num_workers=workers, val="val-*.tar")
        module.setup()
        batches.append([(b["index"], b["image"], b["weight"]) for b in module.val_dataloader()])
    assert len(batches[0]) == len(batches[1]) == 6
    for ours, theirs in zip(*batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert sum(w.sum() for _, _, w in batches[0]) == NUM_VAL  # the last batch is filled up with weight 0


def test_few_files_stay_open(tmp_path: Path) -> None:
    shards(tmp_path, count=300, shard_size=2)
    source = reader(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    source.__getitems__([(i, i) for i in range(300)])
    assert len(os.listdir("/proc/self/fd")) - before == 64
    assert source[0, 299]["label"] == 299 % 3


def test_jpeg_shards_survive_the_check_for_damage(tmp_path: Path) -> None:
    jpeg_shards(tmp_path, 40, 20)
    assert index(tmp_path, form=colour()).findings == []


def test_index_and_manifest_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mvsplit.data import indexing, shard_set

    shards(tmp_path / "set")
    datamodule(tmp_path / "set", tmp_path).setup()
    read: Counter[str] = Counter()

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda path, *more: read.update([path.name]) or function(path, *more)

    monkeypatch.setattr(indexing, "read_index", counting(indexing.read_index))
    monkeypatch.setattr(shard_set, "_read_json", counting(shard_set._read_json))
    module = datamodule(tmp_path / "set", tmp_path, val="train-{000000..000002}.tar")
    for _ in ("fit", "test"):
        module.prepare_data()
        module.setup()
    (kept,) = {path.name for path in (tmp_path / "cache" / "indices").iterdir()} & set(read)
    assert read[kept] <= 2  # by training and validation set
    assert read["train.manifest.json"] == 1
