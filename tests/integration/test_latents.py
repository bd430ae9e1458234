"""Latents end to end, offline: encode → train with a decoded grid → sample → convert, through diffusers' own files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import SMALL, compose_config
from small_autoencoders import OPTION, saved_autoencoder
from small_dinov2 import dino_weights
from torchvision.io import decode_image, encode_png

import convert
import encode
import eval as evaluation
import sample
import train
from mvsplit.data.autoencoders import Diffusers
from mvsplit.data.datamodule import ShardDataModule
from mvsplit.data.formats import Latents
from mvsplit.data.latent_space import LatentDecoder
from mvsplit.data.shard_writer import write_shards
from mvsplit.data.storage import Storage
from mvsplit.flow.sampler import Sampler
from mvsplit.python import load
from mvsplit.utils.errors import UserError
from mvsplit.utils.images import to_uint8

Run = Callable[..., tuple[dict[str, float], dict[str, Any]]]


class LatentRun:
    """A set of images, its latents, and a run trained on them."""

    def __init__(self, place: Path, model: str, *overrides: str) -> None:
        self.place, self.model = place, model
        self.fold = 2 if model == "AutoencoderKLFlux2" else 1
        saved_autoencoder(place / "vae", model)
        self.chosen = [f"autoencoder={OPTION[model]}", f"autoencoder.path={place}/vae", "autoencoder.subfolder=null"]
        rng = np.random.default_rng(0)
        for name in ("train", "val"):
            pixels = rng.integers(0, 255, (12, 3, 16, 16), dtype=np.uint8)
            images = ((encode_png(torch.from_numpy(x)).numpy().tobytes(), "png", i % 3) for i, x in enumerate(pixels))
            write_shards(place / "images", name, images, 6)
        source = ["data=imagenet_images", f"data.folder={place}/images", "data.image_size=[16,16]",
                  "data.num_classes=3", "data.num_workers=0", "kind=latents"]  # fmt: skip
        self.paths = [f"paths.data_dir={place}/data", f"paths.log_dir={place}/logs"]
        output = [f"paths.output_dir={place}/encode", f"output={place}/latents"]
        encode.encode(compose_config(*source, *self.paths, *output, *self.chosen, *overrides, name="encode.yaml"))
        self.shape = (3 * self.fold**2, 8 // self.fold, 8 // self.fold)
        self.run = place / "logs" / "train" / "runs" / "a"

    def train(self, *overrides: str) -> dict[str, Any]:
        data = ["data=imagenet_latents", f"data.folder={self.place}/latents", "data.num_workers=0",
                f"data.channels={self.shape[0]}", f"data.image_size=[{self.shape[1]},{self.shape[2]}]",
                "data.num_classes=3", "model.patch_size=1"]  # fmt: skip
        self.run.mkdir(parents=True, exist_ok=True)
        config = compose_config(*SMALL, *data, *self.paths, f"paths.output_dir={self.run}", *overrides)
        return train.train(config)[1]

    def sample(self, *overrides: str) -> Path:
        output = self.place / "sample"
        output.mkdir(exist_ok=True)
        return sample.sample(compose_config(*self.paths, f"paths.output_dir={output}", *overrides, name="sample.yaml"))


@pytest.mark.parametrize("model", ["AutoencoderKL", "AutoencoderKLFlux2"])
def test_latents_are_decoded_by_the_autoencoder_of_their_set(tmp_path: Path, model: str) -> None:
    latents = LatentRun(tmp_path, model, "normalisation=autoencoder")
    module = latents.train(*latents.chosen)["module"]
    run = load(latents.run, log_dir=tmp_path / "logs")
    assert run.latents is not None
    vae = Diffusers(str(tmp_path / "vae"), model)  # type: ignore[arg-type]
    assert run.latents.encoder == vae.identity()
    decoder = LatentDecoder(run.latents, vae)

    # The grid: at its real size, since 16 pixels are enlarged to 64, with a frame of 4.
    grid = decode_image(str(sorted((latents.run / "samples").glob("*.png"))[-1]))
    expected = to_uint8(decoder(run.sample([0, 1, 2], seed=0, sampler=Sampler(steps=2))))
    assert grid.shape == (3, 64 + 8, 3 * 68 + 4)
    for column in range(3):
        found = grid[:, 4:68, 4 + 68 * column : 68 + 68 * column][:, ::4, ::4]
        assert (found.int() - expected[column].int()).abs().max() <= 1
    assert module.network.input_shape == latents.shape

    # A set of samples: the run's own autoencoder is used without being named.
    latents.sample("num_samples=7", "batch_size=3", f"output={tmp_path}/set", "sampler.steps=2")
    images = [decode_image(str(path)) for path in sorted((tmp_path / "set" / "png").glob("*.png"))]
    assert [tuple(image.shape) for image in images] == [(3, 16, 16)] * 7
    assert (torch.stack(images[:3]).int() - expected.int()).abs().max() <= 1

    # The same from a converted file, for which it must be named.
    file = tmp_path / "model.safetensors"
    (tmp_path / "convert").mkdir()
    of_run = [f"ckpt_path={latents.run}", f"output={file}", f"paths.output_dir={tmp_path}/convert", *latents.paths]
    convert.main(compose_config(*of_run, name="convert.yaml"))
    given = ["num_samples=7", "batch_size=3", f"ckpt_path={file}", "sampler.steps=2"]
    with pytest.raises(UserError, match="autoencoder = None: the network makes latents, which must be decoded"):
        latents.sample(*given)
    latents.sample(*given, *latents.chosen, f"output={tmp_path}/again")
    parts = [
        safetensors.torch.load_file(tmp_path / name / "parts" / "part-000000.safetensors") for name in ("set", "again")
    ]
    assert all(torch.equal(parts[0][key], parts[1][key]) for key in ("images", "labels"))

    # Evaluated against the images that were encoded, in the features of a small DINOv2 with random weights.
    torch.save(dino_weights(), tmp_path / "dino.pth")
    features = ["features=dinov2", f"features.weights={tmp_path}/dino.pth", f"reference={tmp_path}/images"]
    (tmp_path / "eval").mkdir()
    keys = ["num_samples=7", "batch_size=3", "sampler.steps=2", f"ckpt_path={latents.run}"]
    keys += [*features, f"output={tmp_path}/set", f"paths.output_dir={tmp_path}/eval", *latents.paths]
    metrics = evaluation.evaluate(compose_config(*keys, name="eval.yaml"))
    assert metrics["eval/fid"] > 0
    assert {"eval/precision", "eval/recall", "eval/kid", "val/loss"} <= metrics.keys()
    protocol = json.loads((tmp_path / "eval" / "metrics.json").read_text())["protocol"]
    assert protocol["samples"]["autoencoder"]["weights"] == vae.identity()["weights"]
    assert protocol["features"]["name"] == "DinoV2"

    # Another autoencoder is refused, before training and before sampling.
    saved_autoencoder(tmp_path / "other", model, seed=1)
    other = [*latents.chosen, f"autoencoder.path={tmp_path}/other"]
    with pytest.raises(UserError, match="autoencoder: not the one that encoded the latents: weights = "):
        latents.sample(*given, *other)
    with pytest.raises(UserError, match="autoencoder: not the one that encoded the latents: weights = "):
        latents.train(*other)


def test_without_an_autoencoder_latents_are_shown_as_colours(tmp_path: Path) -> None:
    latents = LatentRun(tmp_path, "AutoencoderKLFlux2")
    latents.train()
    grid = decode_image(str(sorted((latents.run / "samples").glob("*.png"))[-1]))
    assert grid.shape[0] == 3
    assert (grid[0] != grid[1]).any()  # not grey
    with pytest.raises(UserError, match="autoencoder = None: the network makes latents"):
        latents.sample("num_samples=4")
    grid = decode_image(str(latents.sample("count=1", "sampler.steps=2") / "grid.png"))
    assert grid.shape == (3, 64 + 8, 3 * 68 + 4)


def test_a_network_of_images_takes_no_autoencoder(train_here: Run) -> None:
    with pytest.raises(UserError, match="autoencoder: the set contains images, not latents; use null"):
        train_here("autoencoder=tiny")


def test_a_set_in_windows_is_known_before_the_first_window(tmp_path: Path) -> None:
    """Its parts are bound only when the first window is indexed, after the autoencoder has been checked."""
    latents = LatentRun(tmp_path, "AutoencoderKL")
    data = latents.train("data.window=1", *latents.chosen)["datamodule"]
    assert data.space.encoder == Diffusers(str(tmp_path / "vae")).identity()
    assert decode_image(str(sorted((latents.run / "samples").glob("*.png"))[-1])).shape == (3, 64 + 8, 3 * 68 + 4)
    fresh = ShardDataModule(
        str(tmp_path / "latents"), Latents([8, 8], 3), Storage(str(tmp_path / "cache")), [8, 8], 3, 3, 4, window=1
    )
    assert fresh.format.space is None
    assert fresh.space == data.space


def test_latents_normalised_otherwise_are_not_resumed(tmp_path: Path) -> None:
    latents = LatentRun(tmp_path, "AutoencoderKL")
    latents.train("trainer.max_steps=4")
    manifest = tmp_path / "latents" / "train.manifest.json"
    content = json.loads(manifest.read_text())
    content["normalisation"]["mean"][0] += 0.5
    manifest.write_text(json.dumps(content))
    with pytest.raises(UserError, match="ckpt_path: the set's latents are normalised otherwise"):
        latents.train(f"ckpt_path={latents.run}/checkpoints/last.ckpt", "trainer.max_steps=6")
