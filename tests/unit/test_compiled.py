"""One compiled block serves every layer, in training, with recomputation, in validation and in sampling."""

import functools
import logging

import pytest
import torch

from mvsplit.flow.sampler import Sampler
from mvsplit.models import compiled
from mvsplit.models.compiled import Compile, compile_if_repaid
from mvsplit.models.conditioning import ClassTokens
from mvsplit.models.dit import DiT
from mvsplit.models.recompute import Checkpointing
from mvsplit.models.residuals import MVSplit


def network(depth: int, compile: Compile, every: int = 0) -> DiT:
    torch.manual_seed(0)
    residual = functools.partial(MVSplit, writer_init="standard")
    context = functools.partial(ClassTokens, num_classes=3)
    net = DiT([4, 4], 1, 2, depth, 16, 2, context, residual, compile=compile, checkpointing=Checkpointing(every))
    torch.nn.init.normal_(net.final_proj.weight)
    return net


def gradients(net: DiT, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    net(*inputs).square().sum().backward()
    return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}


@pytest.mark.slow
def test_recomputation_inside_of_the_compiled_block_gives_the_same_gradients_and_keeps_only_inputs() -> None:
    inputs = torch.randn(3, 1, 4, 4).double(), torch.rand(3), torch.tensor([0, 2, 1])
    plain = gradients(network(8, False).double(), inputs)
    from torch._dynamo.utils import counters

    counters.clear()
    recomputed = network(8, True, every=1).double()
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = recomputed(*inputs).square().sum()
    loss.backward()
    for name, parameter in recomputed.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-9, atol=1e-12, msg=name)
    assert counters["stats"]["unique_graphs"] <= 2  # the first block's input is not like the others': a cat's result
    weights = sum(p.nbytes for p in recomputed.parameters())
    trunk = 3 * recomputed.num_tokens * 16 * 8  # bytes between two blocks, of which one is kept per block
    assert sum(kept.values()) < weights + 8 * 1.5 * trunk + 20_000


@pytest.mark.slow
def test_sampling_is_compiled_once_for_all_depths_and_batch_sizes() -> None:
    from torch._dynamo.utils import counters

    noise, labels = torch.randn(9, 1, 4, 4), torch.arange(9) % 3
    sampler = Sampler("heun", 3, cfg_scale=2.0)
    plain, fast, deeper = network(4, False), network(4, True), network(40, True)
    counters.clear()
    for size in (9, 9, 4, 1):
        expected, got = (sampler.sample(net, labels[:size], noise[:size]) for net in (plain, fast))
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * expected.abs().max().item())
    sampler.sample(deeper, labels, noise)
    assert counters["stats"]["unique_graphs"] == 1
    with torch.inference_mode():  # as Lightning validates
        for size in (9, 5, 2):
            torch.testing.assert_close(
                fast(noise[:size], torch.rand(size), labels[:size]),
                plain(noise[:size], torch.rand(size), labels[:size]),
                rtol=0,
                atol=2e-5 * expected.abs().max().item(),
            )
    assert counters["stats"]["unique_graphs"] <= 2


def test_auto_compiles_only_what_repays_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    few, chosen = network(4, "auto"), network(4, "auto")
    assert not any(block.compiled for block in few.blocks)
    assert not compile_if_repaid(few, 100, 32, training=True)
    for compile in (False, True):  # the user's choice stays
        assert compile_if_repaid(network(4, compile), 10**7, 32, training=True) is compile
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "none")
    assert not compile_if_repaid(chosen, 10**7, 32, training=True), "there is no compiler"
    monkeypatch.undo()
    monkeypatch.setattr(compiled, "_compiler_works", lambda: True)  # compiling takes seconds; tested in the slow tests
    assert compile_if_repaid(chosen, 10**7, 32, training=True)
    assert all(block.compiled for block in chosen.blocks)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("compiling one block for all 4: ")
    assert not compile_if_repaid(torch.nn.Linear(2, 2), 10**7, 32, training=True)


@pytest.mark.slow
def test_a_compiler_that_does_not_work_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    compiled._compiler_works.cache_clear()
    assert compiled._compiler_works()
    compiled._compiler_works.cache_clear()
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": ("false",)}), torch._inductor.utils.fresh_cache():
        assert not compiled._compiler_works()
    compiled._compiler_works.cache_clear()
    (line,) = [record.getMessage() for record in caplog.records if record.name == compiled.log.name]
    assert line.startswith("model.compile = auto: this machine cannot compile (")


class Unfriendly(MVSplit):
    """Prints a value of its input, which cannot be compiled."""

    def merge(self, x: torch.Tensor, update: torch.Tensor, segments: tuple[int, ...]) -> torch.Tensor:
        print(float(x.detach().sum()))
        return x + update


@pytest.mark.apart  # with PyTorch's compiler imported, autograd starts threads, and no later test could fork
def test_auto_leaves_blocks_uncompiled_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "_compiler_works", lambda: True)
    monkeypatch.setattr(compiled, "_uncompilable", set())
    inputs = torch.randn(1, 1, 4, 4), torch.rand(1), torch.tensor([0])

    def unfriendly(compile: Compile) -> DiT:
        torch.manual_seed(0)
        residual = functools.partial(Unfriendly, mean_update="none")
        return DiT([4, 4], 1, 2, 3, 16, 2, functools.partial(ClassTokens, num_classes=3), residual, compile=compile)

    net = unfriendly("auto")
    assert compile_if_repaid(net, 10**7, 32, training=True)
    torch.testing.assert_close(net(*inputs), unfriendly(False)(*inputs), rtol=0, atol=0)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert line.startswith("model.compile = auto: blocks run uncompiled (")
    monkeypatch.setattr(compiled, "_uncompilable", set())
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        unfriendly(True)(*inputs)


def test_a_watched_block_runs_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_compiled", None)  # calling it would be an error
    net = network(2, True)
    for block in net.blocks:
        block.watched = True
        assert not block.runs_compiled
    assert net(torch.randn(1, 1, 4, 4), torch.rand(1), torch.tensor([0])).shape == (1, 1, 4, 4)
