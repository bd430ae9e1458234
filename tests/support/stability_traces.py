"""Synthetic traces of the detector's statistics, modelled on the paper's numbers: healthy, disturbed and dead runs."""

import math
from typing import Any

import numpy as np

Trace = dict[str, np.ndarray]


def _noise(rng: np.random.Generator, size: int, sigma: float, memory: float = 0.0) -> np.ndarray:
    """Lognormal factors around 1, with some memory from row to row."""
    white = rng.normal(size=size)
    if memory:
        for i in range(1, size):
            white[i] = memory * white[i - 1] + math.sqrt(1 - memory**2) * white[i]
    return np.exp(sigma * white)


def healthy(seed: int, steps: int = 2000, **how: Any) -> Trace:
    """A healthy run.

    Keys of `how`: initial, final, speed of the loss; loss_noise, gradient_noise, ratio_noise; gradient (first, last);
    ratio; warmup: steps in which everything but the loss grows from zero; rho (first, last); wander: of the cosine.
    """
    h = {"initial": 1.6, "final": 0.55, "speed": 200.0, "loss_noise": 0.04, "gradient_noise": 0.25, "ratio_noise": 0.3,
         "gradient": (1.8, 0.5), "ratio": 0.4, "warmup": 30, "rho": (0.35, 0.65), "wander": 0.15} | how  # fmt: skip
    rng = np.random.default_rng(seed)
    s = np.arange(steps, dtype=float)
    grown = 1 - np.exp(-s / h["speed"])
    loss = (h["initial"] + (h["final"] - h["initial"]) * grown) * _noise(rng, steps, h["loss_noise"])
    first, last = h["gradient"]
    grad_norm = first * (last / first) ** grown * _noise(rng, steps, h["gradient_noise"], 0.3)
    ramp = np.minimum(1.0, (s / h["warmup"]) ** 2)  # zero-initialised writers
    size = ramp * grad_norm * _noise(rng, steps, 0.3)
    ratio = h["ratio"] * np.minimum(1.0, 0.05 + s / h["warmup"]) * _noise(rng, steps, h["ratio_noise"], 0.5)
    rho = (h["rho"][0] + (h["rho"][1] - h["rho"][0]) * s / steps) * _noise(rng, steps, h["wander"], 0.9)
    return {
        "step": s,
        "loss": loss,
        "grad_norm": grad_norm,
        "g_mean": 0.05 * size * ratio,
        "g_ctr": 0.05 * size,
        "q_grad": 0.01 * ramp * size * _noise(rng, steps, 0.3),
        "rho": rho,
        "token_cosine": rho**2 / (1 + rho**2),
    }


def collapse(trace: Trace, at: int, seed: int = 0, stir: bool = True) -> Trace:
    """The paper's collapse at this row: the gradient norm rises 30 rows before; the network is dead 7 rows later."""
    t = {name: values.copy() for name, values in trace.items()}
    rng = np.random.default_rng(seed + 1000)
    n = len(t["step"])
    initial = np.median(t["loss"][:5])
    if stir:
        t["grad_norm"][at - 30 : at] *= rng.uniform(2, 3, size=30)
    for i in range(at, n):
        k = i - at
        back = min(1.0, k / 7)
        t["loss"][i] = t["loss"][i] * (1 - back) + back * initial * np.exp(0.04 * rng.normal())
        t["grad_norm"][i] *= 18 if k == 0 else max(1.0, 9 / k)
        t["g_mean"][i] *= max(0.1, 156 * 0.5**k)
        t["g_ctr"][i] *= 0.5 if k == 0 else max(1e-6, 0.5 * 0.2**k)
        t["q_grad"][i] *= 6 if k == 0 else max(1e-6, 10.0 ** (-2 * k))
        t["rho"][i] = min(2000.0, 0.65 * 9 ** (k / 10) * 3.0 ** min(max(k - 10, 0), 20))
        t["token_cosine"][i] = t["rho"][i] ** 2 / (1 + t["rho"][i] ** 2)
    return t


def spike(trace: Trace, at: int, times: float = 15, rows: int = 3) -> Trace:
    """A benign spike: of the gradient norm and both its parts, slightly of the loss, not of the ratio."""
    t = {name: values.copy() for name, values in trace.items()}
    for k in range(rows):
        for name in ("grad_norm", "g_mean", "g_ctr", "q_grad"):
            t[name][at + k] *= 1 + (times - 1) * 0.4**k
        t["loss"][at + k] *= 1.05
    return t


def transient(trace: Trace, at: int, rows: int, loss: float = 1.4, gradient: float = 4.0) -> Trace:
    """The transient after a resume: loss and gradients rise, then return."""
    t = {name: values.copy() for name, values in trace.items()}
    fade = np.exp(-3 * np.arange(rows) / rows)
    for name in ("grad_norm", "g_mean", "g_ctr", "q_grad"):
        t[name][at : at + rows] *= 1 + (gradient - 1) * fade
    t["loss"][at : at + rows] *= 1 + (loss - 1) * fade
    return t


def dead(seed: int, steps: int = 200, first_step: int = 0) -> Trace:
    """A run that is dead from its first row, with gradients of normal size."""
    rng = np.random.default_rng(seed)
    grad_norm = 0.5 * _noise(rng, steps, 0.3)
    return {
        "step": first_step + np.arange(steps, dtype=float),
        "loss": 1.57 * _noise(rng, steps, 0.04),
        "grad_norm": grad_norm,
        "g_mean": 0.005 * grad_norm,
        "g_ctr": 1e-8 * grad_norm,
        "q_grad": 1e-9 * grad_norm * _noise(rng, steps, 0.5),
        "rho": 2000 * _noise(rng, steps, 0.2),
        "token_cosine": np.full(steps, 1.0),
    }


def rows(
    trace: Trace, every: int = 1, only: tuple[str, ...] | None = None
) -> list[tuple[int, dict[str, float | None]]]:
    """The rows that a detector observes."""
    names = [name for name in trace if name != "step" and (only is None or name in only)]
    return [
        (int(step), {name: float(trace[name][i]) for name in names})
        for i, step in enumerate(trace["step"])
        if step % every == 0
    ]


CHARACTERS: dict[str, dict[str, Any]] = {
    "laptop": {},
    "low contrast": {"initial": 1.6, "final": 1.15, "loss_noise": 0.06},
    "paper scale": {"initial": 1.0, "final": 0.5, "speed": 400.0, "loss_noise": 0.015, "gradient": (0.6, 0.15),
                    "ratio": 0.1, "warmup": 200},
    "small batch": {"loss_noise": 0.15, "gradient_noise": 0.6, "ratio_noise": 0.6},
    "gradient grows": {"gradient": (0.3, 6.0), "warmup": 300},
    "alive, unsteady": {"rho": (0.6, 1.5), "wander": 0.35, "speed": 600.0, "gradient_noise": 0.4},
    "converged early": {"final": 0.2, "speed": 40.0},
    "slow start": {"speed": 1500.0, "warmup": 100},
}  # fmt: skip
