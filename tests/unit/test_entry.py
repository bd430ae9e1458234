"""What a mistake on the command line costs: seconds of computing, and folders that nobody asked for."""

import logging
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import SRC
from hydra.core.global_hydra import GlobalHydra

import train
from mvsplit.data.folders import RESOLVERS
from mvsplit.training import settings
from mvsplit.utils import entry

Refused = Callable[..., str]
IMPORTS_S = 0.3
"""CPU time of `imports_s` on an idle core of about 3 GHz, for which the limits below were chosen."""


def imports_s() -> float:
    """CPU time of the libraries that every command imports: the same kind of work, here and now."""
    before = children_cpu_s()
    subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import hydra.main, pydantic"], capture_output=True, check=True
    )
    return children_cpu_s() - before


def children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    ("command", "status", "says", "cpu_s"),
    [
        (["train.py", "model.dpth=3"], 2, "model.dpth: unknown key; did you mean depth?", 2.5),
        (["train.py", "trainer.max_stps=3"], 2, "trainer.max_stps: unknown key; did you mean max_steps?", 2.5),
        (["train.py", "residual=nosuch"], 2, "Could not find 'residual/nosuch'; allowed: ", 2.5),
        (["train.py", "-m", "residual=mvsplit,nosuch"], 2, "Could not find 'residual/nosuch'; allowed: ", 2.5),
        (["train.py", "trainer.max_steps=0"], 2, "trainer.max_steps = 0: must be greater than 0", 2.5),
        (["train.py", "model.depth=-3"], 2, "model.depth = -3: must be greater than 0", 5.0),
        (["sample.py", "cuont=3"], 2, "cuont: unknown key; did you mean count?", 2.5),
        (["sample.py", "count=0"], 2, "count = 0: must be greater than 0", 2.5),
        (["eval.py", "weights=best"], 2, "weights = 'best': must be 'ema' or 'raw'", 2.5),
        (["convert.py", "dtype=int8"], 2, "dtype = 'int8': must be", 2.5),
        (["encode.py", "kind=video"], 2, "kind = 'video': must be 'images', 'latents' or 'text'", 2.5),
        (["bench.py", "depth", "rouns=3"], 2, "rouns: unknown key; did you mean rounds?", 2.5),
        (["ablate.py", "sedes=[0]"], 2, "sedes: unknown key; did you mean seeds?", 2.5),
        (["study.py", "depth", "depht=[4]"], 2, "depht: unknown key; did you mean depths?", 2.5),
        (["study.py", "width"], 2, "study = width: unknown; allowed: depth, residuals, or report FOLDER", 2.5),
        (["report.py", "/nowhere", "--outptu"], 2, "see python src/report.py --help", 2.5),
        (["train.py", "--help"], 0, "residual: ", 2.5),
        (["bench.py", "--help"], 0, "data|depth|gpu|kernels|memory|precision|sampling|save|stability|step", 2.5),
        (["bench.py", "data", "--help"], 0, "rounds: 5", 2.5),
        (["report.py", "--help"], 0, "FOLDER", 2.5),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_typing_mistake_is_reported_at_once(
    command: list[str], status: int, says: str, cpu_s: float, tmp_path: Path
) -> None:
    """Alone on a machine half a second, or two where a class of the network is looked at, which needs PyTorch."""
    libraries = imports_s()
    before = children_cpu_s()
    argv = [sys.executable, "-X", "importtime", str(SRC / command[0]), *command[1:]]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    taken = children_cpu_s() - before
    slow = max(1.0, max(libraries, imports_s()) / IMPORTS_S)
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    errors = [line for line in lines if not line.startswith("import time:")]
    assert done.returncode == status, errors
    assert says in (done.stdout if status == 0 else errors[0])
    assert len(errors) == (status == 2)
    assert imported.isdisjoint({"lightning", "deepspeed", "torchvision", "matplotlib"})
    assert ("torch" in imported) == (cpu_s > 2.5)
    assert taken < cpu_s * slow


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Refused]:
    """`refused(*argv)`: run `train.py` in this process: its one line of error."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # the entry sets it: put back afterwards
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def run(*argv: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", *argv, f"paths.log_dir={tmp_path}/logs"])
        with pytest.raises(SystemExit) as stopped:
            entry.run(train.main, "train.yaml", settings.checked, RESOLVERS)
        errors = capfd.readouterr().err
        assert stopped.value.code == 2, errors
        assert errors.count("\n") == 1, errors
        return errors.removeprefix("error: ")

    yield run
    root.handlers[:] = handlers  # those of the run write to this test's captured output
    root.setLevel(level)
    GlobalHydra.instance().clear()


@pytest.mark.parametrize("sweep", [[], ["-m"], ["-m", "seed=0,1"]], ids=["run", "sweep of one", "sweep"])
@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.dpth=3", "model.dpth: unknown key"),
        ("residual=nosuch", "Could not find 'residual/nosuch'"),
        ("model.depth=-3", "model.depth = -3: must be greater than 0"),
        ("trainer.devices=3", "data.batch_size = 32: must be divisible by devices"),  # `check_together`
        ("trainer.accelerator=gpu", "this machine has no usable GPU"),  # `check_machine`
        ("ckpt_path=nosuch", "ckpt_path = nosuch: no such file or folder"),
        ("callbacks.checkpoint=5", "callbacks.checkpoint = 5: must be a group with a _target_, or null"),
        ("trainer.strategy=deepspeeed", "trainer.strategy = deepspeeed: no such strategy"),
        ("extras.enforce_tags=true", "tags = []: extras.enforce_tags requires at least one"),
    ],
)
def test_a_config_is_checked_before_a_folder_is_made(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, says: str, sweep: list[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "logs").mkdir()
    assert says in refused(*sweep, override, "tags=[]")
    assert list((tmp_path / "logs").rglob("*")) == []


def test_one_wrong_job_of_a_sweep_stops_all_before_the_first(refused: Refused, tmp_path: Path) -> None:
    assert refused("-m", "model.depth=2,-3,4").startswith("model.depth = -3: must be greater than 0")
    assert refused("hparams_search=lr", "seed=0,-1").startswith("seed = -1: must be")
    assert not (tmp_path / "logs").exists()
