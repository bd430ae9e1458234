"""Shards, index and the training stream, on real tar files."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.io import encode_png

from mvsplit.data.datamodule import ShardDataModule
from mvsplit.data.digits import NUM_VAL
from mvsplit.data.index import find_shards, load_index
from mvsplit.data.order import StreamBatches, StreamOrder
from mvsplit.data.reader import ShardReader
from mvsplit.data.shards import write_shards
from mvsplit.data.transforms import CentreCrop
from mvsplit.utils.errors import UserError


def picture(value: int, height: int = 8, width: int = 8) -> bytes:
    return encode_png(torch.full((1, height, width), value, dtype=torch.uint8)).numpy().tobytes()


def shards(folder: Path, count: int = 25, shard_size: int = 10) -> list[Path]:
    return write_shards(folder, "train", ((picture(i), "png", i % 3) for i in range(count)), shard_size)


def read(folder: Path) -> ShardReader:
    return ShardReader(load_index(find_shards(folder, "*.tar"), cache=False), 1, CentreCrop([8, 8]))


def test_digits_are_all_there_and_unchanged(data_dir: Path) -> None:
    seen = []
    for name in ("train", "val"):
        index = load_index(find_shards(data_dir / "digits", f"{name}-*.tar"))
        reader = ShardReader(index, 1, CentreCrop([8, 8]))
        for number in range(len(reader)):
            item = reader[0, number]
            pixels = ((item["image"] + 1) * 8).round().int().flatten().tolist()  # back to 0 … 16
            seen.append((*pixels, item["label"]))
    digits = load_digits()
    assert len(index) == NUM_VAL
    assert sorted(seen) == sorted((*map(int, row), int(label)) for row, label in zip(digits.data, digits.target))  # noqa: B905


def test_write_and_read_back(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    assert [p.name for p in paths] == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    assert not list(tmp_path.glob("*.partial"))
    reader = read(tmp_path)
    assert len(reader) == 25
    item = reader[7, 13]
    assert item["label"] == 13 % 3
    assert (item["position"], item["index"], item["weight"]) == (7, 13, 1.0)
    torch.testing.assert_close(item["image"], torch.full((1, 8, 8), 13 / 127.5 - 1))


def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    import webdataset as wds

    paths = shards(tmp_path)
    samples = list(wds.WebDataset([str(p) for p in paths], shardshuffle=False))
    assert len(samples) == 25
    assert samples[13]["cls"] == b"1"
    assert samples[13]["png"] == picture(13)


def test_index_is_kept_and_renewed(tmp_path: Path) -> None:
    shards(tmp_path)
    first = load_index(find_shards(tmp_path, "*.tar"))
    (kept,) = tmp_path.glob(".index-*")
    again = load_index(find_shards(tmp_path, "*.tar"))
    assert np.array_equal(first.rows, again.rows)
    assert first.fingerprint == again.fingerprint
    data = bytearray(kept.read_bytes())
    data[60] ^= 1
    for damaged in (bytes(data), b"", bytes(data[:50])):
        kept.write_bytes(damaged)
        assert np.array_equal(load_index(find_shards(tmp_path, "*.tar")).rows, first.rows)
    shards(tmp_path, count=26)
    assert len(load_index(find_shards(tmp_path, "*.tar"))) == 26


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    second = 1024 + 512 + 512  # image header and body, class header and body: the second sample begins here
    if how == "cut in a header":
        data = data[: second + 200]
    elif how == "cut at a sample":
        data = data[:second]
    elif how == "cut in a body":
        data = data[: second + 512 + 10]
    elif how == "broken header":
        data[second + 20 : second + 60] = b"\xff" * 40
    elif how == "not a tar":
        data = bytearray(b"hello" * 1000)
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut in a header", "cut at a sample", "cut in a body", "broken header", "not a tar"])
def test_damaged_shards_are_found_before_training(tmp_path: Path, how: str) -> None:
    path = shards(tmp_path)[1]
    damage(path, how)
    with pytest.raises(UserError, match=r"train-000001\.tar") as caught:
        load_index(find_shards(tmp_path, "*.tar"))
    assert "\n" not in str(caught.value)


def test_a_changed_byte_is_found_when_read(tmp_path: Path) -> None:
    path = shards(tmp_path)[1]
    reader = read(tmp_path)
    row = reader.index.rows[12]
    data = bytearray(path.read_bytes())
    data[row["offset"] + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"train-000001\.tar: sample 12 .* fails its checksum"):
        reader[0, 12]
    assert reader[0, 11]["label"] == 11 % 3


def tar_of(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": picture(1)}, "sample 'a' has no class label"),
        ({"a.cls": b"1"}, "sample 'a' has no image"),
        ({"a.png": picture(1), "a.cls": b"cat"}, "is b'cat', not a number"),
        ({}, "hold no samples"),
    ],
)
def test_incomplete_samples(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    tar_of(tmp_path / "train-0.tar", members)
    with pytest.raises(UserError, match=message):
        read(tmp_path)


def test_only_named_members_are_read(tmp_path: Path) -> None:
    """A pickle in a shard is never opened, whatever its name."""
    members = {"a.png": picture(1), "a.cls": b"1", "a.pyd": b"\x80\x04.", "a.png.pkl": b"\x80\x04."}
    tar_of(tmp_path / "train-0.tar", members)
    assert read(tmp_path)[0, 0]["label"] == 1


def test_garbage_that_is_no_image(tmp_path: Path) -> None:
    tar_of(tmp_path / "train-0.tar", {"a.png": b"no picture", "a.cls": b"1"})
    with pytest.raises(UserError, match="does not decode as an image"):
        read(tmp_path)[0, 0]


def png_of_16_bits() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("how", ["damaged", "sixteen bits", "empty"])
def test_pictures_that_cannot_be_read_are_named(tmp_path: Path, how: str) -> None:
    """Damaged before they were indexed, so that no checksum tells."""
    data = bytearray(encode_png(torch.randint(0, 255, (1, 64, 64), dtype=torch.uint8)).numpy().tobytes())
    data[len(data) // 2] ^= 0xFF
    pictures = {"damaged": bytes(data), "sixteen bits": png_of_16_bits(), "empty": b""}
    tar_of(tmp_path / "train-0.tar", {"a.png": pictures[how], "a.cls": b"1"})
    with pytest.raises(UserError, match=r"train-0\.tar: sample 0 at byte 512 does not decode as an image"):
        read(tmp_path)[0, 0]


@pytest.mark.parametrize(("suffix", "kind"), [("jpg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_format_gives_the_channels_asked_for(tmp_path: Path, suffix: str, kind: str, channels: int) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 200, dtype=np.uint8)).save(buffer, kind)
    tar_of(tmp_path / "train-0.tar", {f"a.{suffix}": buffer.getvalue(), "a.cls": b"1"})
    index = load_index(find_shards(tmp_path, "*.tar"))
    image = ShardReader(index, channels, CentreCrop([8, 8]))[0, 0]["image"]
    torch.testing.assert_close(image, torch.full((channels, 8, 8), 200 / 127.5 - 1), rtol=0, atol=0.02)


def test_missing_folder_and_empty_shard_list(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        find_shards(tmp_path / "nowhere", "*.tar")
    with pytest.raises(UserError, match=r"no shards match '\*\.tar'"):
        find_shards(tmp_path, "*.tar")


def test_labels_beyond_num_classes(tmp_path: Path) -> None:
    shards(tmp_path)
    module = ShardDataModule(str(tmp_path), [8, 8], 1, 2, 4, CentreCrop([8, 8]), val="train-*.tar")
    with pytest.raises(UserError, match=r"data\.num_classes = 2: .* holds class 2"):
        module.setup()


def test_transform_crops_the_centre_and_flips_by_place() -> None:
    image = torch.zeros(1, 16, 32, dtype=torch.uint8)
    image[:, :, 16:] = 255
    out = CentreCrop([8, 8])(image, 0)
    assert out.shape == (1, 8, 8)
    assert out[0, 4, 0] == -1
    assert out[0, 4, -1] == 1
    flipping = CentreCrop([8, 8], flip=True, seed=1)
    flipped = [bool(flipping(image, p)[0, 4, 0] == 1) for p in range(200)]
    assert 70 < sum(flipped) < 130
    assert flipped == [bool(flipping(image, p)[0, 4, 0] == 1) for p in range(200)]


def stream(order: StreamOrder, steps: int, micro: int, world: int, first: int = 0) -> list[list[tuple[int, int]]]:
    """What all ranks together read, step by step."""
    ranks = [list(StreamBatches(order, 12, micro, r, world, steps, lambda: first)) for r in range(world)]
    accumulate = 12 // (micro * world)
    return [
        [item for m in range(accumulate) for rank in ranks for item in rank[step * accumulate + m]]
        for step in range(steps - first)
    ]


@pytest.mark.parametrize(("micro", "world"), [(12, 1), (4, 1), (6, 2), (3, 2), (1, 4)])
def test_every_split_reads_the_same_stream(micro: int, world: int) -> None:
    order = StreamOrder(25, seed=3)
    whole = stream(order, 10, 12, 1)
    assert stream(order, 10, micro, world) == whole
    assert stream(order, 10, micro, world, first=4) == whole[4:]  # after a resume, across an epoch's end


def test_stream_takes_every_sample_once_per_epoch() -> None:
    order = StreamOrder(25, seed=3)
    for epoch in range(3):
        assert sorted(order[epoch * 25 + i] for i in range(25)) == list(range(25))
    assert [order[i] for i in range(25)] != [order[25 + i] for i in range(25)]
    assert [order[i] for i in range(50)] == [StreamOrder(25, seed=3)[i] for i in range(50)]
    assert [order[i] for i in range(25)] != [StreamOrder(25, seed=4)[i] for i in range(25)]


def test_workers_read_the_same_as_the_main_process(data_dir: Path) -> None:
    batches = []
    for workers in (0, 2):
        module = ShardDataModule(str(data_dir / "digits"), [8, 8], 1, 10, 50, CentreCrop([8, 8]), num_workers=workers)
        module.setup()
        batches.append([(b["index"], b["image"], b["weight"]) for b in module.val_dataloader()])
    assert len(batches[0]) == len(batches[1]) == 6
    for ours, theirs in zip(*batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert sum(w.sum() for _, _, w in batches[0]) == NUM_VAL  # the last batch is filled up with weight 0
