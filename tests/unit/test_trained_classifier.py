"""The feature network that is trained on a small set's own images: always the same, and good enough."""

import os
import subprocess
import sys
import time
from pathlib import Path

import data_tools
import pytest
import torch
from data_tools import SUBSTITUTE, grey, picture, storage

from mvsplit.data.faults import FaultPolicy
from mvsplit.data.reader import ShardReader
from mvsplit.data.shard_writer import write_shards
from mvsplit.evaluation.trained_classifier import POOLED, TrainedClassifier, load
from mvsplit.evaluation.weight_files import weights_sha256
from mvsplit.utils.errors import UserError
from mvsplit.utils.run_dirs import PROJECT_ROOT


def reader(folder: Path, name: str, policy: FaultPolicy | None = None) -> ShardReader:
    found = data_tools.index(folder, policy, pattern=f"{name}-*.tar")
    return ShardReader(found, storage(folder), grey(), policy or FaultPolicy(), False)


@pytest.fixture(scope="module")
def digits(data_dir: Path) -> Path:
    return data_dir / "digits"


@pytest.fixture(scope="module")
def fitted(digits: Path) -> TrainedClassifier:
    began = time.monotonic()
    network = TrainedClassifier.fit(reader(digits, "train"), 10, reader(digits, "val"))
    print(f"trained in {time.monotonic() - began:.1f} s, accuracy {network.accuracy:.4f}")
    return network


def test_it_recognises_held_out_digits(fitted: TrainedClassifier) -> None:
    assert 0.98 <= fitted.accuracy < 1


def test_another_fit_with_other_threads_and_seed_has_the_same_bits(fitted: TrainedClassifier, digits: Path) -> None:
    torch.manual_seed(3)
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    try:
        with torch.no_grad():
            again = TrainedClassifier.fit(reader(digits, "train"), 10, reader(digits, "val"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.identity() == fitted.identity()
    assert again.accuracy == fitted.accuracy
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), fitted.parameters(), strict=True))


def test_its_identity_is_the_hash_of_its_weights(fitted: TrainedClassifier) -> None:
    assert fitted.identity() == {"name": "TrainedClassifier", "sha256": weights_sha256(fitted.state_dict())}
    assert {parameter.dtype for parameter in fitted.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in fitted.parameters())


def test_its_features_are_those_of_its_layers(fitted: TrainedClassifier, digits: Path) -> None:
    images, labels = load(reader(digits, "val"))
    found = fitted(images)
    assert found.spatial is not None
    assert found.probabilities is not None
    assert found.pooled.shape == (297, fitted.num_features) == (297, POOLED)
    assert found.spatial.shape == (297, fitted.num_spatial)
    assert torch.allclose(found.probabilities.sum(1), torch.ones(297))
    assert torch.equal(found.probabilities, (found.pooled @ fitted.last.weight.T + fitted.last.bias).softmax(1))
    assert (found.probabilities.argmax(1) == labels).double().mean() == fitted.accuracy
    assert 0.5 < float(found.pooled.square().mean().sqrt()) < 2
    assert found.pooled.std(0).count_nonzero() > POOLED / 2
    with pytest.raises(UserError, match=r"images of \[1, 9, 8\]: the classifier was trained on \[1, 8, 8\]"):
        fitted(torch.zeros(2, 1, 9, 8, dtype=torch.uint8))


def test_too_many_and_unreadable_images_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [shard] = write_shards(tmp_path, "train", ((picture(i), "png", 0) for i in range(3)), 10)
    whole = reader(tmp_path, "train")
    assert load(whole)[0][:, 0, 0, 0].tolist() == [0, 1, 2]
    content = bytearray(shard.read_bytes())
    place = whole.index.row(1).place("data")[0]
    content[place + 40] ^= 255  # only the checksum notices
    found = reader(tmp_path, "train", SUBSTITUTE)
    shard.write_bytes(content)
    assert load(found)[0][:, 0, 0, 0].tolist() == [0, 2]
    monkeypatch.setattr("mvsplit.evaluation.trained_classifier.MAX_BYTES", 100)
    with pytest.raises(UserError, match=r"^data: 3 images of 192 bytes; the classifier takes at most 100$"):
        load(found)
    monkeypatch.setattr("mvsplit.evaluation.trained_classifier.MAX_SAMPLES", 2)
    with pytest.raises(UserError, match=r"^data: the classifier takes at most 2 of 3 images$"):
        load(found)


SCRIPT = """
import sys
from pathlib import Path
from test_trained_classifier import TrainedClassifier, reader
folder = Path(sys.argv[1])
print(TrainedClassifier.fit(reader(folder, "train"), 10, reader(folder, "val")).identity()["sha256"])
"""


@pytest.mark.long
def test_a_processor_without_wide_instructions_finds_the_same_weights(fitted: TrainedClassifier, digits: Path) -> None:
    folders = [PROJECT_ROOT / "src", PROJECT_ROOT / "tests" / "support", Path(__file__).parent]
    old = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
    environment = os.environ | old | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, "-c", SCRIPT, str(digits)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split()[-1] == fitted.identity()["sha256"]
