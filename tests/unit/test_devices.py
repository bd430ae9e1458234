"""Everything is on the strategy's device, whatever the module thinks its own is; `meta` stands for a GPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningModule
from torch import Tensor, nn

from mvsplit.callbacks.monitor import StepMonitor
from mvsplit.callbacks.sample_grid import SampleGrid
from mvsplit.callbacks.throughput import Throughput
from mvsplit.flow.objective import Flow
from mvsplit.flow.sampler import Sampler
from mvsplit.training.module import FlowModule
from mvsplit.training.optim import AdamW
from mvsplit.training.strategies import FSDP2, ZeRO3, _refusing_scalars
from mvsplit.utils.errors import UserError

META = torch.device("meta")


class Table(nn.Module):
    """A network with a caption table, as ZeRO-3 sees it: its parameters are elsewhere."""

    input_shape = (1, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(3, 2))


def trainer_on(device: torch.device, **more: Any) -> Any:
    return SimpleNamespace(strategy=SimpleNamespace(root_device=device), **more)


def test_zero3_moves_what_deepspeed_leaves_alone() -> None:
    strategy = ZeRO3()
    strategy.parallel_devices = [META]
    module = FlowModule(Table, Flow(), AdamW(), Sampler())
    module.network = Table()
    assert strategy._setup_model(module) is module
    metrics = [state for metric in module.mean_loss for state in (metric.mean_value, metric.weight)]
    assert {t.device for t in [*module.buffers(), *metrics]} == {META}
    assert module.device == META


def test_the_device_peak_is_that_of_the_strategys_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 << 30)
    for device, peak in ((torch.device("cuda", 0), 3.0), (torch.device("cpu"), None)):
        trainer = trainer_on(device, global_step=1, log_every_n_steps=1, accumulate_grad_batches=1, world_size=1,
                             loggers=[], callback_metrics={},
                             fit_loop=SimpleNamespace(_should_accumulate=lambda: False))  # fmt: skip
        callback, module, batch = Throughput(), LightningModule(), {"image": torch.zeros(2, 1)}
        callback.on_train_batch_start(trainer, module, batch, 0)  # type: ignore[arg-type]
        callback.on_train_batch_end(trainer, module, None, batch, 0)  # type: ignore[arg-type]
        assert trainer.callback_metrics.get("memory/device_peak_gib") == peak
    assert len(waits) == 1


def test_losses_are_added_up_on_the_strategys_device() -> None:
    monitor = StepMonitor("nowhere")
    monitor.on_train_start(trainer_on(META, is_global_zero=False), None)
    assert monitor._loss.device == META


def test_pictures_are_drawn_on_the_strategys_device() -> None:
    seen: list[torch.device] = []

    class Module(FlowModule):
        def sample(self, condition: Tensor, index: Tensor) -> Tensor:
            seen.extend((condition.device, index.device))
            return torch.zeros(len(index), 1, 4, 4)

    trainer = trainer_on(META, sanity_checking=False, fast_dev_run=False, global_step=3, is_global_zero=False)
    SampleGrid("nowhere", num_classes=3, rows=1, batch_size=2).on_validation_epoch_end(
        trainer, Module(Table, Flow(), AdamW(), Sampler())
    )
    assert seen == [META] * 4

    module = FlowModule(Table, Flow(), AdamW(), Sampler())
    module.network = Table()
    drawn: list[Tensor] = []
    module.sampler = SimpleNamespace(sample=lambda net, condition, noise, shift, null: drawn.append(noise))  # type: ignore
    index = torch.arange(2, device=META)
    module.sample(index, index)
    assert drawn[0].device == META


def test_fsdp2_refuses_a_weight_with_two_names() -> None:
    network = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    network["b"].weight = network["a"].weight
    with pytest.raises(
        UserError, match=r"^model: 'a\.weight' and 'b\.weight' are the same weight, which FSDP2 cannot shard"
    ):
        FSDP2().shard(network)


def test_sharded_strategies_refuse_a_parameter_without_dimensions() -> None:
    with _refusing_scalars(), pytest.raises(UserError, match=r"^model: parameter 'gain' of Linear has no dimensions"):
        nn.Linear(2, 2).gain = nn.Parameter(torch.tensor(1.0))
