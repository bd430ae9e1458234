"""Images and latents of all kinds: valid ones are read correctly, damaged and costly ones are reported."""

import io
import math
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import simplejpeg
import torch
from data_tools import SUBSTITUTE, colour, grey, index, jpeg_shards, photograph, picture, reader, shards, tar_of
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from mvsplit.data.faults import DataFault
from mvsplit.data.formats import Latents
from mvsplit.data.transforms import decode_picture, jpeg_damage
from mvsplit.training.module import FlowModule
from mvsplit.utils.console import info_once
from mvsplit.utils.errors import UserError

LIMIT = 1 << 26


def scene(height: int, width: int, kind: str = "photograph") -> Image.Image:
    """Smooth colours with noise; or white, black, or half a photograph on white."""
    if kind in ("white", "black"):
        return Image.new("RGB", (width, height), kind)
    chance = np.random.default_rng(height * width)
    coarse = Image.fromarray(chance.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    picture = Image.fromarray((smooth + chance.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8))
    if kind == "half":
        picture.paste("white", (0, 0, width, height // 2 + 1))
    return picture


def encoded(image: Image.Image, kind: str = "JPEG", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


WAYS: list[dict[str, Any]] = [
    {}, {"optimize": True}, {"progressive": True}, {"progressive": True, "optimize": True},
    {"restart_marker_rows": 1}, {"restart_marker_blocks": 3},
]  # fmt: skip


def encodings(kinds: tuple[str, ...] = ("photograph", "white", "black", "half")) -> Iterator[tuple[str, bytes]]:
    """JPEGs of all sizes, qualities, colour spaces, subsamplings and ways to encode, with what they are."""
    sizes = [(1, 1), (3, 2), (9, 7), (16, 16), (17, 33), (75, 100), (375, 500), (600, 600), (1500, 1500)]
    for number, (height, width) in enumerate(sizes):
        for kind in kinds:
            image, qualities = scene(height, width, kind), (5, 75, 95, 100) if height < 600 else (95,)
            for quality in qualities:
                name = f"{height} × {width} {kind} {quality}"
                for i, way in enumerate(WAYS if height < 1000 else WAYS[1:4]):
                    sampling = (i + number) % 3 if height < 1000 else 0
                    yield f"{name} {way} {sampling}", encoded(image, quality=quality, subsampling=sampling, **way)
                for sampling in ("440", "411") if height < 1000 else ():
                    pixels = np.asarray(image)
                    yield f"{name} {sampling}", simplejpeg.encode_jpeg(pixels, quality, colorsubsampling=sampling)
                for mode in ("L", "CMYK") if height < 1000 else ():
                    way = WAYS[number % 4]
                    yield f"{name} {mode} {way}", encoded(image.convert(mode), quality=quality, **way)


def test_no_sound_jpeg_is_refused() -> None:
    """White areas, optimised tables and long runs of zeros are not damage."""
    count, refused = 0, []
    for name, data in encodings():
        count += 1
        if (damage := jpeg_damage(data, LIMIT)) is not None:
            refused.append(f"{name}: {damage}")
    assert count > 800
    assert refused == []


def half(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def page(data: bytes, size: int = 4096) -> bytes:
    place = len(data) // 2 - size // 2
    return data[:place] + bytes(size) + data[place + size :]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], float]] = {
    "half zeroed": (half, 1.0),
    "end zeroed": (lambda data: data[:-64] + bytes(64), 1.0),
    "cut": (lambda data: data[: len(data) * 2 // 3], 1.0),
    "without its end mark": (lambda data: data[:-2], 1.0),
    "a piece missing": (lambda data: data[: len(data) // 2] + data[len(data) // 2 + 4096 :], 1.0),
    "a page zeroed": (page, 0.95),
    "a sector zeroed": (lambda data: page(data, 512), 0.8),
    "one bit changed": (lambda data: data[:-900] + bytes([data[-900] ^ 16]) + data[-899:], 0.2),
}
"""What is done to a sound JPEG, and the share that a decoder must find."""


def test_damage_is_found_as_far_as_decoding_shows_it() -> None:
    whole = [data for _, data in encodings(("photograph",)) if 9000 < len(data) < 1 << 18]
    assert len(whole) > 40
    shares = {
        name: sum(jpeg_damage(damage(data), LIMIT) is not None for data in whole) / len(whole)
        for name, (damage, _) in DAMAGES.items()
    }
    assert {name: share for name, share in shares.items() if share < DAMAGES[name][1]} == {}, shares


@pytest.mark.parametrize("damage", [half, page])
def test_a_damaged_jpeg_is_named_by_index_and_reader(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    whole = encoded(scene(600, 800), quality=90)
    damaged = damage(whole)
    tar_of(tmp_path / "train-0.tar", {"a.jpg": damaged, "a.cls": b"1", "b.jpg": whole, "b.cls": b"1"})
    with pytest.raises(UserError, match=r"train-0\.tar: sample 'a' cannot be decoded \((Corrupt|Premature)"):
        index(tmp_path, form=colour())
    found = index(tmp_path, SUBSTITUTE, form=colour())
    assert (len(found), found.findings[0].kind) == (1, "undecodable")
    with pytest.raises(ValueError, match=r"Corrupt|Premature"):  # without an index in front of it
        colour().decode(damaged, 0, True)


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def test_notes_thumbnails_and_what_follows_are_no_damage() -> None:
    data = photograph(1)
    thumbnail = b"Exif\0\0" + bytes(9000) + photograph(2)[:2000] + b"\xff\xd9"
    for note in (
        segment(0xE1, thumbnail),
        segment(0xE2, b"ICC_PROFILE\0\3\2broken"),
        segment(0xEE, b"Adobe\0\x64\0\0\0\0\7"),
        segment(0xFE, b"\xff\xda" * 400),  # looks like 400 scans
    ):
        with_note = data[:2] + note + data[2:]
        assert jpeg_damage(with_note, LIMIT) is None
        assert jpeg_damage(half(with_note), LIMIT) is not None
    jfif = bytearray(data)
    jfif[11] = 9  # an unknown revision
    scan = data.index(b"\xff\xda")
    old_camera = bytearray(data)
    old_camera[scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big") - 2] = 0  # "Invalid SOS parameters"
    assert jpeg_damage(half(bytes(jfif)), LIMIT) is not None
    for odd in (bytes(jfif), bytes(old_camera), data + bytes(100), data + b"video" * 1000):
        assert jpeg_damage(odd, LIMIT) is None
        assert decode_picture(odd, "RGB", LIMIT).size == (120, 96)


def test_jpegs_decode_to_pillows_pixels() -> None:
    for name, data in encodings(("photograph",)):
        if len(data) < 50_000:
            theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            assert np.array_equal(np.asarray(decode_picture(data, "RGB", LIMIT)), theirs), name


def test_a_strict_decode_is_one_pass_and_costs_less_than_reading_and_checking(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(scene(375, 500), quality=90)

    def read() -> Any:
        return Image.open(io.BytesIO(data)).convert("RGB")

    def check() -> Any:
        return jpeg_damage(data, LIMIT)

    def decode() -> Any:
        return decode_picture(data, "RGB", LIMIT)

    passes: list[str] = []
    with monkeypatch.context() as patch:
        # Each begins a pass over the compressed data.
        fast, pillows = simplejpeg.decode_jpeg, JpegImageFile.load_prepare
        patch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: (passes.append("fast"), fast(*a, **k))[1])
        patch.setattr(JpegImageFile, "load_prepare", lambda image: (passes.append("Pillow"), pillows(image))[1])
        for work, expected in ((read, ["Pillow"]), (check, ["fast"]), (decode, ["fast"])):
            passes.clear()
            work()
            assert passes == expected
    # Times are the least of many, taken in turn: another process on the machine slows all three alike. Between reading
    # and a strict decode there is little (0.96 to 1.16 times on one machine), so they are not compared.
    least = {work: float("inf") for work in (read, check, decode)}
    for turn in range(1000):
        for work in least:
            began = time.perf_counter()
            work()
            least[work] = min(least[work], time.perf_counter() - began)
        if turn >= 100 and least[check] < least[read] and least[decode] < least[read] + least[check]:
            break
    assert least[check] < least[read]
    assert least[decode] < least[read] + least[check]


# -------------------------------------------------------------------- costs


def many_scans(count: int, side: int = 8000) -> bytes:
    """A progressive JPEG that claims side² pixels and repeats one of its scans."""
    data = bytearray(encoded(scene(64, 64), quality=50, progressive=True))
    frame = data.index(b"\xff\xc2")
    data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    scans = [i for i in range(len(data) - 1) if data[i : i + 2] == b"\xff\xda"]
    first = bytes(data[scans[1] : data.index(b"\xff\xc4", scans[1])])
    return bytes(data[: scans[1]]) + first * count + bytes(data[scans[1] :])


def test_thousands_of_scans_are_refused_at_once(tmp_path: Path) -> None:
    bomb = many_scans(2500)
    assert len(bomb) < 1 << 20
    tar_of(tmp_path / "train-0.tar", {"a.jpg": bomb, "a.cls": b"1"})
    began = time.perf_counter()
    with pytest.raises(
        UserError, match=r"train-0\.tar: sample 'a' cannot be decoded \(2510 scans of 8000 × 8000 pixels"
    ):
        index(tmp_path, form=colour())
    with pytest.raises(ValueError, match="2510 scans of 8000 × 8000 pixels; at most 33 are allowed"):
        colour().decode(bomb, 0, True)
    assert time.perf_counter() - began < 0.5


def test_a_hundred_scans_of_a_picture_are_no_attack() -> None:
    usual = encoded(scene(600, 800), progressive=True)
    assert jpeg_damage(usual, LIMIT) is None
    for scans, side, refused in ((88, 64, False), (91, 64, True), (20, 8000, False), (30, 8000, True)):
        damage = jpeg_damage(many_scans(scans, side), LIMIT) or ""
        assert ("are allowed" in damage) == refused, (scans, side, damage)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colours: int, row: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG, row by row the same."""
    rows = zlib.compress((b"\0" + row) * height)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
    extra = b"".join(chunk(*each) for each in chunks)
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_small_files_that_unpack_to_much_are_refused_at_once() -> None:
    packed = zlib.compress(bytes(1 << 27), 9)
    animation = encoded(
        Image.new("RGB", (64, 64)), "WEBP", save_all=True,
        append_images=[Image.new("RGB", (64, 64), (i % 256, i // 256, 0)) for i in range(500)],
    )  # fmt: skip
    bombs = {
        "zTXt": (png(1, 2, 8, 0, b"\7", (b"zTXt", b"a\0\0" + packed)), "too large"),
        "iCCP": (png(1, 2, 8, 0, b"\7", (b"iCCP", b"a\0\0" + packed)), "too large"),
        "size": (png(60_000, 2, 8, 0, b"")[:16] + struct.pack(">II", 60_000, 60_000), "pixels|cannot identify|Trunc"),
        "animation": (animation, "animation"),
    }
    for name, (data, message) in bombs.items():
        began = time.perf_counter()
        with pytest.raises((ValueError, OSError, SyntaxError, Image.DecompressionBombError), match=message):
            decode_picture(data, "RGB", LIMIT)
        assert time.perf_counter() - began < 0.5, name


# ------------------------------------------------------------- what is meant


def pixel(data: bytes, mode: Any = "RGB") -> Any:
    return decode_picture(data, mode, LIMIT).getpixel((0, 0))


def test_a_cameras_second_picture_is_left_alone() -> None:
    first, second = scene(48, 64), scene(24, 32)
    data = encoded(first, "MPO", save_all=True, append_images=[second], quality=95)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert jpeg_damage(data, LIMIT) is None
    read = decode_picture(data, "RGB", LIMIT)
    assert np.array_equal(np.asarray(read), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def corners(image: Image.Image) -> NDArray:
    small = np.asarray(image.convert("L").resize((2, 2), Image.Resampling.BOX)).astype(int)
    return (small + 20) // 60


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_stand_as_exif_says(kind: str) -> None:
    upright = Image.fromarray(np.kron([[0, 60], [120, 180]], np.ones((16, 32))).astype(np.uint8)).convert("RGB")
    stored = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # how the camera turned it: Pillow's transpositions
    for orientation, turn in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = upright if turn is None else upright.transpose(Image.Transpose(turn))
        read = decode_picture(encoded(image, kind, exif=exif), "RGB", LIMIT)
        assert read.size == (64, 32), orientation
        assert corners(read).tolist() == [[0, 1], [2, 3]], orientation


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's; a run does not show them
def test_broken_exif_does_not_spoil_a_picture() -> None:
    plain = photograph(1)
    start = b"Exif\0\0II*\0\x08\0\0\0"
    turn = struct.pack("<HHII", 0x0112, 3, 1, 6)
    for body, size in (
        (b"Exif\0\0garbage", (120, 96)),
        (start + b"\xff\xff" + turn, (96, 120)),  # says 65,535 entries, holds one
        (start + struct.pack("<H", 1) + struct.pack("<HHII", 0x0112, 2, 400, 1 << 30), (120, 96)),
        (start + struct.pack("<H", 1) + struct.pack("<HHII", 0x0112, 3, 1, 77), (120, 96)),
        (start + struct.pack("<H", 5000) + b"".join(struct.pack("<HHII", i, 1, 60_000, 8) for i in range(5000)), None),
    ):
        began = time.perf_counter()
        data = plain[:2] + segment(0xE1, body[:65_000]) + plain[2:]
        assert jpeg_damage(data, LIMIT) is None
        read = decode_picture(data, "RGB", LIMIT)
        assert read.size == (size or (120, 96))
        assert time.perf_counter() - began < 0.5


def test_what_shines_through_is_white() -> None:
    clear, veil = Image.new("RGBA", (8, 8), (10, 20, 30, 0)), Image.new("RGBA", (8, 8), (0, 0, 0, 51))
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        assert pixel(encoded(clear, kind, **options)) == (255, 255, 255)
        assert pixel(encoded(veil, kind, **options)) == (204, 204, 204)
        assert pixel(encoded(veil, kind, **options), "L") == 204
    assert pixel(encoded(veil.convert("LA"), "PNG")) == (204, 204, 204)
    palette = (b"PLTE", bytes([1, 2, 3, 40, 50, 60]))
    assert pixel(png(1, 1, 8, 3, b"\1", palette, (b"tRNS", bytes([255, 0])))) == (255, 255, 255)
    assert pixel(png(1, 1, 8, 3, b"\0", palette, (b"tRNS", bytes([255, 0])))) == (1, 2, 3)
    key = (b"tRNS", struct.pack(">HHH", 10, 20, 30))  # one colour is transparent
    assert pixel(png(1, 1, 8, 2, bytes([10, 20, 30]), key)) == (255, 255, 255)
    assert pixel(png(1, 1, 8, 2, bytes([10, 20, 31]), key)) == (10, 20, 31)
    assert pixel(png(1, 1, 8, 0, b"\x0a", (b"tRNS", b"\0\x0a"))) == (255, 255, 255)


def test_other_depths_and_colours_give_their_eight_bits() -> None:
    assert pixel(png(1, 1, 16, 0, struct.pack(">H", 40_000))) == (156, 156, 156)
    assert pixel(png(1, 1, 16, 2, struct.pack(">HHH", 40_000, 300, 65_535))) == (156, 1, 255)
    assert pixel(png(1, 1, 16, 6, struct.pack(">HHHH", 40_000, 300, 65_535, 0))) == (255, 255, 255)
    assert pixel(png(8, 1, 1, 0, b"\x80"), "L") == 255
    assert pixel(png(2, 1, 4, 0, b"\x7f"), "L") == 119
    orange = Image.new("RGB", (16, 16), (240, 120, 10))
    for mode in ("CMYK", "YCbCr", "RGB"):
        read = pixel(encoded(orange.convert(mode), "JPEG", quality=100, subsampling=0))
        assert np.abs(np.array(read) - (240, 120, 10)).max() <= 3, mode


def test_colour_images_are_logged_before_they_are_converted_to_grey(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notice = "data.channels = 1: colour images are converted to grey"
    info_once.cache_clear()
    caplog.set_level("INFO", logger="mvsplit")
    for name, data, form in (
        ("grey", png(8, 8, 8, 0, bytes(8)), grey()),
        ("rgb", png(8, 8, 8, 2, bytes(24)), colour(8)),
        ("back", png(8, 8, 8, 0, bytes(8)), colour(8)),
    ):
        (tmp_path / name).mkdir()
        tar_of(tmp_path / name / "train-0.tar", {"a.png": data, "a.cls": b"1"})
        index(tmp_path / name, form=form)
    assert notice not in caplog.messages
    (tmp_path / "both").mkdir()
    jpeg_shards(tmp_path / "both", 4, 2)
    index(tmp_path / "both", form=grey())
    assert caplog.messages.count(notice) == 1


# ------------------------------------------------------------------- latents


def latent(mean: float = 0.0, std: float = 1.0, dtype: torch.dtype = torch.float32) -> bytes:
    """Of shape (1, 8, 8), with these values in one place."""
    tensors = {"mean": torch.zeros(1, 8, 8, dtype=dtype), "std": torch.ones(1, 8, 8, dtype=dtype)}
    tensors["mean"][0, 3, 5], tensors["std"][0, 3, 5] = mean, std
    return safetensors.torch.save(tensors)


NO_NUMBERS = {
    "nan": latent(mean=math.nan),
    "inf": latent(mean=-math.inf, dtype=torch.bfloat16),
    "nan in std": latent(std=math.nan, dtype=torch.float16),
    "inf in std": latent(std=math.inf),
    "beyond bfloat16": latent(mean=torch.finfo(torch.float32).max),
}


@pytest.mark.parametrize("what", NO_NUMBERS)
def test_latents_that_are_not_finite_are_faults_of_the_data(tmp_path: Path, what: str) -> None:
    members = {"a.safetensors": NO_NUMBERS[what], "a.cls": b"1", "b.safetensors": latent(), "b.cls": b"2"}
    tar_of(tmp_path / "train-0.tar", members)
    source = reader(tmp_path, form=Latents([8, 8], 1, flip=False))
    message = r"train-0\.tar: sample 0 \('a'\) at byte 512 cannot be decoded \(latent contains values"
    with pytest.raises(DataFault, match=message):
        source.read(0, 0)
    source.policy = SUBSTITUTE
    assert source[0, 0]["label"] == 2
    source.train = False
    assert source[0, 0]["weight"] == 0


def test_statistics_that_cannot_be_divided_by_are_refused() -> None:
    form, good = Latents([8, 8], 1), {"shape": [1, 8, 8], "channel_mean": [0.5], "channel_std": [2.0]}
    form.bind({"data", "flipped"}, good)
    for key in ("channel_mean", "channel_std"):
        for value in (math.nan, math.inf, 1e39, 10**400):
            with pytest.raises(UserError, match=r"in the set's manifest are not valid numbers"):
                form.bind({"data", "flipped"}, good | {key: [value]})
    for value in (0, 0.0, -1, 1e-46):
        with pytest.raises(UserError, match=r"a standard deviation in the set's manifest is not positive"):
            form.bind({"data", "flipped"}, good | {"channel_std": [value]})


def test_a_validation_of_which_nothing_can_be_read_is_an_error(train_here: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shards(folder, 20)
    tar_of(folder / "val-0.tar", {f"{i}.{s}": c for i in range(20) for s, c in
                                  (("png", b"no picture" if i < 8 else picture(i)), ("cls", b"1"))})  # fmt: skip
    options = [f"data.folder={folder}", "data.prepare=null", "data.faults.action=substitute", "test=false"]
    with pytest.raises(UserError, match=r"val/loss = nan: none of the samples could be read"):
        train_here(*options, "trainer.limit_val_batches=1")
    metrics, _ = train_here(*options, run="whole")
    assert 0.5 < metrics["val/loss"] < 5


def test_a_loss_that_is_not_finite_stays_in_the_mean(
    train_here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = FlowModule.validation_losses

    def broken(self: FlowModule, batch: dict[str, torch.Tensor]) -> Any:
        losses, t = whole(self, batch)
        return torch.where(batch["index"] == 3, math.nan, losses), t

    monkeypatch.setattr(FlowModule, "validation_losses", broken)
    with pytest.raises(UserError, match=r"val/loss = inf: a sample's loss is not finite"):
        train_here("test=false")
