"""A config from elsewhere, given as a user would give it, executes nothing, writes nothing outside, and is reported."""

import logging
import os
import pickle
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from mvsplit.data.folders import RESOLVERS
from mvsplit.training import settings
from mvsplit.utils import entry

COMMAND = "touch OUTSIDE/canary"
CALL = f"{{_target_: os.system, command: {COMMAND}}}"

# What the experiment file holds, and the key that is named.
EXPERIMENTS = {
    "os.system": (f"callbacks: {{evil: {CALL}}}", "callbacks.evil._target_ = os.system: must be"),
    "subprocess": (
        f"logger: {{evil: {{_target_: subprocess.run, args: {COMMAND}, shell: true}}}}",
        "logger.evil._target_ = subprocess.run: must be",
    ),
    "eval": (
        "flow: {times: {_target_: builtins.eval, _args_: [\"open('OUTSIDE/canary', 'w')\"]}}",
        "flow.times._target_ = builtins.eval: must be",
    ),
    "exec, later": (
        "data: {prepare: {_target_: builtins.exec, _partial_: true}}",
        "data.prepare._target_ = builtins.exec: must be",
    ),
    "a path that looks like W&B's": (
        "logger: {wandb: {_target_: wandb.init, project: x}}",
        "logger.wandb._target_ = wandb.init: must be",
    ),
    "W&B's server and settings": (
        "logger: {wandb: {_target_: mvsplit.utils.loggers.Wandb, folder: x, settings: {base_url: x}}}",
        "logger.wandb.settings = {'base_url': 'x'}: unknown key",
    ),
    "W&B's files elsewhere": (
        "logger: {wandb: {_target_: mvsplit.utils.loggers.Wandb, folder: OUTSIDE}}",
        "logger.wandb.folder = OUTSIDE: only the command line can set another folder",
    ),
    "pickles of submitit": (
        "defaults: [override /hydra/launcher: submitit_local]\n"
        "hydra: {mode: MULTIRUN, launcher: {submitit_folder: OUTSIDE}}",
        "hydra.launcher.submitit_folder = 'OUTSIDE': must be",
    ),
    "commands for sbatch": (
        f"defaults: [override /hydra/launcher: submitit_slurm]\n"
        f"hydra: {{mode: MULTIRUN, launcher: {{setup: ['{COMMAND}']}}}}",
        "hydra.launcher.setup = ",
    ),
    "a search space of Optuna's": (
        "defaults: [override /hydra/sweeper: optuna]\n"
        "hydra: {mode: MULTIRUN, sweeper: {custom_search_space: os.system, direction: minimize}}",
        "hydra.sweeper.custom_search_space = os.system: ",
    ),
    "pickle": (
        "data: {transform: {_target_: torch.load, f: FILES/evil.pt, weights_only: false}}",
        "data.transform._target_ = torch.load: must be",
    ),
    "hub": (
        "residual: {_target_: torch.hub.load, repo_or_dir: FILES, model: evil, source: local}",
        "residual._target_ = torch.hub.load: must be",
    ),
    "pipe": (
        f"data: {{val_transform: {{_target_: webdataset.WebDataset, urls: 'pipe:{COMMAND}'}}}}",
        "data.val_transform._target_ = webdataset.WebDataset: must be",
    ),
    "pipe as shards": (
        f"data: {{reader: webdataset, train: 'pipe:{COMMAND}', num_workers: 0}}",
        "data.train = pipe:touch ",
    ),
    "pipe as shards, allowed by itself": (
        f"data: {{reader: webdataset, train: 'pipe:{COMMAND}', num_workers: 0, allow_pipe: true}}",
        "data.allow_pipe = True: unknown key",
    ),
    "our function": (
        "callbacks: {evil: {_target_: mvsplit.training.session.save_config, config: {}, output_dir: OUTSIDE}}",
        "callbacks.evil._target_ = mvsplit.training.session.save_config: must be",
    ),
    "our function, called": (
        "callbacks: {evil: {_target_: mvsplit.data.digits.write_digits, folder: here}}",
        "callbacks.evil._partial_ = False: must be true",
    ),
    "what a module of ours imported": (
        "callbacks: {evil: {_target_: mvsplit.training.session.Path, _args_: [OUTSIDE]}}",
        "callbacks.evil._target_ = mvsplit.training.session.Path: must be",
    ),
    "module of ours outside the packages": (
        "callbacks: {evil: {_target_: mvsplit.utils.errors.UserError}}",
        "callbacks.evil._target_ = mvsplit.utils.errors.UserError: must be",
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
        "trainer.plugins.0._target_ = os.system: must be",
    ),
    "interpolation to a node": (
        f"callbacks: {{evil: '${{oc.create:\"{CALL}\"}}'}}",
        "callbacks.evil._target_ = os.system: must be",
    ),
    "interpolation for later": (
        f"data: {{folder: '\\${{oc.create:\"{CALL}\"}}'}}",
        "data.folder = ${oc.create:",
    ),
    "task_name": ("task_name: ../../outside/canary", "task_name = '../../outside/canary': "),
    "hydra.callbacks": (f"hydra: {{callbacks: {{evil: {CALL}}}}}", "hydra.callbacks.evil._target_ = os.system: "),
    "hydra.launcher": (
        "hydra: {mode: MULTIRUN, launcher: {_target_: os.system}}",
        "hydra.launcher._target_ = 'os.system': must be",
    ),
    "launcher of another file": (
        "defaults: [override /hydra/launcher: evil]\nhydra: {mode: MULTIRUN}",
        "hydra.launcher._target_ = 'hydra_plugins.evil.Launcher': must be",
    ),
    "hydra.sweeper": (
        "hydra: {mode: MULTIRUN, sweeper: {_target_: os.system}}",
        "hydra.sweeper._target_ = 'os.system': must be",
    ),
    "sweep of Hydra's keys": (
        "hydra: {mode: MULTIRUN, sweeper: {params: {+hydra.callbacks.evil._target_: os.system}}}",
        "hydra.callbacks.evil._target_ = os.system: ",
    ),
    "overrides that nobody typed": (
        "hydra: {mode: MULTIRUN, overrides: {hydra: [hydra.sweep.dir=OUTSIDE]}}",
        "hydra.sweep.dir = OUTSIDE: only the command line can set another folder",
    ),
    "handler factory": (
        f"hydra: {{job_logging: {{handlers: {{evil: {{(): os.system, command: {COMMAND}}}}}}}}}",
        "hydra.job_logging.handlers.evil.() = os.system: ",
    ),
    "handler class": (
        f"hydra: {{hydra_logging: {{handlers: {{evil: {{class: subprocess.Popen, args: {COMMAND}, shell: true}}}}}}}}",
        "hydra.hydra_logging.handlers.evil.class = 'subprocess.Popen': must be",
    ),
    "key that looks like another": (
        f"hydra: {{job_logging: {{handlers: {{evil: {{class: subprocess.Popen, args: {COMMAND}, shell: true}}}}, "
        "handlers.evil.class: logging.StreamHandler}}",
        "hydra.job_logging.handlers.evil.class = 'subprocess.Popen': must be",
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
        "hydra.job_logging.handlers.console.stream = 'ext://evil_module.run': must be",
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
        "hydra.job_logging.handlers.file.filename = 'OUTSIDE/canary': must be",
    ),
    "truncated log file": (
        "hydra: {job_logging: {handlers: {file: {mode: w}}}}",
        "hydra.job_logging.handlers.file.mode = w: ",
    ),
    "job name": ("hydra: {job: {name: ../canary}}", "hydra.job.name = '../canary': "),
    "output_subdir": (
        "hydra: {output_subdir: ../../../../outside/canary}",
        "hydra.output_subdir = '../../../../outside/canary': must be",
    ),
    "run folder": ("hydra: {run: {dir: OUTSIDE}}", "hydra.run.dir = OUTSIDE: only the command line"),
    "output folder": ("paths: {output_dir: OUTSIDE}", "paths.output_dir = OUTSIDE: only the command line"),
    "secret": (
        "data: {folder: 'https://example.org/${oc.env:AWS_SECRET_ACCESS_KEY}'}",
        "oc.env:AWS_SECRET_ACCESS_KEY: must be one of HOME, ",
    ),
    "secret with a default": (
        "tags: ['${oc.env:AWS_SECRET_ACCESS_KEY,none}']",
        "oc.env:AWS_SECRET_ACCESS_KEY: must be one of HOME, ",
    ),
    "secret, decoded": (
        "tags: ['${oc.decode:\"\\${oc.env:AWS_SECRET_ACCESS_KEY}\"}']",
        "oc.env:AWS_SECRET_ACCESS_KEY: must be one of HOME, ",
    ),
    "secret in a path": (
        "task_name: '${oc.env:AWS_SECRET_ACCESS_KEY}'",
        "oc.env:AWS_SECRET_ACCESS_KEY: must be one of HOME, ",
    ),
    "secret as a token": (
        "data: {folder: 'https://example.org', storage: {token_env: AWS_SECRET_ACCESS_KEY}}",
        "data.storage.token_env = 'AWS_SECRET_ACCESS_KEY': must be 'HF_TOKEN' or 'DATA_TOKEN'",
    ),
    "keys for another server": (
        "data: {folder: 's3://b', storage: {options: {client_kwargs: {endpoint_url: 'https://example.org'}}}}",
        "data.storage.options.endpoint_url: would receive this machine's credentials",
    ),
    "interpolations of interpolations": (
        "x0: aaaaaaaaaaaaaaaa\n"
        + "\n".join(f"x{i}: ${{x{i - 1}}}${{x{i - 1}}}${{x{i - 1}}}${{x{i - 1}}}" for i in range(1, 31))
        + "\ntags: ['${x30}']",
        "x8: its interpolations expand to more than 1000000 characters",
    ),
    "nodes of nodes": (
        "y0: {a: 1234567890}\n" + "\n".join(f"y{i}: {{a: '${{y{i - 1}}}', b: '${{y{i - 1}}}'}}" for i in range(1, 40)),
        "y16: its interpolations expand to more than 1000000 characters",
    ),
    "a number of many digits": (
        f"seed: {'1' * 5000}",
        "FILES/experiment/evil.yaml: a number of more than 100 characters",
    ),
    "a number to the base of sixty": (
        f"tags: [1{':00' * 100000}]",
        "FILES/experiment/evil.yaml: a number of more than 100 characters",
    ),
    "checkpoints of another run": (
        "callbacks: {checkpoint: {folder: OUTSIDE/checkpoints}}",
        "callbacks.checkpoint.folder = OUTSIDE/checkpoints: only the command line can set another folder",
    ),
    "checkpoints out of the run": (
        "callbacks: {best: {_target_: lightning.pytorch.callbacks.ModelCheckpoint,"
        " dirpath: '${paths.output_dir}/../../x'}}",
        "callbacks.best.dirpath = ${paths.output_dir}/../../x: only the command line can set another folder",
    ),
    "checkpoints out of the run by an interpolation": (
        "callbacks: {checkpoint: {folder: '${paths.output_dir}${tags.0}'}}\ntags: [/../../x]",
        "callbacks.checkpoint.folder = ${paths.output_dir}${tags.0}: only the command line",
    ),
    "a log elsewhere": (
        "logger: {csv: {_target_: lightning.pytorch.loggers.CSVLogger, save_dir: OUTSIDE, name: '', version: ''}}",
        "logger.csv.save_dir = OUTSIDE: only the command line can set another folder",
    ),
    "python object": (
        f"tags: !!python/object/apply:os.system ['{COMMAND}']",
        "could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.system'",
    ),
    "broken": ("tags: [", "while parsing a flow node"),
    "no date": ("tags: !!timestamp x", "FILES/experiment/evil.yaml: "),
    "aliases": (
        "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n"
        + "\n".join(f"{y}: &{y} [{', '.join([f'*{x}'] * 9)}]" for x, y in pairwise("abcdefghijk")),
        "FILES/experiment/evil.yaml: its aliases expand to more than 20000 values",
    ),
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
    (files / "local").mkdir()
    (files / "local" / "allowed.yaml").write_text("targets: [os.system, subprocess.run, builtins.exec, torch.load]\n")
    (files / "hydra" / "launcher").mkdir(parents=True)
    (files / "hydra" / "launcher" / "evil.yaml").write_text("_target_: hydra_plugins.evil.Launcher\n")
    code = f"open({str(outside / 'canary')!r}, 'w')\ndef run(*args, **kwargs): pass\nevil = run\n"
    for name in ("hubconf.py", "evil_module.py", "evil_package/__init__.py"):
        (files / name).write_text(code)
    torch.save(Evil(f"touch {outside}/canary"), files / "evil.pt")
    (files / "evil.pickle").write_bytes(pickle.dumps(Evil(f"touch {outside}/canary")))
    monkeypatch.syspath_prepend(str(files))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "precious")
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
        entry.run(train.main, "train.yaml", settings.checked, RESOLVERS)
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
    assert "precious" not in error
    assert not any("precious" in path.read_text() for path in outside.with_name("logs").rglob("*.*") if path.is_file())
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
    assert not logs.exists()


@pytest.mark.parametrize("path", ["pkg://evil_package", "structured://evil_module"])
def test_a_search_path_that_imports(
    path: str, outside: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    files = outside.with_name("files")
    (files / "primary.yaml").write_text(f"defaults: [train, _self_]\nhydra: {{searchpath: ['{path}']}}\n")
    error = refused(["--config-dir", str(files), "--config-name", "primary"], monkeypatch, capfd)
    assert error.startswith(f"hydra.searchpath = {path}: must be a folder")
    assert list(outside.iterdir()) == []


def test_a_pickled_config(outside: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    pickled = str(outside.with_name("files") / "evil.pickle")
    assert refused(["--experimental-rerun", pickled], monkeypatch, capfd).startswith("--experimental-rerun: ")
    assert list(outside.iterdir()) == []


def test_a_typing_error_beside_it(
    outside: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    error = refused(["flow._target_=os.system", "flow.command=true"], monkeypatch, capfd)
    assert error.startswith("flow.command: unknown key")
