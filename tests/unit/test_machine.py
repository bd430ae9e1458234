"""Runs on a machine with GPUs: each takes its own device, and a CPU run none at all."""

import sysconfig
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from data_tools import datamodule, shards
from lightning import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy
from omegaconf import DictConfig

from mvsplit.models.dit import DiT
from mvsplit.training.strategies import ZeRO3
from mvsplit.utils.config import build, to_plain


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch says that there are eight; whoever uses one fails."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda:3", True)])
def test_batches_are_pinned_for_a_gpu_alone(tmp_path: Path, device: str, pinned: bool) -> None:
    shards(tmp_path / "digits", 10)
    data = datamodule(tmp_path / "digits", tmp_path, pin_memory=True)
    data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    data.trainer.strategy._root_device = torch.device(device)
    data.setup()
    assert data.val_dataloader().pin_memory == pinned


@pytest.mark.usefixtures("gpus")
def test_zero_3_on_the_cpu_pins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # or DeepSpeed would look for the GPUs when it is imported
    monkeypatch.setattr(ZeRO3, "_init_deepspeed_distributed", lambda self: None)
    strategy = ZeRO3(offload_optimizer="cpu", offload_parameters="cpu")
    assert isinstance(strategy.config, dict)
    offloaded = [strategy.config["zero_optimization"][f"offload_{part}"] for part in ("optimizer", "param")]
    assert [part["pin_memory"] for part in offloaded] == [True, True]
    strategy.accelerator, strategy.cluster_environment = CPUAccelerator(), LightningEnvironment()
    strategy.parallel_devices = [torch.device("cpu")]
    strategy.setup_environment()
    assert [part["pin_memory"] for part in offloaded] == [False, False]


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(("device", "touched"), [(None, []), ("cpu", []), ("cuda:3", ["cuda:3"])])
def test_building_the_network_keeps_the_generators_of_the_device_in_use(
    config: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch, device: str | None, touched: list[str]
) -> None:
    saved: list[str] = []
    restored: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: saved.append(str(device)) or torch.zeros(16))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.append(str(device)))
    module: Any = build(to_plain(config())["module"])
    if device is not None:
        module._trainer = SimpleNamespace(strategy=SingleDeviceStrategy(device), datamodule=None)
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "CUDA reports that you have 8 available devices"
        module.configure_model()
    assert saved == restored == touched
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("has_gpu", [True, False])
@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize(
    ("commands", "own", "missing"),
    [
        (["gcc", "g++"], {}, {}),
        (["clang", "clang++"], {}, {}),
        (
            [],
            {},
            {
                True: "gcc or clang; use false without a compiler",
                False: "needs c++ or g++ or clang++; use false",
            },
        ),
        (["g++"], {}, {True: "gcc or clang; use false without a compiler"}),
        (["gcc"], {}, {False: "needs c++ or g++ or clang++; use false"}),
        (["gcc", "g++"], {"CC": "nvc"}, {True: "needs nvc;"}),
        (["nvc", "nvc++"], {"CC": "nvc", "CXX": "nvc++"}, {}),
    ],
)
def test_what_compiling_needs_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    commands: list[str],
    own: dict[str, str],
    missing: dict[bool, str],
    header: bool,
    has_gpu: bool,
) -> None:
    """On a machine whose compilers are these `commands`, with these variables of the user's."""
    for command in commands:
        (tmp_path / command).touch(0o755)
    if header:
        (tmp_path / "Python.h").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    message = missing.get(has_gpu) or (None if header else f"needs {tmp_path}/Python.h .*; use false")
    with nullcontext() if message is None else pytest.raises(ValueError, match=message.replace("+", r"\+")):
        DiT.check([8, 8], 2, 16, 2, compile=True)
    DiT.check([8, 8], 2, 16, 2, compile=False)
