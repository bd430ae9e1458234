"""Sets of images from .npz files and folders: what is read, what is refused in one line, and that memory stays flat."""

import io
import os
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mvsplit.evaluation.image_files import ImageFolder, open_images
from mvsplit.evaluation.npz_files import members, write_npz
from mvsplit.utils.errors import UserError


def images(count: int, channels: int = 3, height: int = 5, width: int = 6) -> Tensor:
    shape = (count, channels, height, width)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def refused(path: Path) -> str:
    """The line that reading a whole set ends with."""
    with pytest.raises(UserError) as raised:
        list(open_images(str(path)).batches(4))
    message = str(raised.value)
    assert message.startswith(f"{path}")
    assert "\n" not in message
    return message.removeprefix(str(path))


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def archive(path: Path, method: int = zipfile.ZIP_STORED, **arrays: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in arrays.items():
            file.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_written_images_are_read_by_numpy_and_back(tmp_path: Path, channels: int) -> None:
    path, expected, labels = tmp_path / "samples.npz", images(11, channels), torch.arange(11) % 4
    write_npz(path, 11, expected.shape[1:], expected.split(4), labels)
    with np.load(path, allow_pickle=False) as plain:
        assert plain["arr_0"].dtype == np.uint8
        assert plain["arr_0"].shape == (11, 5, 6, channels)
        assert np.array_equal(plain["arr_0"], expected.permute(0, 2, 3, 1).numpy())
        assert plain["arr_1"].dtype == np.int64
        assert plain["arr_1"].tolist() == labels.tolist()
    found = open_images(str(path))
    assert (len(found), found.shape) == (11, (channels, 5, 6))
    assert found.labels is not None
    assert torch.equal(found.labels, labels)
    assert [len(batch) for batch in found.batches(4)] == [4, 4, 3]
    assert torch.equal(torch.cat(list(found.batches(4))), expected)
    assert torch.equal(next(found.batches(100)), expected)


def test_the_same_images_give_the_same_bytes_and_a_failure_leaves_no_file(tmp_path: Path) -> None:
    for name, size in (("a", 3), ("b", 5)):
        write_npz(tmp_path / f"{name}.npz", 9, (3, 5, 6), images(9).split(size))
    first, second = (open_images(str(tmp_path / f"{name}.npz")) for name in "ab")
    assert first.fingerprint == second.fingerprint
    assert len(first.fingerprint) == 64
    assert first.labels is None
    write_npz(tmp_path / "c.npz", 9, (3, 5, 6), [images(9)], torch.zeros(9, dtype=torch.int64))
    assert open_images(str(tmp_path / "c.npz")).fingerprint != first.fingerprint
    with pytest.raises(AssertionError):
        write_npz(tmp_path / "d.npz", 10, (3, 5, 6), [images(9)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz", "c.npz"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_numpy_s_files_are_read_stored_and_deflated(tmp_path: Path, save: Callable) -> None:
    grey = images(7, 1)[:, 0].numpy()
    save(tmp_path / "grey.npz", grey, np.arange(7, dtype=np.int32))
    found = open_images(str(tmp_path / "grey.npz"))
    assert found.shape == (1, 5, 6)
    assert np.array_equal(torch.cat(list(found.batches(2)))[:, 0].numpy(), grey)
    assert found.labels is not None
    assert found.labels.dtype == torch.int64
    assert found.labels.tolist() == list(range(7))


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    path, count = tmp_path / "many.npz", 600
    write_npz(path, count, (3, 128, 128), (images(1, 3, 128, 128).expand(50, -1, -1, -1) for _ in range(count // 50)))
    tracemalloc.start()
    total = sum(int(batch[:, 0, 0, 0].sum()) for batch in open_images(str(path)).batches(10))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == count * int(images(1, 3, 128, 128)[0, 0, 0, 0])
    assert peak < 6 << 20 < path.stat().st_size / 4


def test_npz_files_that_cannot_be_read_are_one_line_each(tmp_path: Path) -> None:
    good = npy(images(9).permute(0, 2, 3, 1).numpy())
    text = npy(np.array(["a", {"b": 1}], dtype=object))
    lying = good.replace(b"(9, 5, 6, 3)", b"(8, 5, 6, 3)")
    huge = good.replace(b"(9, 5, 6, 3), }       ", b"(9, 5, 6, 3000000), } ")
    cases = {
        "object": (archive(tmp_path / "object.npz", arr_0=text), "Python objects, which are never unpickled"),
        "float": (archive(tmp_path / "float.npz", arr_0=npy(np.zeros((2, 3, 3, 3)))), "'arr_0' is float64, must be"),
        "shape": (archive(tmp_path / "shape.npz", arr_0=npy(np.zeros((2, 3, 3, 4), np.uint8))), "has the shape"),
        "flat": (archive(tmp_path / "flat.npz", arr_0=npy(np.zeros(5, np.uint8))), "has the shape [5], must be N"),
        "none": (archive(tmp_path / "none.npz", arr_0=npy(np.zeros((0, 3, 3, 3), np.uint8))), "has the shape [0,"),
        "absent": (archive(tmp_path / "absent.npz", images=good), "has no array 'arr_0'"),
        "short": (archive(tmp_path / "short.npz", arr_0=good[:-7]), "its header says uint8, [9, 5, 6, 3], which"),
        "lying": (archive(tmp_path / "lying.npz", arr_0=lying), "its header says uint8, [8, 5, 6, 3], which"),
        "huge": (archive(tmp_path / "huge.npz", arr_0=huge), "its header says uint8, [9, 5, 6, 3000000], which"),
        "empty": (archive(tmp_path / "empty.npz", arr_0=b""), "array 'arr_0' cannot be read"),
        "noise": (archive(tmp_path / "noise.npz", arr_0=os.urandom(300)), "array 'arr_0' cannot be read"),
        "labels": (archive(tmp_path / "labels.npz", arr_0=good, arr_1=npy(np.zeros(3, int))), "must be 9 whole number"),
        "fractions": (archive(tmp_path / "fractions.npz", arr_0=good, arr_1=npy(np.zeros(9))), "'arr_1' is float64"),
        "fortran": (
            archive(tmp_path / "fortran.npz", arr_0=npy(np.zeros((2, 3, 4, 3), np.uint8, order="F"))),
            "Fortran",
        ),
    }
    for name, (path, message) in cases.items():
        assert message in refused(path), name
    (tmp_path / "text.npz").write_text("no archive")
    assert "not a .npz file" in refused(tmp_path / "text.npz")
    assert refused(tmp_path / "absent") == ": no such file or folder"
    assert refused(tmp_path / "nothing.npz") == ": no such file"
    (tmp_path / "set.zip").write_bytes(b"")
    assert refused(tmp_path / "set.zip") == ": must be a folder or a .npz file"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_and_lying_archives_are_one_line(tmp_path: Path, method: int) -> None:
    path = archive(tmp_path / "a.npz", method, arr_0=npy(images(40).permute(0, 2, 3, 1).numpy()))
    whole = path.read_bytes()
    place = len(whole) // 2
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert "array 'arr_0' cannot be read" in refused(path)
    path.write_bytes(whole[:place])
    assert "not a .npz file" in refused(path)
    size = zipfile.ZipFile(io.BytesIO(whole)).getinfo("arr_0.npy").file_size
    fields = size.to_bytes(4, "little")
    path.write_bytes(whole.replace(fields, (size * 1000).to_bytes(4, "little")))  # the directory lies
    assert "array 'arr_0' cannot be read" in refused(path)


def test_a_pickle_in_an_array_is_never_loaded(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[Callable, tuple]:
            return Path.touch, (tmp_path / "unpickled",)

    path = archive(tmp_path / "a.npz", arr_0=npy(np.array([Touch()], dtype=object)))
    assert "never unpickled" in refused(path)
    assert not (tmp_path / "unpickled").exists()


def test_an_array_beside_the_images_is_not_read(tmp_path: Path) -> None:
    good = npy(images(3).permute(0, 2, 3, 1).numpy())
    path = archive(tmp_path / "a.npz", arr_0=good, notes=npy(np.array([{}], dtype=object)))
    assert len(open_images(str(path))) == 3
    assert list(members(path, ["arr_0", "mu"])) == ["arr_0"]


def png(path: Path, image: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = image.permute(1, 2, 0).numpy()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(path)


def test_a_folder_is_read_recursively_in_order_of_its_paths(tmp_path: Path) -> None:
    expected = images(5)
    for i, name in enumerate(("a/2.png", "a/3.PNG", "b.png", "c/d/e.webp", "z.png")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        array = Image.fromarray(expected[i].permute(1, 2, 0).numpy())
        array.save(path, "WEBP" if name.endswith("webp") else "PNG", **({"lossless": True} if "webp" in name else {}))
    (tmp_path / "notes.txt").write_text("no image")
    png(tmp_path / ".thumbnails" / "a.png", images(1, 3, 2, 2)[0])
    found = open_images(str(tmp_path))
    assert isinstance(found, ImageFolder)
    assert (len(found), found.shape, found.labels) == (5, (3, 5, 6), None)
    assert [len(batch) for batch in found.batches(2)] == [2, 2, 1]
    assert torch.equal(torch.cat(list(found.batches(2))), expected)


def test_a_folder_is_grey_only_if_all_of_it_is(tmp_path: Path) -> None:
    png(tmp_path / "a.png", images(1, 1)[0])
    png(tmp_path / "b.png", images(1, 1)[0])
    assert open_images(str(tmp_path)).shape == (1, 5, 6)
    png(tmp_path / "c.png", images(1, 3)[0])
    found = open_images(str(tmp_path))
    assert found.shape == (3, 5, 6)
    assert torch.equal(next(found.batches(9))[0], images(1, 1)[0].expand(3, -1, -1))


def test_a_folder_s_fingerprint_follows_names_and_contents_not_times(tmp_path: Path) -> None:
    hashes = []
    for name, value in (("a", 0), ("a", 1), ("b", 1), ("b", 1)):
        for old in tmp_path.iterdir():
            old.unlink()
        png(tmp_path / f"{name}.png", torch.full((3, 4, 4), value, dtype=torch.uint8))
        hashes.append(open_images(str(tmp_path)).fingerprint)
    assert len(set(hashes)) == 3
    assert hashes[2] == hashes[3]


def test_folders_that_cannot_be_read_are_one_line_each(tmp_path: Path) -> None:
    assert refused(tmp_path) == ": contains no images (.png, .jpg, .jpeg, .webp)"
    png(tmp_path / "a.png", images(1)[0])
    png(tmp_path / "b.png", images(1, 3, 7, 6)[0])
    assert refused(tmp_path) == "/b.png: 7 × 6 pixels, must be 5 × 6 as a.png"
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    assert refused(tmp_path).startswith("/b.png: cannot be decoded (")
    (tmp_path / "b.png").write_bytes(b"")
    assert refused(tmp_path).startswith("/b.png: cannot be decoded (")
    (tmp_path / "b.png").unlink()
    os.mkfifo(tmp_path / "b.png")  # reading it would wait for ever
    assert refused(tmp_path).startswith("/b.png: must be a regular file")
