"""A real run that counts the computations of the gradient norm in each optimiser step, and checks what is clipped.

python norm_worker.py FOLDER key=value …
"""

import mvsplit  # noqa: F401 (before torch)

# isort: split

import json
import sys
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from lightning import Callback

from mvsplit.data.folders import RESOLVERS
from mvsplit.training import gradients, local_state
from mvsplit.utils.config import build, to_plain
from mvsplit.utils.resolvers import register_resolvers
from mvsplit.utils.run_dirs import PROJECT_ROOT

calls: list[float] = []
"""Norms computed by anybody."""


def count(owner: Any, name: str) -> None:
    plain = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        result = plain(*args, **kwargs)
        calls.append(float(torch.stack([torch.as_tensor(r) for r in result] if isinstance(result, list) else [result])
                           .double().square().sum().sqrt()))  # fmt: skip
        return result

    setattr(owner, name, counted)


class Counter(Callback):
    """By step: the number of computations, the norm, and that of the gradient that the optimiser got."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record: dict[str, list[float]] = {"norms_by_step": [], "norms": [], "clipped_norms": []}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        count(torch.nn.utils.clip_grad, "_get_total_norm")
        count(torch.nn.utils, "clip_grad_norm_")
        if getattr(trainer.strategy, "deepspeed_engine", None) is None:
            count(gradients, "total_norm")
            inner = trainer.optimizers[0]
        else:
            zero3 = trainer.strategy.deepspeed_engine.optimizer
            count(type(zero3), "_get_norm_groups")
            inner = zero3.optimizer
        plain = inner.step

        def step(*args: Any, **kwargs: Any) -> Any:
            if self.zero3 is None:
                result = plain(*args, **kwargs)  # the closure runs the backward pass and clips
                self.clipped = [local_state.local(p.grad) for p in module.parameters() if p.grad is not None]
            else:
                self.clipped += [p.grad.clone() for g in inner.param_groups for p in g["params"]]
                result = plain(*args, **kwargs)
            return result

        self.zero3 = getattr(trainer.strategy, "deepspeed_engine", None)
        self.clipped: list[torch.Tensor] = []
        inner.step = step

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        self.record["norms_by_step"].append(len(calls))
        self.record["norms"].append(calls[0])
        squares = sum(float(grad.double().square().sum()) for grad in self.clipped)
        sharded = self.zero3 is not None or type(trainer.strategy).__name__ == "FSDP2"
        total = torch.tensor(squares, dtype=torch.float64)
        if sharded:
            torch.distributed.all_reduce(total)
        self.record["clipped_norms"].append(float(total.sqrt()))
        self.clipped.clear()
        calls.clear()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        (self.folder / f"norms_rank_{trainer.global_rank}.json").write_text(json.dumps(self.record))


def main(folder: Path, overrides: list[str]) -> None:
    torch.set_num_threads(1)
    register_resolvers(RESOLVERS)
    small = ["model=tiny", "data.batch_size=8", "data.num_workers=0", "trainer.accelerator=cpu", "trainer.max_steps=4",
             "trainer.gradient_clip_val=0.01", "optim.warmup_steps=0", "optim.schedule=constant", "optim.lr=1e-4",
             "callbacks.monitor.probe.every=2", "callbacks.monitor.guard.action=skip"]  # fmt: skip
    with initialize_config_dir(version_base="1.3", config_dir=str(PROJECT_ROOT / "configs")):
        config = to_plain(compose("train.yaml", overrides=[f"paths.output_dir={folder}", *small, *overrides]))
    callbacks = [build(config["callbacks"]["monitor"]), Counter(folder)]
    settings = {"callbacks": callbacks, "logger": False, "enable_checkpointing": False,
                "enable_progress_bar": False, "limit_val_batches": 0}  # fmt: skip
    build(config["trainer"] | settings).fit(build(config["module"]), datamodule=build(config["data"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
