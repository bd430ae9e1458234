"""Digits with captions, and sets of them whose captions a small Qwen3 has encoded."""

from pathlib import Path

import torch
from conftest import SMALL, compose_config
from sklearn.datasets import load_digits
from small_qwen3 import save_qwen3
from torchvision.io import encode_png

from mvsplit.data.shard_writer import write_shard
from mvsplit.training.checkpoint_format import newest

TOKENS, WIDTH = 16, 32
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = ["model/context=captions", f"model.context.embedding_width={WIDTH}", f"model.context.num_tokens={TOKENS}"]
"""Overrides of train.py for a network that reads these captions."""


def caption_of(label: int, number: int) -> str:
    """Captions of different lengths; every eleventh is empty."""
    if number % 11 == 10:
        return ""
    return f"a handwritten {WORDS[label]}" + ", drawn with a pencil" * (number % 3 == 0)


def captioned_digits(folder: Path, train: int = 40, val: int = 12, shard_size: int = 20, classes: bool = True) -> Path:
    """Write digits with captions: of every second sample in a txt, of the others in a json."""
    folder.mkdir(parents=True)
    digits = load_digits()
    images = (torch.from_numpy(digits.data).reshape(-1, 1, 8, 8) * (255 / 16)).round().to(torch.uint8)
    for name, first, count in (("train", 0, train), ("val", train, val)):
        for start in range(0, count, shard_size):
            samples = []
            for i in range(start, min(start + shard_size, count)):
                label = int(digits.target[first + i])
                members = {"png": encode_png(images[first + i]).numpy().tobytes()}
                caption = caption_of(label, i)
                members |= {"txt": caption.encode()} if i % 2 else {"json": f'{{"caption": "{caption}"}}'.encode()}
                members |= {"cls": str(label).encode()} if classes else {}
                samples.append((f"{i:05d}", members))
            write_shard(folder / f"{name}-{start // shard_size:06d}.tar", samples)
    return folder


def encode_captions(folder: Path, source: Path, qwen3: Path, *overrides: str) -> Path:
    """Run `src/encode.py kind=text` in this process, in float32 and with at most `TOKENS` tokens."""
    import encode

    return encode.encode(compose_config(*text_overrides(folder, source, qwen3), *overrides, name="encode.yaml"))


def text_overrides(folder: Path, source: Path, qwen3: Path) -> list[str]:
    """Arguments of `src/encode.py kind=text`."""
    return [
        "kind=text", "data=digits", f"data.folder={source}", f"output={folder}", "shard_size=20", "batch_size=8",
        f"text_encoder.path={qwen3}", f"text_encoder.max_tokens={TOKENS}", "text_encoder.dtype=float32",
        f"paths.data_dir={folder.parent}", f"paths.output_dir={folder.parent}",
    ]  # fmt: skip


def captioned_set(root: Path, *overrides: str, classes: bool = True) -> Path:
    """A whole set below a folder: `qwen3`, `source`, and the set with the captions' states, `captioned`."""
    qwen3 = save_qwen3(root / "qwen3", WIDTH)
    source = captioned_digits(root / "source", classes=classes)
    return encode_captions(root / "captioned", source, qwen3, *overrides, *([] if classes else ["data.num_classes=0"]))


def trained_run(root: Path, *overrides: str) -> Path:
    """A checkpoint of a few steps on such a set, which is written below `root` first; its run folder is `root/run`."""
    import train

    captions = train_on_captions(captioned_set(root))
    paths = [f"paths.data_dir={root}", f"paths.log_dir={root}/logs", f"paths.output_dir={root}/run"]
    train.train(compose_config(*SMALL, *paths, *captions, *overrides))
    checkpoint = newest(root / "run" / "checkpoints", verify=True)
    assert checkpoint is not None
    return checkpoint


def train_on_captions(set_folder: Path, classes: bool = True) -> list[str]:
    """Overrides of train.py that train on such a set."""
    return [f"data.folder={set_folder}", *CAPTIONS, *([] if classes else ["data.num_classes=0"])]
