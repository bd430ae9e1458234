"""The thresholds of the collapse detector: defined here, and nowhere else. A config overrides them.

`×` means: relative to the running median of the healthy network.
"""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le
from pydantic import PositiveFloat, PositiveInt

MIN_ROWS = 20
Share = Annotated[float, Gt(0), Le(1)]


@dataclass(frozen=True)
class Thresholds:
    """Limits that the detector compares with; each is explained beside it."""

    window: Annotated[int, Ge(MIN_ROWS)] = 100  # healthy rows that a running median is taken over
    # A spike must also stand out from the median of this many last rows: early in training gradients grow by orders of
    # magnitude, and the long median follows too late.
    recent: PositiveInt = 16
    min_rows: PositiveInt = MIN_ROWS  # rows needed before a value is compared with a median
    min_rows_sparse: PositiveInt = 8  # the same where rows are ten steps or more apart
    noise: PositiveFloat = 4.0  # robust standard deviations (of the logarithm, or of the loss) needed as well
    spike: PositiveFloat = 5.0  # × gradient norm: a spike
    spike_end: PositiveFloat = 2.5  # × gradient norm below which the spike is over
    spike_rows: PositiveInt = 40  # rows after which a gradient norm that stays high is the new normal
    ratio: PositiveFloat = 5.0  # × G_mean / G_ctr: an onset, together with a spike
    # In a collapse the mean-coherent part takes over: a G_mean / G_ctr below this is not one, whatever it was before.
    ratio_floor: PositiveFloat = 0.5
    ratio_alone: PositiveFloat = 20.0  # × G_mean / G_ctr: an onset without a spike, if G_mean is × 10 as well
    ratio_still: PositiveFloat = 3.0  # × G_mean / G_ctr below which it has not moved: the loss alone is no onset then
    cosine_onset: Share = 0.95  # token cosine: an onset, if its median was `cosine_step` lower; 1: all tokens are alike
    cosine_step: Share = 0.1
    cosine_dead: Share = 0.99  # token cosine, sustained: a dead network
    rho_onset: PositiveFloat = 5.0  # ρ: an onset, if it is also × 4 (cosine ≈ ρ² / (1 + ρ²))
    rho_dead: PositiveFloat = 10.0  # ρ, sustained: a dead network, where there is no cosine
    q_onset: PositiveFloat = 1e-2  # × Q gradient: an onset
    q_dead: PositiveFloat = 1e-3  # × Q gradient, sustained: a dead network
    q_share: PositiveFloat = 1e-6  # Q gradient / gradient norm of a dead network, where no healthy median is known
    ratio_dead: PositiveFloat = 100.0  # G_mean / G_ctr, sustained: a dead network
    loss_rise: PositiveFloat = 0.7  # share of the way back to the initial loss: an onset, if the loss is also × 1.2
    loss_dead: PositiveFloat = 0.65  # the same share, from the lowest median, sustained and flat: a dead network
    # × gradient norm over `recent` rows, with the loss unmoved, after which a spike is an onset, where only loss and
    # gradient norm are known. In the paper it rises 30 steps before; before benign spikes it does not.
    stir: PositiveFloat = 1.7
    patience: PositiveInt = 12  # steps for which a network must look dead
    patience_rows: PositiveInt = 3  # rows, at least, where they are further apart
    doubt: PositiveInt = 5  # factor on the patience if only the loss looks dead (and 2 × `patience_rows` rows)
    recovery: PositiveInt = 20  # steps in the healthy range after which it has recovered, and 2 × `patience_rows` rows
    # Steps after a jump in the step count in which loss and gradient norm alone are not an onset: a resumed run has a
    # transient.
    grace: PositiveInt = 60
