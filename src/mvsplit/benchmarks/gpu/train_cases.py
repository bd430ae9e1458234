"""Sections `strategies`, `faults`, `scripts` and `two_processes`: real training runs, and what is done with them."""

import json
import math
import os
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mvsplit.benchmarks.common import override
from mvsplit.benchmarks.gpu import overrides as o
from mvsplit.benchmarks.gpu.cases import Bench, CaseError, Command, Outcome, Run, SkipError, TrainedRun, apart, compare
from mvsplit.training.checkpoint_format import Saved
from mvsplit.utils.heartbeat import LOST

STATE_TOLERANCE = {"cpu": 0.0, "cuda": 0.02}
"""Tolerance for weights, optimiser and averages of a resumed run: a GPU's kernels may sum in another order."""
WITHIN_S = 90.0
"""How soon after a kill the other process must have ended: twice `callbacks.rank_watch.timeout_s`."""
MISSING = ("gloo", "not supported", "not implemented", "NotImplementedError", "no backend")
"""Parts of the error of an operation that gloo lacks."""


def strategies(bench: Bench) -> dict[str, Run]:
    """Default callbacks and the final test, in every way of using a device: the losses agree with the first."""
    return {name: partial(train, name=name) for name in bench.of("strategies")}


def train(bench: Bench, place: Path, name: str) -> Outcome:
    job = bench.train(place, bench.of("strategies")[name]).succeed()
    first = job if name == next(iter(bench.of("strategies"))) else _reference(bench)
    found = compare(job.test_loss(), first.test_loss())
    found.figures["steps_per_s"] = job.metric("time/steps_per_s")
    if bench.kind == "cuda":
        found.figures["device_peak_gib"] = job.metric("memory/device_peak_gib")
        found.checks["device_peak_is_logged"] = found.figures["device_peak_gib"] > 0
    return found


def _reference(bench: Bench) -> TrainedRun:
    name, overrides = next(iter(bench.of("strategies").items()))
    return bench.run_of(f"strategies/{name}", overrides)


def scripts(bench: Bench) -> dict[str, Run]:
    """The scripts that use the reference run's checkpoint, and sharded training on CPU processes on any machine."""
    return {"eval": evaluate, "sample": sample, "convert": convert, "rehearsal": rehearsal}


def evaluate(bench: Bench, place: Path) -> Outcome:
    """The loss is that of the run's own test."""
    return compare(_val_loss(bench, place, _reference(bench).checkpoint()), _reference(bench).test_loss())


def _val_loss(bench: Bench, folder: Path, checkpoint: Path) -> float:
    bench.script("eval.py", folder, [override("ckpt_path", checkpoint), "data=digits", *bench.of("scripts")])
    return float(json.loads((folder / "metrics.json").read_text())["val/loss"])


def sample(bench: Bench, place: Path) -> Outcome:
    """An image of each class is drawn."""
    bench.script("sample.py", place, [override("ckpt_path", _reference(bench).checkpoint()), "count=1"])
    return Outcome({"drawn": len(list(place.glob("*_class_*.png"))) == 10 and (place / "grid.png").is_file()})


def convert(bench: Bench, place: Path) -> Outcome:
    """The converted file has the same loss as its checkpoint."""
    checkpoint, file = _reference(bench).checkpoint(), place / "model.safetensors"
    bench.script("convert.py", place, [override("ckpt_path", checkpoint), override("output", file)])
    losses = [_val_loss(bench, place / path.suffix[1:], path) for path in (checkpoint, file)]
    return Outcome({"same": apart(*losses) <= 1e-6}, {"val_loss": losses[1], "mib": file.stat().st_size / 2**20})


def rehearsal(bench: Bench, place: Path) -> Outcome:
    job = bench.train(place, ["trainer=deepspeed", "trainer.accelerator=cpu", "trainer.devices=2"], OMP_NUM_THREADS="1")
    return compare(job.succeed().test_loss(), _reference(bench).test_loss())


def two_processes(bench: Bench) -> dict[str, Run]:
    """Two processes share one device and communicate over gloo, as if each were a machine.

    NCCL does not allow two processes on one GPU, and Lightning does not count a GPU twice; two machines with one device
    each are accepted.
    """
    return {
        name + suffix: partial(_in_two, overrides=[*given, *overrides], trial=trial)
        for suffix, given, trial in (("", [], train_two), ("/kill", o.ENDLESS, kill_one))
        for name, overrides in bench.of("two_processes").items()
    }


def _in_two(bench: Bench, place: Path, overrides: list[str], trial: Callable[..., Outcome]) -> Outcome:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # As torchrun would on two machines.
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "bench", "MVSPLIT_GLOO": "1"}
    env |= {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    line = [*overrides, *o.TWO_MACHINES]
    ranks = [bench.train(place, line, f"rank_{r}", True, RANK=str(r), GROUP_RANK=str(r), **env) for r in range(2)]
    try:
        return trial(bench, *ranks)
    except CaseError:
        for rank in ranks:
            rank.kill()
        lines = [line for rank in ranks for line in rank.text.splitlines() if any(word in line for word in MISSING)]
        if lines and bench.kind == "cuda":  # on CPUs it lacks no operation
            raise SkipError(f"not supported by gloo: {lines[0]}") from None
        raise


def train_two(bench: Bench, first: Command, second: Command) -> Outcome:
    """They reach the loss of one process."""
    first.succeed()
    second.succeed()
    return compare(first.test_loss(), _reference(bench).test_loss())


def kill_one(bench: Bench, first: Command, second: Command) -> Outcome:
    """One is killed: the other ends by itself and names the missing rank."""
    first.until(lambda: first.saved_step() >= o.SAVE_EVERY, "the first save")
    began = time.monotonic()
    second.process.kill()
    status, seconds = first.wait(), time.monotonic() - began
    checks = {"ended": status == LOST, "rank_is_named": "rank 1 (" in first.text, "soon": seconds <= WITHIN_S}
    return Outcome(checks, {"seconds": seconds, "exit": status, "output": first.last_line()})


def faults(bench: Bench) -> dict[str, Run]:
    return {
        f"{name}/{fault}": partial(trial, overrides=[*given, *overrides], name=name)
        for name, overrides in bench.of("faults").items()
        for fault, (given, trial) in FAULTS.items()
    }


def undisturbed(bench: Bench, place: Path, overrides: list[str], name: str) -> Outcome:
    """The run with which the others are compared."""
    job = bench.train(place, overrides).succeed()
    return Outcome({"saved": Saved(job.checkpoint()).verify().step == o.STEPS}, {"test_loss": job.test_loss()})


def kill(bench: Bench, place: Path, overrides: list[str], name: str) -> Outcome:
    """Killed with SIGKILL and resumed with `ckpt_path=last`, a run ends in the state of the undisturbed one."""
    calm = bench.run_of(f"faults/{name}/undisturbed", overrides)
    job = bench.train(place, overrides, "killed")
    job.until(lambda: job.saved_step() >= 2 * o.SAVE_EVERY, "the second save")
    job.process.kill()
    job.wait()
    step = job.saved_step()
    resumed = bench.train(place, [*overrides, "ckpt_path=last"], "resumed").succeed()
    found = compare(resumed.test_loss(), calm.test_loss())
    found.checks["resumed"], found.figures["killed_after"] = f" from step {step} " in resumed.text, step
    for kind in ("weights", "optimizer", "ema"):
        distance = state_apart(Saved(resumed.checkpoint()), Saved(calm.checkpoint()), kind)
        found.figures[f"{kind}_apart"] = distance
        found.checks[f"{kind}_agree"] = distance <= STATE_TOLERANCE[bench.kind]
    return found


def state_apart(a: Saved, b: Saved, kind: str) -> float:
    """The distance of two checkpoints' tensors as a share of their norm."""
    ours, theirs = a.tensors(kind), b.tensors(kind)
    if set(ours) != set(theirs):
        raise CaseError(f"the checkpoints contain different {kind}")
    pairs = [(ours.whole(name).double(), theirs.whole(name).double()) for name in ours]
    norm = math.sqrt(sum(float(y.square().sum()) for _, y in pairs))
    return math.sqrt(sum(float((x - y).square().sum()) for x, y in pairs)) / (norm or 1.0)


def signals(bench: Bench, place: Path, overrides: list[str], name: str) -> Outcome:
    """SIGUSR1 to a worker of the data loader changes nothing; the main process saves and exits with 138."""
    job = bench.train(place, overrides)
    job.until(lambda: job.saved_step() >= o.SAVE_EVERY, "the first save")
    workers = job.workers()
    for worker in workers:
        os.kill(worker, signal.SIGUSR1)
    seen = job.saved_step()
    job.until(lambda: job.saved_step() >= seen + 2 * o.SAVE_EVERY, "two more saves, after SIGUSR1 to the workers")
    alive = set(workers) <= set(job.family())
    job.process.send_signal(signal.SIGUSR1)
    status, step = job.wait(), job.saved_step()
    checks = {
        "workers_live": alive and len(workers) > 0,
        "exit_138": status == 128 + signal.SIGUSR1,
        "saved": f"SIGUSR1: saving step {step} " in job.text and Saved(job.checkpoint()).verify().step == step,
    }
    return Outcome(checks, {"workers": len(workers), "stopped_at": step, "exit": status})


def elsewhere(bench: Bench, place: Path, overrides: list[str], name: str) -> Outcome:
    """The second half of the run, under the next strategy and on the CPU, reaches about the same loss."""
    calm = bench.run_of(f"faults/{name}/undisturbed", overrides)
    others, names, found = dict(bench.of("faults")), list(bench.of("faults")), Outcome()
    targets = [names[(names.index(name) + 1) % len(names)]]
    if bench.kind == "cuda":
        others["cpu"] = ["trainer=cpu"]
        targets.append("cpu")
    for target in targets:
        line = [*o.SHORT, *others[target], override("ckpt_path", calm.checkpoint(o.HALF))]
        job = bench.train(place / target, line, target).succeed()
        same = compare(job.test_loss(), calm.test_loss())
        found.figures[f"{target}_apart"] = same.figures["apart"]
        found.checks[f"{target}_agrees"] = same.checks["loss_agrees"]
        found.checks[f"{target}_resumed"] = f" from step {o.HALF} " in job.text
    return found


def guard(bench: Bench, place: Path, overrides: list[str], name: str) -> Outcome:
    """Given the statistics of a collapse, the guard first skips a step and later rolls back."""
    job = bench.train(place, overrides, probed=True).succeed()
    lines = [json.loads(line) for line in (place / "stability" / "guard.jsonl").read_text().splitlines()]
    acted = [line for line in lines if line["action"] != "none"]
    decided = [(line["step"], line["action"]) for line in acted] == [(o.SKIPPED, "skip"), (o.BACK, "rollback")]
    checks = {"decisions": decided, "continued": job.saved_step() == o.STEPS}
    back_to, skipped, back = str(acted[-1]["back_to"]), str(o.SKIPPED), str(o.BACK)
    for file in sorted(place.glob("forged_rank_*.json")):
        sums, rank = json.loads(file.read_text()), file.stem.removeprefix("forged_")
        before, after = sums["before"], sums["after"]
        checks[f"{rank}_skipped"] = before[skipped] == after[skipped]
        checks[f"{rank}_back"] = before[back_to] == after[back]
        checks[f"{rank}_steps_otherwise"] = before["1"] != after["1"] and before[back] != after[back]
    return Outcome(checks, {"back_to": back_to, "test_loss": job.test_loss()})


def nan(bench: Bench, place: Path, overrides: list[str], name: str) -> Outcome:
    """A NaN in the gradient ends the run before the step, with one line; saved checkpoints are untouched."""
    job = bench.train(place, overrides, probed=True)
    status = job.wait()
    errors = [line for line in job.text.splitlines() if line.startswith("error: ")]
    checks = {
        "exit_2": status == 2,
        "one_line": len(errors) == 1 and f"not finite at step {o.SPOILED} " in errors[0],
        "no_traceback": "Traceback" not in job.text,
        "saved_before": job.saved_step() == o.SPOILED // o.SAVE_EVERY * o.SAVE_EVERY,
    }
    return Outcome(checks, {"exit": status, "output": job.last_line()})


FAULTS: dict[str, tuple[list[str], Callable[..., Outcome]]] = {
    "undisturbed": (o.SHORT, undisturbed),
    "kill": (o.SHORT, kill),
    "signals": ([*o.ENDLESS, "data.num_workers=2"], signals),
    "elsewhere": (o.SHORT, elsewhere),
    "guard": ([*o.SHORT, *o.FORGED], guard),
    "nan": ([*o.SHORT, *o.SPOIL], nan),
}
"""Overrides of the run, and what is done with it."""
