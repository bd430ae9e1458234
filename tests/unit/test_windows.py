"""Remote sets that are indexed window by window: what is downloaded when, in which order, and what a resume needs."""

import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
from data_tools import SUBSTITUTE, datamodule, grey, picture, read_by_ranks, shards, storage
from servers import FaultyServer, serve

from mvsplit.data.datamodule import ShardDataModule
from mvsplit.data.faults import FaultPolicy
from mvsplit.data.indexing import load_index
from mvsplit.data.order import SHARD_BITS, WindowedOrder
from mvsplit.data.shard_set import ShardSet
from mvsplit.data.shard_writer import write_shard
from mvsplit.utils.errors import UserError

COUNTS = [4, 6, 5, 7, 3]
NAMES = [f"train-{i:06d}.tar" for i in range(6)]
PATTERN = "train-{000000..000005}.tar"


def order(window: int, seed: int = 3, counts: list[int] = COUNTS, **settings: Any) -> WindowedOrder:
    return WindowedOrder(len(counts), window, seed, lambda shards: [counts[s] for s in shards], **settings)


def everything(counts: list[int]) -> list[int]:
    return [(shard << SHARD_BITS) + i for shard, count in enumerate(counts) for i in range(count)]


@pytest.mark.parametrize(("micro", "world"), [(12, 1), (4, 1), (6, 2), (3, 2), (1, 4)])
def test_every_split_reads_the_same_stream(micro: int, world: int) -> None:
    stream = partial(read_by_ranks, lambda: order(2))
    whole = stream(10, 12, 1)
    assert stream(10, micro, world) == whole
    assert stream(10, micro, world, first=4) == whole[4:]  # after a resume, across an epoch's end


@pytest.mark.parametrize("window", [1, 2, 5, 9])
def test_stream_takes_every_sample_once_per_epoch(window: int) -> None:
    for epoch in range(3):
        assert sorted(order(window).take(epoch * 25, 25)) == everything(COUNTS)
    assert order(window).take(0, 25) != order(window).take(25, 25)
    assert order(window).take(0, 50) == order(window).take(0, 20) + order(window).take(20, 30)
    assert order(window).take(0, 25) != order(window, 4).take(0, 25)
    one = order(window)
    assert [one.take(place, 3) for place in (0, 60, 10, 60)] == [order(window).take(p, 3) for p in (0, 60, 10, 60)]


def test_a_window_opens_few_shards_at_a_time() -> None:
    counts = [50] * 20
    taken = np.array(order(4, counts=counts).take(0, 1000)) >> SHARD_BITS
    shards_of_windows = [set(taken[i : i + 200].tolist()) for i in range(0, 1000, 200)]
    assert [len(s) for s in shards_of_windows] == [4] * 5
    assert set.union(*shards_of_windows) == set(range(20))
    assert len(set(taken[:100].tolist())) == 4  # mixed within
    ahead = order(4, counts=counts).shards_ahead(0)
    assert [set(ahead[:4]), set(ahead[4:])] == shards_of_windows[:2]


def test_only_the_windows_up_to_a_place_need_counting() -> None:
    asked: Counter[int] = Counter()

    def counts(shards: list[int]) -> list[int]:
        asked.update(shards)
        return [50] * len(shards)

    lazy = WindowedOrder(20, 4, 0, counts, known=lambda shards: set(shards) <= set(asked))
    lazy.take(0, 150)
    first = lazy.shards_ahead(0)[:4]
    assert set(asked) == set(first)
    lazy.shards_ahead(190)
    lazy.shards_ahead(200)  # in the next window, whose count is not known
    assert set(asked) == set(first)
    lazy.take(200, 1)
    assert len(asked) == 8


def test_shards_without_samples_are_passed_over() -> None:
    counts = [0, 0, 3, 0, 2]
    assert sorted(order(1, counts=counts).take(5, 5)) == everything(counts)
    with pytest.raises(UserError, match="contain no samples"):
        order(1, counts=[0, 0]).take(0, 1)


def test_seeking_in_windows_costs_little() -> None:
    import time

    counts = [1251] * 1024
    began = time.perf_counter()
    order(16, counts=counts).take(1251 * 1024 * 300 + 1_200_000, 256)
    assert time.perf_counter() - began < 0.5


# ------------------------------------------------------------- over a real server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    """60 samples in six shards."""
    shards(tmp_path / "there", 60, 10)
    with serve(tmp_path / "there") as faulty:
        yield faulty


def module(
    source: FaultyServer | Path, cache: Path, max_steps: int = 30, step: int = 0, **settings: Any
) -> ShardDataModule:
    """With a trainer that has done some steps."""
    folder = source if isinstance(source, Path) else source.address
    patient = storage(cache, timeout_s=10.0)  # beside other tests
    data = datamodule(folder, cache, **{"train": PATTERN, "val": PATTERN, "window": 2, "storage": patient} | settings)
    data.trainer = L.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    data.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
    data.prepare_data()
    data.setup("fit")
    return data


def samples(data: ShardDataModule, steps: int) -> list[list[int]]:
    """Numbers of the samples in the next batches."""
    batches = iter(data.train_dataloader())
    try:
        return [next(batches)["index"].tolist() for _ in range(steps)]
    finally:
        data.teardown("fit")


def flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


def test_the_first_batch_comes_after_one_window(server: FaultyServer, tmp_path: Path) -> None:
    """The server never delivers the shards after the first window: its batches are read all the same."""
    window = order(2, seed=0, counts=[10] * 6).shards_ahead(0)[:2]
    server.always = {name: "503" for number, name in enumerate(NAMES) if number not in window}
    found = samples(module(server, tmp_path, val="val-{0..3}.tar"), 5)
    assert sorted(flat(found)) == sorted((shard << SHARD_BITS) + i for shard in window for i in range(10))
    assert all(server.requests[NAMES[number]] == 1 for number in window)
    assert not any(name.startswith("val-") and name.endswith(".tar") for name in server.requests)


def test_the_batches_are_those_of_a_full_index(server: FaultyServer, tmp_path: Path) -> None:
    """Two epochs; from the disk, where everything is indexed first, from a server, and from one with all known."""
    local = module(server.folder, tmp_path / "a")
    whole = samples(local, 30)
    assert samples(module(server, tmp_path / "b"), 30) == whole
    load_index(ShardSet(storage(tmp_path / "c"), server.address, PATTERN, grey()))
    known = module(server, tmp_path / "c")
    assert all(name in known.indices["train"]._known for name in NAMES)  # type: ignore[attr-defined]
    assert samples(known, 30) == whole


def test_a_resume_elsewhere_fetches_its_own_window_only(server: FaultyServer, tmp_path: Path) -> None:
    """Killed in the first epoch; the checkpoint's counts place the run on a machine that has nothing."""
    first = module(server, tmp_path / "a")
    whole = samples(first, 7)
    first.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = 6  # type: ignore[union-attr]
    state = json.loads(json.dumps(first.state_dict()))
    assert sorted(state["shards"]["counts"]) == [-1, -1, 10, 10, 10, 10]
    server.requests.clear()
    second = module(server, tmp_path / "b", step=6)
    second.load_state_dict(state)
    assert samples(second, 1) == whole[6:]
    window = order(2, seed=0, counts=[10] * 6)
    passed = window.shards(window.find(0))
    assert all(server.requests[NAMES[number]] == 0 for number in passed)


def test_a_shard_that_is_not_the_checkpoints_is_refused(server: FaultyServer, tmp_path: Path) -> None:
    first = module(server, tmp_path / "a")
    samples(first, 2)
    state = first.state_dict()
    name = NAMES[order(2, seed=0, counts=[10] * 6).shards_ahead(0)[0]]
    server.always[name] = f"other {NAMES[5] if name != NAMES[5] else NAMES[4]}"
    second = module(server, tmp_path / "b")
    second.load_state_dict(state)
    with pytest.raises(UserError, match=f"{name}: not the shard that the checkpoint was trained on"):
        samples(second, 1)


@pytest.mark.parametrize(
    "wrong",
    [None, [], {"counts": [1]}, {"counts": [-2] * 6}, {"counts": [2**40] * 6}, {"counts": "abcdef"}, {"parts": [1]}],
)
def test_a_forged_state_is_refused(server: FaultyServer, tmp_path: Path, wrong: Any) -> None:
    data = module(server, tmp_path)
    honest = {"counts": [-1] * 6, "fingerprints": [""] * 6, "parts": ["data"]}
    state = data.state_dict() | {"shards": honest | wrong if isinstance(wrong, dict) and wrong else wrong}
    with pytest.raises(UserError, match="the checkpoint's data state does not match the set"):
        data.load_state_dict(state)


def test_two_windows_must_fit_into_the_cache(server: FaultyServer, tmp_path: Path) -> None:
    assert module(server, tmp_path, window=None).window == 16
    needed = 4 * (server.folder / NAMES[0]).stat().st_size
    small = storage(tmp_path, cache_gib=0.9 * needed / 2**30)
    with pytest.raises(UserError, match=r"data\.storage\.cache_gib = .*: two windows of data\.window = 2 shards need"):
        samples(module(server, tmp_path, storage=small), 1)


def test_nothing_is_prepared_for_an_address(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default data set writes itself where it is missing: not into a folder called `http:`."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="http cannot list files"):
        module(server, tmp_path / "a", train="train-*.tar", prepare=lambda folder: folder.mkdir(parents=True))
    assert not (tmp_path / "http:").exists()


def test_overfitting_fetches_only_what_it_needs(server: FaultyServer, tmp_path: Path) -> None:
    data = module(server, tmp_path, overfit_samples=12)
    assert len(data.indices["train"]) == len(data.validation_index()) == 12
    assert [server.requests[name] for name in NAMES] == [1, 1, 0, 0, 0, 0]


def test_validation_is_indexed_when_it_begins(server: FaultyServer, tmp_path: Path) -> None:
    data = module(server, tmp_path)
    loader = data.val_dataloader()
    assert not server.requests or set(server.requests) <= {
        "_info.json",
        "train.manifest.json",
        "train.index.safetensors",
    }
    with pytest.raises(TypeError):
        len(loader)
    labels = [label for batch in loader for label in batch["label"].tolist()]
    assert len(loader) == 15
    assert labels == [i % 3 for i in range(60)]


# ------------------------------------------------------------------ published counts


def publish(server: FaultyServer, counts: list[int]) -> None:
    about = {"splits": {"train": {"filenames": NAMES, "shard_lengths": counts, "num_samples": sum(counts)}}}
    (server.folder / "_info.json").write_text(json.dumps(about))


def test_a_shard_cut_at_a_samples_end_is_found_by_its_published_count(server: FaultyServer, tmp_path: Path) -> None:
    publish(server, [10, 10, 11, 10, 10, 10])
    with pytest.raises(UserError, match=r"train-000002\.tar: contains 10 samples; _info\.json lists 11"):
        samples(module(server, tmp_path), 15)
    tolerant = module(server, tmp_path / "b", faults=SUBSTITUTE)
    assert len(samples(tolerant, 15)) == 15
    with pytest.raises(UserError, match=r"_info\.json lists 11"):
        load_index(ShardSet(storage(tmp_path), server.address, PATTERN, grey()))


def test_others_stand_in_for_a_shard_out_of_reach_whose_count_is_published(
    server: FaultyServer, tmp_path: Path
) -> None:
    """Numbers stay those of the whole set; without published counts the run cannot know how many there are."""
    whole = samples(module(server, tmp_path / "a"), 15)
    server.always[NAMES[3]] = "503"
    with pytest.raises(UserError, match=r"train-000003\.tar: download failed.*its number of samples is not published"):
        samples(module(server, tmp_path / "b", faults=SUBSTITUTE), 15)
    publish(server, [10] * 6)
    data = module(server, tmp_path / "c", faults=SUBSTITUTE)
    found = samples(data, 15)
    for ours, theirs in zip(flat(found), flat(whole), strict=True):
        assert ours == theirs if theirs >> SHARD_BITS != 3 else ours >> SHARD_BITS == 4
    with pytest.raises(UserError, match=r"train-000003\.tar: download failed"):
        samples(module(server, tmp_path / "d"), 15)


def test_a_published_count_beyond_belief_is_none(server: FaultyServer, tmp_path: Path) -> None:
    publish(server, [10, 10, 10, 1 << 31, 10, 10])
    server.always[NAMES[3]] = "404"
    found = samples(module(server, tmp_path, faults=SUBSTITUTE), 15)
    assert 3 not in {number >> SHARD_BITS for number in flat(found)}


@pytest.mark.parametrize("content", ["[]", "{", '{"splits": {"train": {"filenames": [1], "shard_lengths": [-5]}}}'])
def test_a_broken_sidecar_counts_for_nothing(server: FaultyServer, tmp_path: Path, content: str) -> None:
    (server.folder / "_info.json").write_text(content)
    assert len(samples(module(server, tmp_path), 15)) == 15


def test_damage_is_measured_against_the_whole_set(server: FaultyServer, tmp_path: Path) -> None:
    """One lost sample of sixty: as a full index would have it, though the first window has only twenty."""
    window = order(2, seed=0, counts=[10] * 6).shards_ahead(0)[:2]
    classes = [b"none", *(str(i % 3).encode() for i in range(9))]
    samples_of_one = ((f"{i:08d}", {"png": picture(i), "cls": label}) for i, label in enumerate(classes))
    write_shard(server.folder / NAMES[window[0]], samples_of_one)
    with pytest.raises(UserError, match=r"data\.faults\.max_rate = 0\.01: 1 of about "):
        samples(module(server, tmp_path / "a", faults=FaultPolicy("substitute", 0.01)), 1)
    assert len(samples(module(server, tmp_path / "b", faults=FaultPolicy("substitute", 0.02)), 5)) == 5
