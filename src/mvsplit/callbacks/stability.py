"""Watches for the mean mode: a few measures at every step, all of them by depth now and then."""

import math
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.optim import Optimizer

from mvsplit.callbacks.health import NonFiniteStop
from mvsplit.stability.taps import Taps
from mvsplit.stability.traces import CHEAP, DEPTH, TableWriter
from mvsplit.training.shards import gain_statistics, gradient_norm, row_norms
from mvsplit.training.strategies import takes_step
from mvsplit.utils.errors import UserError


def spread_evenly(depth: int, count: int) -> list[int]:
    """At most `count` of `depth` block numbers, the first and the last among them."""
    count = min(depth, count)
    return sorted({round(i * (depth - 1) / max(1, count - 1)) for i in range(count)})


def watched_blocks(depth: int, count: int) -> list[int]:
    """`count` blocks of the deeper half, spread evenly: there the collapse shows first and stays."""
    return sorted({math.ceil(depth * (0.5 + 0.5 * (i + 1) / (count + 1))) - 1 for i in range(count)})


class StabilityProbe(Callback):
    """Measures the mean mode before each optimiser step, and leaves `trace.csv` and `depth.csv` for `src/report.py`.

    Every step, over a few deep blocks: ρ, token cosine, G_mean, G_ctr, Q/K gradients, with loss and gradient norm: the
    collapse guard judges them. Every so many steps everything else too, by depth. In TensorBoard: `stability/`.

    Args:
        folder: where the tables go.
        every: optimiser steps between two full measurements; 0 makes none.
        blocks: of the network, fully measured, spread evenly over its depth. For each that is measured in a step its
            two writers' gradients are held twice in float32: 33 MB at width 1024.
        watched: blocks of the deeper half that are looked at in every step.
        attention_samples: samples of a micro-batch whose attention matrices are looked at.

    Attributes:
        values: of the step at hand, by the column names of `trace.csv`; the same on all ranks.
        by_depth: of the last full measurement, by block and the column names of `depth.csv`, until somebody took it.
    """

    def __init__(
        self,
        folder: str,
        every: NonNegativeInt = 100,
        blocks: PositiveInt = 25,
        watched: PositiveInt = 3,
        attention_samples: PositiveInt = 2,
    ) -> None:
        self.folder, self.every, self.attention_samples = Path(folder), every, attention_samples
        self.num_blocks, self.num_watched = blocks, watched
        self.values: dict[str, float] = {}
        self.by_depth: dict[int, dict[str, float]] = {}
        self._tables: tuple[TableWriter, TableWriter] | None = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        network: Any = module.network
        if not hasattr(network, "blocks"):
            raise UserError("callbacks.stability: this network has no blocks to watch; allowed is null")
        depth = len(network.blocks)
        self.watched, self.blocks = watched_blocks(depth, self.num_watched), spread_evenly(depth, self.num_blocks)
        self._taps = Taps(network, self.attention_samples)
        self._health = next((c for c in trainer.callbacks if isinstance(c, NonFiniteStop)), None)
        self._micro_batches = 0
        if trainer.is_global_zero:
            self._tables = (
                TableWriter(self.folder / "trace.csv", ("step", *CHEAP), trainer.global_step),
                TableWriter(self.folder / "depth.csv", ("step", "block", *DEPTH), trainer.global_step),
            )

    def _is_full(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        return self.every > 0 and (step % self.every == 0 or step == trainer.max_steps - 1)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._micro_batches == 0:
            self._loss = torch.zeros((), device=trainer.strategy.root_device)
            self._taps.attach(self.watched, self.blocks if self._is_full(trainer) else ())

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        self._loss += loss.detach()  # already divided by the number of micro-batches
        self._micro_batches += 1

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        if not takes_step(trainer):
            return
        full = self._is_full(trainer)
        self._taps.detach()
        table = self._taps.read(self._micro_batches)
        self._taps.writers.clear()  # their memory is the optimiser step's
        self._micro_batches = 0
        for (block, name), norm in self._query_key_norms(module, list(table)).items():
            table[block][name] = norm
        self.values = {
            "loss": float(trainer.strategy.reduce(self._loss, reduce_op="mean")),
            "grad_norm": self._health.norm if self._health else gradient_norm(module),
            **summary([table[block] for block in self.watched]),
        }
        if full:
            self.by_depth = {block: table[block] for block in self.blocks}
            self._add_gains(module)
        self._write(trainer, full)

    def _query_key_norms(self, module: LightningModule, blocks: list[int]) -> dict[tuple[int, str], float]:
        rows = {}
        for block in blocks:
            name = f"network.blocks.{block}.attention.qkv.weight"  # rows: all queries, all keys, all values
            width = self._taps.network.blocks[block].attention.qkv.in_features
            rows[f"{block} q_grad"] = (name, 0, width)
            rows[f"{block} k_grad"] = (name, width, 2 * width)
        norms = row_norms(module, rows)
        return {(int(key.split()[0]), key.split()[1]): norm for key, norm in norms.items()}

    def _add_gains(self, module: LightningModule) -> None:
        groups: dict[str, list[str]] = {}
        for block in self.by_depth:
            for name, _ in self._taps.network.blocks[block].named_parameters():
                gain = name.rpartition(".")[2]
                if gain in ("alpha", "beta"):
                    groups.setdefault(f"{block} {gain}", []).append(f"network.blocks.{block}.{name}")
        for key, (mean, largest) in (gain_statistics(module, groups) if groups else {}).items():
            number, gain = key.split()
            self.by_depth[int(number)] |= {f"{gain}_mean": mean, f"{gain}_max": largest}

    def _write(self, trainer: Trainer, full: bool) -> None:
        if self._tables is None:
            return
        step = trainer.global_step
        trace, by_depth = self._tables
        trace.append([{"step": step} | self.values])
        if full:
            by_depth.append({"step": step, "block": block} | values for block, values in self.by_depth.items())
        if (step + 1) % trainer.log_every_n_steps == 0:
            logged = {name: value for name, value in self.values.items() if name not in ("loss", "grad_norm")}
            for logger in trainer.loggers:
                logger.log_metrics({f"stability/{name}": value for name, value in logged.items()}, step)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        for table in self._tables or ():
            table.close()
        self._tables = None


def summary(blocks: list[dict[str, float]]) -> dict[str, float]:
    """The watched blocks as one: root-sum-squares of gradients over blocks and writers, means of the others."""

    def total(*names: str) -> float:
        return math.hypot(*(block[name] for block in blocks for name in names))

    return {
        "g_mean": total("g_mean_attention", "g_mean_ffn"),
        "g_ctr": total("g_ctr_attention", "g_ctr_ffn"),
        "q_grad": total("q_grad"),
        "k_grad": total("k_grad"),
        "rho": sum(block["rho"] for block in blocks) / len(blocks),
        "token_cosine": sum(block["token_cosine"] for block in blocks) / len(blocks),
    }
