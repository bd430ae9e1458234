"""A config from elsewhere, given as a user would give it, executes nothing, writes nothing outside, and is reported."""

import logging
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from mvsplit.utils import entry

COMMAND = "touch OUTSIDE/canary"
CALL = f"{{_target_: os.system, command: {COMMAND}}}"

# What the experiment file holds, and the key that is named.
EXPERIMENTS = {
    "os.system": (f"callbacks: {{evil: {CALL}}}", "callbacks.evil._target_ = os.system: allowed are"),
    "subprocess": (
        f"logger: {{evil: {{_target_: subprocess.run, args: {COMMAND}, shell: true}}}}",
        "logger.evil._target_ = subprocess.run: allowed are",
    ),
    "eval": (
        "flow: {times: {_target_: builtins.eval, _args_: [\"open('OUTSIDE/canary', 'w')\"]}}",
        "flow.times._target_ = builtins.eval: allowed are",
    ),
    "exec, later": (
        "data: {prepare: {_target_: builtins.exec, _partial_: true}}",
        "data.prepare._target_ = builtins.exec: allowed are",
    ),
    "pickle": (
        "data: {transform: {_target_: torch.load, f: FILES/evil.pt, weights_only: false}}",
        "data.transform._target_ = torch.load: allowed are",
    ),
    "hub": (
        "residual: {_target_: torch.hub.load, repo_or_dir: FILES, model: evil, source: local}",
        "residual._target_ = torch.hub.load: allowed are",
    ),
    "pipe": (
        f"data: {{val_transform: {{_target_: webdataset.WebDataset, urls: 'pipe:{COMMAND}'}}}}",
        "data.val_transform._target_ = webdataset.WebDataset: allowed are",
    ),
    "our function": (
        "callbacks: {evil: {_target_: mvsplit.training.run.save_config, config: {}, output_dir: OUTSIDE}}",
        "callbacks.evil._target_ = mvsplit.training.run.save_config: allowed are",
    ),
    "our function, called": (
        "callbacks: {evil: {_target_: mvsplit.data.digits.write_digits, folder: OUTSIDE}}",
        "callbacks.evil._partial_ = False: true is needed",
    ),
    "what a module of ours imported": (
        "callbacks: {evil: {_target_: mvsplit.training.run.Path, _args_: [OUTSIDE]}}",
        "callbacks.evil._target_ = mvsplit.training.run.Path: allowed are",
    ),
    "module of ours outside the packages": (
        "callbacks: {evil: {_target_: mvsplit.utils.errors.UserError}}",
        "callbacks.evil._target_ = mvsplit.utils.errors.UserError: allowed are",
    ),
    "_args_": (
        "trainer: {strategy: {_target_: lightning.pytorch.strategies.DDPStrategy, _args_: [null]}}",
        "trainer.strategy._args_ = [None]: unknown key",
    ),
    "key that is no name": (
        "trainer: {strategy: {_target_: lightning.pytorch.strategies.DDPStrategy, 1: 2}}",
        "trainer.strategy.1 = 2: unknown key",
    ),
    "in a list": (
        f"trainer: {{plugins: [{CALL}]}}",
        "trainer.plugins.0._target_ = os.system: allowed are",
    ),
    "interpolation to a node": (
        f"callbacks: {{evil: '${{oc.create:\"{CALL}\"}}'}}",
        "callbacks.evil._target_ = os.system: allowed are",
    ),
    "interpolation for later": (
        f"data: {{folder: '\\${{oc.create:\"{CALL}\"}}'}}",
        "data.folder = ${oc.create:",
    ),
    "task_name": ("task_name: ../../outside/canary", "task_name = '../../outside/canary': "),
    "hydra.callbacks": (f"hydra: {{callbacks: {{evil: {CALL}}}}}", "hydra.callbacks.evil._target_ = os.system: "),
    "hydra.launcher": (
        "hydra: {mode: MULTIRUN, launcher: {_target_: os.system}}",
        "hydra.launcher._target_ = 'os.system': allowed are",
    ),
    "launcher of another file": (
        "defaults: [override /hydra/launcher: evil]\nhydra: {mode: MULTIRUN}",
        "hydra.launcher._target_ = 'hydra_plugins.evil.Launcher': allowed are",
    ),
    "hydra.sweeper": (
        "hydra: {mode: MULTIRUN, sweeper: {_target_: os.system}}",
        "hydra.sweeper._target_ = 'os.system': allowed are",
    ),
    "sweep of Hydra's keys": (
        "hydra: {mode: MULTIRUN, sweeper: {params: {+hydra.callbacks.evil._target_: os.system}}}",
        "hydra.callbacks.evil._target_ = os.system: ",
    ),
    "overrides that nobody typed": (
        "hydra: {mode: MULTIRUN, overrides: {hydra: [hydra.sweep.dir=OUTSIDE]}}",
        "hydra.sweep.dir = OUTSIDE: another folder",
    ),
    "handler factory": (
        f"hydra: {{job_logging: {{handlers: {{evil: {{(): os.system, command: {COMMAND}}}}}}}}}",
        "hydra.job_logging.handlers.evil.() = os.system: ",
    ),
    "handler class": (
        f"hydra: {{hydra_logging: {{handlers: {{evil: {{class: subprocess.Popen, args: {COMMAND}, shell: true}}}}}}}}",
        "hydra.hydra_logging.handlers.evil.class = 'subprocess.Popen': allowed are",
    ),
    "key that looks like another": (
        f"hydra: {{job_logging: {{handlers: {{evil: {{class: subprocess.Popen, args: {COMMAND}, shell: true}}}}, "
        "handlers.evil.class: logging.StreamHandler}}",
        "hydra.job_logging.handlers.evil.class = 'subprocess.Popen': allowed are",
    ),
    "formatter class": (
        "hydra: {job_logging: {formatters: {evil: {class: evil_module.run}}}}",
        "hydra.job_logging.formatters.evil.class = evil_module.run: ",
    ),
    "filter": (
        "hydra: {job_logging: {filters: {evil: {(): evil_module.run}}}}",
        "hydra.job_logging.filters.evil.() = evil_module.run: ",
    ),
    "external stream": (
        "hydra: {job_logging: {handlers: {console: {stream: 'ext://evil_module.run'}}}}",
        "hydra.job_logging.handlers.console.stream = 'ext://evil_module.run': allowed are",
    ),
    "external formatter": (
        "hydra: {hydra_logging: {formatters: {simple: {format: 'ext://evil_module.run'}}}}",
        "hydra.hydra_logging.formatters.simple.format = 'ext://evil_module.run': ",
    ),
    "log interpolated from elsewhere": (
        "evil: {class: evil_module.run}\nhydra: {job_logging: {handlers: {evil: '${evil}'}}}",
        "hydra.job_logging.handlers.evil = ${evil}: ",
    ),
    "log file": (
        "hydra: {job_logging: {handlers: {file: {filename: OUTSIDE/canary}}}}",
        "hydra.job_logging.handlers.file.filename = 'OUTSIDE/canary': allowed are",
    ),
    "truncated log file": (
        "hydra: {job_logging: {handlers: {file: {mode: w}}}}",
        "hydra.job_logging.handlers.file.mode = w: ",
    ),
    "job name": ("hydra: {job: {name: ../canary}}", "hydra.job.name = '../canary': "),
    "output_subdir": (
        "hydra: {output_subdir: ../../../../outside/canary}",
        "hydra.output_subdir = '../../../../outside/canary': allowed are",
    ),
    "run folder": ("hydra: {run: {dir: OUTSIDE}}", "hydra.run.dir = OUTSIDE: another folder"),
    "output folder": ("paths: {output_dir: OUTSIDE}", "paths.output_dir = OUTSIDE: another folder"),
    "environment": (
        "hydra: {job: {env_set: {LD_PRELOAD: FILES/evil.so}}}",
        "hydra.job.env_set.LD_PRELOAD = ",
    ),
}


class Evil:
    """Unpickled, it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that must stay empty; beside it lie files which would write there if anything loaded them."""
    outside, files = tmp_path / "outside", tmp_path / "files"
    outside.mkdir()
    (files / "evil_package").mkdir(parents=True)
    (files / "experiment").mkdir()
    (files / "hydra" / "launcher").mkdir(parents=True)
    (files / "hydra" / "launcher" / "evil.yaml").write_text("_target_: hydra_plugins.evil.Launcher\n")
    code = f"open({str(outside / 'canary')!r}, 'w')\ndef run(*args, **kwargs): pass\nevil = run\n"
    for name in ("hubconf.py", "evil_module.py", "evil_package/__init__.py"):
        (files / name).write_text(code)
    torch.save(Evil(f"touch {outside}/canary"), files / "evil.pt")
    (files / "evil.pickle").write_bytes(pickle.dumps(Evil(f"touch {outside}/canary")))
    monkeypatch.syspath_prepend(str(files))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # the entry sets it: put back afterwards
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield outside
    root.handlers[:] = handlers  # those of the run write to this test's captured output
    root.setLevel(level)
    GlobalHydra.instance().clear()
    for name in ("hubconf", "evil_module", "evil_package"):
        sys.modules.pop(name, None)


def refused(argv: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """Run `train.py` in this process: its one line of error."""
    import train

    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    with pytest.raises(SystemExit) as stopped:
        entry.run(train.main, "train.yaml")
    errors = capfd.readouterr().err
    assert stopped.value.code == 2, errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1, errors
    return errors.removeprefix("error: ")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment(
    name: str, outside: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    files = outside.with_name("files")
    body, message = (t.replace("OUTSIDE", str(outside)).replace("FILES", str(files)) for t in EXPERIMENTS[name])
    (files / "experiment" / "evil.yaml").write_text(f"# @package _global_\n{body}\n")
    options = ["--config-dir", str(files), f"paths.log_dir={outside.with_name('logs')}"]
    error = refused([*options, "experiment=evil"], monkeypatch, capfd)
    assert error.startswith(message)
    assert list(outside.iterdir()) == []


def test_one_of_a_sweep(outside: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The sweep's own config is harmless; each job composes again. None starts."""
    files, logs = outside.with_name("files"), outside.with_name("logs")
    (files / "experiment" / "evil.yaml").write_text(
        f"# @package _global_\nhydra: {{job_logging: {{handlers: {{file: {{filename: {outside}/canary}}}}}}}}\n"
    )
    options = ["-m", "--config-dir", str(files), f"paths.log_dir={logs}"]
    error = refused([*options, "experiment=mms_lab,evil"], monkeypatch, capfd)
    assert error.startswith("hydra.job_logging.handlers.file.filename = ")
    assert list(outside.iterdir()) == []
    assert [path.name for path in logs.glob("train/multiruns/*/*")] == ["multirun.yaml"]


@pytest.mark.parametrize("path", ["pkg://evil_package", "structured://evil_module"])
def test_a_search_path_that_imports(
    path: str, outside: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    files = outside.with_name("files")
    (files / "primary.yaml").write_text(f"defaults: [train, _self_]\nhydra: {{searchpath: ['{path}']}}\n")
    error = refused(["--config-dir", str(files), "--config-name", "primary"], monkeypatch, capfd)
    assert error.startswith(f"hydra.searchpath = {path}: allowed are folders")
    assert list(outside.iterdir()) == []


def test_a_pickled_config(outside: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    pickled = str(outside.with_name("files") / "evil.pickle")
    assert refused(["--experimental-rerun", pickled], monkeypatch, capfd).startswith("--experimental-rerun: ")
    assert list(outside.iterdir()) == []


def test_a_typing_error_beside_it(
    outside: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    error = refused(["flow._target_=os.system", "flow.command=true"], monkeypatch, capfd)
    assert "os.system: allowed are" in error
