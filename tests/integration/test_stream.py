"""The samples trained on, one by one: interrupted, resumed on other ranks and workers, with damaged data."""

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import differences, state, weights
from data_tools import grey, latent_shards, picture, reader, shards, storage, tar_of
from servers import serve
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mvsplit.data.index import ShardIndex, read_index, write_index
from mvsplit.data.indexing import load_index
from mvsplit.data.order import StreamBatches, StreamOrder
from mvsplit.data.reader import StreamLoader, collate
from mvsplit.data.shard_set import ShardSet
from mvsplit.data.tar_scan import stamp
from mvsplit.training.checkpoint_format import Saved, Slice
from mvsplit.training.checkpoint_writer import CheckpointWriter
from mvsplit.utils.errors import UserError
from mvsplit.utils.run_dirs import last_checkpoint

from .test_commands import runs

Run = Callable[..., subprocess.CompletedProcess[str]]
Train = Callable[..., tuple[dict[str, float], dict[str, Any]]]
Keys = dict[int, str]
"""Place in the stream → the sample that was read there."""


def recorded(folders: list[Path], batch_size: int) -> Keys:
    """What all ranks recorded in these run folders; steps done twice, before and after a kill, must agree."""
    keys: Keys = {}
    for file in sorted(file for folder in folders for file in folder.glob("samples_rank_*.txt")):
        for line in file.read_text().splitlines():
            if not line.endswith("."):
                continue  # cut by a kill
            step, *pairs, _ = line.split(" ")
            for pair in pairs:
                place, _, key = pair.partition("=")
                assert int(place) // batch_size == int(step)
                assert keys.setdefault(int(place), key) == key, f"{file}: {pair}, but {keys[int(place)]} before"
    return keys


# ----------------------------------------------------------- the loader alone

G, STEPS = 8, 40  # 320 samples of a set of 75: four epochs' ends


def read_as_rank(folder: Path, out: Path, rank: int, world: int, workers: int, micro: int, first_step: int) -> None:
    """What one rank of a run does with the data, recording its keys."""
    source = reader(folder)
    batches = StreamBatches(StreamOrder(len(source), seed=7), G, micro, rank, world, STEPS, lambda: first_step)
    loader = StreamLoader(source, batch_sampler=batches, num_workers=workers, collate_fn=collate)
    out.mkdir(exist_ok=True)
    with (out / f"samples_rank_{rank}.txt").open("a") as file:
        for number, batch in enumerate(loader):
            pairs = zip(batch["position"].tolist(), batch["index"].tolist(), strict=True)
            keys = " ".join(f"{place}={source.index.key(source.storage, i)}" for place, i in pairs)
            file.write(f"{first_step + number // batches.accumulate} {keys} .\n")
            file.flush()
            time.sleep(0.002)  # a step


def start_rank(*arguments: Any) -> int:
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        status = 1
        try:
            read_as_rank(*arguments)
            status = 0
        finally:
            os._exit(status)
    return child


def running(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def lines_of(folder: Path) -> int:
    return sum(file.read_text().count(".\n") for file in folder.glob("*.txt"))


def test_the_loader_killed_ten_times_and_resumed_otherwise_reads_the_same(tmp_path: Path) -> None:
    shards(tmp_path / "set", 75, 20)
    read_as_rank(tmp_path / "set", tmp_path / "whole", 0, 1, 0, G, 0)
    whole = recorded([tmp_path / "whole"], G)
    assert sorted(whole) == list(range(G * STEPS))
    chance, done, folders, seen = random.Random(0), 0, [], set()
    for attempt in range(11):
        workers, world = chance.choice([(w, r) for w in (0, 1, 4) for r in (1, 2) if (w, r) not in seen] or [(4, 2)])
        seen.add((workers, world))
        micro = chance.choice([m for m in (1, 2, 4, 8) if m * world <= G])
        folder = tmp_path / f"{attempt:02d}"
        folders.append(folder)
        ranks = [start_rank(tmp_path / "set", folder, rank, world, workers, micro, done) for rank in range(world)]
        if attempt < 10:  # killed at a random place; the last may end
            wanted = chance.randint(1, 8) * G // micro
            while lines_of(folder) < wanted and any(running(rank) for rank in ranks):
                time.sleep(0.001)
            for rank in ranks:
                os.kill(rank, signal.SIGKILL)
        for rank in ranks:
            _, status = os.waitpid(rank, 0)
            with suppress(ProcessLookupError):
                os.killpg(rank, signal.SIGKILL)  # a reading process that was not up yet
            assert status in ((signal.SIGKILL, 0) if attempt < 10 else (0,))
        reached = max(recorded(folders, G), default=0) // G
        done = chance.randint(max(0, reached - 4), max(0, reached - 1)) if attempt < 9 else 30  # the last checkpoint
    assert seen >= {(0, 1), (1, 1), (4, 1), (0, 2), (1, 2), (4, 2)}
    everything = recorded(folders, G)
    assert {place: whole[place] for place in everything} == everything
    assert set(everything) >= set(range(30 * G, STEPS * G))


# ------------------------------------------------------------ through train.py

KILLS = 4
LENGTH = 16 * KILLS
STREAM = [
    "callbacks=record",
    "data.batch_size=8",
    f"trainer.max_steps={LENGTH}",
    "trainer.val_check_interval=400",
    "trainer.limit_test_batches=1",
    "callbacks.checkpoint.every_n_steps=3",
    "callbacks.sample_grid=null",
    "callbacks.checkpoint.keep_best=0",
    "optim.warmup_steps=5",
    "data.overfit_samples=75",  # an epoch ends within every ten steps
]


def found(folder: Path, name: str) -> list[Path]:
    """Files of that name anywhere below; unlike glob, it tolerates vanishing folders such as old checkpoints."""
    return [Path(parent, name) for parent, _, files in os.walk(folder) if name in files]


def kill_somewhere(command: list[str], cwd: Path, folder: Path, lines: int) -> None:
    """Start the command and kill -9 its main process once it has recorded so many batches."""
    process = subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while sum(file.read_text().count("\n") for file in found(folder, "samples_rank_0.txt")) < lines:
        assert process.poll() is None, "ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    time.sleep(0.2)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # other ranks would wait for it a while


@pytest.mark.slow
def test_train_killed_and_resumed_on_other_ranks_and_workers(
    script: Callable[..., list[str]], run_script: Run, tmp_path: Path
) -> None:
    assert run_script("train.py", *STREAM, "task_name=whole").returncode == 0
    (whole,) = runs(tmp_path, "whole")
    expected = recorded([whole], 8)
    assert sorted(expected) == list(range(8 * LENGTH))
    chance, ckpt, folders = random.Random(1), "null", []
    for attempt in range(KILLS + 1):
        ranks, workers = (1, 2)[attempt % 2], (0, 1, 4)[attempt % 3]
        options = ["trainer=ddp_sim" if ranks == 2 else "trainer=cpu", f"data.num_workers={workers}"]
        task = f"part_{attempt:02d}"
        command = script("train.py", *STREAM, *options, f"task_name={task}", f"ckpt_path={ckpt}")
        parts = tmp_path / "logs" / task
        if attempt < KILLS:
            kill_somewhere(command, tmp_path, parts, chance.randint(4, 7))
        else:
            last = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
            assert last.returncode == 0, last.stderr
        folders.append(runs(tmp_path, task)[0])
        if (folders[-1] / "checkpoints" / "last.ckpt").exists():
            ckpt = str(folders[-1] / "checkpoints" / "last.ckpt")
    assert recorded(folders, 8) == expected


@pytest.mark.long
def test_one_process_killed_and_resumed_ends_with_the_very_weights(
    script: Callable[..., list[str]], run_script: Run, tmp_path: Path
) -> None:
    """Noise, times, dropout, flips and draws from the posterior included: latents, with a worker, killed twice."""
    latent_shards(tmp_path / "latents", 75, 20, (2, 4, 4))
    (tmp_path / "latents" / "train.manifest.json").write_text(
        '{"shape": [2, 4, 4], "channel_mean": [0.5, 0.5], "channel_std": [20.0, 30.0]}'
    )
    latents = [
        "data=imagenet_latents",
        f"data.folder={tmp_path}/latents",
        "data.val=train-*.tar",
        "data.image_size=[4,4]",
        "data.channels=2",
        "data.num_classes=10",
        "data.num_workers=1",
        *STREAM[1:],
    ]
    whole = run_script("train.py", *latents, "task_name=whole")
    assert whole.returncode == 0, whole.stderr
    command = [*script("train.py", *latents, "callbacks=record", "task_name=cut"), "ckpt_path=last"]
    for lines in (7, 15):
        kill_somewhere(command, tmp_path, tmp_path / "logs" / "cut", lines)
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=240, check=False).returncode == 0
    (one,), (two,) = runs(tmp_path, "whole"), runs(tmp_path, "cut")
    assert differences(state(one), state(two)) == []


@pytest.mark.long
@pytest.mark.parametrize(("first", "then"), [(1, 4), (4, 1), (2, 4)])
def test_resumed_with_other_micro_batches(train_here: Train, tmp_path: Path, first: int, then: int) -> None:
    """Other micro-batches than before the stop: every step still sees its whole batch, and no validation is lost."""

    def options(accumulate: int) -> list[str]:
        return [f"trainer.accumulate_grad_batches={accumulate}", f"trainer.val_check_interval={3 * accumulate}",
                "optim.schedule=constant", "callbacks=record"]  # fmt: skip

    train_here(*options(1), run="whole")
    train_here(*options(first), "trainer.max_steps=3", run="cut")
    metrics, objects = train_here(*options(then), "ckpt_path=last", run="cut")
    assert objects["trainer"].global_step == 6
    assert recorded([tmp_path / "cut"], 8) == recorded([tmp_path / "whole"], 8)
    for name, weight in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "cut")[name], weight, rtol=1e-3, atol=1e-4, msg=name)
    assert "val/loss" in metrics


@pytest.mark.long
def test_a_state_that_does_not_fit_the_step_is_refused(train_here: Train, tmp_path: Path) -> None:
    train_here("trainer.max_steps=4")
    saved = Saved(tmp_path / "run" / "checkpoints" / "last.ckpt")
    content = saved.state()
    content["ShardDataModule"]["samples"] -= 8
    kinds = {kind: saved.tensors(kind) for kind in saved.kinds}
    slices = {kind: {name: Slice.whole(tensors.whole(name)) for name in tensors} for kind, tensors in kinds.items()}
    CheckpointWriter(saved.path, content, slices).run()
    with pytest.raises(UserError, match=r"the data state \(24 samples\) does not match step 4 × data\.batch_size 8"):
        train_here("ckpt_path=last")


# ------------------------------------------------------------- damaged data


def damaged_set(folder: Path, cache: Path, num_shards: int = 10) -> Path:
    """Ten shards of ten, indexed whole; then the fourth is cut in its middle: 5 of 100 samples are gone."""
    paths = shards(folder, 10 * num_shards, 10)
    for pattern in ("train-*.tar", "val-*.tar"):
        if pattern.startswith("train"):
            load_index(ShardSet(storage(cache), str(folder), pattern, grey()))
    os.truncate(paths[3], 5 * 2048 + 100)
    return paths[3]


def on(folder: Path, *more: str) -> list[str]:
    return [f"data.folder={folder}", "data.prepare=null", "data.val=train-*.tar", "data.batch_size=10", *more]


def test_a_damaged_sample_stops_the_run_by_default(train_here: Train, tmp_path: Path) -> None:
    train_here(*on(tmp_path / "set"), "trainer.max_steps=1") if shards(tmp_path / "set", 100) else None
    os.truncate(tmp_path / "set" / "train-000003.tar", 5 * 2048 + 100)
    with pytest.raises(UserError, match=r"train-000003\.tar: cut short|train-000003\.tar: damaged"):
        train_here(*on(tmp_path / "set"), "trainer.max_steps=20")


@pytest.mark.long
def test_substitutes_are_counted_exactly_and_shown(train_here: Train, tmp_path: Path, data_dir: Path) -> None:
    """An epoch of 100 with five gone: five substitutes, twice in two epochs, also after a resume."""
    folder = tmp_path / "set"
    shards(folder, 100)
    options = on(folder, "data.faults.action=substitute", "data.faults.max_rate=0.1", "optim.schedule=constant")
    train_here(*options, "trainer.max_steps=1", run="before")  # indexes them
    os.truncate(folder / "train-000003.tar", 5 * 2048 + 100)
    _, objects = train_here(*options, "trainer.max_steps=20", "trainer.val_check_interval=20")
    counts = objects["datamodule"].counts
    assert counts["train"].counts == {"truncated": 10}
    assert counts["train"].samples == 200
    assert counts["val"].counts == {"truncated": 10}  # validation and test
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert events.Scalars("data/truncated")[-1].value == 10
    _, objects = train_here(*options, "trainer.max_steps=30", "trainer.val_check_interval=20", "ckpt_path=last")
    assert objects["datamodule"].counts["train"].counts == {"truncated": 15}
    assert objects["datamodule"].counts["train"].samples == 300


@pytest.mark.long
def test_two_ranks_finish_an_epoch_with_a_tenth_of_the_shards_destroyed(run_script: Run, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shards(folder, 200, 10)
    options = on(folder, "data.faults.action=substitute", "data.faults.max_rate=0.2", "callbacks=record",
                 "trainer=ddp_sim", "data.num_workers=1", "data.val=train-000000.tar")  # fmt: skip
    assert run_script("train.py", *options, "trainer.max_steps=1", "task_name=index").returncode == 0
    (folder / "train-000004.tar").unlink()
    (folder / "train-000011.tar").write_bytes(os.urandom(30_000))
    result = run_script("train.py", *options, "data.train='train-{000000..000019}.tar'", "trainer.max_steps=20")
    assert result.returncode == 0, result.stderr
    assert "about 20 are damaged" in result.stdout or "train: " in result.stdout
    keys = recorded(runs(tmp_path), 10)
    assert len(keys) == 200
    assert not any("train-000004.tar" in key or "train-000011.tar" in key for key in keys.values())


@pytest.mark.long
def test_ranks_stop_together_and_report_once(run_script: Run, tmp_path: Path) -> None:
    """A sample that only one rank reads, damaged after indexing: both stop at that step, one line is printed."""
    folder = tmp_path / "set"
    paths = shards(folder, 100)
    options = on(folder, "trainer=ddp_sim", "data.val=train-000000.tar", "trainer.val_check_interval=100",
                 f"data.storage.cache_dir={tmp_path}/cache")  # fmt: skip
    assert run_script("train.py", *options, "trainer.max_steps=1", "task_name=index").returncode == 0
    data = bytearray(paths[5].read_bytes())
    data[3 * 2048 + 1024 + 512 + 40] ^= 1
    paths[5].write_bytes(data)
    for kept in (tmp_path / "cache" / "indices").iterdir():  # unseen by the index, as on a dying disk
        old = read_index(kept, str(folder))
        assert old is not None
        stamped = [replace(shard, stamp_ns=stamp((folder / shard.name).stat())) for shard in old.shards]
        write_index(kept, ShardIndex(str(folder), stamped, old.columns))
    result = run_script("train.py", *options, "trainer.max_steps=20")
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert re.search(r"train-000005\.tar: sample 53 \('train00000053'\) at byte \d+ fails its checksum", errors[0])


# ---------------------------------------------------------- remote, and webdataset


def test_training_from_an_unreliable_server(train_here: Train, tmp_path: Path, data_dir: Path) -> None:
    """Over http with failures on the way: the same weights as from the disk, the retries counted."""
    train_here("data.window=0", run="disk")
    with serve(data_dir / "digits") as server:
        patterns = ["data.train='train-{000000..000002}.tar'", "data.val=val-000000.tar", "data.prepare=null"]
        cache = [
            f"data.storage.cache_dir={tmp_path}/cache",
            "data.storage.backoff_s=0.01",
            "data.storage.timeout_s=1.0",
        ]
        options = [f"data.folder={server.address}", "data.window=0", *patterns, *cache]
        server.faults["train-000001.tar"] = ["503", "cut"]
        _, first = train_here(*options, run="http")
        for path in storage(tmp_path).folder.glob("*.kept"):
            path.unlink()
        server.faults["train-000001.tar"] = ["503"]
        train_here(*options, "data.num_workers=2", run="again")
    assert first["datamodule"].counts["train"].faults == 0
    for name in ("http", "again"):
        assert differences(weights(tmp_path / "disk"), weights(tmp_path / name)) == []


@pytest.mark.long
def test_a_remote_set_killed_in_its_first_epoch_is_resumed_by_others(
    script: Callable[..., list[str]], run_script: Run, tmp_path: Path
) -> None:
    """Its batches are those of a full index, though the ranks that resume have nothing but a checkpoint."""
    shards(tmp_path / "there", 60, 10)
    options = [o for o in STREAM if not o.startswith(("data.overfit_samples", "trainer.max_steps"))]
    options += ["trainer.max_steps=16", "data.prepare=null", "data.window=2", "data.val=train-000000.tar"]
    options += ["data.train='train-{000000..000005}.tar'"]
    local = run_script("train.py", *options, f"data.folder={tmp_path}/there", "task_name=whole")
    assert local.returncode == 0, local.stderr
    expected = recorded(runs(tmp_path, "whole"), 8)
    assert sorted(expected) == list(range(8 * 16))
    with serve(tmp_path / "there") as server:

        def command(name: str, *more: str) -> list[str]:
            cache = f"data.storage.cache_dir={tmp_path}/cache_{name}"
            return script("train.py", *options, f"data.folder={server.address}", cache, f"task_name={name}", *more)

        kill_somewhere(command("cut"), tmp_path, tmp_path / "logs" / "cut", 5)
        (cut,) = runs(tmp_path, "cut")
        last = last_checkpoint(cut)  # the kill may have come before its link was set
        assert Saved(last).step < 7  # of seven and a half in an epoch
        server.requests.clear()
        ranks = ["trainer=ddp_sim", "data.num_workers=1", f"ckpt_path={last}"]
        resumed = subprocess.run(
            command("other", *ranks), cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
        )
        assert resumed.returncode == 0, resumed.stderr
        assert max(server.requests[path.name] for path in (tmp_path / "there").glob("*.tar")) == 1  # for both ranks
    assert recorded([cut, *runs(tmp_path, "other")], 8) == expected


@pytest.mark.long
def test_sets_too_large_to_index_stream_through_webdataset(
    train_here: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["data.reader=webdataset", "data.samples_per_shard=500", "data.shuffle_buffer=50"]
    with caplog.at_level("INFO", logger="mvsplit"):
        metrics, objects = train_here(*options, "data.num_workers=2", "trainer.max_steps=8")
    assert objects["trainer"].global_step == 8
    assert "the order of samples depends on the number of ranks and workers" in caplog.text
    assert torch.isfinite(torch.tensor(metrics["val/loss"]))
    _, objects = train_here(*options, "trainer.max_steps=10", "optim.schedule=constant", "ckpt_path=last")
    assert objects["trainer"].global_step == 10


@pytest.mark.long
@pytest.mark.parametrize("action", ["fatal", "substitute"])
@pytest.mark.parametrize("what", ["undecodable", "empty tars", "no tars", "a class too high"])
def test_a_stream_of_nothing_but_damage_ends(train_here: Train, tmp_path: Path, action: str, what: str) -> None:
    """It neither hangs nor raises where only one rank would see it."""
    folder = tmp_path / "set"
    shards(folder, 20, 10)
    shards(folder, 20, 10, "val")
    for number in range(2):
        path = folder / f"train-00000{number}.tar"
        if what == "undecodable":
            tar_of(path, {f"{i}.{s}": c for i in range(20) for s, c in (("png", b"no picture"), ("cls", b"1"))})
        elif what == "a class too high":
            tar_of(path, {f"{i}.{s}": c for i in range(20) for s, c in (("png", picture(i)), ("cls", b"99"))})
        else:
            path.write_bytes(bytes(10240) if what == "empty tars" else b"hello" * 1000)
    options = [f"data.folder={folder}", "data.prepare=null", "data.reader=webdataset", "data.shuffle_buffer=5",
               f"data.faults.action={action}"]  # fmt: skip
    with pytest.raises(UserError, match=r"train-00000\d\.tar"):
        train_here(*options)


@pytest.mark.long
def test_a_signal_to_all_processes_is_one_to_the_run(script: Callable[..., list[str]], tmp_path: Path) -> None:
    """As schedulers send it, also to worker processes. The run saves and ends as intended, without a traceback."""
    command = script("train.py", *STREAM, "data.num_workers=2", "trainer.max_steps=4000", "task_name=all")
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not list(tmp_path.glob("logs/all/runs/*/checkpoints/last.ckpt")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "saving step" in out
    assert "Traceback" not in err
