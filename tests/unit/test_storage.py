"""Remote shards: a real HTTP server that fails in every way, S3's protocol, and the cache."""

import gzip
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from data_tools import SUBSTITUTE, datamodule, grey, index, picture, shards, storage, stream, tar_of
from servers import FaultyServer, serve, serve_gcs

from mvsplit.data.faults import DataFault, FaultPolicy
from mvsplit.data.indexing import load_index
from mvsplit.data.reader import ShardReader
from mvsplit.data.shard_set import ShardSet
from mvsplit.data.storage import Storage
from mvsplit.data.training_sources import Prefetcher
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
    assert f"{NAME}: downloaded on attempt " in store.retried[0]
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("fault", "kind", "tries", "message"),
    [
        ("503", "network", 3, "download failed after 3 attempts .*503"),
        ("stall", "network", 3, "download failed after 3 attempts"),
        ("cut", "network", 3, "download failed after 3 attempts"),
        ("404", "missing_shard", 1, "shard does not exist"),
        ("403", "network", 1, r"access denied \(status 403\)"),
        ("other train-000002.tar", "replaced_shard", 3, "shard has changed since it was indexed"),
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
    with pytest.raises(DataFault):  # and is not requested again at once
        store.local(f"{server.address}/{NAME}", sha256=sha256)
    assert server.requests[NAME] == tries
    assert leftovers(tmp_path) == []


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataFault, match="download failed after 3 attempts") as caught:
        storage(tmp_path).local(f"http://127.0.0.1:9/{NAME}")
    assert caught.value.kind == "network"


def test_a_token_goes_to_https_only_and_not_to_where_a_redirect_leads(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    store = storage(tmp_path, token_env="HF_TOKEN")
    store.local(f"{server.address}/{NAME}")
    assert server.authorization == [None]  # plain http
    hub = "https://huggingface.co/datasets/x/y.tar"
    assert store.remote.filesystem(hub).kwargs["headers"]["Authorization"] == "Bearer secret"
    monkeypatch.delenv("HF_TOKEN")
    assert "Authorization" not in store.remote.filesystem(hub).kwargs["headers"]
    # The library drops the header when the host changes: seen on two servers, with it forced on plain http.
    with serve(server.folder) as elsewhere:
        server.faults["train-000000.tar"] = [f"redirect {elsewhere.address}/{NAME}"]
        forced = storage(tmp_path, options={"headers": {"Authorization": "Bearer secret"}})
        assert whole(server, forced.local(f"{server.address}/train-000000.tar"))
        assert server.authorization[-1] == "Bearer secret"
        assert elsewhere.authorization == [None]


@pytest.mark.parametrize(
    ("token_env", "location", "sent"),
    [
        ("HF_TOKEN", "https://huggingface.co/x.tar", "hub"),
        ("HF_TOKEN", "https://mirror.example/x.tar", "hub"),
        ("HF_TOKEN", "https://huggingface.co.example.org/x.tar", None),
        ("HF_TOKEN", "https://huggingface.co@example.org/x.tar", None),
        ("HF_TOKEN", "https://data.example/x.tar", None),
        ("HF_TOKEN", "http://huggingface.co/x.tar", None),
        ("DATA_TOKEN", "https://data.example/x.tar", "own"),
        ("DATA_TOKEN", "https://huggingface.co/x.tar", None),
        (None, "https://huggingface.co/x.tar", None),
    ],
)
def test_a_token_goes_to_its_own_host_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token_env: str | None, location: str, sent: str | None
) -> None:
    """A config can name another server, but not have a secret sent there."""
    monkeypatch.setenv("HF_TOKEN", "hub")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    monkeypatch.setenv("DATA_TOKEN", "own")
    monkeypatch.setenv("DATA_TOKEN_HOST", "data.example")
    assert storage(tmp_path, token_env=token_env).remote.token(location) == sent


def test_a_token_without_a_host_goes_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_TOKEN", "own")
    assert storage(tmp_path, token_env="DATA_TOKEN").remote.token("https://data.example/x.tar") is None
    assert storage(tmp_path, token_env="DATA_TOKEN").remote.token("https:///x.tar") is None


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


def test_a_full_disk_is_reported(server: FaultyServer, tmp_path: Path) -> None:
    store = storage(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # the kernel's own refusal, as for a quota
    try:
        with pytest.raises(DataFault, match=rf"{NAME}: does not fit into data\.storage\.cache_dir") as caught:
            store.local(f"{server.address}/{NAME}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.kind == "cache_full"
    assert leftovers(tmp_path) == []


def foreign(folder: Path) -> dict[Path, bytes]:
    """A user's own files, some with names like the cache's."""
    names = ("thesis.tex", "train-000000.tar", "data.partial", "deadbeefdeadbeef-train.txt", "x.lock")
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(name.encode() * 1000)
        os.utime(folder / name, ns=(1, 1))  # the first to go, were they the cache's
    return {folder / name: (folder / name).read_bytes() for name in names}


def use_up(server: FaultyServer, store: Storage) -> None:
    """Download more than the cache can hold, and missing files too."""
    for number in (0, 1, 2, 0):
        store.local(f"{server.address}/train-00000{number}.tar")
    store.refresh(f"{server.address}/none.json")
    store.discard(f"{server.address}/train-000000.tar")


def small(server: FaultyServer, tmp_path: Path) -> Storage:
    return storage(tmp_path, cache_gib=1.5 * (server.folder / NAME).stat().st_size / 2**30)


@pytest.mark.parametrize("where", [".", "shards", "indices"])
def test_the_cache_removes_only_what_it_wrote(server: FaultyServer, tmp_path: Path, where: str) -> None:
    theirs = foreign(tmp_path / "cache" / where)
    use_up(server, small(server, tmp_path))
    assert {path: path.read_bytes() for path in theirs if path.exists()} == theirs


def test_a_folder_of_the_caches_name_that_it_did_not_make_is_refused(server: FaultyServer, tmp_path: Path) -> None:
    store = small(server, tmp_path)
    theirs = foreign(store.folder)
    with pytest.raises(UserError, match=r"data\.storage\.cache_dir = .*contains other files") as caught:
        use_up(server, store)
    assert "\n" not in str(caught.value)
    store.discard(f"{server.address}/{NAME}")
    store.refresh(f"{server.address}/{NAME}")
    assert {path: path.read_bytes() for path in store.folder.iterdir()} == theirs


def test_what_strangers_put_into_the_cache_stays(server: FaultyServer, tmp_path: Path) -> None:
    store = small(server, tmp_path)
    store.local(f"{server.address}/{NAME}")
    theirs = foreign(store.folder)
    use_up(server, store)
    assert {path: path.read_bytes() for path in theirs if path.exists()} == theirs


def test_links_in_the_cache_are_not_followed(server: FaultyServer, tmp_path: Path) -> None:
    """Neither to write, nor to read, nor to remove."""
    victim = tmp_path / "victim"
    victim.write_bytes(bytes((server.folder / NAME).stat().st_size))
    os.utime(victim, ns=(1, 1))
    store = small(server, tmp_path)
    store.local(f"{server.address}/train-000002.tar")
    path = store.cached(f"{server.address}/{NAME}")
    for place in (path, path.with_name(f"{path.name}.partial")):
        place.symlink_to(victim)
    assert whole(server, store.local(f"{server.address}/{NAME}", victim.stat().st_size))
    path.unlink()
    path.symlink_to(victim)
    lock = store.cached(f"{server.address}/train-000000.tar.lock")
    lock.with_name(f"{store.cached(f'{server.address}/train-000000.tar').name}.lock").symlink_to(victim)
    for number in (0, 2):
        with suppress(DataFault):
            store.local(f"{server.address}/train-00000{number}.tar")
    store.discard_damaged(f"{server.address}/{NAME}", "0" * 64)
    assert victim.read_bytes() == bytes((server.folder / NAME).stat().st_size)
    assert victim.stat().st_mtime_ns == 1


def test_what_a_server_packs_is_not_unpacked(server: FaultyServer, tmp_path: Path) -> None:
    """Otherwise some kilobytes could fill the disk."""
    (server.folder / NAME).write_bytes(gzip.compress(bytes(1 << 26)))
    server.always[NAME] = "packed"
    assert storage(tmp_path).local(f"{server.address}/{NAME}").stat().st_size < 1 << 17
    with pytest.raises(UserError, match=f"{NAME}: .*not a|{NAME}: damaged at byte 0"):
        remote_reader(server, storage(tmp_path), FaultPolicy())


def test_a_cache_that_cannot_be_written_is_the_users_to_mend(server: FaultyServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.storage\.cache_dir = .*file/cache"):
        storage(tmp_path / "file").local(f"{server.address}/{NAME}")


def remote_reader(server: FaultyServer, store: Storage, policy: FaultPolicy) -> ShardReader:
    return ShardReader(
        load_index(ShardSet(store, server.address, PATTERN, grey()), policy), store, grey(), policy, train=True
    )


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
    for path in storage(tmp_path).folder.glob("*.kept"):
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
    for path in storage(tmp_path).folder.glob("*.kept"):
        path.unlink()
    shards(server.folder, 31)  # sample 30 joins the third shard; the others stay
    (server.folder / NAME).write_bytes((server.folder / "train-000000.tar").read_bytes())
    item = source[0, 13]
    assert [finding.kind for finding in item["findings"]] == ["replaced_shard"]
    assert NAME in item["findings"][0].message


def test_missing_remote_shards_are_found_when_indexing(server: FaultyServer, tmp_path: Path) -> None:
    (server.folder / NAME).unlink()
    with pytest.raises(UserError, match=f"{NAME}: shard does not exist"):
        remote_reader(server, storage(tmp_path), FaultPolicy())
    source = remote_reader(server, storage(tmp_path), SUBSTITUTE)
    assert len(source) == 20
    assert [finding.kind for finding in source.index.findings] == ["missing_shard"]


def test_shards_ahead_are_fetched_beside_the_reading(server: FaultyServer, tmp_path: Path) -> None:
    store = storage(tmp_path)
    found = load_index(ShardSet(store, server.address, PATTERN, grey()))
    for path in storage(tmp_path).folder.glob("*.kept"):
        path.unlink()
    prefetcher = Prefetcher(store, found)
    prefetcher.request([2, 0])
    deadline = time.monotonic() + 20
    while len(list(storage(tmp_path).folder.glob("*.kept"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for number in (signal.SIGINT, signal.SIGUSR1):  # a whole job may get them: the run still needs its shards
        os.kill(prefetcher._process.pid or 0, number)
    prefetcher.request([0, 1])
    while len(list(storage(tmp_path).folder.glob("*.kept"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    prefetcher.close()
    assert not prefetcher._process.is_alive()
    assert [server.requests[f"train-00000{i}.tar"] for i in range(3)] == [2, 2, 2]


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
            load_index(ShardSet(store, "s3://shards/set", "train-*.tar", grey())),
            store,
            grey(),
            FaultPolicy(),
            train=True,
        )
        assert [source[i, i]["label"] for i in range(30)] == [i % 3 for i in range(30)]
        with pytest.raises(DataFault, match="shard does not exist"):
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
            load_index(ShardSet(store, "gs://shards", "train-*.tar", grey())), store, grey(), FaultPolicy(), train=True
        )
        assert [source[i, i]["label"] for i in range(30)] == [i % 3 for i in range(30)]
        with pytest.raises(DataFault, match="shard does not exist"):
            store.local("gs://shards/none.tar")


def test_one_remote_stream_from_two_ranks_with_workers(server: FaultyServer, tmp_path: Path) -> None:
    """Whole batches through forked workers while shards are fetched: nothing hangs, every sample once."""
    module = datamodule(server.address, tmp_path, train=PATTERN, val=PATTERN, batch_size=5, num_workers=2)
    module.setup()
    for path in storage(tmp_path).folder.glob("*.kept"):
        path.unlink()
    seen = torch.cat([batch["index"] for batch in module.val_dataloader()]).tolist()
    assert seen == list(range(30))
    assert threading.active_count() < 50


@pytest.mark.parametrize("fault", ["drip", "drip headers"])
def test_a_server_that_only_drips_is_left(tmp_path: Path, fault: str) -> None:
    """A byte now and then keeps every single read within its time; its rate gives it away."""
    shards(tmp_path / "there", 30)
    with serve(tmp_path / "there") as faulty:
        faulty.always[NAME] = fault
        began = time.monotonic()
        with pytest.raises(DataFault, match="slower than 10000 bytes a second"):
            storage(tmp_path, timeout_s=0.3, retries=1).local(f"{faulty.address}/{NAME}")
        assert time.monotonic() - began < 8


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
    prefetcher = Prefetcher(store, load_index(ShardSet(store, server.address, PATTERN, grey())))
    prefetcher._process.kill()
    prefetcher._process.join()
    for _ in range(3):
        prefetcher.request([0, 1])
        prefetcher.request([2])
    prefetcher.close()


def test_an_index_beside_remote_shards_is_requested_again(server: FaultyServer, tmp_path: Path) -> None:
    """Shards written again at the same address, with their index: the cached ones are not used."""
    from mvsplit.data.index import write_index

    def write(count: int) -> None:
        shards(server.folder, count)
        for old in (tmp_path / "apart").glob("cache/indices/*"):
            old.unlink()
        made = load_index(ShardSet(storage(tmp_path / "apart"), str(server.folder), "train-*.tar", grey()))
        write_index(server.folder / "train.index.safetensors", made)

    write(30)
    assert len(remote_reader(server, storage(tmp_path), FaultPolicy())) == 30
    write(29)
    kept = storage(tmp_path).cached(f"{server.address}/train.index.safetensors")
    kept.unlink()  # as after the minute in which it is not requested again
    source = remote_reader(server, storage(tmp_path), FaultPolicy())
    assert len(source) == 29
    assert source.read(0, 28)["label"] == 28 % 3


def test_a_file_that_is_called_like_a_command_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "pipe:touch PWNED"
    tar_of(tmp_path / name, {"a.png": picture(7), "a.cls": b"7"})
    assert index(Path("."), pattern=name).columns["label"].tolist() == [7]
    assert next(iter(stream(Path("."), pattern=name)))["label"] == 7
    assert not (tmp_path / "PWNED").exists()


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


def test_failed_downloads_are_logged_once(
    server: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One line, while it still tries: not one per shard or attempt, and none if all goes well."""
    store = storage(tmp_path)
    with caplog.at_level("INFO", logger="mvsplit"):
        store.local(f"{server.address}/train-000000.tar")
        assert caplog.messages == []
        for name in (NAME, "train-000002.tar"):
            server.always[name] = "503"
            with pytest.raises(DataFault):
                store.local(f"{server.address}/{name}")
    assert len(caplog.messages) == 1
    assert f"{NAME}: download failed (" in caplog.messages[0]
    assert "trying again, up to 2 times" in caplog.messages[0]
