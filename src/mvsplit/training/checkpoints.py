"""What is done with checkpoints (`folder.py` reads and writes them): fit them to a network, draw from them, convert."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mvsplit import __version__
from mvsplit.training.folder import COMPLETE, PARTIAL, Saved, Tensors, write_safetensors
from mvsplit.utils.config import build, check_config
from mvsplit.utils.console import track
from mvsplit.utils.errors import UserError

NETWORK = "network."
"""What the names of the network's weights begin with in a checkpoint, which holds the whole module's."""
RAW = "raw."
"""What the names of the trained weights begin with in a converted file."""


def check_fits(saved: Mapping[str, Sequence[int]], network: Mapping[str, Sequence[int]]) -> None:
    """Check that the shapes of saved weights fit the network's.

    Raises:
        UserError: naming the first parameter that does not.
    """
    for name in sorted(saved.keys() | network.keys()):
        if name not in saved or name not in network:
            where = "the checkpoint" if name not in saved else "the network of this config"
            raise UserError(f"ckpt_path: the checkpoint belongs to another network; {where} has no '{name}'")
        if tuple(saved[name]) != tuple(network[name]):
            raise UserError(
                f"ckpt_path: the checkpoint belongs to another network; '{name}' is {tuple(saved[name])} there"
                f" and {tuple(network[name])} here"
            )


def set_micro_batches(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Let the trainer's count of micro-batches follow from the optimiser steps done.

    It is saved as it was with the accumulation of then; with another one the trainer would step and validate at the
    wrong micro-batches.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        for key in counts:
            counts[key] = checkpoint["global_step"] * accumulate


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that are built here have parameters of the right shape and type, but neither memory nor values.

    Buffers are real: those that are not saved have no other place to come from. One parameter has memory at a time,
    until it is registered; drawing its values afterwards, as PyTorch's layers do, costs nothing.
    """

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.is_meta:
            return parameter  # a second name of the same one
        return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


@dataclass
class Source:
    """Saved weights, of which only names and shapes have been read.

    Args:
        step: optimiser steps done. config: of the run. shapes: by the network's names.
        verify: compares checksums, if there are any. read: a tensor of its own by name, turned into a type.
    """

    step: int
    config: dict[str, Any]
    shapes: Mapping[str, Sequence[int]]
    verify: Callable[[], object]
    read: Callable[[str, torch.dtype], Tensor]


class SavedRun:
    """A trained network with the config it was trained by.

    Host memory holds the weights that are used, once.

    Args:
        path: a checkpoint inside a run folder, whose `config.yaml` is read and checked like any other config; or a
            file written by `src/convert.py`, which holds the config.
        weights: `ema` for the averaged weights, `raw` for the trained ones.
        schema: of the run's config.

    Attributes:
        config: plain dict. network: on the CPU, in eval mode. step: optimiser steps done.

    Raises:
        UserError: if something is missing, damaged or does not fit.
    """

    def __init__(self, path: Path, weights: Literal["ema", "raw"], schema: type) -> None:
        source = _open_file(path, weights) if path.is_file() else _open_folder(path, weights)
        check_config(source.config, schema)
        self.step, self.config = source.step, source.config
        with parameters_on_meta():
            network: nn.Module = build(self.config["model"])()
        expected = network.state_dict()
        check_fits(source.shapes, {name: value.shape for name, value in expected.items()})
        source.verify()
        state = {name: source.read(name, value.dtype) for name, value in expected.items()}
        network.load_state_dict(state, assign=True)  # no copies
        for name, value in (*network.named_parameters(), *network.named_buffers()):
            if value.is_meta:
                raise ValueError(
                    f"model: '{name}' is made from the values of parameters, which are not there yet when a checkpoint"
                    " is read, and it is not saved with them (persistent=True)"
                )
        self.network: Any = network.eval()


def _open_folder(path: Path, weights: str) -> Source:
    """A checkpoint in its run folder."""
    saved = Saved(path)
    chosen = choose(saved, weights)
    return Source(
        saved.step,
        read_config(saved),
        {name: tensors.shapes[NETWORK + name] for name, (_, tensors) in chosen.items()},
        verify=lambda: saved.verify(*{kind for kind, _ in chosen.values()}),
        read=lambda name, dtype: chosen[name][1].whole(NETWORK + name).to(dtype),
    )


def choose(saved: Saved, weights: str) -> dict[str, tuple[str, Tensors]]:
    """Where the averaged or the trained weights are: the network's name → kind, and the tensors of that kind.

    Buffers and frozen weights have no average.
    """
    chosen: dict[str, tuple[str, Tensors]] = {}
    for kind in weight_kinds(saved, weights):
        tensors = saved.tensors(kind)
        chosen |= {name.removeprefix(NETWORK): (kind, tensors) for name in tensors if name.startswith(NETWORK)}
    return chosen


def weight_kinds(saved: Saved, weights: str) -> list[str]:
    """Kinds of tensors to read, one over the other, for the averaged or the trained weights."""
    if weights == "ema" and not len(saved.tensors("ema")):
        raise UserError(f"weights = ema: {saved.path} holds no averaged weights; allowed is raw")
    return ["weights", "ema"] if weights == "ema" else ["weights"]


def read_config(saved: Saved) -> dict[str, Any]:
    """The config of the run folder that a checkpoint lies in."""
    file = saved.path.parent.parent / "config.yaml"
    if not file.is_file():
        raise UserError(f"ckpt_path = {saved.path}: {file} is missing; the checkpoint must lie in its run folder")
    return _config(file.read_bytes(), str(file))


def _config(text: bytes | str, where: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{where}: not the config of a run")
    return config


# -------------------------------------------------------- one file of weights


def convert(path: Path, output: Path, weights: Sequence[str], dtype: torch.dtype) -> int:
    """Write a checkpoint's weights and its config into one safetensors file, tensor by tensor.

    Args:
        weights: `raw`, `ema` or both; the averaged ones are called like the network's, the trained ones `raw.…`.

    Returns:
        Number of tensors written.

    Raises:
        UserError: if the checkpoint is damaged or has no averaged weights, or no such file can be written.
    """
    if output.suffix != ".safetensors" or (output.exists() and not output.is_file()):
        raise UserError(f"output = {output}: a file that ends in .safetensors is needed")
    if any((folder / COMPLETE).exists() for folder in output.resolve().parents):
        raise UserError(f"output = {output}: lies in a checkpoint, which would no longer be whole")
    if not output.parent.is_dir():
        raise UserError(f"output = {output}: there is no such folder")
    saved = Saved(path)
    sources: dict[str, tuple[Tensors, str]] = {}
    for which in weights:
        prefix = RAW if which == "raw" else ""
        sources |= {prefix + name: (tensors, NETWORK + name) for name, (_, tensors) in choose(saved, which).items()}
    saved.verify("weights", "ema")

    def type_of(tensors: Tensors, name: str) -> torch.dtype:
        return dtype if tensors.dtypes[name].is_floating_point else tensors.dtypes[name]

    sizes = {key: (type_of(*source), source[0].shapes[source[1]]) for key, source in sources.items()}
    values = (source[0].whole(source[1]).to(type_of(*source)) for source in track(list(sources.values()), "writing"))
    about = {"mvsplit": __version__, "step": str(saved.step), "config": yaml.safe_dump(read_config(saved))}
    partial = output.with_name(output.name + PARTIAL)
    partial.unlink(missing_ok=True)
    try:
        write_safetensors(partial, sizes, values, about)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    return len(sources)


def _open_file(path: Path, weights: str) -> Source:
    """A file that `convert` wrote."""
    try:
        file = safe_open(str(path), "pt")
        about = file.metadata() or {}
        if not about.keys() >= {"mvsplit", "step", "config"}:
            raise UserError(f"ckpt_path = {path}: not written by this project's src/convert.py")
        names = [name for name in file.keys() if name.startswith(RAW) == (weights == "raw")]  # noqa: SIM118
        shapes = {name.removeprefix(RAW): file.get_slice(name).get_shape() for name in names}
        step = int(about["step"])
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"ckpt_path = {path}: damaged, or not a checkpoint of this project ({error})") from None
    if not shapes:
        other = "raw" if weights == "ema" else "ema"
        raise UserError(f"weights = {weights}: {path} does not hold them; allowed is {other}")
    prefix = RAW if weights == "raw" else ""
    return Source(
        step,
        _config(about["config"], str(path)),
        shapes,
        verify=lambda: None,
        # What the library gives is the file itself, which may change.
        read=lambda name, dtype: file.get_tensor(prefix + name).to(dtype, copy=True),
    )
