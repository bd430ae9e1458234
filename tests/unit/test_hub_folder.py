"""Folders for a model hub: written by one project, loaded by another, believed in nothing."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import PROJECT_ROOT, convert_here
from omegaconf import DictConfig
from random_weights import random_run
from reference_dit import ReferenceDiT, save_release
from safetensors.torch import load_file, save_file

from mvsplit.training.hub_folder import CARD, INDEX, WHOLE
from mvsplit.training.model_card import FLUX2_CALL, without_places
from mvsplit.training.release_layout import LATENTS
from mvsplit.training.saved_run import SavedRun
from mvsplit.training.tensor_files import MAX_HEADER
from mvsplit.utils.config import to_plain
from mvsplit.utils.errors import UserError
from mvsplit.utils.locks import sole_writer
from mvsplit.utils.run_dirs import HUB_CONFIG, find_checkpoint

SHARDED = "shard_gb=0.0001"
"""100 KB."""


def run(tmp_path: Path, *overrides: str) -> Path:
    """`python src/convert.py hub=true license=mit …` in this process."""
    paths = [f"paths.output_dir={tmp_path}", f"output={tmp_path}/hub", "hub=true", "license=mit"]
    return convert_here(*paths, *overrides)


@pytest.fixture
def folder(config: Callable[..., DictConfig], tmp_path: Path) -> Path:
    """A run of random weights."""
    return random_run(to_plain(config()), tmp_path)


def velocity(saved: SavedRun) -> torch.Tensor:
    with torch.no_grad():
        return saved.network(torch.ones(2, 1, 8, 8), torch.full((2,), 0.3), torch.tensor([3, 7]))


LOADED = """
import sys, torch
from pathlib import Path
import mvsplit
from mvsplit.training.saved_run import SavedRun
assert Path(mvsplit.__file__).is_relative_to(sys.argv[1]), mvsplit.__file__
for name in ("whole", "sharded"):
    saved = SavedRun(Path(sys.argv[2], name), "ema")
    with torch.no_grad():
        v = saved.network(torch.ones(2, 1, 8, 8), torch.full((2,), 0.3), torch.tensor([3, 7]))
    torch.save(v, Path(sys.argv[2], name, "v.pt"))
"""


@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_has_the_hubs_files(folder: Path, tmp_path: Path, sharded: bool) -> None:
    hub = run(tmp_path, f"ckpt_path={folder}", *([SHARDED] if sharded else []))
    files = sorted(path.name for path in hub.iterdir())
    parts = [name for name in files if name.startswith("model-")]
    assert files == sorted([HUB_CONFIG, CARD, *([*parts, INDEX] if sharded else [WHOLE])])
    if sharded:
        assert len(parts) > 2
        assert parts[0] == f"model-00001-of-{len(parts):05d}.safetensors"
        index = json.loads((hub / INDEX).read_text())
        names = {name: load_file(hub / name).keys() for name in parts}
        assert index["weight_map"] == {key: name for name, keys in names.items() for key in keys}
        assert index["metadata"]["total_size"] == sum(
            value.nbytes for name in parts for value in load_file(hub / name).values()
        )
        assert all((hub / name).stat().st_size < 110_000 for name in parts)
    expected = velocity(SavedRun(find_checkpoint(str(folder), ""), "ema"))
    assert torch.equal(velocity(SavedRun(hub, "ema")), expected)


@pytest.mark.slow
def test_a_folder_of_one_project_is_loaded_by_another(folder: Path, tmp_path: Path) -> None:
    """By a copy of the source elsewhere, when the first project's run is gone."""
    elsewhere, fork = tmp_path / "elsewhere", tmp_path / "fork"
    elsewhere.mkdir()
    for name, options in {"whole": [], "sharded": [SHARDED]}.items():
        run(tmp_path, f"ckpt_path={folder}", *options).rename(elsewhere / name)
    expected = velocity(SavedRun(find_checkpoint(str(folder), ""), "ema"))
    shutil.rmtree(folder)
    shutil.copytree(PROJECT_ROOT / "src", fork / "src", ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {"PYTHONPATH": str(fork / "src")}
    command = [sys.executable, "-c", LOADED, str(fork), str(elsewhere)]
    done = subprocess.run(command, env=environment, cwd=fork, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("whole", "sharded"):
        assert torch.equal(torch.load(elsewhere / name / "v.pt", weights_only=True), expected)


def test_a_folder_is_a_checkpoint_like_any_other(folder: Path, tmp_path: Path) -> None:
    """It is found, loaded in either precision, and converted again."""
    hub = run(tmp_path, f"ckpt_path={folder}", SHARDED)
    assert find_checkpoint(str(hub), "/nowhere") == hub
    saved = SavedRun(hub, "ema", "bfloat16")
    assert saved.step == 5
    assert {value.dtype for value in saved.network.parameters()} == {torch.bfloat16}
    assert saved.run_config == saved.config  # nothing of another machine
    with pytest.raises(UserError, match=r"weights = raw: .* does not contain them; use ema"):
        SavedRun(hub, "raw")
    out = convert_here(f"paths.output_dir={tmp_path}", f"ckpt_path={hub}", "weights=[ema]")
    assert torch.equal(velocity(SavedRun(out, "ema")), velocity(SavedRun(hub, "ema")))
    whole = run(tmp_path, f"ckpt_path={folder}", "weights=[raw]", f"output={tmp_path}/raw")
    assert torch.equal(velocity(SavedRun(whole, "raw")), velocity(SavedRun(whole / WHOLE, "raw")))


def test_the_card_describes_the_run_and_nothing_of_the_machine(folder: Path, tmp_path: Path) -> None:
    metrics = {
        "checkpoint": f"{tmp_path}/secret/place.ckpt", "step": 5, "weights": "ema", "val/loss": 0.5, "eval/fid": 2.25,
        "protocol": {
            "samples": {"sampler": {"steps": 25, "cfg_scale": 2.0}, "num_samples": 50000},
            "reference": {"path": f"{tmp_path}/secret/reference.npz", "fingerprint": "abc"},
            "features": {"weights": "https://user:password@host.org/inception.pth"},
        },
    }  # fmt: skip
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    hub = run(tmp_path, f"ckpt_path={folder}", f"metrics={tmp_path}/metrics.json", "license=apache-2.0")
    card = (hub / CARD).read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == "mvsplit"
    assert front["pipeline_tag"] == "unconditional-image-generation"
    assert "mvsplit" in front["tags"]
    count = sum(value.numel() for value in SavedRun(hub, "ema").network.parameters())
    for text in (
        f"{count:,} parameters", "| residual | MVSplit |", "| model.depth | 4 |", "| steps | 5 |",
        "| data.num_classes | 10 |", "| set | digits |", "| data.batch_size | 8 |", "| optim | AdamW |",
        "| eval/fid | 2.25 |", '"cfg_scale": 2.0', '"reference.npz"', '"inception.pth"',
        'mvsplit.load("hub").sample(classes=[0, 1, 2])', "python src/sample.py ckpt_path=hub 'classes=[0,1,2]'",
    ):  # fmt: skip
        assert text in card, text
    for file in hub.iterdir():
        content = file.read_bytes()
        for secret in (str(tmp_path), "secret", "password", str(PROJECT_ROOT), str(Path.home())):
            assert secret.encode() not in content, f"{secret} in {file.name}"


PUBLIC = {
    "s3://AKIA123:SECRETKEY": None, "s3:/AKIA123": None, "http://10.0.0.3:9000": None, "http://10.0.0.3:9000/": None,
    "https://alice:pw@host/file.npz": "file.npz", "https://host/x?token=secret": None, "//server/share": None,
    "/home/alice": None, "/home/alice/": None, "C:\\Users\\alice": None, "file:///home/alice": None, "/root": None,
    "/home/alice/set/digits": "digits", "alice@host": None, "AKIA123:SECRET": None, "/data/AKIA:SECRET": None,
    "a photo: a dog": "a photo: a dog", "digits": "digits",
}  # fmt: skip


@pytest.mark.parametrize("place", PUBLIC)
def test_nothing_of_an_address_or_a_home_is_published(place: str) -> None:
    kept = PUBLIC[place]
    assert without_places({"a": [place]}) == {"a": [kept]}
    assert without_places({place: 1}) == ({} if kept is None else {kept: 1})


def test_a_card_shows_only_finite_metrics_of_plain_names(folder: Path, tmp_path: Path) -> None:
    text = '{"eval/fid": 2.25, "val/loss": 0.5, "eval/big": 1%s, "eval/nan": NaN, "eval/inf": -Infinity, "eval/a|b": 1,'
    text += '"\\n# Hacked": 1, "12345secret": 2, "protocol": {"/home/alice": 1, "h": "http://10.0.0.3:9000"}}'
    (tmp_path / "metrics.json").write_text(text % ("0" * 400))
    card = (run(tmp_path, f"ckpt_path={folder}", f"metrics={tmp_path}/metrics.json") / CARD).read_text()
    shown = card.split("## Metrics")[1].split("## Use")[0]
    assert [line for line in shown.splitlines() if line.startswith("| ")] == ["| | |", "| eval/fid | 2.25 |"]
    assert json.loads(shown.split("```json")[1].split("```")[0]) == {"h": None}
    assert "| samples |" not in card
    for text in ('{"eval/fid": 1, "protocol": %s}', "%s"):
        (tmp_path / "metrics.json").write_text(text % ("[" * 980 + "]" * 980))
        with pytest.raises(UserError, match=r"metrics\.json: nested more than 50 levels deep"):
            run(tmp_path, f"ckpt_path={folder}", f"metrics={tmp_path}/metrics.json", f"output={tmp_path}/none")


@pytest.mark.parametrize(
    ("encoder", "call", "command", "notes"),
    [
        (LATENTS["encoder"], f", autoencoder={FLUX2_CALL})", "ckpt_path=hub autoencoder=flux2 'classes=[0,1,2]'", 0),
        ({"name": "Tiny"}, "[0, 1, 2])", "ckpt_path=hub 'classes=[0,1,2]'", 2),
    ],
)
def test_a_card_says_what_decodes_latents(
    config: Callable[..., DictConfig], tmp_path: Path, encoder: Any, call: str, command: str, notes: int
) -> None:
    latents = {"encoder": encoder, "mean": None, "std": None, "own": True}
    folder = random_run(to_plain(config()), tmp_path, {"samples": 40, "latents": latents})
    card = (run(tmp_path, f"ckpt_path={folder}") / CARD).read_text()
    assert f"{call}\n" in card
    assert f"{command}\n" in card
    assert card.count("# Draws latents; autoencoder=… decodes them, the one of the training set: Tiny\n") == notes
    assert ("import Diffusers\n" in card) == (not notes)


def test_two_processes_do_not_write_one_folder(folder: Path, tmp_path: Path) -> None:
    with sole_writer(tmp_path / "hub"), pytest.raises(UserError, match=r"^output = .*: another process is writing th"):
        run(tmp_path, f"ckpt_path={folder}")
    before = {path.name for path in tmp_path.iterdir()}
    run(tmp_path, f"ckpt_path={folder}")
    assert {path.name for path in tmp_path.iterdir()} == before | {"hub"}


def test_a_release_becomes_a_folder_for_prompts(tmp_path: Path) -> None:
    save_release(tmp_path / "model.pt", ReferenceDiT(text=24, depth=2))
    hub = run(tmp_path, f"release={tmp_path}/model.pt", "num_heads=2", "dtype=bfloat16")
    saved = SavedRun(hub, "ema")
    assert saved.text == {"encoder": {"name": "Qwen3", "width": 24, "max_tokens": 256}, "padding": "longest"}
    assert saved.latents is not None
    assert saved.latents.own
    about = json.loads((hub / HUB_CONFIG).read_text())
    assert about["text"] == saved.text
    card = (hub / CARD).read_text()
    for text in ("pipeline_tag: text-to-image", 'sample(prompts=["a corgi', "'prompts=[\"a corgi", "Qwen3", "bfloat16"):
        assert text in card
    assert "\npython src/sample.py ckpt_path=hub protocol=released 'prompts=[\"a corgi in the snow\"]'\n" in card
    for text in ("data.num_classes", "| steps |", "optim", "averaged", "set |"):  # a release does not record them
        assert text not in card
    assert "| flow.time_shift | 4.0 |" in card


def edited(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(hub: Path) -> None:
        (hub / name).write_text(json.dumps(change(json.loads((hub / name).read_text()))))

    return edit


def another_file(name: str) -> Callable[[Path], None]:
    """The index places the first tensor in another file, which exists."""

    def edit(hub: Path) -> None:
        index = json.loads((hub / INDEX).read_text())
        index["weight_map"][next(iter(index["weight_map"]))] = name
        (hub / INDEX).write_text(json.dumps(index))
        target = hub / name
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file({"x": torch.zeros(1)}, target)

    return edit


def with_tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def edit(hub: Path) -> None:
        name = sorted(hub.glob("model-*"))[0]
        save_file(change(load_file(name)), name)

    return edit


def huge_header(hub: Path) -> None:
    next(hub.glob("model-*")).write_bytes((MAX_HEADER + 1).to_bytes(8, "little") + b"{" * 100)


def nested(depth: int, key: str) -> Callable[[Path], None]:
    def edit(hub: Path) -> None:
        text = json.dumps(json.loads((hub / HUB_CONFIG).read_text()) | {key: "nested"})
        (hub / HUB_CONFIG).write_text(text.replace('"nested"', "[" * depth + "]" * depth))

    return edit


def absurd(hub: Path) -> None:
    """No values, but of a shape that cannot be."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [0, 2**62, 3], "data_offsets": [0, 0]}}).encode()
    (sorted(hub.glob("model-*"))[0]).write_bytes(len(header).to_bytes(8, "little") + header)


def first_doubled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([value, value]) for name, value in tensors.items()}


TAMPERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "path traversal": (another_file("../x.safetensors"), r"names the file '\.\./x\.safetensors'; must be like"),
    "absolute path": (another_file("/tmp/x.safetensors"), r"names the file '/tmp/x\.safetensors'; must be like"),
    "extra keys": (with_tensors(lambda found: found | {"extra": torch.zeros(1)}), "lists other tensors of .* than it"),
    "a missing key": (with_tensors(lambda found: dict(list(found.items())[1:])), "lists other tensors of .* than it"),
    "other shapes": (with_tensors(first_doubled), "the checkpoint belongs to another network; '"),
    "huge header": (huge_header, "is missing or damaged .*a header of more than 16 MiB"),
    "cut": (lambda hub: os.truncate(sorted(hub.glob("model-*"))[-1], 2000), "is missing or damaged"),
    "missing part": (lambda hub: sorted(hub.glob("model-*"))[-1].unlink(), "is missing or damaged .*no such file"),
    "no map": (edited(INDEX, lambda found: {"weight_map": []}), "has no `weight_map`"),
    "no config": (edited(HUB_CONFIG, lambda found: {"architectures": ["x"]}), "was not written by this project's"),
    "no step": (edited(HUB_CONFIG, lambda found: found | {"step": "5"}), "was not written by this project's"),
    "a deep config": (nested(900, "config"), r"config\.json: nested more than 50 levels deep"),
    "deep text": (nested(60, "text"), r"config\.json: nested more than 50 levels deep"),
    "very deep latents": (nested(100_000, "latents"), r"config\.json: nested more than 50 levels deep"),
    "an absurd shape": (absurd, "is missing or damaged .*impossible shape"),
    "a long name": (with_tensors(lambda found: found | {"x" * 5000: torch.zeros(1)}), "lists other tensors of .* than"),
    "code": (
        edited(HUB_CONFIG, lambda found: {**found, "config": {**found["config"], "model": {"_target_": "os.system"}}}),
        r"model\._target_ = os\.system: must be a class of mvsplit\.models in a saved config",
    ),
    "a text encoder": (
        edited(HUB_CONFIG, lambda found: found | {"text": {"encoder": "x"}}),
        "text encoder is not valid",
    ),
    "a padding": (
        edited(HUB_CONFIG, lambda found: found | {"text": {"encoder": {}, "padding": ["longest"]}}),
        "text encoder is not valid",
    ),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_folder_that_was_tampered_with_is_refused_in_one_line(folder: Path, tmp_path: Path, name: str) -> None:
    tamper, message = TAMPERED[name]
    hub = run(tmp_path, f"ckpt_path={folder}", SHARDED)
    SavedRun(hub, "ema")
    tamper(hub)
    with pytest.raises(UserError, match=message) as found:
        SavedRun(hub, "ema")
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 300 + len(str(hub))


def test_a_link_as_in_the_hubs_cache_is_followed(folder: Path, tmp_path: Path) -> None:
    hub = run(tmp_path, f"ckpt_path={folder}")
    expected = velocity(SavedRun(hub, "ema"))
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(list(hub.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    assert torch.equal(velocity(SavedRun(hub, "ema")), expected)
    (hub / WHOLE).unlink()
    (hub / WHOLE).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"is missing or damaged .*not a regular file"):
        SavedRun(hub, "ema")


def test_nothing_else_is_overwritten_or_removed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "mine").touch()
    with pytest.raises(UserError, match=r"output = .*hub: exists; must be a new folder"):
        run(tmp_path, f"ckpt_path={folder}")
    (tmp_path / "hub" / "mine").rename(tmp_path / "mine")
    (tmp_path / "hub.partial").mkdir()
    (tmp_path / "hub.partial" / "mine").touch()
    with pytest.raises(UserError, match=r"hub\.partial is in the way, and contains other files"):
        run(tmp_path, f"ckpt_path={folder}")
    (tmp_path / "hub.partial" / "mine").rename(tmp_path / "hub.partial" / WHOLE)  # left by a killed process
    assert {path.name for path in run(tmp_path, f"ckpt_path={folder}").iterdir()} == {WHOLE, HUB_CONFIG, CARD}
    assert not (tmp_path / "hub.partial").exists()
    for name in (".", "/", ".."):
        with pytest.raises(UserError, match=rf"^output = {re.escape(name)}: must be the name of a new folder$"):
            run(tmp_path, f"ckpt_path={folder}", f"output={name}")
    with pytest.raises(UserError, match=r"license = 'MIT: x': "):
        run(tmp_path, f"ckpt_path={folder}", "license='MIT: x'")


def test_a_network_that_reads_a_file_is_not_published(config: Callable[..., DictConfig], tmp_path: Path) -> None:
    save_file({"embeddings": torch.zeros(11, 2, 8)}, tmp_path / "table.safetensors")
    table = ["model/context=caption_table", f"model.context.embeddings={tmp_path}/table.safetensors"]
    folder = random_run(to_plain(config(*table)), tmp_path)
    with pytest.raises(UserError, match=r"model\.context\.embeddings = .*: a network that reads a file cannot be publ"):
        run(tmp_path, f"ckpt_path={folder}")
    assert not (tmp_path / "hub").exists()
