"""A real training run of `train.yaml` whose ranks write down what the tests compare.

    python sharded_worker.py FOLDER MODE key=value …

MODE `train` records: initial and final weights, at step `AT` (or the last, if that is earlier) the weights, the
averaged gradient and every rank's micro-batches, later steps' micro-batches too. MODE `watch` trains with
`callbacks.monitor` alone: its tables are the record. MODE `build` stops after construction and records its memory.
"""

import mvsplit  # noqa: F401 (before torch)

# isort: split

import os
import sys
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from lightning import Callback, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mvsplit.data.folders import RESOLVERS
from mvsplit.utils.config import build, to_plain
from mvsplit.utils.resolvers import register_resolvers
from mvsplit.utils.run_dirs import PROJECT_ROOT

AT = 3


def whole(parameter: nn.Parameter) -> Tensor:
    """The whole parameter, whatever the strategy; a collective call."""
    if hasattr(parameter, "ds_numel"):
        from deepspeed.utils import safe_get_full_fp32_param

        if hasattr(parameter, "_z3_optimizer"):
            return safe_get_full_fp32_param(parameter).detach().view(parameter.ds_shape).clone()
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    if isinstance(parameter, DTensor):
        return parameter.detach().full_tensor().clone()
    return parameter.detach().clone()


def gradient(parameter: nn.Parameter) -> Tensor:
    if hasattr(parameter, "ds_numel"):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter).view(parameter.ds_shape).clone()
    assert parameter.grad is not None
    grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
    return grad.clone()


def at(trainer: Trainer) -> int:
    return min(AT, trainer.max_steps - 1)


class Recorder(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record: dict[str, Any] = {"batches": []}

    @staticmethod
    def weights(module: Any) -> dict[str, Tensor]:
        return {name: whole(p) for name, p in module.network.named_parameters()}

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self.record["initial"] = self.weights(module)

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: dict[str, Any], batch_idx: int) -> None:
        kept = ("image", "label", "position", "condition", "null_condition")
        self.record["batches"].append({key: batch[key].clone() for key in kept if key in batch})
        if batch_idx == at(trainer) * trainer.accumulate_grad_batches:
            self.record["weights"] = self.weights(module)

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        # DeepSpeed calls this at every micro-batch.
        if trainer.fit_loop.epoch_loop.batch_idx + 1 == (at(trainer) + 1) * trainer.accumulate_grad_batches:
            self.record["gradient"] = {name: gradient(p) for name, p in module.network.named_parameters()}

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        self.record["final"] = self.weights(module)
        torch.save(self.record, self.folder / f"rank_{trainer.global_rank}.pt")


def memory(key: str) -> int:
    """A line of this process's memory account, in bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


def measured(module: Any, folder: Path) -> None:
    """Make `module.configure_model` record the memory it takes, and end the process."""
    configure = module.configure_model

    def configure_model() -> None:
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        configure()
        record = {"peak": memory("VmHWM") - before, "initial": {}}
        if os.environ.get("RECORD_WEIGHTS"):
            record["initial"] = Recorder.weights(module)
        torch.save(record, folder / f"rank_{module.global_rank}.pt")
        torch.distributed.barrier()
        os._exit(0)

    module.configure_model = configure_model


def main(folder: Path, mode: str, overrides: list[str]) -> None:
    torch.set_num_threads(1)
    register_resolvers(RESOLVERS)
    with initialize_config_dir(version_base="1.3", config_dir=str(PROJECT_ROOT / "configs")):
        config = to_plain(compose("train.yaml", overrides=[f"paths.output_dir={folder}", *overrides]))
    module = build(config["module"])
    if mode == "build":
        measured(module, folder)
    callbacks = [build(config["callbacks"]["monitor"])] if mode == "watch" else [Recorder(folder)]
    settings = {"callbacks": callbacks, "logger": False, "enable_checkpointing": False,
                "enable_progress_bar": False, "limit_val_batches": 0}  # fmt: skip
    trainer: Trainer = build(config["trainer"] | settings)
    trainer.fit(module, datamodule=build(config["data"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
