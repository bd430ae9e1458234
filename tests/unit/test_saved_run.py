"""A saved network: the same as if it were built and filled, in memory for one copy of the weights that are used."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import DictConfig
from random_weights import save
from safetensors.torch import save_file
from torch import Tensor, nn

from mvsplit.training.checkpoint_format import COMPLETE, MANIFEST, Saved, Tensors
from mvsplit.training.checkpoints import NETWORK
from mvsplit.training.conversion import convert
from mvsplit.training.saved_run import SavedRun, parameters_on_meta
from mvsplit.training.tensor_files import BUFFER, SafetensorsFile
from mvsplit.utils.config import build, to_plain
from mvsplit.utils.errors import UserError


@pytest.fixture
def saved(config: Callable[..., DictConfig], tmp_path: Path) -> Path:
    return save(to_plain(config()), tmp_path, {"weights": 0.1, "ema": 0.2})


def filled(path: Path, weights: str) -> nn.Module:
    """The network built with random weights, into which the saved ones are copied."""
    network: nn.Module = build(yaml.safe_load((path.parent.parent / "config.yaml").read_text())["model"])()
    tensors = Saved(path).tensors("ema" if weights == "ema" else "weights")
    network.load_state_dict({name: tensors.whole(NETWORK + name) for name in network.state_dict()})
    return network.eval()


def everything(network: nn.Module) -> dict[str, Tensor]:
    return dict(network.named_parameters()) | dict(network.named_buffers())


@torch.no_grad()
def velocity(network: nn.Module) -> Tensor:
    return network(torch.ones(2, 1, 8, 8), torch.full((2,), 0.3), torch.tensor([3, 7]))


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_saved_network_is_the_one_that_is_built_and_filled(saved: Path, weights: Any) -> None:
    expected, run = filled(saved, weights), SavedRun(saved, weights)
    assert run.step == 5
    theirs, ours = everything(expected), everything(run.network)
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
        assert (ours[name].dtype, ours[name].requires_grad) == (value.dtype, value.requires_grad)
    assert not run.network.training
    assert velocity(run.network).abs().sum() > 0
    assert torch.equal(velocity(run.network), velocity(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_converted_file_is_computed_with_in_float32(saved: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    file = tmp_path / "model.safetensors"
    convert(saved, file, ["ema", "raw"], dtype)
    for weights in ("ema", "raw"):
        network = SavedRun(file, weights).network  # type: ignore[arg-type]
        for name, value in filled(saved, weights).named_parameters():
            found = network.get_parameter(name)
            assert found.dtype == torch.float32
            assert torch.equal(found, value.to(dtype).float())
    before = velocity(network)
    file.write_bytes(bytes(file.stat().st_size))  # in place
    assert torch.equal(velocity(network), before)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_weights_are_loaded_in_the_requested_precision(saved: Path, tmp_path: Path, precision: Any) -> None:
    """Rounded once, from a checkpoint and from a file."""
    file, dtype = tmp_path / "model.safetensors", getattr(torch, precision)
    convert(saved, file, ["ema", "raw"], None)
    for path in (saved, file):
        network = SavedRun(path, "raw", precision).network
        for name, value in filled(saved, "raw").named_parameters():
            found = network.get_parameter(name)
            assert found.dtype == dtype
            assert torch.equal(found, value.to(dtype))


def test_large_tensors_are_converted_in_parts(tmp_path: Path) -> None:
    """Of more values than the buffer takes, and not a multiple of it."""
    values = torch.randn(2 * (BUFFER // 4) + 37, generator=torch.Generator().manual_seed(0))
    save_file({"first": torch.zeros(3), "x": values}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert torch.equal(file.read(file.tensors["x"], dtype), values.to(dtype))
    os.truncate(tmp_path / "a.safetensors", (tmp_path / "a.safetensors").stat().st_size - 1)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(UserError, match="damaged, it ends at byte"):
            file.read(file.tensors["x"], dtype)


TEXT = {"encoder": {"name": "Qwen3", "width": 8}, "padding": "fixed"}


@pytest.mark.parametrize(
    ("text", "valid"),
    [(TEXT, True), (None, True), ([], False), (TEXT | {"padding": "none"}, False), (TEXT | {"encoder": None}, False),
     (TEXT | {"encoder": {"name": "x" * 20_000}}, False)],
)  # fmt: skip
def test_the_record_of_the_text_encoder_is_carried_on(
    config: Callable[..., DictConfig], tmp_path: Path, text: Any, valid: bool
) -> None:
    path = save(to_plain(config()), tmp_path, {"weights": 0.1}, data={"samples": 1, "text": text})
    convert(path, tmp_path / "model.safetensors", ["raw"], None)
    for one in (path, tmp_path / "model.safetensors"):
        if valid:
            assert SavedRun(one, "raw").text == text
        else:
            with pytest.raises(UserError, match="its record of the text encoder is not valid"):
                SavedRun(one, "raw")


def test_only_what_is_used_is_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = saved / "weights-00000.safetensors"
    content = bytearray(raw.read_bytes())
    content[-1] ^= 1
    raw.write_bytes(content)
    read: list[str] = []
    original = Tensors.read
    monkeypatch.setattr(Tensors, "read", lambda self, name, *place: read.append(name) or original(self, name, *place))
    with pytest.raises(UserError, match=r"weights-00000\.safetensors fails its checksum"):
        SavedRun(saved, "raw")
    assert read == []
    network = SavedRun(saved, "ema").network
    assert sorted(read) == sorted(NETWORK + name for name in network.state_dict())


def test_another_network_is_named_before_anything_is_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved.parent.parent / "config.yaml"
    config = yaml.safe_load(file.read_text())
    width = config["model"]["width"]
    file.write_text(yaml.safe_dump(config | {"model": config["model"] | {"width": 2 * width}}))
    read: list[Any] = []
    monkeypatch.setattr(Tensors, "read", lambda *given: read.append(given))
    monkeypatch.setattr(Saved, "_hash", lambda *given: read.append(given))
    with pytest.raises(UserError, match=rf"another network; 'blocks\.0\..*{width}.* there and .*{2 * width}.* here"):
        SavedRun(saved, "ema")
    assert read == []


ABSURD = {
    "deep": ({"depth": 300_000}, "model: the network of this config has over"),
    "wide": ({"width": 1 << 20}, "ckpt_path: the checkpoint belongs to another network; "),
    "of large pictures": ({"image_size": [1 << 20, 1 << 20]}, "at most 512 patches of 2 are allowed a side"),
    "of rather large pictures": ({"image_size": [1 << 12, 1 << 12]}, "at most 512 patches of 2 are allowed a side"),
    "beyond numbers": ({"width": 1 << 70}, "model: cannot be built from this config"),
    "with many tokens": ({"context": {"num_tokens": 1 << 40}}, "ckpt_path: the checkpoint belongs to another network"),
}


@pytest.mark.parametrize("name", ABSURD)
def test_a_config_of_another_size_costs_nothing(saved: Path, tmp_path: Path, name: str) -> None:
    changes, message = ABSURD[name]
    file, converted = saved.parent.parent / "config.yaml", tmp_path / "model.safetensors"
    config = yaml.safe_load(file.read_text())
    for key, value in changes.items():
        config["model"][key] = config["model"][key] | value if isinstance(value, dict) else value
    file.write_text(yaml.safe_dump(config))
    convert(saved, converted, ["ema"], torch.float32)
    assert converted.stat().st_size < 500_000
    for path in (saved, converted):
        begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(UserError, match=message):
            SavedRun(path, "ema")
        assert time.monotonic() - begun < 10
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # KiB


LAUGHS = "\n".join(["a: &a [1, 2]", *(f"{y}: &{y} [{', '.join([f'*{x}'] * 9)}]" for x, y in pairwise("abcdefghijkl"))])
DOCUMENTS = {
    "aliases": (LAUGHS, "its aliases expand to more than 20000 values"),
    "merged aliases": (LAUGHS.replace("[1, 2]", "{k: 1}").replace("[*", "{<<: [*").replace("*]", "*]") + "}", "config"),
    "an alias of itself": ("a: &a [*a]", "a node contains an alias of itself"),
    "deep": ("[" * 5000, "config"),
    "nested": ("[" * 100 + "]" * 100, "nested more than 50 levels deep"),
    "many": ("[" + "1," * 50_000 + "]", "more than 20000 values"),
    "no number": ("!!int x", "config"),
    "no date": ("2026-13-45", "config"),
    "python": ("!!python/object/apply:os.system [true]", "could not determine a constructor"),
    "large": ("#" * (5 << 20), "larger than 4 MiB"),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_config_beside_a_checkpoint_is_read_within_limits(saved: Path, name: str) -> None:
    text, message = DOCUMENTS[name]
    (saved.parent.parent / "config.yaml").write_text(text)
    begun = time.monotonic()
    with pytest.raises(UserError, match=message):
        SavedRun(saved, "ema")
    assert time.monotonic() - begun < 5


def test_files_that_never_end_are_not_read(saved: Path) -> None:
    for file in (saved.parent.parent / "config.yaml", saved / COMPLETE, saved / MANIFEST):
        content = file.read_bytes()
        file.unlink()
        file.symlink_to("/dev/zero")
        with pytest.raises(UserError, match=r"config\.yaml is missing|manifest\.json: not a regular|not a checkpoint"):
            SavedRun(saved, "ema")
        file.unlink()
        file.write_bytes(content)


class Forked(nn.Module):
    """What a fork's network may do in its constructor."""

    def __init__(self, derived: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64))
        self.norm = nn.BatchNorm1d(3)
        if derived:
            self.register_buffer("sums", self.first.weight.detach().sum(0), persistent=False)


def test_networks_are_built_without_memory_for_their_parameters() -> None:
    before = torch.get_rng_state()
    with parameters_on_meta():
        network = Forked()
    assert all(parameter.is_meta for parameter in network.parameters())
    assert network.second.weight is network.first.weight
    assert not network.frozen.requires_grad
    assert network.table.tolist() == [0, 1, 2]
    assert not any(buffer.is_meta for buffer in network.buffers())
    assert {name: (value.shape, value.dtype) for name, value in network.state_dict().items()} == {
        name: (value.shape, value.dtype) for name, value in Forked().state_dict().items()
    }
    assert not torch.equal(torch.get_rng_state(), before)  # by `Forked()`, outside
    assert not any(parameter.is_meta for parameter in nn.Linear(2, 2).parameters())


MEASURED = """
import json, sys, threading
from pathlib import Path
from mvsplit.training.saved_run import SavedRun
import mvsplit.models.dit, mvsplit.data.datamodule

def held() -> int:  # in MiB, of the process's own memory: mapped files can be dropped
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) // 1024

def watch() -> None:
    while True:
        looks.append(held())
        pause.wait(0.001)

looks, pause, networks = [], threading.Event(), []
threading.Thread(target=watch, daemon=True).start()
for path in sys.argv[1:]:
    before = held()
    looks.clear()
    networks.append(SavedRun(Path(path), "ema").network)
    print(json.dumps({"looks": len(looks), "peak": max(looks) - before}))
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_network_is_read_in_memory_for_one_copy(config: Callable[..., DictConfig], tmp_path: Path) -> None:
    size = to_plain(config("model.width=1024", "model.depth=2", "model.num_heads=16"))
    path = save(size, tmp_path, {"weights": 1, "ema": 1}, draw=torch.zeros)
    file = tmp_path / "model.safetensors"
    convert(path, file, ["ema", "raw"], torch.bfloat16)
    weights = (path / "ema-00000.safetensors").stat().st_size / 2**20
    assert weights > 100
    command = [sys.executable, "-c", MEASURED, str(path), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    for found in map(json.loads, done.stdout.splitlines()[-2:]):
        assert found["looks"] > 20
        assert 0.9 * weights < found["peak"] < 1.5 * weights
