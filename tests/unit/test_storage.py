"""Remote shards: a real HTTP server that fails in every way, S3's protocol, and the cache they are kept in."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from data_tools import SUBSTITUTE, datamodule, grey, shards, storage
from servers import FaultyServer, serve, serve_gcs

from mvsplit.data.faults import DataFault, FaultPolicy
from mvsplit.data.index import load_index
from mvsplit.data.prefetch import Prefetcher
from mvsplit.data.reader import ShardReader
from mvsplit.data.storage import Storage
from mvsplit.utils.errors import UserError

NAME = "train-000001.tar"
PATTERN = "train-{000000..000002}.tar"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    shards(tmp_path / "there", 30)
    with serve(tmp_path / "there") as faulty:
        yield faulty


def whole(server: FaultyServer, path: Path) -> bool:
    return path.read_bytes() == (server.folder / NAME).read_bytes()


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.rglob("*.partial")]


def test_a_shard_is_fetched_once(server: FaultyServer, tmp_path: Path) -> None:
    store = storage(tmp_path)
    path = store.local(f"{server.address}/{NAME}")
    assert whole(server, path)
    assert store.local(f"{server.address}/{NAME}") == path
    assert storage(tmp_path).local(f"{server.address}/{NAME}") == path
    assert server.requests == {NAME: 1}
    assert store.retried == []


@pytest.mark.parametrize(
    "faults",
    [["503"], ["500", "503"], ["stall"], ["cut"], ["cut", "429"], ["loop"] * 11 + [""], ["other train-000002.tar"]],
)
def test_what_passes_is_tried_again_and_counted(server: FaultyServer, tmp_path: Path, faults: list[str]) -> None:
    import hashlib

    server.faults[NAME] = list(faults)
    digest = hashlib.sha256((server.folder / NAME).read_bytes()).hexdigest()
    store = storage(tmp_path)
    assert whole(server, store.local(f"{server.address}/{NAME}", sha256=digest))
    assert len(store.retried) == 1
    assert f"{NAME}: fetched at try " in store.retried[0]
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("fault", "kind", "tries", "message"),
    [
        ("503", "network", 3, "could not be fetched in 3 tries .*503"),
        ("stall", "network", 3, "could not be fetched in 3 tries"),
        ("cut", "network", 3, "could not be fetched in 3 tries"),
        ("404", "missing_shard", 1, "there is no such shard"),
        ("403", "network", 1, r"access denied \(status 403\)"),
        ("other train-000002.tar", "replaced_shard", 3, "not the shard that was indexed"),
    ],
)
def test_what_does_not_pass_is_named(
    server: FaultyServer, tmp_path: Path, fault: str, kind: str, tries: int, message: str
) -> None:
    server.always[NAME] = fault
    store = storage(tmp_path, timeout_s=0.3)
    sha256 = "0" * 64 if kind == "replaced_shard" else None
    began = time.monotonic()
    with pytest.raises(DataFault, match=message) as caught:
        store.local(f"{server.address}/{NAME}", sha256=sha256)
    assert time.monotonic() - began < 5
    assert caught.value.kind == kind
    assert NAME in str(caught.value)
    assert server.requests[NAME] == tries
    with pytest.raises(DataFault):  # and is not asked for again at once
        store.local(f"{server.address}/{NAME}", sha256=sha256)
    assert server.requests[NAME] == tries
    assert leftovers(tmp_path) == []


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataFault, match="could not be fetched in 3 tries") as caught:
        storage(tmp_path).local(f"http://127.0.0.1:9/{NAME}")
    assert caught.value.kind == "network"


def test_a_token_goes_to_https_only_and_not_to_where_a_redirect_leads(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", "secret")
    store = storage(tmp_path, token_env="TOKEN")
    store.local(f"{server.address}/{NAME}")
    assert server.authorization == [None]  # plain http
    assert store._filesystem("https").kwargs["headers"] == {"Authorization": "Bearer secret"}
    monkeypatch.delenv("TOKEN")
    assert "headers" not in store._filesystem("https").kwargs
    # The library drops the header when the host changes: seen on two servers, with it forced on plain http.
    with serve(server.folder) as elsewhere:
        server.faults["train-000000.tar"] = [f"redirect {elsewhere.address}/{NAME}"]
        forced = storage(tmp_path, options={"headers": {"Authorization": "Bearer secret"}})
        assert whole(server, forced.local(f"{server.address}/train-000000.tar"))
        assert server.authorization[-1] == "Bearer secret"
        assert elsewhere.authorization == [None]


def test_processes_share_a_fetch(server: FaultyServer, tmp_path: Path) -> None:
    """Four readers ask at once: one request reaches the server."""
    location = f"{server.address}/{NAME}"
    with multiprocessing.get_context("fork").Pool(4) as pool:
        paths = pool.map(Fetch(tmp_path), [location] * 4, chunksize=1)
    assert {whole(server, path) for path in paths} == {True}
    assert server.requests[NAME] == 1


class Fetch:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, location: str) -> Path:
        return storage(self.folder).local(location)


def test_the_cache_keeps_to_its_limit(server: FaultyServer, tmp_path: Path) -> None:
    size = (server.folder / NAME).stat().st_size
    store = storage(tmp_path, cache_gib=2.5 * size / 2**30)
    files = []
    for number in (0, 1, 2):
        files.append(store.local(f"{server.address}/train-00000{number}.tar", size))
        os.utime(files[-1], ns=(number, number))
    assert [file.exists() for file in files] == [False, True, True]
    store.local(f"{server.address}/{NAME}", size)  # used again
    store.local(f"{server.address}/train-000000.tar", size)
    assert [file.exists() for file in files] == [True, True, False]
    with pytest.raises(DataFault, match=r"larger than data\.storage\.cache_gib allows") as caught:
        storage(tmp_path / "small", cache_gib=0.5 * size / 2**30).local(f"{server.address}/{NAME}")
    assert caught.value.kind == "cache_full"


def test_a_cached_file_of_another_size_is_fetched_again(server: FaultyServer, tmp_path: Path) -> None:
    store = storage(tmp_path)
    path = store.local(f"{server.address}/{NAME}")
    path.write_bytes(b"half")
    assert whole(server, store.local(f"{server.address}/{NAME}", (server.folder / NAME).stat().st_size))
    assert server.requests[NAME] == 2


def test_a_full_disk_is_told(server: FaultyServer, tmp_path: Path) -> None:
    store = storage(tmp_path)
    path = store.cached(f"{server.address}/{NAME}")
    path.parent.mkdir(parents=True)
    path.with_name(f"{path.name}.partial").symlink_to("/dev/full")  # the kernel's own "no space left on device"
    with pytest.raises(DataFault, match=rf"{NAME}: no room for it in data\.storage\.cache_dir") as caught:
        store.local(f"{server.address}/{NAME}")
    assert caught.value.kind == "cache_full"
    assert leftovers(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_the_users_to_mend(server: FaultyServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.storage\.cache_dir = .*file/cache"):
        storage(tmp_path / "file").local(f"{server.address}/{NAME}")


def remote_reader(server: FaultyServer, store: Storage, policy: FaultPolicy) -> ShardReader:
    return ShardReader(load_index(store, server.address, PATTERN, grey(), policy), store, grey(), policy, train=True)


def test_a_remote_set_reads_like_a_local_one(server: FaultyServer, tmp_path: Path) -> None:
    source = remote_reader(server, storage(tmp_path), FaultPolicy())
    assert [item["label"] for item in source.__getitems__([(i, i) for i in range(30)])] == [i % 3 for i in range(30)]
    assert server.requests["train-000000.tar"] == 1  # indexed from the cache
    again = remote_reader(server, storage(tmp_path), FaultPolicy())
    assert again.index.fingerprint == source.index.fingerprint
    assert server.requests["train-000000.tar"] == 1
    assert source.index.key(source.storage, 13) == f"{NAME}:train00000013"


def test_retries_and_faults_of_a_read_reach_the_batch(server: FaultyServer, tmp_path: Path) -> None:
    store = storage(tmp_path)
    source = remote_reader(server, store, SUBSTITUTE)
    for path in (tmp_path / "cache" / "shards").glob("*.tar"):
        path.unlink()
    server.faults["train-000000.tar"] = ["503"]
    server.always[NAME] = "503"
    first, gone = source[0, 3], source[1, 13]
    assert [finding.kind for finding in first["findings"]] == ["retried"]
    assert {finding.kind for finding in gone["findings"]} == {"network"}
    assert gone["index"] not in range(10, 20)
    assert server.requests[NAME] == 1 + 3  # indexed; then tried three times, for all samples of the shard


def test_a_replaced_remote_shard_is_found(server: FaultyServer, tmp_path: Path) -> None:
    source = remote_reader(server, storage(tmp_path), FaultPolicy())
    for path in (tmp_path / "cache" / "shards").glob("*.tar"):
        path.unlink()
    shards(server.folder, 31)  # sample 30 joins the third shard; the others stay
    (server.folder / NAME).write_bytes((server.folder / "train-000000.tar").read_bytes())
    item = source[0, 13]
    assert [finding.kind for finding in item["findings"]] == ["replaced_shard"]
    assert NAME in item["findings"][0].message


def test_missing_remote_shards_are_found_when_indexing(server: FaultyServer, tmp_path: Path) -> None:
    (server.folder / NAME).unlink()
    with pytest.raises(UserError, match=f"{NAME}: there is no such shard"):
        remote_reader(server, storage(tmp_path), FaultPolicy())
    source = remote_reader(server, storage(tmp_path), SUBSTITUTE)
    assert len(source) == 20
    assert [finding.kind for finding in source.index.findings] == ["missing_shard"]


def test_shards_ahead_are_fetched_beside_the_reading(server: FaultyServer, tmp_path: Path) -> None:
    store = storage(tmp_path)
    found = load_index(store, server.address, PATTERN, grey())
    for path in (tmp_path / "cache" / "shards").glob("*.tar"):
        path.unlink()
    prefetcher = Prefetcher(store, found)
    prefetcher.ask([2, 0])
    deadline = time.monotonic() + 20
    while len(list((tmp_path / "cache" / "shards").glob("*.tar"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for number in (signal.SIGINT, signal.SIGUSR1):  # a whole job may get them: the run still needs its shards
        os.kill(prefetcher._process.pid or 0, number)
    prefetcher.ask([0, 1])
    while len(list((tmp_path / "cache" / "shards").glob("*.tar"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    prefetcher.close()
    assert not prefetcher._process.is_alive()
    assert [server.requests[f"train-00000{i}.tar"] for i in range(3)] == [2, 2, 2]


def test_the_window_must_fit_into_the_cache(server: FaultyServer, tmp_path: Path) -> None:
    module = datamodule(server.address, tmp_path, train=PATTERN, val=PATTERN, window=16)
    module.setup()
    assert module.window == 16
    small = storage(tmp_path, cache_gib=2e-5)
    with pytest.raises(
        UserError, match=r"data\.storage\.cache_gib = 2e-05: data\.window = 16 shards and the next as many"
    ):
        datamodule(server.address, tmp_path, train=PATTERN, val=PATTERN, window=16, storage=small).setup()


def test_s3_speaks_its_own_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a real server of that protocol on this machine: listing, indexing, reading."""
    pytest.importorskip("s3fs")
    from moto.server import ThreadedMotoServer

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    paths = shards(tmp_path / "there", 30)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = {"endpoint_url": f"http://{host}:{port}"}
        import s3fs

        bucket = s3fs.S3FileSystem(**options)
        bucket.mkdir("shards")
        for path in paths:
            bucket.put_file(str(path), f"shards/set/{path.name}")
        store = storage(tmp_path, options=options, timeout_s=10.0)
        locations = store.expand("s3://shards/set", "train-*.tar")
        assert locations == [f"s3://shards/set/{path.name}" for path in paths]
        source = ShardReader(
            load_index(store, "s3://shards/set", "train-*.tar", grey()), store, grey(), FaultPolicy(), train=True
        )
        assert [source[i, i]["label"] for i in range(30)] == [i % 3 for i in range(30)]
        with pytest.raises(DataFault, match="there is no such shard"):
            store.local("s3://shards/set/none.tar")
    finally:
        server.stop()


def test_gcs_speaks_its_own_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a server here that answers the three requests of that protocol which reading needs."""
    pytest.importorskip("gcsfs")
    paths = {path.name: path for path in shards(tmp_path / "there", 30)}
    with serve_gcs("shards", paths) as address:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        store = storage(tmp_path, options={"token": "anon"}, timeout_s=10.0)
        assert store.expand("gs://shards", "train-*.tar") == [f"gs://shards/{name}" for name in sorted(paths)]
        source = ShardReader(
            load_index(store, "gs://shards", "train-*.tar", grey()), store, grey(), FaultPolicy(), train=True
        )
        assert [source[i, i]["label"] for i in range(30)] == [i % 3 for i in range(30)]
        with pytest.raises(DataFault, match="there is no such shard"):
            store.local("gs://shards/none.tar")


def test_one_remote_stream_from_two_ranks_with_workers(server: FaultyServer, tmp_path: Path) -> None:
    """Whole batches through forked workers while shards are fetched: nothing hangs, every sample once."""
    module = datamodule(server.address, tmp_path, train=PATTERN, val=PATTERN, batch_size=5, num_workers=2)
    module.setup()
    for path in (tmp_path / "cache" / "shards").glob("*.tar"):
        path.unlink()
    seen = torch.cat([batch["index"] for batch in module.val_dataloader()]).tolist()
    assert seen == list(range(30))
    assert threading.active_count() < 50


def test_a_server_that_only_drips_is_left(tmp_path: Path) -> None:
    """A byte now and then keeps every single read within its time; the rate tells."""
    shards(tmp_path / "there", 30)
    with serve(tmp_path / "there") as faulty:
        faulty.always[NAME] = "drip"
        began = time.monotonic()
        with pytest.raises(DataFault, match="slower than 10000 bytes a second"):
            storage(tmp_path, timeout_s=0.3, retries=1).local(f"{faulty.address}/{NAME}")
        assert time.monotonic() - began < 5


def test_a_damaged_cache_heals(server: FaultyServer, tmp_path: Path) -> None:
    source = remote_reader(server, storage(tmp_path), FaultPolicy())
    path = source.storage.cached(f"{server.address}/{NAME}")
    data = bytearray(path.read_bytes())
    row = int(source.index.columns["data.offset"][13])
    data[row + 45] ^= 1
    path.write_bytes(data)
    assert source.read(0, 13)["label"] == 13 % 3
    assert server.requests[NAME] == 2


def test_what_came_cut_without_a_length_is_fetched_again(server: FaultyServer, tmp_path: Path) -> None:
    server.faults[NAME] = ["cut without length"]
    source = remote_reader(server, storage(tmp_path), FaultPolicy())
    assert len(source) == 30
    assert server.requests[NAME] == 2


def test_a_killed_prefetcher_is_no_harm(server: FaultyServer, tmp_path: Path) -> None:
    store = storage(tmp_path)
    prefetcher = Prefetcher(store, load_index(store, server.address, PATTERN, grey()))
    prefetcher._process.kill()
    prefetcher._process.join()
    for _ in range(3):
        prefetcher.ask([0, 1])
        prefetcher.ask([2])
    prefetcher.close()


def test_an_index_beside_remote_shards_is_asked_for_anew(server: FaultyServer, tmp_path: Path) -> None:
    """Shards written again at the same address, with their index: the cached ones do not stand in the way."""
    from mvsplit.data.index import write_index

    def write(count: int) -> None:
        shards(server.folder, count)
        for old in (tmp_path / "apart").glob("cache/indices/*"):
            old.unlink()
        made = load_index(storage(tmp_path / "apart"), str(server.folder), "train-*.tar", grey())
        write_index(server.folder / "train.index.safetensors", made)

    write(30)
    assert len(remote_reader(server, storage(tmp_path), FaultPolicy())) == 30
    write(29)
    kept = storage(tmp_path).cached(f"{server.address}/train.index.safetensors")
    kept.unlink()  # stands for the minute in which it is not asked for again
    source = remote_reader(server, storage(tmp_path), FaultPolicy())
    assert len(source) == 29
    assert source.read(0, 28)["label"] == 28 % 3


def test_a_file_that_is_called_like_a_command_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipe:touch PWNED").write_bytes(b"x" * 1000)
    store = storage(tmp_path)
    for pattern in ("{pipe:touch PWNED,a}", "pipe:*"):
        with pytest.raises(UserError, match="pipe: runs a shell"):
            store.expand(".", pattern)
    module = datamodule(".", tmp_path, train="*", val="*", reader="webdataset")
    assert all(location.startswith("/") for location in store.expand(module.folder, "*"))


@pytest.mark.parametrize(
    "pattern", ["{a,b}" * 40, "{0000000000000000001..99999999999999999999}", "{" * 2000, "**.tar", "a\0b"]
)
def test_absurd_patterns_end_at_once(tmp_path: Path, pattern: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserError):
        storage(tmp_path).expand(str(tmp_path), pattern)
    assert time.monotonic() - began < 2


def test_a_shard_named_twice_is_refused(tmp_path: Path) -> None:
    shards(tmp_path, 10)
    with pytest.raises(UserError, match=r"names .*train-000000\.tar twice"):
        storage(tmp_path).expand(str(tmp_path), "{train,train}-000000.tar")
