"""A classifier as another task: its loss by hand, and what of diffusion it refuses or switches off."""

import functools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import compose_config

from mvsplit.callbacks.sample_grid import SampleGrid
from mvsplit.callbacks.time_probe import TimeProbe
from mvsplit.models.residuals import MVSplit, PreNorm
from mvsplit.models.vit import ViT
from mvsplit.training import settings
from mvsplit.training.classifier import ClassifierModule
from mvsplit.training.optim import AdamW
from mvsplit.training.saved_config import check_generates, portable
from mvsplit.utils.config import build, to_plain
from mvsplit.utils.errors import UserError


def small(residual: Any = MVSplit) -> ViT:
    made = functools.partial(residual, writer_init="standard")
    sizes = {"image_size": [4, 6], "channels": 2, "patch_size": 2, "depth": 3, "width": 16, "num_heads": 2}
    return ViT(num_classes=5, num_tokens=2, residual=made, **sizes)


@pytest.mark.parametrize("residual", [MVSplit, PreNorm])
def test_the_loss_is_plain_cross_entropy(residual: Any) -> None:
    torch.manual_seed(0)
    module = ClassifierModule(lambda: small(residual), AdamW())
    module.configure_model()
    network = module.network.double()
    torch.nn.init.normal_(network.head.weight)
    torch.nn.init.normal_(network.head.bias)
    batch = {"image": torch.randn(7, 2, 4, 6).double(), "label": torch.arange(7) % 5}
    losses, right = module.losses(batch)
    logits = network(batch["image"])
    assert losses.dtype == torch.float64
    for row, label, loss, found in zip(logits.tolist(), batch["label"].tolist(), losses.tolist(), right, strict=True):
        assert loss == pytest.approx(-math.log(math.exp(row[label]) / sum(map(math.exp, row))), rel=1e-12)
        assert bool(found) == (row[label] == max(row))
    assert not torch.allclose(logits[0], logits[1])


def test_it_starts_with_equal_probabilities_and_reads_the_first_class_token() -> None:
    network = small()
    assert network.segments == (6, 2)
    image = torch.randn(3, 2, 4, 6)
    assert torch.equal(network(image), torch.zeros(3, 5))
    torch.nn.init.ones_(network.head.weight)
    token = network.run(image, image)[:, 6]
    torch.testing.assert_close(network(image), token.sum(1, keepdim=True).expand(3, 5))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["module=classifier"], "model: DiT has no num_classes; see class ViT in src/mvsplit/models/vit.py"),
        (["model=vit_digits"], "model: ViT has no drop; see class Network in src/mvsplit/flow/objective.py"),
    ],
)
def test_a_network_of_another_task_is_refused(overrides: list[str], message: str) -> None:
    config = to_plain(compose_config("paths.output_dir=/nowhere", "model.depth=1", *overrides))
    with pytest.raises(UserError) as caught:
        build(config["module"]).configure_model()
    assert str(caught.value) == message


@pytest.mark.parametrize("part", ["flow=paper", "sampler.steps=3"])
def test_parts_that_a_classifier_does_not_use_are_refused(part: str) -> None:
    hydra: Any = SimpleNamespace(overrides=SimpleNamespace(task=[part]), runtime=SimpleNamespace(choices={}))
    config = to_plain(compose_config("paths.output_dir=/nowhere", part))
    settings.check_used(config, settings.chosen_parts(hydra))
    config = to_plain(compose_config("paths.output_dir=/nowhere", "experiment=vit_lab", part))
    key, value = part.split("=")
    with pytest.raises(UserError) as caught:
        settings.check_used(config, settings.chosen_parts(hydra))
    assert str(caught.value) == f"{key} = {value}: module ClassifierModule takes no {key.partition('.')[0]}"


def test_a_classifiers_run_generates_nothing() -> None:
    config = to_plain(compose_config("paths.output_dir=/nowhere", "experiment=vit_lab"))
    for known in (config, portable(config)):
        with pytest.raises(UserError, match=r"^ckpt_path = here: not trained with module=flow[^\n]*$"):
            check_generates(known, Path("here"))
    check_generates(to_plain(compose_config("paths.output_dir=/nowhere")), Path("here"))


def test_callbacks_of_diffusion_step_aside(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level("INFO", logger="mvsplit")
    module = ClassifierModule(small, AdamW())
    module.configure_model()
    trainer: Any = SimpleNamespace(is_global_zero=True, sanity_checking=False, fast_dev_run=False, global_step=3)
    grid, probe = SampleGrid(str(tmp_path), num_classes=5), TimeProbe(str(tmp_path))
    grid.on_fit_start(trainer, module)
    grid.on_validation_epoch_end(trainer, module)
    probe.on_validation_start(trainer, module)
    probe.on_validation_batch_start(trainer, module, {}, 0)
    probe.on_validation_end(trainer, module)
    assert list(tmp_path.iterdir()) == []
    assert [record.getMessage() for record in caplog.records] == [
        "callbacks.sample_grid: off, ClassifierModule draws no samples",
        "callbacks.time_probe: off, ClassifierModule has no times",
    ]
