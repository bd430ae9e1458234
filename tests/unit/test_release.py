"""The paper's released weights: read, computed with, and written back; whatever else is in such a file is refused."""

import functools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_tools import Canary, claimed, deflated, hand_made, nested_encoding, nested_storage, tensor_of
from conftest import compose_config, convert_here
from random_weights import random_run
from reference_dit import ReferenceDiT, euler, release_state, save_release, save_sparse
from torch import Tensor, nn

from convert import RELEASED
from mvsplit.flow.sampler import Sampler
from mvsplit.python import compose
from mvsplit.training.release_file import ReleaseFile, write_release
from mvsplit.training.release_layout import open_release
from mvsplit.training.saved_run import SavedRun
from mvsplit.training.tensor_files import Stored
from mvsplit.utils.config import to_plain
from mvsplit.utils.errors import UserError
from mvsplit.utils.locks import sole_writer


def run(tmp_path: Path, *overrides: str) -> Path:
    """`python src/convert.py …` in this process."""
    return convert_here(f"paths.output_dir={tmp_path}", *overrides)


@functools.cache
def base() -> dict[str, Any]:
    return compose(*RELEASED)


def reference(**sizes: int) -> ReferenceDiT:
    torch.manual_seed(1)
    return ReferenceDiT(**sizes).eval()


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SIZES: dict[str, tuple[dict[str, int], list[str]]] = {
    "without a projection": ({}, ["num_heads=2"]),
    "with a projection": ({"text": 24}, ["num_heads=2"]),
    "with patches": ({"patch": 2, "channels": 3, "text": 24}, ["num_heads=4"]),
    "with the release's heads": ({"width": 256, "text": 256, "depth": 3}, []),
}


@torch.no_grad()
@pytest.mark.parametrize("name", SIZES)
def test_a_release_computes_what_its_equations_say(tmp_path: Path, name: str) -> None:
    """Velocities, guided ones and five Euler steps: 1e-5 in float32."""
    sizes, overrides = SIZES[name]
    theirs = reference(**sizes, **({"heads": 4} if "num_heads=4" in overrides else {}))
    save_release(tmp_path / "model.pt", theirs)
    saved = SavedRun(run(tmp_path, f"release={tmp_path}/model.pt", *overrides), "ema")
    width = sizes.get("text", 64)
    captions, null = draws(2, 5, width), draws(5, width, seed=1)
    for side in (4, 6):
        x, t = draws(2, sizes.get("channels", 8), side, side, seed=2), torch.full((2,), 0.4)
        ours = saved.network(x, t, captions)
        assert ours.std() > 0.1
        torch.testing.assert_close(ours, theirs(x, captions), atol=1e-5, rtol=1e-5)
        drawn = Sampler(steps=5, cfg_scale=2.0).sample(saved.network, captions, x, saved.flow.time_shift, null=null)
        torch.testing.assert_close(drawn, euler(theirs, x, captions, null, 2.0, 5), atol=1e-5, rtol=1e-5)


def test_a_release_brings_what_is_known_of_it(tmp_path: Path) -> None:
    save_release(tmp_path / "model.pt", reference(text=24))
    saved = SavedRun(run(tmp_path, f"release={tmp_path}/model.pt", "num_heads=2"), "ema")
    assert saved.step == 0
    assert saved.config["data"] == {"image_size": [16, 16], "channels": 8, "num_classes": 0}
    assert saved.network.input_shape == (8, 16, 16)
    assert saved.network.embedding_width == 24
    assert saved.flow.time_shift == 4
    model = saved.config["model"]
    assert (model["eps"], model["qk_eps"], model["residual"]["eps"]) == (1e-5, 1e-6, 1e-5)
    assert saved.text == {"encoder": {"name": "Qwen3", "width": 24, "max_tokens": 256}, "padding": "longest"}
    assert saved.latents is not None
    assert saved.latents.own
    assert saved.latents.encoder == {"name": "Diffusers", "model": "AutoencoderKLFlux2"}


@pytest.mark.parametrize(("patch", "side"), [(3, 15), (32, 32)])
def test_patches_that_do_not_divide_the_usual_size_are_loaded(tmp_path: Path, patch: int, side: int) -> None:
    save_release(tmp_path / "model.pt", reference(text=24, depth=1, patch=patch, channels=2))
    saved = SavedRun(run(tmp_path, f"release={tmp_path}/model.pt", "num_heads=2"), "ema")
    assert saved.network.input_shape == (2, side, side)


def test_a_release_is_no_checkpoint(tmp_path: Path) -> None:
    save_release(tmp_path / "model.pt", reference(depth=1))
    with pytest.raises(
        UserError,
        match=r"^ckpt_path = .*: not a checkpoint of this project, but a file of torch\.save; src/convert\.py release=",
    ):
        SavedRun(tmp_path / "model.pt", "ema")


def test_an_export_is_alone_and_removes_what_killed_ones_left(tmp_path: Path) -> None:
    save_release(tmp_path / "model.pt", reference(depth=1))
    file = run(tmp_path, f"release={tmp_path}/model.pt", "num_heads=2")
    left, other = tmp_path / "again.pt.123.partial", tmp_path / "other.pt.123.partial"
    for path in (left, other):
        path.touch()
    for target in (tmp_path / "again.pt", file):
        with sole_writer(target), pytest.raises(UserError, match=r"^output = .*: another process is writing there$"):
            run(tmp_path, f"ckpt_path={file}", f"export={target.suffix == '.pt'}", "weights=[ema]", f"output={target}")
    run(tmp_path, f"ckpt_path={file}", "export=true", f"output={tmp_path}/again.pt")
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt", file.name, "again.pt", other.name}


@pytest.mark.parametrize("ones", ["all", "inputs", "none"])
@pytest.mark.parametrize("under", [None, "model", "state_dict"])
def test_weights_go_in_and_out_unchanged(tmp_path: Path, under: str | None, ones: str) -> None:
    """The exported file has the release's keys, types, shapes and bytes; of norms it has those of both inputs."""
    theirs = reference(text=24, depth=2).bfloat16()
    theirs.blocks[1].float()  # types may differ between tensors
    save_release(tmp_path / "model.pt", theirs, ones, under)
    file = run(tmp_path, f"release={tmp_path}/model.pt", "num_heads=2")
    out = run(tmp_path, f"ckpt_path={file}", "export=true", f"output={tmp_path}/again.pt")
    expected, found = release_state(theirs, "inputs"), torch.load(out, weights_only=True)
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert found[key].shape == value.shape
        assert found[key].view(torch.uint8).equal(value.view(torch.uint8))
    missing, unknown = theirs.load_state_dict(found, strict=False)
    assert unknown == []
    assert all("norm" in key and key.endswith("weight") for key in missing)
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None  # checksums, which PyTorch does not compare
    assert run(tmp_path, f"release={out}", "num_heads=2", f"output={tmp_path}/b.safetensors").read_bytes() == (
        file.read_bytes()
    )
    half = run(tmp_path, f"ckpt_path={file}", "export=true", "dtype=float16", f"output={tmp_path}/half.pt")
    assert {value.dtype for value in torch.load(half, weights_only=True).values()} == {torch.float16}


def test_a_run_of_this_project_is_exported(tmp_path: Path) -> None:
    """It computes the same there."""
    base = compose_config("paths.output_dir=/x", "model=tiny", "data=imagenet_latents", "residual=mvsplit")
    config = to_plain(base)
    context = {"_target_": "mvsplit.models.conditioning.SampleEmbeddings", "_partial_": True, "embedding_width": 24}
    config["model"] |= {"context": context, "patch_size": 1, "eps": 1e-5}
    config["model"]["residual"] |= {"eps": 1e-5}
    folder = random_run(config, tmp_path)
    out = run(tmp_path, f"ckpt_path={folder}", "weights=[raw]", "export=true")
    assert out.name == "model.pt"
    theirs = ReferenceDiT(width=32, heads=2, depth=4, hidden=96, channels=128, text=24)
    theirs.load_state_dict(torch.load(out, weights_only=True), strict=False)
    ours = SavedRun(folder / "checkpoints" / "last-00000005.ckpt", "raw").network
    x, captions = draws(2, 128, 4, 4), draws(2, 3, 24, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, torch.ones(2), captions), theirs(x, captions), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=tiny", r"model\.context\._target_ = .*ClassTokens: must be .*SampleEmbeddings to be exported"),
        ("residual=post_norm", r"model\.context|model\.residual\._target_ = .*PostNorm: must be .*MVSplit"),
        ("model=sit_digits", r"model\._target_ = mvsplit\.models\.sit\.SiT: must be mvsplit\.models\.dit\.DiT"),
    ],
)
def test_other_networks_are_not_exported(tmp_path: Path, override: str, message: str) -> None:
    sets = ["model=tiny"] if override.startswith("residual") else []
    folder = random_run(to_plain(compose_config("paths.output_dir=/x", *sets, override)), tmp_path)
    with pytest.raises(UserError, match=message):
        run(tmp_path, f"ckpt_path={folder}", "export=true")
    assert not (tmp_path / "model.pt").exists()


State = dict[str, Any]


def changed(key: str, value: Any) -> Callable[[State], State]:
    return lambda state: {**state, key: value}


def without(key: str) -> Callable[[State], State]:
    return lambda state: {name: value for name, value in state.items() if name != key}


WRONG: dict[str, tuple[Callable[[State], Any], str]] = {
    "missing": (without("blocks.1.ffn.w13.weight"), r"has no 'blocks\.1\.ffn\.w13\.weight', .* shape \(192, 64\)"),
    "no block": (lambda state: {k: v for k, v in state.items() if "blocks.0" not in k}, r"has no 'blocks\.0\."),
    "no patches": (without("patch_embed.patch_proj.weight"), r"has no 'patch_embed\.patch_proj\.weight'"),
    "unknown": (changed("blocks.0.operator.q_proj.bias", torch.zeros(64)), r"contains 'blocks\.0\.op"),
    "mis-shaped": (
        changed("blocks.1.operator.k_proj.weight", torch.zeros(32, 64)),
        r"'blocks\.1\.operator\.k_proj\.weight' has shape \(32, 64\), must have \(64, 64\)",
    ),
    "of other dimensions": (
        changed("blocks.0.ffn.w2.weight", torch.zeros(64)),
        r"'blocks\.0\.ffn\.w2\.weight' has shape",
    ),
    "no ones": (
        changed("blocks.0.fused_mvsplit_norm2.weight", torch.full((64,), 1.01)),
        r"'blocks\.0\.fused_mvsplit_norm2\.weight' must be ones",
    ),
    "of other heads": (
        changed("blocks.0.operator.qk_norm.key_norm.weight", torch.ones(16)),
        r"has shape \(16,\), must",
    ),
    "of one value": (
        lambda state: (
            {key: state["blocks.0.operator.q_proj.weight"][: len(value)] for key, value in state.items()}
            | {f"blocks.{i}.operator.q_proj.weight": state["blocks.0.operator.q_proj.weight"] for i in range(40)}
        ),
        "its tensors share values, and together claim more than are stored",
    ),
    "a key that is a number": (lambda state: {**state, 3: torch.zeros(1)}, "a key is a int, must be a tensor's name"),
    "a long name": (changed("a\n" + "x" * 4000, torch.zeros(1)), r"contains 'a\\nx{90,98}', which"),
    "of numbers": (changed("final_proj.bias", torch.zeros(8, dtype=torch.int64)), "must be floating-point"),
    "of two types": (
        changed("blocks.1.operator.v_proj.weight", torch.zeros(64, 64).bfloat16()),
        r"'blocks\.1\.operator\.q_proj\.weight', .* must have the same type",
    ),
    "no tensor": (changed("step", 3), "'step' is a int, must be a tensor"),
    "a list": (lambda state: [state], "contains a list, must be tensors by name"),
    "empty": (lambda state: {}, "contains a dict, must be tensors by name"),
    "spread out": (
        changed("final_proj.bias", torch.zeros(8, 9)[:, 0]),
        "overlap or are spread over a larger one; save contiguous copies",
    ),
    "expanded": (changed("final_proj.bias", torch.zeros(1).expand(8)), "claims more|overlap or are spread"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_the_release_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    change, message = WRONG[name]
    torch.save(change(release_state(reference(depth=2))), tmp_path / "model.pt")
    with pytest.raises(UserError, match=f"^release = .*{message}") as found:
        open_release(tmp_path / "model.pt", 2, base(), [16, 16]).verify()
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 300 + len(str(tmp_path))


def test_nothing_is_written_of_a_release_that_is_refused(tmp_path: Path) -> None:
    change, message = WRONG["no ones"]
    torch.save(change(release_state(reference(depth=1))), tmp_path / "model.pt")
    with pytest.raises(UserError, match=message):
        run(tmp_path, f"release={tmp_path}/model.pt", "num_heads=2")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"num_heads = None: means heads of 128 channels, .* is 64; give the number of heads"),
        (["num_heads=3"], r"num_heads = 3: the width 64 / num_heads must be divisible by 4"),
        (["num_heads=2", "output=model.bin"], r"output = model\.bin: must be a file that ends in \.safetensors"),
        (["num_heads=2", "export=true"], r"export = True: .* not together with release"),
        (["num_heads=2", "license=mit"], r"license = mit: only used with hub=true"),
        (["num_heads=2", "hub=true"], r"license = None: hub=true needs the identifier of a licence"),
    ],
)
def test_what_the_file_does_not_show_must_be_given(tmp_path: Path, overrides: list[str], message: str) -> None:
    save_release(tmp_path / "model.pt", reference(depth=1))
    with pytest.raises(UserError, match=message):
        run(tmp_path, f"release={tmp_path}/model.pt", *overrides)


def code(path: Path) -> bytes:
    torch.save({**release_state(reference(depth=1)), "x": Canary(path.with_name("canary"))}, path)
    return path.read_bytes()


def called_by_attributes(path: Path) -> bytes:
    """A BUILD opcode on something else than a state dictionary."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", b"\x80\x02}X\x01\x00\x00\x00aK\x01s}b.")
    return path.read_bytes()


def truncated(path: Path) -> bytes:
    save_release(path, reference(depth=1))
    content = path.read_bytes()
    return content[: len(content) // 2]


def moved(path: Path) -> bytes:
    """The directory's end claims that records are elsewhere."""
    save_release(path, reference(depth=1))
    content = path.read_bytes()
    return content[: len(content) // 3] + content[len(content) // 3 + 64 :]


def claiming(path: Path) -> bytes:
    torch.save({"a": torch.zeros(70_000)[:7]}, path)
    return claimed(path, 70_000, 700_000)


def compressed(path: Path) -> bytes:
    save_release(path, reference(depth=1))
    return deflated(path)


def many_records(path: Path) -> bytes:
    """A directory of 20 MiB."""
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(400):
            archive.writestr(f"{number:060000d}", b"")
    return path.read_bytes()


def many_containers(path: Path) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", b"\x80\x02](" + b"]" * (9 << 20) + b"e.")
    return path.read_bytes()


def other_protocol(path: Path) -> bytes:
    torch.save(release_state(reference(depth=1)), path, pickle_protocol=4)
    return path.read_bytes()


HOSTILE: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "code": (code, r"it names \S+, but only tensors and plain containers are read"),
    "protocol 4": (other_protocol, "pickle protocol 4; only protocol 2, PyTorch's default, is read"),
    "a storage that never hashes": (hand_made(nested_storage), "a tensor without storage"),
    "an encoding that is never shown": (hand_made(nested_encoding), "bytes of another encoding than latin1"),
    "a long key": (hand_made(b"\x80\x02}(" + b"N" * 17 + b"tNs."), "a key is a container"),
    "an absurd shape": (hand_made(tensor_of(b"K\x00\x8a\x08" + b"\xff" * 7 + b"\x0fK\x03")), "a tensor with.* shape"),
    "attributes": (called_by_attributes, "attributes of a dict"),
    "truncated": (truncated, "not a zip file"),
    "moved": (moved, "Bad magic|not where the directory says|truncated|ends at byte"),
    "claimed": (claiming, "a tensor claims more values than are stored"),
    "compressed": (compressed, "it contains compressed records"),
    "many records": (many_records, "too many records"),
    "many containers": (many_containers, "more than 8 MiB of containers"),
    "no archive": (lambda _: b"\x80\x02}q\x00.", "not a zip file"),
    "nothing": (lambda _: b"", "not a zip file"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_means_harm_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    make, message = HOSTILE[name]
    path = tmp_path / "model.pt"
    path.write_bytes(make(path))
    with pytest.raises(
        UserError, match=rf"^release = .*damaged, or not a file of tensors only \(.*({message})"
    ) as found:
        ReleaseFile(path)
    assert "\n" not in str(found.value)
    assert not (tmp_path / "canary").exists()


def test_devices_and_missing_files_are_not_read(tmp_path: Path) -> None:
    long = ("x" * 300, "File name too long")
    for path, message in (("/dev/zero", "not a regular file"), (f"{tmp_path}/none.pt", "no such file"), long):
        with pytest.raises(UserError, match=rf"release = {path[:100]}\S*: {message}"):
            run(tmp_path, f"release={path}")


def test_all_that_torch_saves_of_tensors_is_read(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    state = {
        "parameter": nn.Parameter(draws(2, 3)), "turned": whole.T, "part": whole[1:3], "same": whole,
        "half": draws(3).half(), "empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5), "strided": draws(4, 5)[:, :4],
    }  # fmt: skip
    torch.save(state, tmp_path / "a.pt")
    file = ReleaseFile(tmp_path / "a.pt")
    assert file.tensors.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(file.read(file.tensors[name]), value), name
        assert file.read(file.tensors[name]).is_contiguous()
    assert file.tensors["part"] == Stored(file.tensors["same"].offset + 24, torch.float32, (2, 6))


def test_what_is_written_is_what_torch_reads_and_maps(tmp_path: Path) -> None:
    state = {"a": draws(3, 4), "b": draws(5).bfloat16(), "none": torch.zeros(0, 2), "flag": torch.tensor([True, False])}
    with (tmp_path / "a.pt").open("wb") as file:
        write_release(file, {name: (v.dtype, tuple(v.shape)) for name, v in state.items()}, iter(state.values()))
    for mapped in (False, True):
        found = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mapped)
        assert list(found) == list(state)
        assert all(torch.equal(found[name], value) for name, value in state.items())
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None
    places = ReleaseFile(tmp_path / "a.pt").tensors
    assert [place.offset % 64 for place in places.values()] == [0, 0, 0, 0]


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_release(tmp_path / "model.pt", reference(depth=2))
    file = run(tmp_path, f"release={tmp_path}/model.pt", "num_heads=2")
    before = {path.name for path in tmp_path.iterdir()}
    content = bytearray(file.read_bytes())
    file.write_bytes(content[:-10])
    with pytest.raises(UserError, match="damaged"):
        run(tmp_path, f"ckpt_path={file}", "export=true", f"output={tmp_path}/again.pt")
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_large_file_is_read_at_its_places(tmp_path: Path) -> None:
    """6 GB, of which nothing but headers is on disk: offsets beyond 32 bits."""
    path = tmp_path / "model.pt"
    save_sparse(path, 220, torch.bfloat16)
    assert path.stat().st_size > 5.9e9
    assert path.stat().st_blocks * 512 < 64 << 20
    file = ReleaseFile(path)
    last = file.tensors["final_proj.weight"]
    assert last.offset > 1 << 32
    with path.open("r+b") as raw:
        raw.seek(last.offset)
        raw.write(torch.full((128, 1024), 3.0).bfloat16().view(torch.uint8).numpy().tobytes())
    assert torch.equal(file.read(last), torch.full((128, 1024), 3.0).bfloat16())
    assert not file.read(file.tensors["blocks.219.ffn.w2.weight"]).any()
