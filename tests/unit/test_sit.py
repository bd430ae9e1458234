"""SiT: its published size, its initialisation, and a training step against a plain formulation."""

import math

import pytest
import torch
from conftest import compose_config
from torch import Tensor

from mvsplit.benchmarks.model_stats import measure_activations
from mvsplit.benchmarks.plan import read_planned_run
from mvsplit.flow.objective import velocity_loss
from mvsplit.models.recompute import Checkpointing, saved_bytes
from mvsplit.models.sit import SiT, position_table
from mvsplit.stability.taps import Taps
from mvsplit.training import settings
from mvsplit.utils.config import build, check_config, to_plain
from mvsplit.utils.errors import UserError

LATENTS = ["data=imagenet_latents", "data.image_size=[32,32]", "data.channels=4"]
"""The published models' inputs: 256 × 256 pixels behind Stable Diffusion's autoencoder, 1000 classes."""


def counted(depth: int, width: int, outputs: int) -> int:
    """Trained parameters of SiT with patches of 2 × 2 × 4 values, layer by layer."""
    patches = 16 * width + width
    time = 256 * width + width + width * width + width
    classes = 1001 * width
    attention = (width * 3 * width + 3 * width) + (width * width + width)
    ffn = (width * 4 * width + 4 * width) + (4 * width * width + width)
    modulation = width * 6 * width + 6 * width
    final = (width * 2 * width + 2 * width) + (width * outputs + outputs)
    return patches + time + classes + depth * (attention + ffn + modulation) + final


@pytest.mark.parametrize(
    ("size", "depth", "width", "trained", "published"),
    [
        ("s", 12, 384, 32_865_056, 33),
        ("b", 12, 768, 130_315_808, 130),
        ("l", 24, 1024, 457_840_672, 458),
        ("xl", 28, 1152, 674_834_720, 675),
    ],
)
def test_parameter_counts_are_the_published_ones(
    size: str, depth: int, width: int, trained: int, published: int
) -> None:
    config = to_plain(compose_config("paths.output_dir=/nowhere", f"model=sit_{size}", *LATENTS))
    check_config(config, settings.TrainConfig)
    with torch.device("meta"):
        network = build(config["model"])()
        smaller = build(config["model"] | {"learn_sigma": False})()
    found = sum(p.numel() for p in network.parameters())
    assert found == counted(depth, width, 32) == trained
    assert sum(p.numel() for p in smaller.parameters()) == counted(depth, width, 16) == trained - 16 * width - 16
    assert round(found / 1e6) == published
    assert network.position.numel() == 256 * width  # fixed; a parameter in the published code
    assert "position" not in network.state_dict()


def test_with_its_positions_the_largest_has_the_count_that_the_published_code_prints() -> None:
    assert counted(28, 1152, 32) + 256 * 1152 == 675_129_632


def tiny(**options: object) -> SiT:
    arguments = {"image_size": [4, 6], "channels": 2, "num_classes": 5, "patch_size": 2, "depth": 3, "width": 16,
                 "num_heads": 2}  # fmt: skip
    torch.manual_seed(0)
    return SiT(**(arguments | options))  # type: ignore[arg-type]


def awake(network: SiT) -> SiT:
    """Give every parameter a value, so that everything matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network


def test_it_starts_as_published() -> None:
    network = tiny(width=128, depth=2, num_heads=4, image_size=[8, 8])
    for block in network.blocks:
        for parameter in block.modulation.parameters():
            assert not parameter.any()
        for linear in (block.attention.qkv, block.attention.proj, block.ffn.w1, block.ffn.w2):
            bound = math.sqrt(6 / (linear.in_features + linear.out_features))
            assert 0.98 * bound < linear.weight.abs().max().item() <= bound
            assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
            assert not linear.bias.any()
    for parameter in network.final.parameters():
        assert not parameter.any()
    for weight in (network.time.fc1.weight, network.time.fc2.weight, network.classes.table):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    z, t, labels = torch.randn(3, 2, 8, 8), torch.rand(3), torch.tensor([0, 4, 5])
    trunk: list[Tensor] = []
    network.blocks[0].register_forward_hook(lambda module, inputs, out: trunk.extend((inputs[0], out)))
    assert not network(z, t, labels).any()  # the velocity starts at zero
    assert torch.equal(*trunk)  # and each block as the identity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 4}, r"^model\.patch_size = 4: must divide the image size \[4, 6\]$"),
        ({"num_heads": 3}, r"^model\.width = 16: must be divisible by model\.num_heads = 3$"),
        ({"width": 18}, r"^model\.width = 18: must be divisible by 4$"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_positions_are_sines_and_cosines_of_column_and_row() -> None:
    rows, columns, width = 3, 5, 24
    table = position_table(rows, columns, width)
    for token in range(rows * columns):
        expected = []
        for place in (token % columns, token // columns):
            angles = [place / 10000 ** (k / 6) for k in range(6)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert table[token].tolist() == pytest.approx(expected, abs=1e-7)


def linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def normal(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def plain_velocity(w: dict[str, Tensor], z: Tensor, t: Tensor, labels: Tensor, depth: int, heads: int) -> Tensor:
    """SiT of `tiny`'s shapes with patches of 2 × 2, from its weights by name: sample by sample, head by head."""
    velocities = []
    for image, time, label in zip(z, t, labels, strict=True):
        channels, height, columns = image.shape
        places = [(row, column) for row in range(0, height, 2) for column in range(0, columns, 2)]
        patches = [
            torch.stack([image[c, row + a, column + b] for a in range(2) for b in range(2) for c in range(channels)])
            for row, column in places
        ]
        x = linear(torch.stack(patches), w, "patch_proj")
        x = x + position_table(height // 2, columns // 2, x.shape[1]).double()
        angles = torch.stack([time / 10000 ** (k / 128) for k in range(128)])
        hidden = linear(torch.cat([torch.cos(angles), torch.sin(angles)]), w, "time.fc1")
        c = linear(hidden / (1 + torch.exp(-hidden)), w, "time.fc2") + w["classes.table"][label, 0]
        c = c / (1 + torch.exp(-c))
        width = x.shape[1]
        each = width // heads
        for i in range(depth):
            name = f"blocks.{i}"
            m = linear(c, w, f"{name}.modulation").reshape(6, width)
            qkv = linear(normal(x) * (1 + m[1]) + m[0], w, f"{name}.attention.qkv")
            found = []
            for h in range(heads):
                q, k, v = (qkv[:, part * width + h * each :][:, :each] for part in range(3))
                scores = torch.exp(q @ k.T / math.sqrt(each))
                found.append(scores / scores.sum(1, keepdim=True) @ v)
            x = x + m[2] * linear(torch.cat(found, 1), w, f"{name}.attention.proj")
            inner = gelu(linear(normal(x) * (1 + m[4]) + m[3], w, f"{name}.ffn.w1"))
            x = x + m[5] * linear(inner, w, f"{name}.ffn.w2")
        m = linear(c, w, "final.modulation").reshape(2, width)
        out = linear(normal(x) * (1 + m[1]) + m[0], w, "final.proj").reshape(len(places), 2, 2, -1)[..., :channels]
        velocity = torch.stack([out[places.index((r // 2 * 2, q // 2 * 2)), r % 2, q % 2] for r in range(height)
                                for q in range(columns)])  # fmt: skip
        velocities.append(velocity.T.reshape(image.shape))
    return torch.stack(velocities)


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_a_training_step_equals_a_plain_formulation(learn_sigma: bool) -> None:
    network = awake(tiny(learn_sigma=learn_sigma)).double()
    x0, x1 = torch.randn(3, 2, 4, 6).double(), torch.randn(3, 2, 4, 6).double()
    t, labels = torch.rand(3).double(), torch.tensor([0, 4, 2])
    labels = network.drop(labels, torch.tensor([False, False, True]))
    assert labels.tolist() == [0, 4, 5]
    losses = velocity_loss(network, x0, x1, t, labels)
    losses.mean().backward()

    w = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    z = torch.stack([(1 - s) * a + s * b for a, b, s in zip(x0, x1, t, strict=True)])
    errors = plain_velocity(w, z, t, labels, depth=3, heads=2) - (x0 - x1)
    expected = (errors**2).mean((1, 2, 3))
    expected.mean().backward()
    # velocity_loss compares in float32.
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)
    exact = tiny(learn_sigma=learn_sigma).double()
    exact.load_state_dict(network.state_dict())
    (exact(z, t, labels) - (x0 - x1)).square().mean().backward()
    for name, parameter in network.named_parameters():
        found, grad = w[name].grad, parameter.grad
        assert found is not None
        assert grad is not None
        torch.testing.assert_close(grad, found, rtol=1e-5, atol=1e-6, msg=name)
        torch.testing.assert_close(exact.get_parameter(name).grad, found, rtol=1e-9, atol=1e-12, msg=name)
    dropped = exact.final.proj.bias.grad.view(4, -1)[:, 2:]
    assert dropped.shape[1] == (2 if learn_sigma else 0)
    assert not dropped.any()  # the second half of the outputs is not trained


def steps(network: SiT) -> dict[str, Tensor]:
    """Gradients of one backward pass."""
    z = torch.randn(2, 2, 4, 6, generator=torch.Generator().manual_seed(2))
    network(z, torch.tensor([0.3, 0.9]), torch.tensor([0, 5])).square().sum().backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{"every": 1}, {"every": 2, "offload": True}, {"every": "auto"}])
def test_checkpointing_leaves_the_gradients_as_they_are(options: dict[str, object]) -> None:
    plain = steps(awake(tiny()))
    recomputed = steps(awake(tiny(checkpointing=Checkpointing(**options))))  # type: ignore[arg-type]
    assert [name for name, grad in plain.items() if not torch.equal(grad, recomputed[name])] == []
    assert len(plain) == len(dict(tiny().named_parameters()))


@pytest.mark.long
def test_a_compiled_block_computes_the_same_and_serves_all_of_them() -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    plain, compiled = steps(awake(tiny())), steps(awake(tiny(compile=True)))
    for name, grad in plain.items():  # by norm: single values of gradients this large are differences of large terms
        assert ((compiled[name] - grad).norm() / grad.norm()).item() < 1e-5, name
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_the_trunk_is_float32_in_bf16_too(weights: torch.dtype) -> None:
    network = awake(tiny())
    z, t, labels = torch.randn(2, 2, 4, 6), torch.rand(2), torch.tensor([0, 5])
    expected = network(z, t, labels)
    network = network.to(weights)
    seen: list[tuple[torch.dtype, ...]] = []
    network.blocks[1].register_forward_hook(
        lambda module, inputs, out: seen.append((*(i.dtype for i in inputs), out.dtype))
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        found = network(z, t, labels)
    assert seen == [(torch.float32,) * 3]
    assert found.dtype == torch.float32
    assert ((found - expected).norm() / expected.norm()).item() < 0.03
    assert torch.equal(network.position.view(torch.float32), position_table(2, 3, 16))  # not rounded


def test_every_measure_of_a_block_is_taken() -> None:
    network = awake(tiny())
    taps = Taps(network)
    taps.attach((), range(3))
    steps(network)
    taps.detach()
    measured = taps.read()
    by_branch = ("var_gain", "tr_ratio", "g_mean", "g_ctr", "amplification", "alignment")
    expected = {"rho", "token_cosine", "mu_eff", "retention", "row_diversity"}
    expected |= {f"{name}_{branch}" for name in by_branch for branch in ("attention", "ffn")}
    for block in range(3):
        assert measured[block].keys() == expected
        assert all(math.isfinite(value) for value in measured[block].values())
    assert [matrix.out_features for matrix in taps.matrices.values()] == [48] * 3


def test_it_takes_no_residual() -> None:
    config = to_plain(compose_config("paths.output_dir=/nowhere", "model=sit_s", "residual=rezero"))
    with pytest.raises(UserError, match=r"^residual = rezero: model SiT takes no residual$"):
        settings.check_used(config, ["residual=rezero"])


def test_its_memory_can_be_planned() -> None:
    overrides = ["paths.output_dir=/nowhere", "model=sit_xl", *LATENTS, "data.batch_size=256", "trainer.devices=8"]
    config = to_plain(compose_config(*overrides, name="bench_memory.yaml"))
    run = read_planned_run(config)
    assert (run.depth, run.world, run.batch) == (28, 8, 32)
    block, writers = 18 * 1152**2 + 15 * 1152, 5 * 1152**2 + 2 * 1152
    assert (run.stats.total, run.stats.block, run.stats.writers) == (674_834_720, block, writers)
    assert run.stats.at_depth(28, 30).total == 674_834_720 + 2 * block


def test_the_planner_measures_a_blocks_activations() -> None:
    sizes = ["model.depth=3", "model.width=32", "model.num_heads=2"]
    config = to_plain(compose_config("paths.output_dir=/nowhere", "model=sit_digits", *sizes))
    planned = measure_activations(config["model"], 4, torch.float32, autocast=False)
    network = build(config["model"])()
    x, c = torch.randn(4, 16, 32, requires_grad=True), torch.randn(4, 32)
    _, kept = saved_bytes(lambda: network.blocks[0](x, c), network.blocks[0], [c])
    assert (planned.trunk, planned.block) == (4 * 16 * 32 * 4, kept)
