"""One run through every strategy and number of processes: each goes on from what another left behind."""

import csv
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_tools import Canary, poison
from comparison import last
from conftest import compose_config
from omegaconf import DictConfig
from safetensors.torch import load_file

import convert as convert_script
import eval as eval_script
from mvsplit.training.checkpoint_format import Saved
from mvsplit.utils.config import build, to_plain
from mvsplit.utils.errors import UserError

from .test_commands import runs

Run = Callable[..., subprocess.CompletedProcess[str]]
CPU = ["trainer.accelerator=cpu", "trainer.precision=32-true"]
ONE = ["optim.warmup_steps=3", "optim.schedule=constant", "logger=csv", "callbacks.sample_grid=null",
       "callbacks.checkpoint.keep_best=0", "trainer.val_check_interval=100",
       "trainer.limit_test_batches=1"]  # fmt: skip
CHAIN: list[tuple[str, int]] = [
    ("deepspeed", 2), ("deepspeed", 4), ("fsdp", 2), ("ddp_sim", 2), ("deepspeed", 2), ("cpu", 1),
]  # fmt: skip


def losses(run: Path) -> list[float]:
    with (run / "csv" / "version_0" / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.mark.long
def test_strategies_hand_a_run_to_each_other(run_script: Run, tmp_path: Path) -> None:
    steps = 2 * len(CHAIN)
    whole = run_script("train.py", *ONE, *CPU, f"trainer.max_steps={steps}", "task_name=whole")
    assert whole.returncode == 0, whole.stderr
    (one,) = runs(tmp_path, "whole")
    curve: list[float] = []
    ckpt = "null"
    for number, (trainer, devices) in enumerate(CHAIN):
        options = [f"trainer={trainer}", f"trainer.devices={devices}", f"trainer.max_steps={2 * number + 2}"]
        done = run_script("train.py", *ONE, *CPU, *options, f"task_name=part{number}", f"ckpt_path={ckpt}")
        assert done.returncode == 0, done.stderr
        (run,) = runs(tmp_path, f"part{number}")
        curve += losses(run)
        ckpt = str(run / "checkpoints" / "last.ckpt")
        sharded = trainer in ("deepspeed", "fsdp")
        assert len(list(Path(ckpt).glob("weights-*"))) == (devices if sharded else 1)
    assert curve == pytest.approx(losses(one), rel=1e-5)
    expected, actual = last(one), last(run)
    assert actual["callbacks"]["EMA"]["num_updates"] == steps
    for kind, tensors in expected["tensors"].items():
        assert tensors.keys() == actual["tensors"][kind].keys()
        for name, tensor in tensors.items():
            # Sums in another order, and Adam magnifies what it does to gradients near zero.
            torch.testing.assert_close(
                actual["tensors"][kind][name], tensor, rtol=2e-3, atol=2e-5, msg=f"{kind} {name}"
            )

    # What two processes of ZeRO-3 saved draws the same pictures as the file it is converted to.
    (run,) = runs(tmp_path, f"part{len(CHAIN) - 2}")
    ckpt = str(run / "checkpoints" / "last.ckpt")
    file = tmp_path / "model.safetensors"
    assert run_script("convert.py", f"ckpt_path={ckpt}", f"output={file}").returncode == 0
    tensors = last(run)["tensors"]
    for name, tensor in load_file(file).items():
        kind = "weights" if name.startswith("raw.") else "ema"
        assert torch.equal(tensor, tensors[kind][f"network.{name.removeprefix('raw.')}"])
    pictures = []
    for path in (ckpt, str(file)):
        drawn = run_script(
            "sample.py", f"ckpt_path={path}", "count=1", "sampler.steps=2", f"task_name={Path(path).stem}"
        )
        assert drawn.returncode == 0, drawn.stderr
        (folder,) = runs(tmp_path, Path(path).stem)
        pictures.append([picture.read_bytes() for picture in sorted(folder.glob("*.png"))])
    assert len(pictures[0]) == 11
    assert pictures[0] == pictures[1]


@pytest.mark.long
def test_sharded_average_is_the_average_to_the_bit(
    run_script: Run, tmp_path: Path, config: Callable[..., DictConfig]
) -> None:
    """ZeRO-3 in two processes; the average of the weights of every step, taken afterwards by one."""
    options = [
        "trainer=deepspeed",
        "trainer.devices=2",
        "callbacks.checkpoint.every_n_steps=1",
        "callbacks.checkpoint.keep_last=100",
    ]
    done = run_script("train.py", *ONE, *CPU, *options, "callbacks.ema.decay=0.6")
    assert done.returncode == 0, done.stderr
    (run,) = runs(tmp_path)
    module = build(to_plain(config())["module"])
    module.configure_model()
    average = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    for step in range(1, 7):
        saved = Saved(run / "checkpoints" / f"step-{step:08d}.ckpt")
        weights, ema = saved.tensors("weights"), saved.tensors("ema")
        decay = min(0.6, (1 + step) / (10 + step))
        for name, value in average.items():
            value.lerp_(weights.whole(name), 1 - decay)
            assert torch.equal(value, ema.whole(name)), f"{name}, step {step}"


@pytest.mark.slow
def test_poison_is_refused_by_all_who_read(
    train_here: Callable[..., Any], config: Callable[..., DictConfig], run_script: Run, tmp_path: Path
) -> None:
    """Pickles in every place of a checkpoint, vouched for by its manifest; and files that are nothing but pickle."""
    train_here("trainer.max_steps=2")
    good, canary = tmp_path / "run" / "checkpoints" / "step-00000002.ckpt", tmp_path / "canary"
    bad = good.parent / "bad-00000002.ckpt"
    torch.save(Saved(good).state() | {"loops": Canary(canary)}, tmp_path / "state")
    (tmp_path / "pickle").write_bytes(pickle.dumps(Canary(canary)))
    torch.save({"state_dict": Canary(canary)}, tmp_path / "single.ckpt")
    (tmp_path / "engine" / "checkpoint").mkdir(parents=True)
    for name in ("mp_rank_00_model_states", "zero_pp_rank_0_mp_rank_00_optim_states"):
        torch.save({"module": Canary(canary)}, tmp_path / "engine" / "checkpoint" / f"{name}.pt")

    def readers(path: Path) -> dict[str, Callable[[], Any]]:
        def other(name: str, main: Callable[..., Any]) -> None:
            (tmp_path / "out").mkdir(exist_ok=True)
            paths = [f"paths.output_dir={tmp_path}/out", f"paths.log_dir={tmp_path}"]
            main(compose_config(f"ckpt_path={path}", *paths, name=name))

        return {
            "resume": lambda: train_here(f"ckpt_path={path}", "trainer.max_steps=4"),
            "convert": lambda: other("convert.yaml", convert_script.main),
            "eval": lambda: other("eval.yaml", eval_script.evaluate),
        }

    for name in ("state.pt", "weights-00000.safetensors", "ema-00000.safetensors", "optimizer-00000.safetensors"):
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        poison(bad, name, (tmp_path / ("state" if name == "state.pt" else "pickle")).read_bytes())
        for reader, read in readers(bad).items():
            if reader != "resume" and name in ("state.pt", "optimizer-00000.safetensors"):
                read()  # does not look there
                continue
            with pytest.raises(UserError, match=r"damaged or unsafe|damaged, or not a file of slices"):
                read()
    for path in (tmp_path / "single.ckpt", tmp_path / "engine"):
        for read in readers(path).values():
            with pytest.raises(UserError, match="not a checkpoint of this project"):
                read()
    done = run_script("train.py", *CPU, "trainer=deepspeed", "trainer.devices=2", f"ckpt_path={bad}")
    assert done.returncode == 2, done.stderr
    assert "optimizer-00000.safetensors: damaged, or not a file of slices" in done.stderr
    assert not canary.exists()
