"""Section `faults`: runs that are killed, stopped, moved to another strategy, or go wrong by themselves."""

import json
import os
import signal
from functools import partial
from pathlib import Path

from mvsplit.benchmarks.gpu.cases import Bench, Case, Outcome
from mvsplit.benchmarks.gpu.commands import CaseError, Run, apart, states_apart
from mvsplit.training.folder import Saved

STEPS, HALF, SAVE_EVERY = 40, 20, 4
SPOILED, SKIPPED, BACK = 6, 3, 8
"""Steps at which a gradient is spoiled, a step is skipped, the guard rolls back."""
SHORT = [
    f"trainer.max_steps={STEPS}", "trainer.val_check_interval=100000", "optim.warmup_steps=5",
    f"callbacks.last.every_n_steps={SAVE_EVERY}", f"callbacks.every.every_n_train_steps={HALF}",
    "callbacks.best=null", "callbacks.sample_grid=null",
]  # fmt: skip
ENDLESS = [*SHORT, "trainer.max_steps=1000000", "callbacks.every=null"]
CALLBACKS = "mvsplit.benchmarks.gpu.callbacks"
FORGED = [
    f"callbacks.stability._target_={CALLBACKS}.Forged", f"+callbacks.stability.skip={SKIPPED}",
    f"+callbacks.stability.back={BACK}", "callbacks.guard.action=skip", "callbacks.guard.snapshot_every=2",
    "callbacks.guard.margin=2",
]  # fmt: skip
SPOIL = [f"+callbacks.spoil._target_={CALLBACKS}.Spoil", f"+callbacks.spoil.step={SPOILED}"]


def cases(bench: Bench) -> list[Case]:
    kinds = {"undisturbed": whole, "kill": kill, "signals": signals, "elsewhere": elsewhere, "guard": guard, "nan": nan}
    names = bench.of("faults")
    return [Case("faults", f"{name}/{kind}", partial(run, name=name)) for name in names for kind, run in kinds.items()]


def whole(bench: Bench, place: Path, name: str) -> Outcome:
    """What the others are compared with."""
    job = bench.train(place, [*SHORT, *bench.of("faults")[name]]).succeed()
    return Outcome({"saved": Saved(job.checkpoint()).verify().step == STEPS}, {"test_loss": job.test_loss()})


def undisturbed(bench: Bench, name: str) -> Run:
    """That run."""
    return bench.run_of("faults", f"{name}/undisturbed", [*SHORT, *bench.of("faults")[name]])


def kill(bench: Bench, place: Path, name: str) -> Outcome:
    """Killed with SIGKILL and gone on with `ckpt_path=last`: it ends as if nothing had been."""
    calm = undisturbed(bench, name)
    overrides = [*SHORT, *bench.of("faults")[name]]
    job = bench.train(place, overrides, "killed")
    job.until(lambda: job.saved_step() >= 2 * SAVE_EVERY, "the second save")
    job.send(signal.SIGKILL)
    job.wait()
    at = job.saved_step()
    resumed = bench.train(place, [*overrides, "ckpt_path=last"], "resumed").succeed()
    distances = states_apart(Saved(resumed.checkpoint()), Saved(calm.checkpoint()))
    figures = {"killed_after": at, "loss_apart": apart(resumed.test_loss(), calm.test_loss())}
    checks = {
        "others_ended": not job.left,
        "went_on": f"going on from step {at} " in resumed.text,
        "loss_agrees": figures["loss_apart"] <= bench.config["loss_tolerance"],
    }
    for kind, distance in distances.items():
        figures[f"{kind}_apart"] = distance
        checks[f"{kind}_agree"] = distance <= bench.config["state_tolerance"]
    return Outcome(checks, figures)


def signals(bench: Bench, place: Path, name: str) -> Outcome:
    """SIGUSR1 to a reading process changes nothing; to the first process, it saves and exits with 138."""
    job = bench.train(place, [*ENDLESS, *bench.of("faults")[name], "data.num_workers=2"])
    job.until(lambda: job.saved_step() >= SAVE_EVERY, "the first save")
    readers = job.readers()
    if not readers:
        raise CaseError("no reading process was found")
    for reader in readers:
        os.kill(reader, signal.SIGUSR1)
    seen = job.saved_step()
    job.until(lambda: job.saved_step() >= seen + 2 * SAVE_EVERY, "two more saves, after SIGUSR1 to reading processes")
    alive = set(readers) <= set(job.family())
    job.send(signal.SIGUSR1)
    status = job.wait()
    step = job.saved_step()
    checks = {
        "readers_live": alive,
        "exit_138": status == 128 + signal.SIGUSR1,
        "saved": f"SIGUSR1: saving step {step} " in job.text and Saved(job.checkpoint()).verify().step == step,
        "others_ended": not job.left,
    }
    return Outcome(checks, {"readers": len(readers), "stopped_at": step, "exit": status})


def elsewhere(bench: Bench, place: Path, name: str) -> Outcome:
    """The second half of the run under the next strategy, and on the CPU: it ends at about the same loss."""
    calm = undisturbed(bench, name)
    others: dict[str, list[str]] = dict(bench.of("faults"))
    names = list(others)
    targets = {names[(names.index(name) + 1) % len(names)]}
    if bench.kind == "cuda":
        others |= {"cpu": ["trainer=cpu"]}
        targets.add("cpu")
    checks, figures = {}, {}
    for target in sorted(targets - {name}):
        overrides = [*SHORT, *others[target], f"ckpt_path={calm.checkpoint(HALF)}"]
        job = bench.train(place / target, overrides, target).succeed()
        figures[f"{target}_apart"] = apart(job.test_loss(), calm.test_loss())
        checks[f"{target}_went_on"] = f"going on from step {HALF} " in job.text
        checks[f"{target}_agrees"] = figures[f"{target}_apart"] <= bench.config["loss_tolerance"]
    return Outcome(checks, figures)


def guard(bench: Bench, place: Path, name: str) -> Outcome:
    """The guard, given the statistics of a collapse: it skips a step, later it rolls back."""
    job = bench.train(place, [*SHORT, *bench.of("faults")[name], *FORGED], changed=True).succeed()
    decisions = [json.loads(line) for line in (place / "stability" / "guard.jsonl").read_text().splitlines()]
    acted = [(d["step"], d["action"]) for d in decisions if d["action"] != "none"]
    checks = {"decisions": acted == [(SKIPPED, "skip"), (BACK, "rollback")], "went_on": job.saved_step() == STEPS}
    back_to = next((d["back_to"] for d in decisions if d["action"] == "rollback"), None)
    for file in sorted(place.glob("forged_rank_*.json")):
        sums, rank = json.loads(file.read_text()), file.stem.rpartition("_")[2]
        before, after = sums["before"], sums["after"]
        checks[f"rank_{rank}_skipped"] = before[str(SKIPPED)] == after[str(SKIPPED)]
        checks[f"rank_{rank}_back"] = back_to is not None and before[str(back_to)] == after[str(BACK)]
        checks[f"rank_{rank}_steps_otherwise"] = before["1"] != after["1"] and before[str(BACK)] != after[str(BACK)]
    return Outcome(checks, {"back_to": back_to, "test_loss": job.test_loss()})


def nan(bench: Bench, place: Path, name: str) -> Outcome:
    """A NaN in the gradient: the run ends with one line before the step, and what was saved is untouched."""
    job = bench.train(place, [*SHORT, *bench.of("faults")[name], *SPOIL], changed=True)
    status = job.wait()
    errors = [line for line in job.text.splitlines() if line.startswith("error: ")]
    checks = {
        "exit_2": status == 2,
        "one_line": len(errors) == 1 and f"not finite at step {SPOILED} " in errors[0],
        "no_traceback": "Traceback" not in job.text,
        "saved_before": job.saved_step() == SPOILED // SAVE_EVERY * SAVE_EVERY,
        "others_ended": not job.left,
    }
    return Outcome(checks, {"exit": status}, "" if all(checks.values()) else job.last_line())
