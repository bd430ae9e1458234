"""The layout of the paper's released weights (`erwold/mv-split`), and the way from it to this network and back.

Shapes: D width, C channels, P patch size, F hidden width of the SwiGLU branch, W embedding width, E head dimension.

    theirs                                       here
    patch_embed.patch_proj.weight (D, C, P, P)   patch_proj.weight (D, P·P·C), channels fastest
    context_proj.weight (D, W)                   context.proj.weight; absent if W = D
    blocks.i.operator.{q,k,v}_proj.weight        blocks.i.attention.qkv.weight (3·D, D)
    blocks.i.operator.proj.weight (D, D)         blocks.i.attention.proj.weight
    blocks.i.ffn.{w13,w2}.weight                 the same: (2·F, D), gate first, and (D, F)
    blocks.i.fused_mvsplit_norm{1,2}.{alpha,beta}  blocks.i.residual{1,2}.{alpha,beta}
    final_proj.{weight,bias}                     the same

The norms have no weights here; theirs are checked to be ones. RoPE turns the same way in both, so values are the same.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvsplit.training.checkpoints import check_fits
from mvsplit.training.release_file import ReleaseFile
from mvsplit.training.saved_config import portable
from mvsplit.training.weight_sources import Source
from mvsplit.utils.errors import UserError

HEAD_DIM = 128
"""E of the release."""
EPS, QK_EPS, THETA = 1e-5, 1e-6, 10000.0
"""ε of merges and input norms, ε of the QK-norm, and base of the rotary frequencies in its code."""
MAX_TOKENS = 256
"""Tokens of a caption."""
LATENTS = {"encoder": {"name": "Diffusers", "model": "AutoencoderKLFlux2"}, "mean": None, "std": None, "own": True}
"""Its latents: those of FLUX.2, normalised by the autoencoder's own statistics."""
Shape = tuple[int, ...]
Kind = tuple[torch.dtype, Shape]


class Part(NamedTuple):
    """A weight of this network, and those of the release that it is made of."""

    name: str
    shape: Shape
    keys: Mapping[str, Shape]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Theirs → ours."""
        if len(self.keys) == 1 and len(next(iter(self.keys.values()))) == 4:
            return parts[0].permute(0, 2, 3, 1).flatten(1)  # (D, C, P, P) → (D, P·P·C)
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))

    def split(self, value: Tensor) -> list[Tensor]:
        """Ours → theirs."""
        shape = next(iter(self.keys.values()))
        if len(shape) == 4:
            D, C, P, _ = shape
            return [value.view(D, P, P, C).permute(0, 3, 1, 2).contiguous()]
        return list(value.chunk(len(self.keys)))


@dataclass(frozen=True)
class Sizes:
    """Everything that the shapes depend on."""

    depth: int
    width: int
    hidden: int
    channels: int
    patch_size: int
    embedding_width: int
    num_heads: int

    def parts(self) -> Iterator[Part]:
        """All weights, in the order of the release."""
        D, P, C = self.width, self.patch_size, self.channels

        def one(name: str, shape: Shape, key: str | None = None) -> Part:
            return Part(name, shape, {key or name: shape})

        patch = {"patch_embed.patch_proj.weight": (D, C, P, P)}
        yield Part("patch_proj.weight", (D, P * P * C), patch)
        yield one("patch_proj.bias", (D,), "patch_embed.patch_proj.bias")
        if self.embedding_width != D:
            yield one("context.proj.weight", (D, self.embedding_width), "context_proj.weight")
        for i in range(self.depth):
            for name in (f"{number}.{gain}" for number in (1, 2) for gain in ("alpha", "beta")):
                yield one(f"blocks.{i}.residual{name}", (D,), f"blocks.{i}.fused_mvsplit_norm{name}")
            qkv = {f"blocks.{i}.operator.{kind}_proj.weight": (D, D) for kind in "qkv"}
            yield Part(f"blocks.{i}.attention.qkv.weight", (3 * D, D), qkv)
            yield one(f"blocks.{i}.attention.proj.weight", (D, D), f"blocks.{i}.operator.proj.weight")
            yield one(f"blocks.{i}.ffn.w13.weight", (2 * self.hidden, D))
            yield one(f"blocks.{i}.ffn.w2.weight", (D, self.hidden))
        yield one("final_proj.weight", (P * P * C, D))
        yield one("final_proj.bias", (P * P * C,))

    def ones(self) -> dict[str, Shape]:
        """Weights of norms that the release may have, all ones."""
        norms: dict[str, Shape] = {f"norm_{kind}_input.weight": (self.width,) for kind in ("img", "text")}
        for i in range(self.depth):
            norms |= {f"blocks.{i}.fused_mvsplit_norm{number}.weight": (self.width,) for number in (1, 2)}
            head = (self.width // self.num_heads,)
            norms |= {f"blocks.{i}.operator.qk_norm.{kind}_norm.weight": head for kind in ("query", "key")}
        return norms

    def model(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """The config of the network: what the project's configs say of a DiT with this residual, in these sizes."""
        context = {
            "_target_": "mvsplit.models.conditioning.SampleEmbeddings",
            "_partial_": True,
            "num_tokens": MAX_TOKENS,
            "embedding_width": self.embedding_width,
        }
        own = {key: getattr(self, key) for key in ("depth", "width", "hidden", "channels", "patch_size", "num_heads")}
        norms = {"eps": EPS, "qk_eps": QK_EPS, "rope_theta": THETA}
        return {**base, **own, **norms, "context": context, "residual": base["residual"] | {"eps": EPS}}


def sizes_of(shapes: Mapping[str, Shape], num_heads: int | None, where: str) -> Sizes:
    """The sizes that a release's shapes give.

    Args:
        shapes: by the release's keys.
        num_heads: H; None for width / 128.
        where: begins the messages.

    Raises:
        UserError: if a key that they are read from is missing or has another number of dimensions.
    """

    def shape(key: str, length: int) -> Shape:
        if key not in shapes:
            raise UserError(f"{where}: has no '{key}'; not in the layout of the released weights")
        if len(shapes[key]) != length or 0 in shapes[key]:
            raise UserError(f"{where}: '{key}' has shape {shapes[key]}, must have {length} dimensions")
        return shapes[key]

    key = "patch_embed.patch_proj.weight"
    width, channels, patch_size, other = shape(key, 4)
    if patch_size != other:
        raise UserError(f"{where}: '{key}' has shape {shapes[key]}, must be square patches")
    hidden = shape("blocks.0.ffn.w2.weight", 2)[1]
    embedding_width = shape("context_proj.weight", 2)[1] if "context_proj.weight" in shapes else width
    numbers = {int(found[1]) for key in shapes if (found := re.match(r"blocks\.(\d{1,6})\.", key))}
    if num_heads is None and width % HEAD_DIM:
        raise UserError(
            f"num_heads = None: means heads of {HEAD_DIM} channels, as in the released weights, but the width in"
            f" {where.removeprefix('release = ')} is {width}; give the number of heads"
        )
    heads = num_heads or width // HEAD_DIM
    if width % heads or width // heads % 4:
        raise UserError(f"num_heads = {heads}: the width {width} / num_heads must be divisible by 4")
    # As many blocks as there are numbers: a missing one is named below, a single high one costs nothing.
    return Sizes(len(numbers), width, hidden, channels, patch_size, embedding_width, heads)


def open_release(path: Path, num_heads: int | None, base: dict[str, Any], image_size: list[int]) -> Source:
    """Released weights, as if this project had trained them. Only their names, types and shapes are read.

    Args:
        path: of a file that `torch.save` wrote.
        num_heads: H, which the shapes do not show; None for width / 128.
        base: config of a run of this project with the release's residual, flow and data.
        image_size: [height, width] of its latents, here in the nearest multiples of its patches.

    Raises:
        UserError: one line, for a file that is damaged or not in the release's layout.
    """
    where, file = f"release = {path}", ReleaseFile(path)
    shapes = {key: stored.shape for key, stored in file.tensors.items()}
    sizes = sizes_of(shapes, num_heads, where)
    parts, ones = {part.name: part for part in sizes.parts()}, sizes.ones()
    image_size = [max(1, round(side / sizes.patch_size)) * sizes.patch_size for side in image_size]
    needed = {key: shape for part in parts.values() for key, shape in part.keys.items()}
    for key in (*needed, *shapes):
        if key not in shapes:
            raise UserError(f"{where}: has no '{key}', which must have shape {needed[key]}")
        if key not in needed and key not in ones:
            raise UserError(f"{where}: contains {key[:100]!r}, which the layout of the released weights does not have")
        if shapes[key] != (expected := needed.get(key, ones.get(key))):
            raise UserError(f"{where}: '{key}' has shape {shapes[key]}, must have {expected}")
        if not file.tensors[key].dtype.is_floating_point:
            raise UserError(f"{where}: '{key}' has type {file.tensors[key].dtype}, must be floating-point")
    found: dict[str, Kind] = {}
    for part in parts.values():
        types = {file.tensors[key].dtype for key in part.keys}
        if len(types) > 1:
            raise UserError(f"{where}: {', '.join(map(repr, part.keys))} must have the same type")
        found[part.name] = (types.pop(), part.shape)

    def verify() -> None:
        for key in ones.keys() & shapes.keys():
            if not bool((file.read(file.tensors[key]) == 1).all()):
                raise UserError(f"{where}: '{key}' must be ones: norms have no weights in this network")

    encoder = {"name": "Qwen3", "width": sizes.embedding_width, "max_tokens": MAX_TOKENS}
    return Source(
        step=0,  # not recorded in a release
        config={
            **portable(base),
            "model": sizes.model(base["model"]) | {"image_size": image_size},
            "data": {"image_size": image_size, "channels": sizes.channels, "num_classes": 0},
        },
        latents=LATENTS,
        text={"encoder": encoder, "padding": "longest"},
        sizes=found,
        verify=verify,
        read=lambda name, dtype: parts[name].join([file.read(file.tensors[key], dtype) for key in parts[name].keys]),
    )


NEEDED = {
    "model._target_": "mvsplit.models.dit.DiT",
    "model.context._target_": "mvsplit.models.conditioning.SampleEmbeddings",
    "model.residual._target_": "mvsplit.models.residuals.MVSplit",
    "model.residual.segment_means": True,
    "model.residual.mean_update": "leaky",
    "model.residual.attention_only": False,
}
"""What the release's code can compute."""
ASSUMED = {"model.eps": EPS, "model.residual.eps": EPS, "model.qk_eps": QK_EPS, "model.rope_theta": THETA}
"""Numbers in the release's code."""


def value_at(config: Any, key: str, default: Any = None) -> Any:
    """The value of a dotted key, or the default."""
    for part in key.split("."):
        if not isinstance(config, dict) or part not in config:
            return default
        config = config[part]
    return config


def exported(source: Source, dtype: torch.dtype | None) -> tuple[dict[str, Kind], Iterator[Tensor]]:
    """A network of this project in the release's layout.

    The norms' weights are those that the release's code has with its kernels: ones for both inputs, and no others.

    Args:
        source: its weights, its config checked.
        dtype: to convert to; None keeps the types.

    Returns:
        Types and shapes by the release's keys, and an iterator over the tensors in that order.

    Raises:
        UserError: for a network that the release's code does not have.
    """
    model = source.config["model"]
    defaults = {key: value for key, value in NEEDED.items() if not key.endswith("_target_")}
    for key, needed in NEEDED.items():
        if (given := value_at(source.config, key, defaults.get(key))) != needed:
            raise UserError(f"{key} = {given}: must be {needed} to be exported to the layout of the released weights")
    width = model["width"]
    if model["depth"] > len(source.sizes):
        raise UserError(f"model.depth = {model['depth']}: more blocks than there are weights")
    sizes = Sizes(
        model["depth"], width, model.get("hidden") or 3 * width, model["channels"], model["patch_size"],
        model["context"].get("embedding_width") or width, model["num_heads"],
    )  # fmt: skip
    parts = list(sizes.parts())
    check_fits(source.shapes, {part.name: part.shape for part in parts})

    def type_of(name: str) -> torch.dtype:
        return dtype or source.sizes[name][0]

    found: dict[str, Kind] = {}
    norm = (type_of("patch_proj.weight"), (width,))
    norms: dict[str, Kind] = {f"norm_{kind}_input.weight": norm for kind in ("img", "text")}
    for part in parts:
        found |= {key: (type_of(part.name), shape) for key, shape in part.keys.items()}
        found |= norms if part.name == "patch_proj.bias" else {}

    def values() -> Iterator[Tensor]:
        for part in parts:
            yield from part.split(source.read(part.name, type_of(part.name)))
            if part.name == "patch_proj.bias":
                yield from (torch.ones(shape, dtype=kind) for kind, shape in norms.values())

    return found, values()
