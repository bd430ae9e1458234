"""A saved network: the same as if it were built and filled, in memory for one copy of the weights that are used."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import DictConfig
from torch import Tensor, nn

from mvsplit.training.checkpoints import NETWORK, SavedRun, convert, parameters_on_meta
from mvsplit.training.folder import Saved, Slice, Tensors, write
from mvsplit.training.run import TrainConfig
from mvsplit.utils.config import build, to_plain
from mvsplit.utils.errors import UserError


def save(config: dict[str, Any], run: Path, scale: dict[str, float], draw: Callable[..., Tensor] = torch.randn) -> Path:
    """A checkpoint of drawn weights, in each kind times its scale."""
    torch.manual_seed(3)
    with parameters_on_meta():
        network = build(config["model"])()
    tensors: dict[str, dict[str, Slice]] = {}
    for kind, factor in scale.items():
        values = {name: factor * draw(value.shape) for name, value in network.state_dict().items()}
        tensors[kind] = {NETWORK + name: Slice.whole(value) for name, value in values.items()}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    path = run / "checkpoints" / "last-00000005.ckpt"
    path.parent.mkdir()
    write(path, {"global_step": 5}, tensors, together=False)
    return path


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
    expected, run = filled(saved, weights), SavedRun(saved, weights, TrainConfig)
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
        network = SavedRun(file, weights, TrainConfig).network  # type: ignore[arg-type]
        for name, value in filled(saved, weights).named_parameters():
            found = network.get_parameter(name)
            assert found.dtype == torch.float32
            assert torch.equal(found, value.to(dtype).float())
    before = velocity(network)
    file.write_bytes(bytes(file.stat().st_size))  # in place
    assert torch.equal(velocity(network), before)


def test_only_what_is_used_is_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = saved / "weights-00000.safetensors"
    content = bytearray(raw.read_bytes())
    content[-1] ^= 1
    raw.write_bytes(content)
    read: list[str] = []
    original = Tensors.read
    monkeypatch.setattr(Tensors, "read", lambda self, name, *place: read.append(name) or original(self, name, *place))
    with pytest.raises(UserError, match=r"weights-00000\.safetensors fails its checksum"):
        SavedRun(saved, "raw", TrainConfig)
    assert read == []
    network = SavedRun(saved, "ema", TrainConfig).network
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
        SavedRun(saved, "ema", TrainConfig)
    assert read == []


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
from mvsplit.training.checkpoints import SavedRun
from mvsplit.training.run import TrainConfig
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
    networks.append(SavedRun(Path(path), "ema", TrainConfig).network)
    print(json.dumps({"looks": len(looks), "peak": max(looks) - before}))
"""


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
