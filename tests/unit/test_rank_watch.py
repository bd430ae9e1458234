"""What the watch over the ranks prepares before they are connected."""

import os
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest

from mvsplit.callbacks.rank_watch import NCCL_PATIENCE


class ConnectedError(Exception):
    """Raised instead of making the process group."""


@pytest.mark.parametrize(
    ("timeout_s", "own", "sleep_s"), [(45, None, 150), (600, None, 1260), (1e12, None, 2**31 / 1000), (45, "7", 0.028)]
)
def test_nccl_does_not_abort_a_process_before_the_watch_ends_it(
    train_here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, timeout_s: float, own: str | None, sleep_s: float
) -> None:
    seen: list[str | None] = []

    def connect(*_: Any, **__: Any) -> None:
        seen.append(os.environ.get(NCCL_PATIENCE))
        raise ConnectedError

    monkeypatch.setattr("lightning.pytorch.strategies.ddp._init_dist_connection", connect)
    monkeypatch.delenv(NCCL_PATIENCE, raising=False)
    if own is not None:
        monkeypatch.setenv(NCCL_PATIENCE, own)
    with patch.dict(os.environ), pytest.raises(ConnectedError):  # Lightning leaves its own variables behind
        train_here("trainer=ddp_sim", "trainer.devices=1", f"callbacks.rank_watch.timeout_s={timeout_s}")
    assert [4 * int(value or 15_000) / 1000 for value in seen] == pytest.approx([sleep_s])
    assert 4 * int(seen[0] or 0) < 2**31
    assert os.environ.get(NCCL_PATIENCE) == own
