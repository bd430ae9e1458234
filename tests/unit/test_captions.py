"""Captions' states: what `encode.py kind=text` stores is what transformers computes, and what batches get."""

import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from captioned import CAPTIONS, TOKENS, WIDTH, caption_of, captioned_digits, encode_captions
from conftest import compose_config
from data_tools import datamodule, image_folder, picture, tar_of
from servers import serve
from transformers import AutoTokenizer, Qwen3Model

import encode
from mvsplit.data.datamodule import ShardDataModule
from mvsplit.data.faults import FaultPolicy
from mvsplit.data.formats import Latents
from mvsplit.data.shard_encoder import ShardEncoder
from mvsplit.data.text_encoder import TextEncoder
from mvsplit.models.conditioning import CaptionTable
from mvsplit.training import settings
from mvsplit.utils.errors import UserError


@pytest.fixture
def copied(captions_root: Path, tmp_path: Path) -> Path:
    """The captioned set, for tests that damage it."""
    return Path(shutil.copytree(captions_root / "captioned", tmp_path / "set"))


def transformers_states(qwen3: Path, captions: list[str], padding: str) -> torch.Tensor:
    """Independently of `TextEncoder`: the reference's own few lines."""
    tokenizer = AutoTokenizer.from_pretrained(qwen3)
    model = Qwen3Model.from_pretrained(qwen3, dtype=torch.float32).eval()
    tokens = tokenizer(captions, padding=padding, truncation=True, max_length=TOKENS, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state


def members(folder: Path, name: str = "train") -> dict[str, dict[str, bytes]]:
    """Key → suffix → content, of all shards."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob(f"{name}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                found.setdefault(key, {})[suffix] = file.read()
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def manifest(folder: Path, name: str = "train") -> dict[str, Any]:
    return json.loads((folder / f"{name}.manifest.json").read_text())


def read(folder: Path | str, tmp_path: Path, **options: Any) -> ShardDataModule:
    data = datamodule(folder, tmp_path / "cache", **{"text": "longest", "val": "val-*.tar"} | options)
    data.prepare_data()
    data.setup()
    return data


# ---------------------------------------------------------------- encoding


def test_what_is_stored_is_what_transformers_computes(captions_root: Path) -> None:
    stored = members(captions_root / "captioned")
    labels = [int(sample["cls"]) for sample in stored.values()]
    captions = [caption_of(label, i) for i, label in enumerate(labels)]
    assert [sample["txt"].decode() for sample in stored.values()] == captions
    assert "" in captions
    texts = [safetensors.torch.load(sample["text.safetensors"]) for sample in stored.values()]
    states = torch.stack([text["states"] for text in texts])
    assert states.shape == (40, TOKENS, WIDTH)
    for first in (0, 8, 20, 28, 36):  # the batches that were encoded together: 8, 8, 4 of each shard of 20
        last = min(first + 8, 20 if first < 20 else 40)
        theirs = transformers_states(captions_root / "qwen3", captions[first:last], "max_length")
        assert torch.equal(states[first:last], theirs)
    for i in (0, 1, 10):
        alone = transformers_states(captions_root / "qwen3", [captions[i]], "max_length")[0]
        torch.testing.assert_close(states[i], alone, atol=2e-6, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(captions_root / "qwen3")
    lengths = [len(tokenizer(caption).input_ids) for caption in captions]
    assert [int(text["num_tokens"]) for text in texts] == [min(length, TOKENS) for length in lengths]
    assert max(lengths) > TOKENS  # some are cut
    null = safetensors.torch.load_file(captions_root / "captioned" / "null.safetensors")["embeddings"]
    assert torch.equal(null, transformers_states(captions_root / "qwen3", [""], "max_length")[0])


def test_everything_else_is_copied(captions_root: Path) -> None:
    source, copies = members(captions_root / "source"), members(captions_root / "captioned")
    assert [s["png"] for s in source.values()] == [s["png"] for s in copies.values()]
    assert [s["cls"] for s in source.values()] == [s["cls"] for s in copies.values()]
    about = manifest(captions_root / "captioned")
    assert about["kind"] == "images"
    assert about["samples"] == 40
    encoder = TextEncoder(str(captions_root / "qwen3"), max_tokens=TOKENS, dtype="float32").identity()
    assert about["text"] == {"encoder": encoder, "tokens": TOKENS, "width": WIDTH, "dtype": "float32"}
    assert about["settings"] == {"kind": "text", "shard_size": 20, "batch_size": 8}


def test_latents_keep_what_decodes_them(captions_root: Path, tmp_path: Path) -> None:
    paths = [f"paths.data_dir={tmp_path}", f"paths.output_dir={tmp_path}", f"output={tmp_path}/latents"]
    source = [f"data.folder={captions_root}/source", "data=digits", "kind=latents", "autoencoder=tiny", "shard_size=20"]
    latents = encode.encode(compose_config(*source, *paths, name="encode.yaml"))
    sizes = ["data=imagenet_latents", "data.channels=4", "data.image_size=[4,4]", "data.num_classes=10"]
    out = encode_captions(tmp_path / "text", latents, captions_root / "qwen3", *sizes, "text_encoder.dtype=bfloat16")
    before, after = manifest(latents), manifest(out)
    statistics = ("channel_mean", "channel_std", "normalisation")
    for key in ("kind", "shape", "encoder", "posterior", "preprocessing", *statistics):
        assert after[key] == before[key], key
    shape: dict[str, Any] = {"image_size": [4, 4], "channels": 4}
    plain = read(latents, tmp_path, format=Latents([4, 4], 4), text=None, **shape)
    both = read(out, tmp_path, format=Latents([4, 4], 4), text="fixed", **shape)
    for name in ("train", "val"):
        one, other = next(plain.batches(name)), next(both.batches(name))  # type: ignore[arg-type]
        assert torch.equal(one["image"], other["image"])
        assert one["caption"] == other["caption"]
        assert other["condition"].shape == (4, TOKENS, WIDTH)
        assert other["condition"].dtype == other["null_condition"].dtype == torch.bfloat16


def test_an_interrupted_encoding_resumes_to_the_very_bytes(
    captions_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, done = ShardEncoder.encode, list[str]()

    def killed(self: ShardEncoder, task: Any, report: Any) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(task.name)
        whole(self, task, report)

    monkeypatch.setattr(ShardEncoder, "encode", killed)
    with pytest.raises(KeyboardInterrupt):
        encode_captions(tmp_path / "out", captions_root / "source", captions_root / "qwen3")
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == done
    assert not (tmp_path / "out" / "null.safetensors").exists()
    with pytest.raises(UserError, match="has not finished 'train'"):
        read(tmp_path / "out", tmp_path)
    monkeypatch.setattr(ShardEncoder, "encode", lambda self, task, report: whole(self, task, report))
    encode_captions(tmp_path / "out", captions_root / "source", captions_root / "qwen3")
    assert files(tmp_path / "out") == files(captions_root / "captioned")


@pytest.mark.slow
def test_several_processes_write_the_same_bytes(captions_root: Path, tmp_path: Path) -> None:
    encode_captions(tmp_path / "out", captions_root / "source", captions_root / "qwen3", "num_processes=2")
    assert files(tmp_path / "out") == files(captions_root / "captioned")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("text_encoder.max_tokens=8", "text_encoder.max_tokens = 16, not 8"),
        ("text_encoder.dtype=bfloat16", "text_encoder.dtype = float32, not bfloat16"),
        ("batch_size=4", "batch_size = 8, not 4"),
        ("kind=images", "batch_size = 8, not None"),
    ],
)
def test_a_folder_of_other_settings_is_refused(captions_root: Path, copied: Path, override: str, message: str) -> None:
    before = files(copied)
    with pytest.raises(UserError, match=r"^output = .*: choose another folder.*$") as caught:
        encode_captions(copied, captions_root / "source", captions_root / "qwen3", override)
    assert message in str(caught.value)
    assert files(copied) == before


def test_samples_without_captions(captions_root: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    for name in ("train", "val"):
        tar_of(tmp_path / "none" / f"{name}-0.tar", {"0.png": picture(1), "0.cls": b"1"})
    with pytest.raises(UserError, match=r"has no captions for train \(\.txt, or `caption` in \.json\)"):
        encode_captions(tmp_path / "out", tmp_path / "none", captions_root / "qwen3")
    more = {"1.png": picture(1), "1.cls": b"1", "1.json": b'{"caption": "half a character: \\ud800"}'}
    for name in ("train", "val"):
        tar_of(tmp_path / "none" / f"{name}-0.tar", {"0.png": picture(1), "0.cls": b"1", **more})
    with pytest.raises(UserError, match=r"sample '0' has no caption"):
        encode_captions(tmp_path / "out2", tmp_path / "none", captions_root / "qwen3")
    tolerant = ["data.faults.action=substitute", "data.faults.max_rate=1.0"]
    out = encode_captions(tmp_path / "out2", tmp_path / "none", captions_root / "qwen3", *tolerant)
    assert manifest(out)["left_out"] == {"missing_member": 1}
    assert [sample["txt"] for sample in members(out).values()] == [b"half a character: ?"]


# ----------------------------------------------------------------- a table


def table(captions_root: Path, folder: Path, names: str, *overrides: str) -> Path:
    (folder / "names.txt").write_text(names)
    paths = [f"paths.data_dir={folder}", f"paths.output_dir={folder}", f"output={folder}/table.safetensors"]
    encoder = [
        f"text_encoder.path={captions_root}/qwen3",
        f"text_encoder.max_tokens={TOKENS}",
        "text_encoder.dtype=float32",
    ]
    chosen = ["kind=text", f"captions={folder}/names.txt", *paths, *encoder, *overrides]
    return encode.encode(compose_config(*chosen, name="encode.yaml"))


def test_class_names_make_a_table(captions_root: Path, tmp_path: Path) -> None:
    names = ["a zero", "an orange cat, drawn", "two"]
    path = table(captions_root, tmp_path, "\n".join(names) + "\n")
    context = CaptionTable(WIDTH, str(path))
    theirs = transformers_states(captions_root / "qwen3", [*names, ""], "longest")
    assert torch.equal(context.table, theirs)
    assert context.null_class == 3
    assert theirs.shape[1] < TOKENS
    with safetensors.safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["encoder"]) == manifest(captions_root / "captioned")["text"]["encoder"]


@pytest.mark.parametrize(
    ("names", "override", "message"),
    [
        ("a\n\nb\n", "seed=0", r"captions = .*names\.txt: line 2 is empty; each class needs a caption"),
        ("", "seed=0", r"captions = .*names\.txt: contains no captions"),
        ("a\n", "captions=/nowhere.txt", r"captions = /nowhere\.txt: no such file"),
        ("a\n", "output=/nowhere/table", r"output = /nowhere/table: must be a file that ends in \.safetensors"),
        ("a\n", "output=${captions}.safetensors", r"output = .*: exists already"),
        ("a\n", "text_encoder.path=/nowhere", r"text_encoder\.path = /nowhere: no such folder"),
    ],
)
def test_mistakes_with_tables_are_one_line(
    captions_root: Path, tmp_path: Path, names: str, override: str, message: str
) -> None:
    (tmp_path / "names.txt.safetensors").touch()
    with pytest.raises(UserError, match=rf"^{message}[^\n]*$"):
        table(captions_root, tmp_path, names, override)


def test_a_table_needs_the_kind_that_writes_it() -> None:
    config = compose_config("captions=names.txt", "paths.output_dir=/x", name="encode.yaml")
    with pytest.raises(UserError, match=r"captions = names\.txt: a table is only written with kind=text"):
        encode.checked(config)


# ----------------------------------------------------------------- batches


def batches(data: ShardDataModule, name: str = "train") -> Iterator[dict[str, Any]]:
    return data.batches(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
def test_longest_is_the_padding_of_the_reference(captions_root: Path, tmp_path: Path, workers: int) -> None:
    data = read(captions_root / "captioned", tmp_path, num_workers=workers)
    lengths, stream = set(), batches(data)
    for _ in range(6):
        batch = next(stream)
        theirs = transformers_states(captions_root / "qwen3", [*batch["caption"], ""], "longest")
        assert batch["condition"].shape == theirs[:-1].shape
        torch.testing.assert_close(batch["condition"], theirs[:-1], atol=2e-6, rtol=0)
        null = batch["null_condition"]
        assert null.shape == (TOKENS, WIDTH)
        torch.testing.assert_close(null[: theirs.shape[1]], theirs[-1], atol=2e-6, rtol=0)
        assert "num_tokens" not in batch
        lengths.add(theirs.shape[1])
    assert len(lengths) > 1


def test_fixed_is_all_that_is_stored_and_nothing_is_read_without_text(captions_root: Path, tmp_path: Path) -> None:
    fixed = next(batches(read(captions_root / "captioned", tmp_path, text="fixed")))
    theirs = transformers_states(captions_root / "qwen3", fixed["caption"], "max_length")
    torch.testing.assert_close(fixed["condition"], theirs, atol=2e-6, rtol=0)
    plain = read(captions_root / "captioned", tmp_path, text=None)
    batch = next(batches(plain))
    assert not {"condition", "null_condition"} & batch.keys()
    assert torch.equal(batch["image"], fixed["image"])
    assert torch.equal(batch["label"], fixed["label"])


def test_the_webdataset_reader_yields_the_same_states(captions_root: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"reader": "webdataset", "samples_per_shard": 20, "shuffle_buffer": 8}
    batch = next(batches(read(captions_root / "captioned", tmp_path, **options)))
    theirs = transformers_states(captions_root / "qwen3", batch["caption"], "longest")
    torch.testing.assert_close(batch["condition"], theirs, atol=2e-6, rtol=0)
    without = next(batches(read(captions_root / "captioned", tmp_path, text=None, **options)))
    assert without["caption"] == batch["caption"]
    assert "condition" not in without


@pytest.mark.parametrize("where", ["local", "remote"])
def test_windows_read_the_same_states(captions_root: Path, tmp_path: Path, where: str) -> None:
    whole = read(captions_root / "captioned", tmp_path, window=0, val="val-000000.tar")
    expected = {int(n): states for n, states in zip(*states_of(whole, 10), strict=True)}
    with serve(captions_root / "captioned") as server:
        folder = server.address if where == "remote" else captions_root / "captioned"
        names = {"train": "train-{000000..000001}.tar", "val": "val-{000000..000000}.tar"}
        data = read(folder, tmp_path / where, window=1, text="fixed", **names)
        numbers, states = states_of(data, 10)
        data.source.close()
    assert len(numbers) == 40
    for number, mine in zip(numbers, states, strict=True):
        theirs = expected[(number >> 32) * 20 + number % 2**32]  # shards of 20 samples
        assert torch.equal(mine[: len(theirs)], theirs)


def states_of(data: ShardDataModule, count: int) -> tuple[list[int], list[torch.Tensor]]:
    numbers, states, stream = list[int](), list[torch.Tensor](), batches(data)
    for _ in range(count):
        batch = next(stream)
        numbers += batch["index"].tolist()
        states += list(batch["condition"])
    return numbers, states


HOSTILE: dict[str, Callable[[], bytes]] = {
    "not safetensors": lambda: b"PK\x03\x04" * 100,
    "empty": lambda: b"",
    "another width": lambda: text_member(torch.zeros(TOKENS, WIDTH + 1)),
    "another type": lambda: text_member(torch.zeros(TOKENS, WIDTH, dtype=torch.float16)),
    "integers": lambda: text_member(torch.zeros(TOKENS, WIDTH, dtype=torch.int32)),
    "not finite": lambda: text_member(torch.full((TOKENS, WIDTH), -torch.inf)),
    "a negative count": lambda: text_member(torch.zeros(TOKENS, WIDTH), torch.tensor(-1)),
    "a count too high": lambda: text_member(torch.zeros(TOKENS, WIDTH), torch.tensor(TOKENS + 1)),
    "counts": lambda: text_member(torch.zeros(TOKENS, WIDTH), torch.tensor([1, 2])),
    "a float count": lambda: text_member(torch.zeros(TOKENS, WIDTH), torch.tensor(3.0)),
    "no count": lambda: safetensors.torch.save({"states": torch.zeros(TOKENS, WIDTH)}),
    "huge": lambda: text_member(torch.zeros(4000, WIDTH)),
    "a header of a terabyte": lambda: (1 << 40).to_bytes(8, "little") + b"{}",
}


def text_member(states: torch.Tensor, count: torch.Tensor | None = None) -> bytes:
    return safetensors.torch.save({"states": states, "num_tokens": torch.tensor(3) if count is None else count})


def with_member(folder: Path, content: bytes | None, key: str = "train00000003") -> Path:
    """Replace, or remove, the states of one sample; the index beside the shards no longer holds."""
    (shard,) = folder.glob("train-000000.tar")
    samples = members(folder)
    renewed = {}
    for name, sample in list(samples.items())[:20]:
        parts = dict(sample)
        if name == key:
            parts |= {"text.safetensors": content} if content is not None else {}
            if content is None:
                del parts["text.safetensors"]
        renewed |= {f"{name}.{suffix}": data for suffix, data in parts.items()}
    tar_of(shard, renewed)
    (folder / "train.index.safetensors").unlink()
    return folder


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_states_are_faults(copied: Path, tmp_path: Path, what: str) -> None:
    folder = with_member(copied, HOSTILE[what]())
    data = read(folder, tmp_path, batch_size=40)
    with pytest.raises(UserError, match=r"^[^\n]*train-000000\.tar: sample 3 \('train00000003'\)[^\n]*$"):
        next(batches(data))
    tolerant = read(folder, tmp_path, batch_size=40, faults=FaultPolicy("substitute", 1.0))
    batch = next(batches(tolerant))
    assert 3 not in batch["index"]
    assert sum(tolerant.counts["train"].counts.values()) == 1
    in_order: dict[str, Any] = {"faults": FaultPolicy("substitute", 1.0), "shuffle_buffer": 1, "samples_per_shard": 20}
    stream = read(folder, tmp_path, reader="webdataset", batch_size=40, **in_order)
    assert len(next(batches(stream))["condition"]) == 40
    assert sum(stream.counts["train"].counts.values()) >= 1


def test_a_sample_without_states_is_a_fault(copied: Path, tmp_path: Path) -> None:
    folder = with_member(copied, None)
    with pytest.raises(UserError, match=r"sample 3 .* has no member for 'text'"):
        next(batches(read(folder, tmp_path, batch_size=40)))
    with pytest.raises(UserError, match=r"sample 'train00000003' lacks its text\.safetensors"):
        next(batches(read(folder, tmp_path, reader="webdataset", batch_size=40, shuffle_buffer=1)))
    assert len(next(batches(read(folder, tmp_path, text=None, batch_size=40)))["image"]) == 40


def test_a_damaged_sample_of_validation_has_no_weight(copied: Path, tmp_path: Path) -> None:
    folder = with_member(copied, HOSTILE["empty"]())
    data = read(folder, tmp_path, val="train-*.tar", batch_size=8, faults=FaultPolicy("substitute", 1.0))
    batch = next(batches(data, "val"))
    assert batch["weight"].tolist() == [1, 1, 1, 0, 1, 1, 1, 1]
    assert batch["condition"][3].abs().sum() == 0


@pytest.mark.parametrize("reader", ["index", "webdataset"])
def test_a_set_without_states_is_refused_at_the_start(captions_root: Path, tmp_path: Path, reader: str) -> None:
    message = r"^data\.text = longest: .*source contains no states of captions; src/encode\.py kind=text writes them$"
    with pytest.raises(UserError, match=message):
        read(captions_root / "source", tmp_path, reader=reader)


def damaged_manifest(folder: Path, name: str = "train", **changes: Any) -> None:
    about = manifest(folder, name)
    (folder / f"{name}.manifest.json").write_text(json.dumps(about | {"text": about["text"] | changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": 10**12}, {"tokens": -1}, {"tokens": True}, {"width": "32"}, {"width": None}, {"dtype": "float8"},
        {"dtype": ["float32"]}, {"encoder": None}, {"encoder": {"name": "x" * 100_000}},
        {"encoder": {"name": [[[[[]]]]]}},
    ],
)  # fmt: skip
def test_manifests_that_are_not_credible_are_refused(copied: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    for name in ("train", "val"):
        damaged_manifest(copied, name, **changes)
    with pytest.raises(UserError, match=r"^data\.folder = [^\n]*what its manifest records of the captions' states"):
        read(copied, tmp_path)


def test_a_manifest_that_is_nested_deeply_is_none(copied: Path, tmp_path: Path) -> None:
    about = manifest(copied)
    for depth in (60, 600, 100_000):
        text = json.dumps(about | {"x": "nested"}).replace('"nested"', "[" * depth + "]" * depth)
        (copied / "train.manifest.json").write_text(text)
        with pytest.raises(UserError, match=r"^data\.text = longest: [^\n]* contains no states of captions"):
            read(copied, tmp_path)


def test_sets_whose_captions_differ_are_refused(copied: Path, tmp_path: Path) -> None:
    damaged_manifest(copied, "val", tokens=8)
    with pytest.raises(UserError, match=r"data\.val = val-\*\.tar: its captions were not encoded as those of"):
        read(copied, tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"x" * 5000, "shape", "huge"])
def test_the_empty_captions_states_must_be_there(copied: Path, tmp_path: Path, content: Any) -> None:
    path = copied / "null.safetensors"
    if isinstance(content, str):
        tokens = {"shape": TOKENS + 1, "huge": 10**5}[content]
        content = safetensors.torch.save({"embeddings": torch.zeros(tokens, WIDTH)})
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=r"^data\.folder: [^\n]*null\.safetensors must contain the states of the empty"):
        read(copied, tmp_path)


# -------------------------------------------------------- without classes


def test_sets_without_classes(tmp_path: Path) -> None:
    folder = captioned_digits(tmp_path / "source", classes=False)
    data = read(folder, tmp_path, text=None, num_classes=0)
    for name in ("train", "val"):
        batch = next(batches(data, name))
        assert "label" not in batch
        assert len(batch["image"]) == 4
    stream = next(batches(read(folder, tmp_path, text=None, num_classes=0, reader="webdataset")))
    assert "label" not in stream
    # The index that was made without classes is not taken for one with.
    with pytest.raises(UserError, match=r"data\.num_classes = 10: .*contains a sample without a class label.*; use 0"):
        read(folder, tmp_path, text=None)
    with pytest.raises(UserError, match="has no class label"):
        read(folder, tmp_path / "other", text=None)


def test_classes_that_nobody_needs_may_be_anything(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    tar_of(tmp_path / "set" / "train-0.tar", {"0.png": picture(1), "0.cls": b"dog", "1.png": picture(2), "1.cls": b"7"})
    data = read(tmp_path / "set", tmp_path, text=None, num_classes=0, val="train-*.tar", batch_size=2)
    assert next(batches(data, "val"))["index"].tolist() == [0, 1]


def test_folders_are_classes(tmp_path: Path) -> None:
    image_folder(tmp_path, ("ant", "bee"), (8, 8))
    overrides = ["data=image_folder", f"data.folder={tmp_path}", "data.num_classes=0", "paths.output_dir=/x"]
    with pytest.raises(ValueError, match=r"data\.num_classes = 0: must be at least 1 with data\.layout=folders"):
        settings.checked(compose_config(*overrides, "model/context=captions"))


def test_keys_are_checked() -> None:
    for override, message in (
        ("data.text=short", r"data\.text = 'short': must be 'longest' or 'fixed'"),
        ("model.context.num_tokens=0", r"model\.context\.num_tokens = 0: must be greater than 0"),
    ):
        with pytest.raises(UserError, match=message):
            settings.checked(compose_config(*CAPTIONS, override, "paths.output_dir=/x"))
