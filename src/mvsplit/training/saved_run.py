"""A trained network, rebuilt from a checkpoint or a converted file without trusting either."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mvsplit.data.captions import is_identity
from mvsplit.data.latent_space import LatentSpace
from mvsplit.data.text_encoder import Padding
from mvsplit.flow.objective import Flow
from mvsplit.training.checkpoints import check_fits
from mvsplit.training.saved_config import check_generates, check_saved_config, portable
from mvsplit.training.weight_sources import open_source
from mvsplit.utils.config import build
from mvsplit.utils.errors import UserError

OURS = ("mvsplit.models.dit.DiT", "mvsplit.models.sit.SiT")
"""Networks whose `compile` and `kernels` may be `auto`."""
WeightType = Literal["float32", "bfloat16", "float16"]


@contextmanager
def parameters_on_meta(limit: float = math.inf) -> Iterator[None]:
    """Modules built in this context have parameters of the right shape and type, but without memory or values.

    Buffers are real, because those that are not saved could not be restored. Only one parameter has memory at a time,
    until it is registered; initialising it afterwards, as PyTorch's layers do, costs nothing.

    Args:
        limit: number of parameters that may be registered.

    Raises:
        UserError: if there are more.
    """
    registered = 0

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        nonlocal registered
        registered += 1
        if registered > limit:
            raise UserError(f"model: the network of this config has over {limit} weights, more than were saved")
        if parameter.is_meta:
            return parameter  # a second name of the same one
        return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


class SavedRun:
    """A trained network, built from its saved config; nothing else in that config is used.

    Host memory holds the weights in use once, in the requested precision, and one more tensor. A config that describes
    another network than the saved one, even one of a million blocks, is refused before any work of its size begins.

    Args:
        path: a checkpoint inside a run folder, whose `config.yaml` is read; or a file or hub folder written by
            `src/convert.py`.
        weights: `ema` for the averaged weights, `raw` for the trained ones.
        precision: of floating-point weights in memory.

    Attributes:
        path: where it was read from, links resolved.
        config: the part of the run's config that describes the weights, checked, as a plain dict.
        run_config: all of it, unchecked.
        network: on the CPU, in eval mode.
        flow: the objective it was trained for.
        latents: how its samples become images; None if they are images.
        text: how its captions were encoded, `encoder` (an identity) and `padding`; None for a network of classes.
        step: optimiser steps done.

    Raises:
        UserError: if something is missing, damaged or does not fit.
    """

    def __init__(self, path: Path, weights: Literal["ema", "raw"], precision: WeightType = "float32") -> None:
        source = open_source(path, weights)
        self.path, self.step, self.run_config = path.resolve(), source.step, source.config
        self.config = portable(source.config)
        check_generates(self.config, path)
        check_saved_config(self.config)
        self.flow: Flow = build(self.config["flow"])
        channels = self.config["data"]["channels"]
        self.latents = LatentSpace.parse(source.latents, channels) if source.latents is not None else None
        self.text = _text_of(source.text, path)
        network = _network_of(self.config["model"], source.shapes)
        source.verify()
        first, expected = saved_names(network), network.state_dict()
        wanted = {name: value.dtype for name, value in expected.items()}
        wanted |= {name: getattr(torch, precision) for name, dtype in wanted.items() if dtype.is_floating_point}
        state = {name: source.read(name, wanted[name]) for name in first.values()}
        network.load_state_dict({name: state[first[name]] for name in first}, assign=True)  # no copies
        for name, value in (*network.named_parameters(), *network.named_buffers()):
            if value.is_meta:
                raise ValueError(
                    f"model: buffer '{name}' is not saved, but computed from parameters, which have no values yet when"
                    " a checkpoint is read; register it with persistent=True"
                )
        self.network: Any = network.eval()


def _network_of(node: dict[str, Any], shapes: Mapping[str, Sequence[int]]) -> nn.Module:
    """The network that a config describes, without its weights, if its weights have these shapes."""
    if node["_target_"] in OURS:  # what paid on the machine that trained it may be missing here
        node = node | {key: "auto" for key in ("compile", "kernels") if node.get(key) in (True, "fused")}
    saved = sum(map(math.prod, shapes.values()))

    def built() -> nn.Module:
        with parameters_on_meta(2 * len(shapes) + 100):  # some networks register a parameter and remove it
            network: nn.Module = build(node)()
        expected = network.state_dict()
        check_fits(shapes, {name: expected[name].shape for name in saved_names(network).values()})
        unsaved = sum(value.numel() for name, value in network.named_buffers() if name not in expected)
        if unsaved > saved + (1 << 24):
            raise UserError(f"model: {unsaved} values are not saved, too many for {saved} saved weights")
        return network

    try:
        try:
            with torch.device("meta"):  # first without any memory, buffers included
                built()
        except RuntimeError:
            pass  # a network may need values in its constructor
        return built()
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:  # impossible sizes
        raise UserError(f"model: cannot be built from this config ({str(error).splitlines()[0]})") from error


def saved_names(network: nn.Module) -> dict[str, str]:
    """Name of each weight and buffer → the name it is saved under: a shared weight is saved under its first name."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(value), name) for name, value in network.state_dict(keep_vars=True).items()}


def _text_of(content: Any, path: Path) -> dict[str, Any] | None:
    """How captions were encoded, from elsewhere: `encoder`, an identity, and `padding`.

    Raises:
        UserError: if it is not valid.
    """
    if content is None:
        return None
    valid = isinstance(content, dict) and content.get("padding") in get_args(Padding)
    if not valid or not is_identity(content.get("encoder")):
        raise UserError(f"ckpt_path = {path}: its record of the text encoder is not valid")
    return {"encoder": content["encoder"], "padding": content["padding"]}
