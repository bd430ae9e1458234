"""What all tests share: a folder of digits, a way to train in this process, a way to run a script in another."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

# As for a script that runs there: `import train`. An installed copy of the package comes after it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from mvsplit.data.digits import write_digits
from mvsplit.data.folders import RESOLVERS
from mvsplit.utils.resolvers import register_resolvers
from mvsplit.utils.run_dirs import PROJECT_ROOT

SRC = PROJECT_ROOT / "src"
SUPPORT = Path(__file__).parent / "support"
"""Helpers, and scripts that tests start."""
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in its background like this, and the commands that tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # tiny networks: threads cost more than they give
os.environ["OMP_NUM_THREADS"] = "1"  # the same for the scripts that tests start

SMALL = [
    "model=tiny",
    "data.batch_size=8",
    "trainer.accelerator=cpu",
    "trainer.max_steps=6",
    "trainer.val_check_interval=3",
    "trainer.log_every_n_steps=1",
    "callbacks.sample_grid.rows=1",
    "callbacks.checkpoint.every_n_steps=2",
    "sampler.steps=2",
]
"""A run of a second or two that still does everything."""


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with the digits' shards in it."""
    folder = tmp_path_factory.mktemp("data")
    write_digits(folder / "digits")
    return folder


def compose_config(*overrides: str, name: str = "train.yaml") -> DictConfig:
    register_resolvers(RESOLVERS, planning=name == "bench_memory.yaml")
    with initialize_config_dir(version_base="1.3", config_dir=str(PROJECT_ROOT / "configs")):
        return compose(name, overrides=list(overrides))


def convert_here(*overrides: str) -> Path:
    """`python src/convert.py …` in this process."""
    import convert

    register_resolvers(RESOLVERS)
    with initialize_config_dir(version_base="1.3", config_dir=str(PROJECT_ROOT / "configs")):
        return convert.main(compose("convert.yaml", overrides=list(overrides)))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test marked `apart` in a fork.

    With a device beside the CPU, also a fake one, autograd starts threads, and no process forked after that can train.
    """
    if pyfuncitem.get_closest_marker("apart") is None:
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}

    def test() -> None:
        # In a fork the first call replaces PyTorch's thread pool; autograd's threads, all at once, would race for it.
        torch.set_num_threads(1)
        pyfuncitem.obj(**arguments)

    process = multiprocessing.get_context("fork").Process(target=test)
    process.start()
    process.join()
    assert process.exitcode == 0, "see the traceback in the captured output"
    return True


@pytest.fixture
def config(data_dir: Path, tmp_path: Path) -> Callable[..., DictConfig]:
    """`config(*overrides)`: the small run's composed config; output in this test's own folder."""

    def make(*overrides: str, run: str = "run") -> DictConfig:
        output = tmp_path / run
        output.mkdir(parents=True, exist_ok=True)
        paths = [f"paths.data_dir={data_dir}", f"paths.log_dir={tmp_path}/logs", f"paths.output_dir={output}"]
        return compose_config(*SMALL, *paths, *overrides)

    return make


@pytest.fixture
def train_here(config: Callable[..., DictConfig]) -> Callable[..., tuple[dict[str, float], dict[str, Any]]]:
    """`train_here(*overrides)`: run `train(cfg)` in this process."""
    import train

    return lambda *overrides, run="run": train.train(config(*overrides, run=run))


@pytest.fixture
def script(data_dir: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """`script(name, *overrides)`: the command line of `src/<name>`; for train.py of the small run."""

    def command(name: str, *overrides: str) -> list[str]:
        small = [*SMALL, f"paths.data_dir={data_dir}"] if name == "train.py" else []
        flags = [o for o in overrides if o.startswith("-")]  # Hydra wants them before the overrides
        rest = [o for o in overrides if not o.startswith("-")]
        return [sys.executable, str(SRC / name), *flags, *small, f"paths.log_dir={tmp_path}/logs", *rest]

    return command


@pytest.fixture
def run_script(script: Callable[..., list[str]], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_script(name, *overrides)`: run it to its end, from a working directory that is not the project's."""

    def run(name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
        return warm.run(script(name, *overrides), tmp_path, 240)

    return run


@pytest.fixture(scope="session")
def captions_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `qwen3`, `source` and `captioned`: digits whose captions a small Qwen3 has encoded."""
    from captioned import captioned_set

    folder = tmp_path_factory.mktemp("captions")
    captioned_set(folder)
    return folder
