"""`data=image_folder`: sizes and classes come from the folder."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import compose_config
from data_tools import image_folder
from PIL import Image

from mvsplit.utils.config import to_plain
from mvsplit.utils.errors import UserError


def data_of(folder: Path, *overrides: str) -> dict[str, Any]:
    config = to_plain(
        compose_config("paths.output_dir=/nowhere", "data=image_folder", f"data.folder={folder}", *overrides)
    )
    assert config["model"]["image_size"] == config["data"]["image_size"]
    return config["data"]


@pytest.mark.parametrize(
    ("size", "expected"),
    [((16, 16), 16), ((28, 28), 28), ((375, 500), 256), ((500, 202), 200), ((3, 3), 3), ((256, 300), 256)],
)
def test_sizes_and_classes_are_read_from_the_folder(tmp_path: Path, size: tuple[int, int], expected: int) -> None:
    image_folder(tmp_path, ("ant", "bee", "cat"), size)
    (tmp_path / "train" / ".hidden").mkdir()
    data = data_of(tmp_path)
    assert (data["num_classes"], data["image_size"]) == (3, [expected, expected])
    assert data["format"]["transform"]["image_size"] == [expected, expected]
    given = data_of(tmp_path, "data.image_size=[8,16]", "data.num_classes=5")
    assert (given["num_classes"], given["image_size"]) == (5, [8, 16])


def test_a_few_odd_pictures_do_not_decide(tmp_path: Path) -> None:
    image_folder(tmp_path, ("ant", "bee"), (64, 80), count=4)
    (tmp_path / "train" / "ant" / "0.png").write_bytes(b"no picture")
    Image.new("L", (2, 2)).save(tmp_path / "train" / "bee" / "0.png")
    os.mkfifo(tmp_path / "train" / "bee" / "00.png")
    assert data_of(tmp_path)["image_size"] == [64, 64]


def test_a_large_folder_is_read_in_no_time(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / "train" / f"{number:04d}" / "deep").mkdir(parents=True)
    picture = tmp_path / "train" / "0000" / "0.png"
    Image.fromarray(np.zeros((40, 40), dtype=np.uint8)).save(picture)
    for number in range(0, 1000, 2):
        for i in range(5):
            os.link(picture, tmp_path / "train" / f"{number:04d}" / "deep" / f"{i}.png")
    compose_config("data=image_folder", f"data.folder={tmp_path}")
    began = time.perf_counter()
    data = data_of(tmp_path)
    assert (data["num_classes"], data["image_size"]) == (1000, [40, 40])
    assert time.perf_counter() - began < 3


def test_a_folder_without_classes_or_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^data\.folder = {tmp_path}/x: no class folders in '/.*/x/train'$"):
        data_of(tmp_path / "x")
    (tmp_path / "train" / "ant").mkdir(parents=True)
    (tmp_path / "train" / "ant" / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=rf"^data\.folder = {tmp_path}: no readable images in '/.*/train/<class>/'$"):
        data_of(tmp_path)


def test_a_run_learns_the_folders_classes_and_resumes(train_here: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    image_folder(folder, ("ant", "bee", "cat"), (16, 16), count=4)
    options = ["data=image_folder", f"data.folder={folder}", "data.batch_size=4", "data.num_workers=0", "test=false"]
    train_here(*options, "trainer.max_steps=3")
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["data"]["num_classes"], saved["data"]["image_size"]) == (3, [16, 16])
    _, objects = train_here(*options, "ckpt_path=last", "trainer.max_steps=6")
    assert objects["trainer"].global_step == 6
    (folder / "val" / "dog").mkdir()
    with pytest.raises(UserError, match=r"val/dog is not a class of the training set"):
        train_here(*options, run="other")
