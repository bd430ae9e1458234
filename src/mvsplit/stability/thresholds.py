"""What the guard judges by: every number in one place."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Thresholds:
    """What is judged how. "×" means: relative to the running median.

    Args:
        window: healthy rows that a running median is taken over.
        recent: a spike has to stand out of the median of the last so many rows too: at the start of a training
            gradients grow by orders of magnitude, which the long median follows too late.
        min_rows: rows before anything is called relative to a median (fewer, `min_rows_sparse`, where rows are ten
            steps or more apart).
        noise: how many robust standard deviations (of the logarithm, or of the loss) a value must be away as well.
        spike: × gradient norm that is a spike. spike_end: × under which it is over. spike_rows: rows after which a
            gradient norm that stays up is the new normal.
        ratio, ratio_floor: × of G_mean / G_ctr, and its value, that together with a spike is an onset: a collapse is
            where the mean-coherent part takes over, so a ratio far below 1 is none whatever it was before.
        ratio_alone: × of G_mean / G_ctr that needs no spike of the gradient norm, if G_mean itself is × 10 as well.
        ratio_still: × under which the ratio has not moved: the loss alone is no onset then.
        cosine_onset, cosine_dead: token cosine that is an onset, of a network whose median was `cosine_step` lower; and
            that, sustained, is a dead network. Absolute: 1 means that all tokens are the same.
        rho_onset, rho_dead: the same of rho (cosine ≈ ρ² / (1 + ρ²)); the onset's has to be × 4 its median too; death
            is read from it only where there is no cosine.
        q_onset, q_dead: × of the Q gradient that is an onset, or, sustained, a dead network.
        q_share: Q gradient / gradient norm that is a dead network, where no healthy median is known.
        ratio_dead: G_mean / G_ctr that, sustained, is a dead network.
        loss_rise: share of the way from the running median back to the initial loss that is an onset, if the loss is
            1.2 × its median as well. loss_dead: the share (from the lowest median) that, sustained and flat, is a dead
            network.
        stir: × gradient norm, sustained over `recent` rows with the loss unmoved, after which a spike is an onset
            where only loss and gradient norm are known: the paper's stirs 30 steps before, benign spikes do not.
        patience: steps for which a dead network has to look dead, and rows if they are further apart (at least
            `patience_rows`). doubt: how many times longer if only the loss says so and the rest looks healthy (and at
            least 2 × `patience_rows` rows).
        recovery: steps in the healthy range, and at least 2 × `patience_rows` rows, after which it has recovered.
        grace: steps after a jump in the step count in which loss and gradient norm alone are no onset: the transient
            of a resumed run.
    """

    window: int = 100
    recent: int = 16
    min_rows: int = 20
    min_rows_sparse: int = 8
    noise: float = 4.0
    spike: float = 5.0
    spike_end: float = 2.5
    spike_rows: int = 40
    ratio: float = 5.0
    ratio_floor: float = 0.5
    ratio_alone: float = 20.0
    ratio_still: float = 3.0
    cosine_onset: float = 0.95
    cosine_step: float = 0.1
    cosine_dead: float = 0.99
    rho_onset: float = 5.0
    rho_dead: float = 10.0
    q_onset: float = 1e-2
    q_dead: float = 1e-3
    q_share: float = 1e-6
    ratio_dead: float = 100.0
    loss_rise: float = 0.7
    loss_dead: float = 0.65
    stir: float = 1.7
    patience: int = 12
    patience_rows: int = 3
    doubt: int = 5
    recovery: int = 20
    grace: int = 60
