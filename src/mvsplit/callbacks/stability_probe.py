"""Measures the mean mode in the backward pass of a step: a few values at every step, all by depth at intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import NonNegativeInt, PositiveInt
from torch import nn

from mvsplit.stability.detector import Event
from mvsplit.stability.measures import MOST_TOKENS
from mvsplit.stability.taps import Taps, kind_of
from mvsplit.training.gradients import gain_statistics, row_norms

CHEAP_MEASURES = ("rho", "token_cosine", "g_mean", "g_ctr", "q_grad", "k_grad")
ALL_MEASURES = ("mu_eff", "retention", "row_diversity", "var_gain", "tr_ratio", *CHEAP_MEASURES)
"""Measures of a block at every step, and in a full measurement: prefixes of their columns' names."""


def spread_evenly(depth: int, count: int) -> list[int]:
    """At most `count` of `depth` block numbers, the first and the last among them."""
    count = min(depth, count)
    return sorted({round(i * (depth - 1) / max(1, count - 1)) for i in range(count)})


def watched_blocks(depth: int, count: int) -> list[int]:
    """At most `count` blocks of the deeper half, spread evenly: the collapse shows there first, and stays."""
    count = min(depth, count)
    return sorted({math.ceil(depth * (0.5 + 0.5 * (i + 1) / (count + 1))) - 1 for i in range(count)})


@dataclass
class StepRow:
    """What is known about a step before the optimiser takes it; the same on all ranks.

    Attributes:
        step: optimiser steps done before this one.
        loss: mean over micro-batches and processes.
        grad_norm: norm of the whole gradient before clipping.
        measures: by column of `trace.csv`, over the watched blocks; filled in by the probe.
        by_depth: by block and column of `depth.csv`; filled in by the probe in a full measurement.
        events: filled in by the detector.
    """

    step: int
    loss: float
    grad_norm: float
    measures: dict[str, float] = field(default_factory=dict)
    by_depth: dict[int, dict[str, float]] = field(default_factory=dict)
    events: Sequence[Event] = ()

    @property
    def values(self) -> dict[str, float]:
        """Values by column of `trace.csv`, which the detector also reads."""
        return {"loss": self.loss, "grad_norm": self.grad_norm} | self.measures


class StabilityProbe:
    """Measures a network's blocks, as far as the network supports it (`stability.taps.Watchable`).

    At every step, over a few deep blocks: ρ, token cosine, G_mean, G_ctr, Q and K gradients. In a full measurement
    everything else too, by depth.

    Args:
        every: optimiser steps between two full measurements; 0 makes none.
        blocks: number of blocks in a full measurement, spread evenly over the depth. For each block measured in a step,
            its two writers' gradients are kept twice in float32: 33 MB at width 1024.
        watched: number of blocks of the deeper half that are measured at every step.
        attention_samples: samples of a micro-batch whose attention matrices are measured.
    """

    def __init__(
        self,
        every: NonNegativeInt = 100,
        blocks: PositiveInt = 25,
        watched: PositiveInt = 3,
        attention_samples: PositiveInt = 2,
    ) -> None:
        self.every, self.attention_samples = every, attention_samples
        self.num_blocks, self.num_watched = blocks, watched
        self.missing: str | None = None
        """One line about the measures that the network does not support, after the first measurement."""

    def start(self, network: Any) -> None:
        """Choose the blocks. The training begins."""
        self._taps = Taps(network, self.attention_samples)
        depth = len(self._taps.blocks)
        self.watched, self.blocks = watched_blocks(depth, self.num_watched), spread_evenly(depth, self.num_blocks)
        self._attached = self._full = self._checked = False

    def is_full(self, step: int, max_steps: int) -> bool:
        """Whether everything is measured at this step."""
        return self.every > 0 and (step % self.every == 0 or step == max_steps - 1)

    def attach(self, full: bool) -> None:
        """Call before the forward pass of each micro-batch; the first one of a step decides what is measured."""
        if not self._attached:
            self._attached, self._full = True, full
            self._taps.attach(self.watched, self.blocks if full else ())

    def measure(self, row: StepRow, module: nn.Module) -> None:
        """Add the step's measures to the row, after its last backward pass. A collective call.

        Args:
            module: has the parameters of the network, as its attribute `network`.
        """
        self._taps.detach()
        self._attached = False
        table = self._taps.read()
        self._taps.writers.clear()  # the optimiser step needs their memory
        for (block, name), norm in self._query_key_norms(module).items():
            table.setdefault(block, {})[name] = norm
        row.measures = combine([table.get(block, {}) for block in self.watched])
        if not self._checked:
            self._checked, self.missing = True, self._describe_missing(module.network, table)
        if self._full:
            row.by_depth = {block: table[block] for block in self.blocks if block in table}
            self._add_gains(row.by_depth, module)

    def _describe_missing(self, network: Any, table: dict[int, dict[str, float]]) -> str | None:
        found = {name for values in table.values() for name in values}
        expected = ALL_MEASURES if self._full else CHEAP_MEASURES
        missing = [name for name in expected if not any(f.startswith(name) for f in found)]
        if "mu_eff" in missing and "retention" in found:
            missing[missing.index("mu_eff")] += f" (more than {MOST_TOKENS} tokens)"
        if not self._taps.blocks:
            return f"{kind_of(network)} has no blocks: only loss and gradient norm are measured"
        return f"not measured in {kind_of(network)}: {', '.join(missing)}" if missing else None

    def _query_key_norms(self, module: nn.Module) -> dict[tuple[int, str], float]:
        rows: dict[tuple[int, str], tuple[Any, int, int]] = {}
        for number, qkv in self._taps.matrices.items():
            third = qkv.out_features // 3  # of its rows: queries, keys, values
            rows[number, "q_grad"] = (qkv.weight, 0, third)
            rows[number, "k_grad"] = (qkv.weight, third, 2 * third)
        return row_norms(module, rows)

    def _add_gains(self, by_depth: dict[int, dict[str, float]], module: nn.Module) -> None:
        groups: dict[tuple[int, str], list[nn.Parameter]] = {}
        for block in by_depth:
            for name, parameter in self._taps.blocks[block].named_parameters():
                gain = name.rpartition(".")[2]
                if gain in ("alpha", "beta"):
                    groups.setdefault((block, gain), []).append(parameter)
        for (block, gain), (mean, largest) in (gain_statistics(module, groups) if groups else {}).items():
            by_depth[block] |= {f"{gain}_mean": mean, f"{gain}_max": largest}


def combine(blocks: list[dict[str, float]]) -> dict[str, float]:
    """The watched blocks as one: root-sum-squares of gradients over blocks and writers, means of the other measures.

    Measures that no block has are left out.
    """
    found = {}
    for name in ("g_mean", "g_ctr", "q_grad", "k_grad", "rho", "token_cosine"):
        columns = (name, f"{name}_attention", f"{name}_ffn")
        values = [block[column] for block in blocks for column in columns if column in block]
        if values:
            found[name] = sum(values) / len(values) if name in ("rho", "token_cosine") else math.hypot(*values)
    return found
