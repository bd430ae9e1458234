"""The network's parts against plain, slow formulations; its size against the paper's."""

import functools
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mvsplit.flow.objective import drop_condition
from mvsplit.kernels.rope_norm import apply_rope
from mvsplit.models.attention import Attention, rope_table
from mvsplit.models.conditioning import CaptionTable, ClassTokens, SampleEmbeddings
from mvsplit.models.dit import DiT, patchify, unpatchify
from mvsplit.models.layers import SwiGLU
from mvsplit.models.norm_placements import SiameseNorm
from mvsplit.models.residuals import MVSplit, PostNorm, Residual
from mvsplit.utils.errors import UserError


def rotate_slowly(x: list[float], row: int, column: int, theta: float = 10000.0) -> list[float]:
    """One head's vector at one place, plane by plane, in the reference code's direction."""
    half, planes = len(x) // 2, len(x) // 4
    out = [0.0] * len(x)
    for i in range(half):
        place = row if i < planes else column
        angle = place * theta ** (-(i % planes) / planes)
        out[i] = x[i] * math.cos(angle) + x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) - x[i] * math.sin(angle)
    return out


def test_rope_equals_rotation_plane_by_plane() -> None:
    rows, columns, head_dim, context = 3, 5, 8, 2
    x = torch.randn(2, 2, rows * columns + context, head_dim)
    out = apply_rope(x, *rope_table(rows, columns, head_dim, 100.0, context))
    for token in range(rows * columns):
        expected = rotate_slowly(x[1, 0, token].tolist(), token // columns, token % columns, 100.0)
        assert out[1, 0, token].tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(out[:, :, rows * columns :], x[:, :, rows * columns :])  # context is not turned


def test_rope_needs_whole_planes() -> None:
    with pytest.raises(ValueError, match="divisible by 4"):
        rope_table(2, 2, 6)


def test_attention_equals_a_loop_over_heads_and_tokens() -> None:
    width, num_heads, rows, columns = 16, 2, 2, 3
    attention = Attention(width, num_heads).double()
    x = torch.randn(2, rows * columns + 1, width, dtype=torch.float64)
    head_dim = width // num_heads

    def turned_and_normalised(vectors: Tensor) -> Tensor:
        turned = [
            rotate_slowly(v, i // columns, i % columns) if i < rows * columns else v
            for i, v in enumerate(vectors.tolist())
        ]
        t = torch.tensor(turned, dtype=torch.float64)
        return t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    expected = torch.zeros_like(x)
    for b in range(2):
        heads = []
        for h in range(num_heads):
            of_head = [attention.qkv.weight[i * width + h * head_dim :][:head_dim] for i in range(3)]
            q, k, v = (x[b] @ weight.T for weight in of_head)
            q, k = turned_and_normalised(q), turned_and_normalised(k)  # RoPE first, then the norm
            heads.append(torch.softmax(q @ k.T / math.sqrt(head_dim), dim=-1) @ v)
        expected[b] = torch.cat(heads, dim=-1) @ attention.proj.weight.T
    cos, sin = rope_table(rows, columns, head_dim, num_context=1)
    torch.testing.assert_close(attention(x, cos, sin), expected, rtol=1e-6, atol=1e-6)  # the table is float32


def test_swiglu_is_gate_first_then_value() -> None:
    ffn = SwiGLU(4, 6).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    gate, value = x @ ffn.w13.weight[:6].T, x @ ffn.w13.weight[6:].T
    expected = (gate / (1 + torch.exp(-gate)) * value) @ ffn.w2.weight.T
    torch.testing.assert_close(ffn(x), expected)


@pytest.mark.parametrize(("height", "width", "patch"), [(4, 6, 2), (6, 3, 3), (5, 2, 1)])
def test_patching_takes_pixels_in_the_reference_order(height: int, width: int, patch: int) -> None:
    image = torch.randn(2, 3, height, width)
    tokens = patchify(image, patch)
    columns = width // patch
    for token in range(tokens.shape[1]):
        top, left = token // columns * patch, token % columns * patch
        flat = [image[1, c, top + p1, left + p2].item() for p1 in range(patch) for p2 in range(patch) for c in range(3)]
        assert tokens[1, token].tolist() == flat
    assert torch.equal(unpatchify(tokens, patch, height // patch, columns), image)


@pytest.mark.parametrize(
    ("depth", "residual", "expected"),
    [(400, PostNorm, 5_452_858_496), (400, MVSplit, 5_454_496_896), (1000, MVSplit, 13_635_847_296)],
)
def test_parameter_counts_are_the_papers(depth: int, residual: type, expected: int) -> None:
    with torch.device("meta"):
        network = DiT([16, 16], 128, 1, depth, 1024, 8, SampleEmbeddings, residual)
    assert sum(p.numel() for p in network.parameters()) == expected


def tiny(residual: object = MVSplit, **options: object) -> DiT:
    arguments = {"image_size": [4, 6], "channels": 2, "patch_size": 2, "depth": 3, "width": 16, "num_heads": 2}
    torch.manual_seed(0)
    context = functools.partial(ClassTokens, num_classes=5)
    return DiT(**(arguments | {"context": context, "residual": residual} | options))  # type: ignore[arg-type]


def awake(network: DiT) -> DiT:
    """Give the zero-initialised matrices values, so that everything matters."""
    for parameter in network.parameters():
        if parameter.ndim == 2 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return network


def test_rectangular_images_and_zero_start() -> None:
    network = tiny()
    z = torch.randn(3, 2, 4, 6)
    out = network(z, torch.rand(3), torch.tensor([0, 4, 5]))
    assert out.shape == z.shape
    assert not out.any()  # the final projection starts at zero
    out = awake(network)(z, torch.rand(3), torch.tensor([0, 4, 5]))
    other = network(z, torch.rand(3), torch.tensor([1, 4, 5]))
    assert not torch.equal(out[0], other[0])  # the class reaches the picture
    assert torch.equal(out[1:], other[1:])


def test_each_module_initialises_its_own_parameters() -> None:
    network = tiny(depth=1, width=64, num_heads=4)
    block = network.blocks[0]
    assert not block.attention.proj.weight.any()
    assert not block.ffn.w2.weight.any()
    assert block.attention.qkv.weight.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.05)
    assert not network.patch_proj.bias.any()
    assert tiny(functools.partial(MVSplit, writer_init="standard")).blocks[0].ffn.w2.weight.std() > 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 3}, r"model\.patch_size = 3: must divide"),
        ({"width": 15}, r"model\.width = 15: must be divisible by model\.num_heads = 2"),
        ({"width": 12}, r"width / num_heads = 6 must be divisible by 4"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_class_tokens_drop_to_the_null_class() -> None:
    context = ClassTokens(8, num_classes=3, num_tokens=2)
    labels, mask = torch.tensor([0, 1, 2]), torch.tensor([True, False, True])
    assert context.drop(labels, mask).tolist() == [3, 1, 3]
    assert context(labels).shape == (3, 2, 8)


def test_caption_table_is_fixed_and_projected(tmp_path: Path) -> None:
    table = torch.randn(4, 3, 5)
    save_file({"embeddings": table}, tmp_path / "table.safetensors")
    context = CaptionTable(8, str(tmp_path / "table.safetensors"))
    assert context.null_class == 3
    assert [name for name, _ in context.named_parameters()] == ["proj.weight"]
    expected: Tensor = table[[2]] @ context.proj.weight.T
    torch.testing.assert_close(context(torch.tensor([2])), expected)
    assert isinstance(CaptionTable(5, table).proj, torch.nn.Identity)
    with pytest.raises(ValueError, match="does not exist"):
        CaptionTable(8, str(tmp_path / "missing.safetensors"))


def test_sample_embeddings_run_through_the_network() -> None:
    network = awake(tiny(context=functools.partial(SampleEmbeddings, num_tokens=3, embedding_width=7)))
    condition, null, mask = torch.randn(2, 3, 7), torch.randn(5, 7), torch.tensor([True, False])
    assert network.embedding_width == 7
    dropped = drop_condition(network, condition, mask, null)
    assert torch.equal(dropped[0], null[:3])  # of the longer null condition, as many tokens as the captions have
    assert torch.equal(dropped[1], condition[1])
    z = torch.randn(1, 2, 4, 6).expand(2, -1, -1, -1)
    out = network(z, torch.rand(2), dropped)
    assert out.shape == (2, 2, 4, 6)
    assert (out[0] - out[1]).abs().max() > 1e-3  # the caption reaches the picture
    with pytest.raises(UserError, match=r"^model\.context: the batch has captions' embeddings, but no `null_cond"):
        drop_condition(network, condition, mask)
    with pytest.raises(UserError, match=r"\(samples, tokens, 7\) of captions, but was given \(2,\); src/encode\.py"):
        network(z, torch.rand(2), torch.tensor([0, 1]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [MVSplit, pytest.param(SiameseNorm, marks=pytest.mark.long)])
def test_a_compiled_block_computes_the_same_and_serves_all(kind: type[Residual]) -> None:
    from torch._dynamo.utils import counters

    def network(compile: bool) -> DiT:
        torch.manual_seed(0)
        residual = functools.partial(kind, writer_init="standard")
        context = functools.partial(ClassTokens, num_classes=3)
        net = DiT([4, 4], 1, 2, 12, 16, 2, context, residual, compile=compile)
        torch.nn.init.normal_(net.final_proj.weight)
        return net.double()

    z, t, labels = torch.randn(2, 1, 4, 4).double(), torch.rand(2), torch.tensor([0, 2])
    plain, compiled = network(False), network(True)
    counters.clear()
    for net in (plain, compiled):
        net(z, t, labels).square().sum().backward()
    for (name, left), right in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-9, atol=1e-12, msg=name)
    assert counters["stats"]["unique_graphs"] <= 2  # the first block's input is not like the others': a cat's result
    with torch.no_grad():
        torch.testing.assert_close(compiled(z, t, labels), plain(z, t, labels))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("embedding_width", [16, 8])
def test_inputs_of_float64_leave_the_trunk_as_it_is(autocast: bool, embedding_width: int) -> None:
    """Regression tasks and numpy give float64: as images and, also without a matrix behind it, as conditions."""
    context = functools.partial(SampleEmbeddings, num_tokens=3, embedding_width=embedding_width)
    network = DiT([4, 4], 1, 2, 2, 16, 2, context, functools.partial(MVSplit, writer_init="standard"))
    torch.nn.init.normal_(network.final_proj.weight)
    trunk: list[torch.dtype] = []
    network.blocks[0].register_forward_pre_hook(lambda module, inputs: trunk.append(inputs[0].dtype))
    z, condition, t = torch.randn(2, 1, 4, 4), torch.randn(2, 3, embedding_width), torch.rand(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = network(z, t, condition)
        found = network(z.double(), t.double(), condition.double())
    assert trunk == [torch.float32] * 2
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0)
