"""Section `two_processes`: two processes share one device and talk over gloo, as if each were a machine.

NCCL refuses two processes on one GPU, and Lightning to count a GPU twice. Two machines of one device each it believes.
"""

import signal
import socket
import time
from functools import partial
from pathlib import Path

from mvsplit.benchmarks.gpu.cases import Bench, Case, Outcome, SkipError
from mvsplit.benchmarks.gpu.commands import CaseError, Command, apart
from mvsplit.benchmarks.gpu.faults import ENDLESS, SAVE_EVERY
from mvsplit.benchmarks.gpu.strategies import reference
from mvsplit.utils.rank_lines import LOST

WITHIN_S = 90.0
"""How soon after a kill the other process must have ended: `callbacks.rank_watch.timeout_s` twice."""
MACHINES = ["trainer.num_nodes=2", "trainer.devices=1"]
MISSING = ("gloo", "not supported", "not implemented", "NotImplementedError", "no backend")
"""What the error of an operation says that gloo does not have."""


def cases(bench: Bench) -> list[Case]:
    names = bench.of("two_processes")
    both = [Case("two_processes", name, partial(train, name=name)) for name in names]
    return both + [Case("two_processes", f"{name}/kill", partial(kill, name=name)) for name in names]


def _start(bench: Bench, place: Path, overrides: list[str]) -> list[Command]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # As torchrun starts them on two machines.
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "bench", "MVSPLIT_GLOO": "1"}
    env |= {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    command = [*overrides, *MACHINES]
    return [bench.train(place, command, f"rank_{r}", True, RANK=str(r), GROUP_RANK=str(r), **env) for r in range(2)]


def _explain(bench: Bench, ranks: list[Command], error: CaseError) -> Exception:
    """A lack of gloo is no failure of ours; on CPUs it lacks nothing."""
    for rank in ranks:
        rank.end()
    told = next((line for rank in ranks for line in rank.text.splitlines() if any(w in line for w in MISSING)), None)
    return SkipError(f"as far as gloo goes: {told}") if told and bench.kind == "cuda" else error


def train(bench: Bench, place: Path, name: str) -> Outcome:
    """They train to the loss of one process."""
    ranks = _start(bench, place, bench.of("two_processes")[name])
    try:
        for rank in ranks:
            rank.succeed()
    except CaseError as error:
        raise _explain(bench, ranks, error) from None
    loss = ranks[0].test_loss()
    figures = {"test_loss": loss, "apart": apart(loss, reference(bench).test_loss())}
    return Outcome({"loss_agrees": figures["apart"] <= bench.config["loss_tolerance"]}, figures)


def kill(bench: Bench, place: Path, name: str) -> Outcome:
    """One is killed: the other ends by itself, and says who is missing."""
    ranks = _start(bench, place, [*ENDLESS, *bench.of("two_processes")[name]])
    first, second = ranks
    try:
        first.until(lambda: first.saved_step() >= SAVE_EVERY or second.ended, "the first save")
        if second.ended:
            second.succeed()
            raise CaseError("rank_1 ended before the first save")
    except CaseError as error:
        raise _explain(bench, ranks, error) from None
    began = time.monotonic()
    second.send(signal.SIGKILL)
    status = first.wait()
    figures = {"seconds": time.monotonic() - began, "exit": status}
    told = any("rank 1 (" in line for line in first.text.splitlines())
    checks = {"ended": status == LOST, "told": told, "soon": figures["seconds"] <= WITHIN_S}
    return Outcome(checks, figures, "" if all(checks.values()) else first.last_line())
