"""Training on captions: one config, the empty caption as null condition, resumes to the bit, grids and metrics."""

import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from captioned import TOKENS, WIDTH, captioned_set, encode_captions, text_overrides, train_on_captions, trained_run
from comparison import differences, state
from lightning import Callback
from small_qwen3 import save_qwen3
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer, Qwen3Model

from mvsplit.flow.objective import velocity_loss
from mvsplit.training.checkpoint_format import Saved, newest
from mvsplit.utils.errors import UserError

Train = Callable[..., tuple[dict[str, float], dict[str, Any]]]


@pytest.fixture
def train_captions(train_here: Train, captions_root: Path) -> Train:
    """`train_here` on the captioned set."""
    return lambda *overrides, run="run": train_here(
        *train_on_captions(captions_root / "captioned"), *overrides, run=run
    )


class Seen(Callback):
    """Records what the network gets in training."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Any]] = []
        self.conditions: list[torch.Tensor] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(dict(batch))
        hook = module.network.context.register_forward_pre_hook(lambda _, inputs: self.conditions.append(inputs[0]))
        self.remove = hook.remove
        with torch.no_grad():
            x1, t, mask = module.flow.draw(module.seed, batch["position"], batch["image"])
            null = batch["null_condition"][: batch["condition"].shape[1]]
            condition = torch.stack([null if m else c for m, c in zip(mask, batch["condition"], strict=True)])
            self.losses.append(float(velocity_loss(module.network, batch["image"], x1, t, condition).mean()))
        self.conditions.pop()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.remove()
        self.losses[-1] -= float(outputs["loss"])


def watch(monkeypatch: pytest.MonkeyPatch, callback: Callback) -> None:
    import train

    build_each = train.build_each
    monkeypatch.setattr(train, "build_each", lambda nodes: build_each(nodes) + [callback] * ("ema" in nodes))


def texts(folder: Path) -> dict[str, str]:
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    return {
        tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
        for tag in events.Tags()["tensors"]
        if tag.endswith("text_summary")
    }


def test_one_config_trains_on_captions(train_captions: Train, captions_root: Path, tmp_path: Path) -> None:
    metrics, objects = train_captions("optim.lr=1.0e-3")
    assert 0.1 < metrics["val/loss"] < 3
    checkpoint = newest(tmp_path / "run" / "checkpoints", verify=True)
    assert checkpoint is not None
    about = json.loads((captions_root / "captioned" / "train.manifest.json").read_text())["text"]["encoder"]
    assert Saved(checkpoint).manifest["data"]["text"] == {"encoder": about, "padding": "longest"}
    grid = objects["callbacks"][[type(c).__name__ for c in objects["callbacks"]].index("SampleGrid")]
    validation = objects["datamodule"].reader("val")
    assert grid.captions == [validation.caption(i) for i in range(10)]
    assert sorted(p.name for p in (tmp_path / "run" / "samples").iterdir()) == [
        "step_00000003.png",
        "step_00000006.png",
    ]
    logged = texts(tmp_path / "run" / "tensorboard")["sample/captions/text_summary"]
    assert f"2. {validation.caption(1)}" in logged


def test_a_trained_network_is_read_back_with_its_captions(tmp_path: Path) -> None:
    from mvsplit.training.saved_run import SavedRun

    checkpoint = trained_run(tmp_path, "trainer.max_steps=2", "data.text=fixed")
    run = SavedRun(checkpoint, "ema")
    assert run.network.embedding_width == WIDTH
    assert Saved(checkpoint).manifest["data"]["text"]["padding"] == "fixed"


def test_the_null_condition_is_the_empty_caption(
    train_captions: Train, captions_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(monkeypatch, seen := Seen())
    train_captions("flow.label_dropout=0.4", "callbacks.monitor=null", "trainer.val_check_interval=6")
    tokenizer = AutoTokenizer.from_pretrained(captions_root / "qwen3")
    model = Qwen3Model.from_pretrained(captions_root / "qwen3", dtype=torch.float32).eval()
    lengths, dropped = [], 0
    for batch, condition in zip(seen.batches, seen.conditions, strict=True):
        tokens = tokenizer([*batch["caption"], ""], padding="longest", truncation=True, max_length=TOKENS,
                           return_tensors="pt")  # fmt: skip
        with torch.no_grad():
            theirs = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        lengths.append(theirs.shape[1])
        empty = [text == "" for text in batch["caption"]]
        for mine, own, is_empty in zip(condition, theirs[:-1], empty, strict=True):
            is_null = bool((mine - theirs[-1]).abs().max() < 2e-6)
            dropped += is_null and not is_empty
            torch.testing.assert_close(mine, theirs[-1] if is_null else own, atol=2e-6, rtol=0)
    assert len(seen.conditions) == 6
    assert 8 <= dropped <= 30  # of 48 samples, 40 % of those with captions
    assert max(map(abs, seen.losses)) < 1e-5
    assert len(set(lengths)) > 1


@pytest.mark.parametrize("padding", ["longest", "fixed"])
def test_stopped_and_resumed_is_uninterrupted(
    train_captions: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, padding: str
) -> None:
    import os

    import train

    class Stop(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    build_each, option = train.build_each, f"data.text={padding}"
    train_captions(option, run="whole")
    watch(monkeypatch, Stop())
    _, objects = train_captions(option, run="cut")
    assert objects["trainer"].global_step == 4
    monkeypatch.setattr(train, "build_each", build_each)
    train_captions(option, "ckpt_path=last", run="cut")
    assert differences(state(tmp_path / "whole"), state(tmp_path / "cut")) == []


def test_only_fixed_padding_is_the_same_in_every_division(train_captions: Train, tmp_path: Path) -> None:
    def distance(padding: str) -> float:
        found = []
        for accumulate in (1, 2):
            options = [f"data.text={padding}", f"trainer.accumulate_grad_batches={accumulate}", "optim.lr=0.02"]
            more = [f"trainer.val_check_interval={3 * accumulate}", "residual.writer_init=standard"]
            _, objects = train_captions(*options, *more, run=f"{padding}{accumulate}")
            found.append(torch.cat([p.detach().flatten() for p in objects["module"].network.parameters()]))
        return float((found[0] - found[1]).abs().max())

    assert distance("fixed") < 1e-6
    assert distance("longest") > 1e-4


@pytest.mark.slow
def test_killed_and_resumed_is_uninterrupted(
    script: Callable[..., list[str]], captions_root: Path, tmp_path: Path
) -> None:
    options = [*train_on_captions(captions_root / "captioned"), "trainer.max_steps=12"]
    whole = script("train.py", *options, f"paths.output_dir={tmp_path}/whole")
    assert subprocess.run(whole, cwd=tmp_path, check=False).returncode == 0
    command = script("train.py", *options, f"paths.output_dir={tmp_path}/cut")
    process = subprocess.Popen(command, cwd=tmp_path)
    while newest(tmp_path / "cut" / "checkpoints", verify=False) is None:
        assert process.poll() is None
    process.kill()
    process.wait()
    resumed = subprocess.run([*command, "ckpt_path=last"], cwd=tmp_path, check=False)
    assert resumed.returncode == 0
    assert differences(state(tmp_path / "whole"), state(tmp_path / "cut")) == []


def test_resuming_with_other_captions_is_refused(train_captions: Train, captions_root: Path, tmp_path: Path) -> None:
    train_captions("trainer.max_steps=2")
    with pytest.raises(UserError, match=r"^data\.text = fixed: the checkpoint was trained with longest; resume with"):
        train_captions("data.text=fixed", "ckpt_path=last")
    # The same captions by another encoder are another set already; here only the record differs.
    other = Path(shutil.copytree(captions_root / "captioned", tmp_path / "other"))
    for name in ("train", "val"):
        path = other / f"{name}.manifest.json"
        about = json.loads(path.read_text())
        about["text"]["encoder"] |= {"path": "elsewhere", "weights": "0" * 16}
        path.write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"^data\.folder: its captions were encoded with weights = 0{16}, those that"):
        train_captions(f"data.folder={other}", "ckpt_path=last")
    qwen3 = save_qwen3(tmp_path / "qwen3", WIDTH, seed=1)
    another = encode_captions(tmp_path / "another", captions_root / "source", qwen3)
    with pytest.raises(UserError, match="the checkpoint was trained on other samples"):
        train_captions(f"data.folder={another}", "ckpt_path=last")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.text=null"], r"data\.text = null: the network is conditioned on captions; use longest or fixed"),
        (["model.context.embedding_width=48"], r"model\.context\.embedding_width = 48: .* have the width 32"),
        (["model/context=class_tokens", "data.text=longest"], r"model\.context: is conditioned on classes"),
        (
            ["model=sit_digits", "data.num_classes=0"],
            r"model\.num_classes = 0: must be greater than 0",
        ),
    ],
)
def test_captions_and_network_must_fit(
    train_here: Train, captions_root: Path, overrides: list[str], message: str
) -> None:
    given = train_on_captions(captions_root / "captioned")
    if overrides[0].startswith("model=") or overrides[0].startswith("model/"):
        given = given[:1]
    with pytest.raises(UserError, match=rf"^{message}[^\n]*$"):
        train_here(*given, *overrides)


def test_a_set_with_captions_and_without_classes_trains(train_here: Train, tmp_path: Path) -> None:
    folder = captioned_set(tmp_path / "set", classes=False)
    options = [*train_on_captions(folder, classes=False), "callbacks=record"]
    metrics, objects = train_here(*options)
    assert 0.1 < metrics["val/loss"] < 3
    assert (tmp_path / "run" / "samples" / "step_00000006.png").exists()
    assert "label" not in objects["datamodule"].reader("train")[0, 0]
    with pytest.raises(UserError, match=r"^callbacks\.metrics\.features = null: trains a classifier, and the set has"):
        train_here(*options, "callbacks=metrics", run="metrics")


def test_metrics_are_of_the_validation_captions(
    train_here: Train, captions_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path(shutil.copytree(captions_root / "captioned", tmp_path / "set"))  # features are stored beside it
    from mvsplit.training.module import FlowModule

    drawn: list[tuple[torch.Tensor, torch.Tensor]] = []
    sample = FlowModule.sample

    def recorded(self: Any, condition: Any, index: Any, null: Any = None) -> torch.Tensor:
        drawn.append((condition, index))
        return sample(self, condition, index, null)

    monkeypatch.setattr(FlowModule, "sample", recorded)
    options = ["callbacks.metrics.num_samples=20", "callbacks.metrics.batch_size=10", "data.text=fixed"]
    metrics, objects = train_here(*train_on_captions(own), "callbacks=metrics", "callbacks.sample_grid=null", *options)
    assert metrics["sample/fid"] > 0
    assert "sample/recognised" not in metrics  # a caption is no class
    reader = objects["datamodule"].reader("val", text=True)
    conditions = torch.cat([condition for condition, _ in drawn[-2:]])
    assert torch.cat([index for _, index in drawn[-2:]]).tolist() == list(range(20))
    for i in range(20):
        assert torch.equal(conditions[i], reader.read(0, i % 12)["condition"])


def test_a_table_of_class_names_trains(train_here: Train, captions_root: Path, tmp_path: Path) -> None:
    from conftest import compose_config

    import encode

    (tmp_path / "names.txt").write_text("\n".join(f"the digit {i}" for i in range(10)))
    where = text_overrides(tmp_path / "table.safetensors", captions_root / "source", captions_root / "qwen3")
    encode.encode(compose_config(*where, f"captions={tmp_path}/names.txt", name="encode.yaml"))
    table = ["model/context=caption_table", f"model.context.embeddings={tmp_path}/table.safetensors"]
    metrics, _ = train_here(*table, "trainer.max_steps=2")
    assert 0.1 < metrics["test/loss"] < 3
    (tmp_path / "few").mkdir()
    (tmp_path / "names.txt").write_text("zero\none")
    few = text_overrides(tmp_path / "few.safetensors", captions_root / "source", captions_root / "qwen3")
    encode.encode(compose_config(*few, f"captions={tmp_path}/names.txt", name="encode.yaml"))
    with pytest.raises(UserError, match=r"^model\.context: has 2 classes; must be at least data\.num_classes = 10$"):
        train_here(table[0], f"model.context.embeddings={tmp_path}/few.safetensors", run="few")


@pytest.mark.slow
def test_commands_from_captions_to_a_trained_network(
    run_script: Callable[..., subprocess.CompletedProcess[str]], captions_root: Path, tmp_path: Path
) -> None:
    """Offline, as a user runs them."""
    encoded = run_script(
        "encode.py", *text_overrides(tmp_path / "set", captions_root / "source", captions_root / "qwen3")
    )
    assert encoded.returncode == 0, encoded.stderr
    assert "states of 52 captions: 16 tokens of width 32 each" in encoded.stdout
    command = [*train_on_captions(tmp_path / "set"), f"paths.output_dir={tmp_path}/run"]
    trained = run_script("train.py", *command)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "run" / "samples" / "step_00000006.png").exists()
    refused = run_script("train.py", *command, "data.text=null", f"paths.output_dir={tmp_path}/other")
    assert refused.returncode == 2
    assert refused.stderr.strip().splitlines()[-1].startswith("error: data.text = null: the network is conditioned")
