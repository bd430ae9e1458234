"""From latents back to images: both normalisations, the right autoencoder and no other, memory."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_autoencoders import SIZES, saved_autoencoder
from torch.nn import functional as F

from mvsplit.data.autoencoders import MAPS, Autoencoder, Diffusers, Identity, Tiny
from mvsplit.data.latent_space import LatentDecoder, LatentSpace
from mvsplit.utils.errors import UserError

IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def space_of(autoencoder: Autoencoder) -> LatentSpace:
    """With the autoencoder's own normalisation, as the manifest of a set records it."""
    own = autoencoder.normalisation()
    assert own is not None
    manifest = {
        "encoder": autoencoder.identity(),
        "normalisation": {"by": "autoencoder", "mean": own[0], "std": own[1]},
    }
    return LatentSpace.of_manifest(json.loads(json.dumps(manifest | {"channel_mean": []})), len(own[0]), True)


def test_flux2_is_normalised_and_decoded_as_in_diffusers_pipeline(tmp_path: Path) -> None:
    """Against `Flux2Pipeline`'s own methods: 1e-5 of what the network sees, of the decoded image, of the round trip."""
    pytest.importorskip("transformers")  # diffusers' pipelines import it
    from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline as Theirs

    theirs = saved_autoencoder(tmp_path, "AutoencoderKLFlux2")
    mine = Diffusers(str(tmp_path), "AutoencoderKLFlux2")
    pipeline: Any = SimpleNamespace(vae=theirs, _patchify_latents=Theirs._patchify_latents)
    with torch.no_grad():
        expected = Theirs._encode_vae_image(pipeline, IMAGES, torch.Generator())
        space = space_of(mine)
        seen = space.normalise(mine.encode(IMAGES)[0])
        torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-5)
        # As at the end of its `__call__`.
        std = torch.sqrt(theirs.bn.running_var.view(1, -1, 1, 1) + theirs.config.batch_norm_eps)
        unfolded = Theirs._unpatchify_latents(expected * std + theirs.bn.running_mean.view(1, -1, 1, 1))
        decoded = theirs.decode(unfolded, return_dict=False)[0]
    torch.testing.assert_close(LatentDecoder(space, mine)(seen), decoded, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(space.restore(seen), mine.encode(IMAGES)[0], atol=1e-5, rtol=1e-5)


def test_stable_diffusion_is_normalised_and_decoded_as_in_diffusers_pipelines(tmp_path: Path) -> None:
    """Against FLUX.1's img2img pipeline, which has a shift too; it draws from the posterior, so the draw is given."""
    pytest.importorskip("transformers")
    from diffusers.pipelines.flux.pipeline_flux_img2img import FluxImg2ImgPipeline as Theirs

    theirs = saved_autoencoder(tmp_path, "AutoencoderKL")
    mine = Diffusers(str(tmp_path))
    with torch.no_grad():
        expected = Theirs._encode_vae_image(SimpleNamespace(vae=theirs), IMAGES, torch.Generator().manual_seed(5))
        mean, std = mine.encode(IMAGES)
        draw = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
        space = space_of(mine)
        seen = space.normalise(draw)
        torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-5)
        scaled = expected / theirs.config.scaling_factor + theirs.config.shift_factor  # as at the end of its `__call__`
        decoded = theirs.decode(scaled, return_dict=False)[0]
    torch.testing.assert_close(LatentDecoder(space, mine)(seen), decoded, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(space.restore(seen), draw, atol=1e-5, rtol=1e-5)


def test_the_sets_own_statistics_are_the_normalisation_of_earlier_manifests() -> None:
    manifest = {"encoder": Tiny().identity(), "channel_mean": [1.0, 2.0], "channel_std": [3.0, 0.5]}
    space = LatentSpace.of_manifest(manifest, 2, normalise=True)
    z = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    seen = space.normalise(z)
    torch.testing.assert_close(seen[:, 1], (z[:, 1] - 2) / 0.5)
    torch.testing.assert_close(space.restore(seen), z)
    assert LatentSpace.parse(json.loads(json.dumps(space.plain())), 2) == space
    raw = LatentSpace.of_manifest(manifest, 2, normalise=False)
    assert torch.equal(raw.normalise(z), z)
    assert LatentSpace.parse(json.loads(json.dumps(raw.plain())), 2) == raw


@pytest.mark.parametrize("chosen", ["x", [], {}, {"mean": None, "std": None}, {"mean": [0.0]}])
def test_a_normalisation_that_is_not_one_is_refused(chosen: Any) -> None:
    manifest = {"channel_mean": [0.0], "channel_std": [1.0], "normalisation": chosen}
    with pytest.raises(UserError, match="not valid numbers"):
        LatentSpace.of_manifest(manifest, 1, normalise=True)


def test_a_manifest_cannot_fill_the_checkpoints() -> None:
    manifest = {"encoder": {"name": "x" * 20_000}, "channel_mean": [0.0], "channel_std": [1.0]}
    for normalise in (True, False):
        with pytest.raises(UserError, match="identity of the autoencoder in the set's manifest is not credible"):
            LatentSpace.of_manifest(manifest, 1, normalise)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"mean": [1.0], "std": [1.0, 1.0]}, "not valid numbers"),
        ({"mean": [1.0, "x"], "std": [1.0, 1.0]}, "not valid numbers"),
        ({"mean": [1.0, float("nan")], "std": [1.0, 1.0]}, "not valid numbers"),
        ({"mean": [1.0, 1.0], "std": [0.0, 1.0]}, "not positive"),
        ("text", "not valid numbers"),
        ({}, "not valid numbers"),
    ],
)
def test_a_checkpoints_record_is_checked(content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LatentSpace.parse(content, 2)


def test_another_autoencoder_is_refused_in_one_line(tmp_path: Path) -> None:
    saved_autoencoder(tmp_path / "a", "AutoencoderKL")
    saved_autoencoder(tmp_path / "b", "AutoencoderKL", seed=1)
    space = LatentSpace(Diffusers(str(tmp_path / "a")).identity())
    with pytest.raises(UserError, match=r"^autoencoder: not the one [^\n]*: weights = \w+, but theirs is [^\n]*/a$"):
        space.check(Diffusers(str(tmp_path / "b")))
    with pytest.raises(UserError, match="name = Identity, but theirs is Diffusers"):
        space.check(Identity())
    with pytest.raises(UserError, match="no manifest that names its autoencoder"):
        LatentSpace(None).check(Identity())
    with pytest.raises(UserError, match="seed = 1, but theirs is 0"):
        LatentSpace(Tiny(seed=0).identity()).check(Tiny(seed=1))
    (tmp_path / "a").rename(tmp_path / "moved")  # the weights count, not their place
    space.check(Diffusers(str(tmp_path / "moved")))
    with pytest.raises(UserError, match="dtype = bfloat16, but theirs is float32"):
        space.check(Diffusers(str(tmp_path / "moved"), dtype="bfloat16"))


def test_images_are_decoded_in_batches_that_fit_the_memory(tmp_path: Path) -> None:
    theirs = saved_autoencoder(tmp_path, "AutoencoderKL")
    latents = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    image_bytes = MAPS * 16 * 16 * SIZES["block_out_channels"][0] * 4
    sizes: list[int] = []

    def recorded(z: torch.Tensor) -> Any:
        sizes.append(len(z))
        return type(theirs).decode(mine.vae, z)

    for budget, expected in ((2.5, [2, 2, 1]), (100, [5])):
        mine = Diffusers(str(tmp_path), memory_gib=budget * image_bytes / 2**30)
        mine.vae.decode = recorded
        sizes.clear()
        with torch.no_grad():
            torch.testing.assert_close(mine.decode(latents), theirs.decode(latents).sample, atol=1e-5, rtol=1e-5)
        assert sizes == expected
        assert not mine.vae.use_tiling
    tiled = Diffusers(str(tmp_path), memory_gib=0.5 * image_bytes / 2**30)
    with torch.no_grad():
        assert tiled.decode(latents).shape == (5, 3, 16, 16)
    assert tiled.vae.use_tiling


def test_a_picture_of_latents_shows_all_channels() -> None:
    from mvsplit.utils.images import to_uint8

    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    shown = to_uint8(latents)
    assert shown.shape == (2, 3, 8, 8)
    assert shown.float().std() > 30  # not flat
    for channel in range(16):
        changed = latents.clone()
        changed[:, channel] += 1
        assert not torch.equal(to_uint8(changed), shown), f"channel {channel} is not seen"
    assert torch.equal(to_uint8(latents), shown)
    assert F.mse_loss(to_uint8(latents[:, :3]).float(), ((latents[:, :3].clamp(-1, 1) + 1) * 127.5)) < 0.1


OWN = {"encoder": {"name": "Diffusers", "model": "AutoencoderKLFlux2"}, "mean": None, "std": None, "own": True}
"""What a converted release records."""


def test_a_releases_latents_are_decoded_by_the_autoencoders_own_statistics(tmp_path: Path) -> None:
    """As by recorded ones; of the autoencoder's identity, only what is recorded is compared."""
    saved_autoencoder(tmp_path, "AutoencoderKLFlux2")
    mine = Diffusers(str(tmp_path), "AutoencoderKLFlux2")
    recorded = space_of(mine)
    own = LatentSpace.parse(json.loads(json.dumps(OWN)), 16)
    assert own.own
    assert own.plain() == OWN
    assert "own" not in recorded.plain()  # as in earlier checkpoints
    seen = recorded.normalise(mine.encode(IMAGES)[0])
    torch.testing.assert_close(LatentDecoder(own, mine)(seen), LatentDecoder(recorded, mine)(seen), atol=0, rtol=0)
    assert own.completed(mine).mean == recorded.mean
    assert own.completed(mine).std == recorded.std
    saved_autoencoder(tmp_path / "other", "AutoencoderKL")
    with pytest.raises(UserError, match=r"model = AutoencoderKL, but theirs is AutoencoderKLFlux2"):
        LatentDecoder(own, Diffusers(str(tmp_path / "other")))


@pytest.mark.parametrize("change", [{"mean": [0.0]}, {"std": [1.0]}, {"encoder": None}, {"encoder": "Diffusers"}])
def test_a_record_of_own_statistics_has_no_others(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="latents: own = True: must have an encoder, and neither mean nor std"):
        LatentSpace.parse(OWN | change, 16)


def test_an_autoencoder_without_statistics_cannot_give_them() -> None:
    space = LatentSpace({"name": "Identity"}, own=True)
    with pytest.raises(UserError, match="normalised by its own statistics, but it has none"):
        LatentDecoder(space, Identity())
