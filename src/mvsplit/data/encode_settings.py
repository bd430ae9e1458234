"""Settings of `src/encode.py`. Imports no PyTorch: a mistake is reported before that."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le, Len
from pydantic import PositiveInt

Split = Literal["train", "val"]


@dataclass
class Settings:
    """What to write and how; the keys of `encode.yaml`, explained there."""

    output: str
    kind: Literal["images", "latents", "text"]
    splits: Annotated[list[Split], Len(1)]
    shard_size: PositiveInt
    image_format: Literal["png", "jpg", "webp"]
    quality: Annotated[int, Ge(1), Le(100)]
    flip: bool
    posterior: Literal["draw", "mean"]
    normalisation: Literal["set", "autoencoder"]
    captions: str | None
    batch_size: PositiveInt
    num_processes: PositiveInt
    accelerator: Literal["auto", "cpu", "gpu"]
