"""Quantities of `depth.csv`: how each is computed from the table, and how it is drawn."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from mvsplit.stability.tables import Table


@dataclass(frozen=True)
class Quantity:
    """One quantity of `depth.csv`: how it is computed from the table, and how it is drawn."""

    name: str
    title: str
    label: str
    log: bool
    of: Callable[[Table], np.ndarray]
    reading: str


def column(table: Table, name: str) -> np.ndarray:
    return table.get(name, np.full(len(table["step"]), np.nan))


def _both_writers(table: Table, name: str) -> np.ndarray:
    """Root sum of squares over the attention's and the FFN's writer; NaN where neither is measured."""
    parts = np.stack([column(table, f"{name}_{writer}") for writer in ("attention", "ffn")])
    return np.where(np.isfinite(parts).any(axis=0), np.sqrt(np.nansum(parts**2, axis=0)), np.nan)


def g_ratio(table: Table) -> np.ndarray:
    """G_mean/G_ctr over both writers of a block."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return _both_writers(table, "g_mean") / _both_writers(table, "g_ctr")


DEPTH = (
    Quantity("rho", "Mean over centred energy", "ρ = ‖JX‖ / ‖PX‖", True, lambda t: column(t, "rho"),
             "Where ρ is high, all tokens of a sample are close to their mean. A collapse shows as a change of colour"
             " from one step on."),
    Quantity("token_cosine", "Token cosine similarity", "mean cosine of two tokens", False,
             lambda t: column(t, "token_cosine"), "At 1 a block's tokens all point the same way."),
    Quantity("g_ratio", "Writer gradients, G_mean over G_ctr", "G_mean / G_ctr", True, g_ratio,
             "Above 1, what all tokens share outweighs what they differ in, in the gradient of W_O and W_2 (eq. 5)."),
    Quantity("q_grad", "Gradient of the query projections", "‖∂L/∂W_Q‖", True, lambda t: column(t, "q_grad"),
             "Dark from some step on: attention no longer learns."),
)  # fmt: skip


def grid(table: Table, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, blocks, and the values as `(steps, blocks)`; NaN where there is no row."""
    steps, row = np.unique(table["step"], return_inverse=True)
    blocks, place = np.unique(table["block"], return_inverse=True)
    out = np.full((len(steps), len(blocks)), np.nan)
    out[row, place] = values
    return steps, blocks, out


def mean(values: Iterable[float], geometric: bool = False) -> float:
    """Mean of the finite values (for a geometric mean also positive); NaN if there are none."""
    array = np.asarray(list(values), dtype=float)
    array = array[np.isfinite(array) & ((array > 0) | (not geometric))]
    if not len(array):
        return math.nan
    return float(np.exp(np.log(array).mean())) if geometric else float(array.mean())
