"""Networks of the metrics, with random weights in the published files' layout, against independent computations."""

import hashlib
import io
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from small_dinov2 import dino_weights
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import VisionTransformer

from mvsplit.evaluation.dinov2 import DinoV2
from mvsplit.evaluation.feature_networks import Inception
from mvsplit.evaluation.weight_files import load_weights, weights_sha256
from mvsplit.utils.errors import UserError

inceptionv3 = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(channels: int = 3, size: int = 40, count: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, channels, size, size), generator=generator(), dtype=torch.uint8)


class Random(inceptionv3.FeatureExtractorInceptionV3):
    """The library's network as it is before it reads its file."""

    def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("weights")
    yield path
    shutil.rmtree(path)  # 400 MB, which pytest would keep


@pytest.fixture(scope="module")
def release(folder: Path) -> Path:
    """Random weights of Inception in the release's layout; activations stay of order 1."""
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Random("inception", ["2048"], empty)
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    path = folder / "release.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(release: Path) -> Inception:
    return Inception(str(release))


def test_inception_equals_the_library_s_extractor(release: Path, inception: Inception) -> None:
    library = inceptionv3.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(release))
    pooled, logits = library(pictures())
    found = inception(pictures())
    assert found.pooled.shape == (2, inception.num_features)
    assert found.probabilities is not None
    assert torch.equal(found.pooled, pooled)
    assert torch.equal(found.probabilities, logits.softmax(1))
    assert float(pooled.std()) > 0.01  # not all dead
    assert (pooled[0] - pooled[1]).abs().max() > 1e-3


def test_spatial_features_are_the_first_channels_of_the_seventh_block(inception: Inception) -> None:
    maps: list[Tensor] = []
    names = [name for name, _ in inception.network.named_children() if name.startswith("Mixed_")]
    assert names.index("Mixed_6d") == 6  # mixed, mixed_1 … mixed_6
    block = inception.network.Mixed_6d
    with block.register_forward_hook(lambda module, inputs, output: maps.append(output)):
        spatial = inception(pictures()).spatial
    assert spatial is not None
    assert spatial.shape == (2, inception.num_spatial) == (2, 2023)
    for b, row, column, channel in ((0, 0, 0, 0), (1, 3, 16, 6), (1, 16, 2, 4)):
        assert spatial[b, (row * 17 + column) * 7 + channel] == maps[0][b, channel, row, column]
    assert float(spatial.min()) == 0 < float(spatial.max())  # after the ReLU


def test_grey_images_are_three_equal_channels(inception: Inception) -> None:
    grey = pictures(1, count=1)
    assert torch.equal(inception(grey).pooled, inception(grey.repeat(1, 3, 1, 1)).pooled)


def test_inception_stays_in_evaluation_without_gradients_and_leaves_random_numbers_alone(release: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    network = Inception(str(release))
    assert torch.equal(torch.get_rng_state(), before)
    network.train()
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_other_layouts_of_the_same_tensors_are_read(release: Path, folder: Path, inception: Inception) -> None:
    tensors = torch.load(release, weights_only=True)
    legacy, safe, old = folder / "legacy.pth", folder / "same.safetensors", folder / "old.pth"
    torch.save(tensors, legacy, _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(tensors, safe)
    torch.save({name: tensor for name, tensor in tensors.items() if "num_batches" not in name}, old)
    expected = inception(pictures(count=1)).pooled
    hashes = {inception.identity()["sha256"]}
    for path in (legacy, safe, old):
        network = Inception(str(path))
        hashes.add(network.identity()["sha256"])
        assert torch.equal(network(pictures(count=1)).pooled, expected)
    assert len(hashes) == 4  # of the files


def test_the_identity_is_the_file_s_hash_which_may_be_required(release: Path) -> None:
    digest = hashlib.sha256(release.read_bytes()).hexdigest()
    assert load_weights(release, digest.upper())[1] == digest
    assert Inception(str(release), digest).identity()["sha256"] == digest
    with pytest.raises(
        UserError, match=rf"features\.weights = \S+: its sha256 is {digest}, must be features\.sha256 = abc$"
    ):
        Inception(str(release), "abc")


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:Validating sparse tensor")
def test_files_that_are_not_weights_are_one_line_each(tmp_path: Path) -> None:
    folder, marker = tmp_path, tmp_path / "unpickled"
    first, bias = "Conv2d_1a_3x3.bn.bias", torch.zeros(32)
    (folder / "text.pth").write_text("no weights")
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "plain.pth").write_bytes(pickle.dumps(Touch(marker)))
    torch.save({"fc.bias": Touch(marker)}, folder / "object.pth")
    torch.save({"fc.bias": Touch(marker)}, folder / "legacy_object.pth", _use_new_zipfile_serialization=False)
    torch.save([bias], folder / "list.pth")
    torch.save({"Another": bias}, folder / "extra.pth")
    torch.save({"fc.bias": bias}, folder / "missing.pth")
    torch.save({first: bias[:5]}, folder / "shape.pth")
    torch.save({first: bias.long()}, folder / "integers.pth")
    torch.save({first: bias.to_sparse()}, folder / "sparse.pth")
    expected = {
        "absent.pth": "no such file",
        ".": "not a regular file",
        "text.pth": "not a file of tensors",
        "empty.safetensors": "not a file of tensors",
        "plain.pth": "not a file of tensors",
        "object.pth": "not a file of tensors",
        "legacy_object.pth": "not a file of tensors",
        "list.pth": "must contain tensors by name",
        "extra.pth": "contains 'Another', which Inception does not have",
        "missing.pth": f"has no '{first}', which Inception needs",
        "shape.pth": rf"'{first}' has the shape \[5\], must be \[32\]",
        "integers.pth": f"'{first}' must be a dense tensor of floating-point numbers",
        "sparse.pth": f"'{first}' must be a dense tensor of floating-point numbers",
    }
    for name, message in expected.items():
        with pytest.raises(UserError, match=f"^features\.weights = {folder / name}: .*{message}") as raised:
            Inception(str(folder / name))
        assert "\n" not in str(raised.value), name
    assert not marker.exists()


def test_a_file_that_unpacks_to_more_than_the_limit_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvsplit.evaluation.weight_files.MAX_BYTES", 1 << 16)
    torch.save({"a": torch.zeros(1 << 16)}, folder / "large.pth")
    with (
        zipfile.ZipFile(folder / "large.pth") as source,
        zipfile.ZipFile(folder / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in source.infolist():
            bomb.writestr(member.filename, source.read(member))
    assert (folder / "bomb.pth").stat().st_size < 1 << 14
    with pytest.raises(UserError, match=r"bytes; at most 65536 are allowed"):
        load_weights(folder / "bomb.pth")


@pytest.mark.parametrize("kind", [Inception, DinoV2])
def test_without_a_network_the_user_learns_what_to_download(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    pattern = (
        r"^features\.weights = None: https://\S+pth cannot be downloaded \(Network is unreachable\); .*"
        r" features\.weights=<its path>$"
    )
    with pytest.raises(UserError, match=pattern):
        kind()


def test_dinov2_equals_torchvision_s_transformer(tmp_path: Path) -> None:
    weights = dino_weights()
    torch.save(weights, tmp_path / "dino.pth")
    network = DinoV2(str(tmp_path / "dino.pth"))
    other = VisionTransformer(224, 14, 2, 2, 128, 512).eval()
    other.heads = torch.nn.Identity()
    names = {
        "norm1": "ln_1", "norm2": "ln_2", "attn.qkv.weight": "self_attention.in_proj_weight",
        "attn.qkv.bias": "self_attention.in_proj_bias", "attn.proj": "self_attention.out_proj", "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.3", "blocks.": "encoder.layers.encoder_layer_", "cls_token": "class_token",
        "pos_embed": "encoder.pos_embedding", "patch_embed.proj": "conv_proj",
    }  # fmt: skip
    state = {}
    for name, tensor in weights.items():
        scale = "ls1" if "attn.proj" in name else "ls2" if "mlp.fc2" in name else None
        if scale is not None:  # torchvision has no scale per channel: it is a part of the branch's last matrix
            gamma = weights[f"{name.rpartition('.')[0].rpartition('.')[0].rpartition('.')[0]}.{scale}.gamma"]
            tensor = tensor * (gamma[:, None] if tensor.ndim == 2 else gamma)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[name.replace("norm.", "encoder.ln.") if name.startswith("norm.") else name] = tensor
    other.load_state_dict({name: t for name, t in state.items() if ".ls" not in name and name != "mask_token"})
    found = network(pictures())
    x = F.interpolate(pictures().float(), (224, 224), mode="bicubic", antialias=True) / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        expected = other(x)
    assert (found.spatial, found.probabilities) == (None, None)
    assert found.pooled.shape == (2, network.num_features) == (2, 128)
    assert (found.pooled - expected).abs().max() < 1e-5
    assert (expected[0] - expected[1]).abs().max() > 1e-3


def cubic(distance: float, a: float = -0.75) -> float:
    x = abs(distance)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def test_dinov2_s_position_embedding_is_interpolated_as_when_it_was_trained(tmp_path: Path) -> None:
    weights = dino_weights(depth=1, width=64, side=37)
    safetensors.torch.save_file(weights, tmp_path / "dino.safetensors")
    network = DinoV2(str(tmp_path / "dino.safetensors")).network
    found = network.positions(16, 16)
    grid = weights["pos_embed"][0, 1:].reshape(37, 37, 64)
    matrix = torch.zeros(16, 37)
    for i in range(16):
        place = (i + 0.5) * 37 / 16.1 - 0.5
        for j in range(int(place) - 1, int(place) + 3):
            matrix[i, min(max(j, 0), 36)] += cubic(place - j)
    expected = torch.einsum("im,jn,mnd->ijd", matrix, matrix, grid).flatten(0, 1)
    assert (found[0, 1:] - expected).abs().max() < 1e-5
    assert torch.equal(found[0, 0], weights["pos_embed"][0, 0])


def test_what_is_not_a_dinov2_is_one_line(tmp_path: Path) -> None:
    weights = dino_weights(depth=1, width=64)
    bad = {
        "embedding": weights | {"pos_embed": torch.zeros(1, 100, 64)},
        "width": weights | {"pos_embed": torch.zeros(1, 257, 65)},
        "none": {},
        "registers": weights | {"register_tokens": torch.zeros(1, 4, 64)},
        "depth": weights | {"blocks.70.norm1.bias": torch.zeros(64)},
    }
    for name, tensors in bad.items():
        torch.save(tensors, tmp_path / f"{name}.pth")
        with pytest.raises(UserError, match=r"^features\.weights = \S+: [^\n]*$"):
            DinoV2(str(tmp_path / f"{name}.pth"))


def test_the_hash_of_weights_covers_names_shapes_and_values() -> None:
    weights = {"a": torch.arange(6.0), "b": torch.zeros(2)}
    changed = [
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2)},
        {"a": torch.arange(6.0), "c": torch.zeros(2)},
        {"a": torch.arange(6.0), "b": torch.tensor([0.0, 1e-30])},
    ]
    assert weights_sha256(dict(reversed(weights.items()))) == weights_sha256(weights)
    assert len({weights_sha256(w) for w in [weights, *changed]}) == 4
