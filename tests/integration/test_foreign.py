"""What a run from elsewhere can do to this machine: be read, and nothing else."""

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint_tools import poison
from conftest import compose_config
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import safe_open

import convert as convert_script
import eval as eval_script
import sample as sample_script
from mvsplit.callbacks.checkpoint_saver import CheckpointSaver
from mvsplit.data.storage import Storage
from mvsplit.training.checkpoint_format import MANIFEST, STATE, Saved
from mvsplit.utils.errors import UserError

Train = Callable[..., tuple[dict[str, float], dict[str, Any]]]


def change_states(path: Path, tmp_path: Path, prefix: str, **changes: Any) -> None:
    """Change what a checkpoint holds of the callbacks whose key begins like this; None takes an entry out."""
    state = Saved(path).state()
    for name, about in state["callbacks"].items():
        if name.startswith(prefix):
            about |= changes
            for key in [key for key, value in changes.items() if value is None]:
                del about[key]
    torch.save(state, tmp_path / "state.pt")
    poison(path, STATE, (tmp_path / "state.pt").read_bytes())


def of_type(objects: dict[str, Any], kind: type) -> Any:
    return next(c for c in objects["callbacks"] if isinstance(c, kind))


def best_of(objects: dict[str, Any]) -> list[str]:
    return [line.split()[-1] for line in of_type(objects, CheckpointSaver).summary() if line.startswith("best")]


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A folder that looks like a checkpoint and must stay as it is; `run/checkpoints/link.ckpt` leads to it."""
    folder, victim = tmp_path / "run" / "checkpoints", tmp_path / "victim"
    victim.mkdir()
    folder.mkdir(parents=True)
    for name in (MANIFEST, "COMPLETE"):
        (victim / name).write_text("precious")
    (folder / "link.ckpt").symlink_to(victim)
    yield victim
    assert sorted(file.name for file in victim.iterdir()) == ["COMPLETE", MANIFEST]
    assert (folder / "link.ckpt").is_symlink()


PLACES = ["../../victim", "link.ckpt", "../checkpoints", "link.ckpt/../victim"]


@pytest.mark.slow
def test_only_checkpoints_of_this_run_are_removed(train_here: Train, tmp_path: Path, victim: Path) -> None:
    train_here("trainer.max_steps=3")
    folder = tmp_path / "run" / "checkpoints"
    names = [*PLACES, *(f"{folder}/{place}" for place in PLACES), str(victim), "step-00000003.ckpt/../link.ckpt"]
    scores = dict.fromkeys(names, 1e9) | {"step-00000002.ckpt": None, "\0": None, "none.ckpt": -1.0}
    change_states(folder / "step-00000003.ckpt", tmp_path, "CheckpointSaver", scores=scores)
    _, objects = train_here(f"ckpt_path={folder}/step-00000003.ckpt")
    assert not (folder / "step-00000002.ckpt").exists()  # this run's own, and no longer one of the last two
    assert best_of(objects) == [str(folder / "step-00000006.ckpt")]
    assert of_type(objects, CheckpointSaver).scores.keys() == {"step-00000004.ckpt", "step-00000006.ckpt"}


@pytest.mark.long
@pytest.mark.parametrize("scores", [None, [], "x", {"step-00000003.ckpt": [1.0]}, {3: 1.0}])
def test_a_state_of_another_kind_is_ignored(train_here: Train, tmp_path: Path, scores: Any) -> None:
    train_here("trainer.max_steps=3")
    path = tmp_path / "run" / "checkpoints" / "step-00000003.ckpt"
    change_states(path, tmp_path, "CheckpointSaver", scores=scores)
    _, objects = train_here(f"ckpt_path={path}", "trainer.max_steps=4")
    assert best_of(objects) == []


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_lightnings_callback_removes_only_checkpoints_of_this_run(
    train_here: Train, tmp_path: Path, victim: Path, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run" / "checkpoints"
    keys = "monitor:val/loss,filename:'lit-{step:08d}',auto_insert_metric_name:false,enable_version_counter:false"
    target = "_target_:lightning.pytorch.callbacks.ModelCheckpoint"
    options = [f"+callbacks.lit={{{target},{keys},dirpath:{folder}}}", "callbacks.checkpoint.keep_best=0"]
    train_here(*options, "trainer.max_steps=4")
    hostile, path = f"{folder}/{place}", folder / "step-00000004.ckpt"
    score = torch.tensor(1e9)  # any other is better
    change_states(path, tmp_path, "ModelCheckpoint", dirpath=None, best_k_models={hostile: score}, kth_value=score,
                  kth_best_model_path=hostile, best_model_path=hostile, last_model_path=hostile)  # fmt: skip
    caplog.clear()
    with caplog.at_level("INFO", "mvsplit"):
        _, objects = train_here(*options, f"ckpt_path={path}")
    dropped = [line for line in caplog.messages if line.startswith("ignored these saved paths")]
    assert len(dropped) == 1
    assert hostile in dropped[0]
    best = of_type(objects, ModelCheckpoint)
    assert list(best.best_k_models) == [best.best_model_path] == [str(folder / "lit-00000006.ckpt")]


@pytest.mark.slow
def test_the_best_checkpoint_is_this_runs(train_here: Train, tmp_path: Path) -> None:
    train_here("trainer.max_steps=3", run="first")
    best = tmp_path / "first" / "checkpoints" / "step-00000003.ckpt"
    change_states(best, tmp_path, "CheckpointSaver", scores={best.name: 0.0})  # no later one is as good
    for steps, found in ((4, []), (6, ["step-00000006.ckpt"])):  # without a validation, and with one
        _, objects = train_here(f"ckpt_path={best}", f"trainer.max_steps={steps}", run="second")
        folder = tmp_path / "second" / "checkpoints"
        assert best_of(objects) == [str(folder / name) for name in found]
        assert (folder / "best.ckpt").exists() == bool(found)
    assert Saved(best).verify().step == 3
    # If the run resumes in its own folder, what it found before still counts.
    shutil.rmtree(tmp_path / "second")
    _, objects = train_here("ckpt_path=last", run="first")
    assert best_of(objects) == [str(best)]
    assert Saved(best.with_name("best.ckpt")).path == best


@pytest.mark.long
def test_a_run_of_a_former_version_is_resumed(train_here: Train, tmp_path: Path) -> None:
    """Its checkpoints are called `last-…` and `best-…`, and Lightning's callback kept the best."""
    train_here("trainer.max_steps=4", "callbacks.checkpoint.keep_last=3")
    folder = tmp_path / "run" / "checkpoints"
    for step, name in ((2, "last"), (3, "best"), (4, "last")):
        path = folder / f"step-{step:08d}.ckpt"
        state = Saved(path).state()
        del state["callbacks"]["CheckpointSaver"]
        best = {"/moved/checkpoints/best-00000003.ckpt": torch.tensor(1e-9)} if step > 3 else {}
        state["callbacks"]["ModelCheckpoint{'monitor': 'val/loss'}"] = {"monitor": "val/loss", "best_k_models": best}
        torch.save(state, tmp_path / "state.pt")
        poison(path, STATE, (tmp_path / "state.pt").read_bytes())
        path.rename(folder / f"{name}-{step:08d}.ckpt")
    (folder / "best.ckpt").unlink()
    (folder / "last.ckpt").unlink()
    (folder / "last.ckpt").symlink_to("last-00000004.ckpt")
    _, objects = train_here("ckpt_path=last")
    assert objects["trainer"].global_step == 6
    names = {path.name: path.resolve().name for path in folder.iterdir()}
    assert names.pop("best.ckpt") == "best-00000003.ckpt"
    assert names.pop("last.ckpt") == "step-00000006.ckpt"
    assert set(names) == {"best-00000003.ckpt", "last-00000004.ckpt", "step-00000006.ckpt"}
    assert best_of(objects) == [str(folder / "best-00000003.ckpt")]


def compose_for(name: str, tmp_path: Path, *overrides: str) -> Any:
    output = tmp_path / "out"
    output.mkdir(exist_ok=True)
    paths = [f"paths.output_dir={output}", f"paths.log_dir={tmp_path}/logs"]
    return compose_config(*paths, *overrides, name=f"{name}.yaml")


def hostile(file: Path, victim: Path) -> None:
    """A run's config that takes from, and puts into, places of this machine."""
    config = yaml.safe_load(file.read_text())
    config["data"] |= {"folder": str(victim / "digits"), "num_workers": 3}
    config["data"]["storage"] |= {"token_env": "SECRET", "cache_dir": str(victim / "cache"), "cache_gib": 1e-9}
    config["callbacks"]["checkpoint"]["folder"] = str(victim / "checkpoints")
    config["paths"] = {key: str(victim / key) for key in config["paths"]}
    config["trainer"]["default_root_dir"] = str(victim / "trainer")
    config["logger"] = {"csv": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(victim / "csv")}}
    config["module"]["optim"] = {"_target_": "mvsplit.data.storage.Storage", "cache_dir": str(victim / "module")}
    file.write_text(yaml.safe_dump(config))


@pytest.mark.slow
def test_a_run_from_elsewhere_is_judged_by_data_of_this_machine(
    train_here: Train, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, _ = train_here()
    run, victim = tmp_path / "run", tmp_path / "victim"
    victim.mkdir()
    hostile(run / "config.yaml", victim)
    convert_script.main(compose_for("convert", tmp_path, f"ckpt_path={run}/checkpoints/last.ckpt"))
    used: list[Storage] = []
    original = Storage.__init__

    @functools.wraps(original)
    def noted(self: Storage, *args: Any, **kwargs: Any) -> None:
        used.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(Storage, "__init__", noted)
    # A converted file says nothing of the machine, so it does not even where it lies in one's own log folder.
    (tmp_path / "logs").mkdir(exist_ok=True)
    file = (tmp_path / "out" / "model.safetensors").rename(tmp_path / "logs" / "model.safetensors")
    with safe_open(str(file), "pt") as opened:
        assert str(tmp_path) not in str(opened.metadata())
        assert "SECRET" not in str(opened.metadata())
    for path in (run / "checkpoints" / "last.ckpt", file):
        evaluate = compose_for("eval", tmp_path, f"ckpt_path={path}", "num_samples=0")
        with pytest.raises(UserError, match=r"data = None: .* is not a run of this log folder.*; choose data=digits"):
            eval_script.evaluate(evaluate)
        data = ["data=digits", f"paths.data_dir={data_dir}"]
        judged = eval_script.evaluate(compose_for("eval", tmp_path, f"ckpt_path={path}", "num_samples=0", *data))
        assert judged["val/loss"] == pytest.approx(trained["val/loss"], rel=1e-5)
        other = [*data, "data.image_size=[16,16]"]
        with pytest.raises(UserError, match=r"data.image_size = \[16, 16\]: the network .* was trained with \[8, 8\]"):
            eval_script.evaluate(compose_for("eval", tmp_path, f"ckpt_path={path}", *other))
        sample_script.sample(compose_for("sample", tmp_path, f"ckpt_path={path}", "count=1", "sampler.steps=1"))
    assert {storage.remote.token_env for storage in used} == {"HF_TOKEN"}
    assert all(Path(storage.cache_dir).is_relative_to(data_dir) for storage in used)
    assert list(victim.iterdir()) == []


@pytest.mark.long
def test_a_run_of_ones_own_is_taken_at_its_word(train_here: Train, tmp_path: Path) -> None:
    trained, _ = train_here(run="logs/train/runs/own")
    run = tmp_path / "logs" / "train" / "runs" / "own"
    judged = eval_script.evaluate(compose_for("eval", tmp_path, "num_samples=0"))
    assert judged["val/loss"] == pytest.approx(trained["val/loss"], rel=1e-5)
    run.rename(tmp_path / "elsewhere")
    run.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="not a run of this log folder"):
        eval_script.evaluate(compose_for("eval", tmp_path, f"ckpt_path={run}/checkpoints/last.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "node"),
    [
        ("model", {"_target_": "mvsplit.data.digits.write_digits", "_partial_": True, "folder": "VICTIM/digits"}),
        ("model.residual", {"_target_": "mvsplit.callbacks.sample_grid.SampleGrid", "folder": "VICTIM"}),
        ("flow.times", {"_target_": "mvsplit.data.storage.Storage", "cache_dir": "VICTIM"}),
    ],
)
def test_only_networks_and_flows_are_built_from_a_saved_config(
    train_here: Train, tmp_path: Path, key: str, node: dict[str, Any]
) -> None:
    train_here("trainer.max_steps=1")
    file, victim = tmp_path / "run" / "config.yaml", tmp_path / "victim"
    config = yaml.safe_load(file.read_text())
    *above, name = key.split(".")
    place = config
    for part in above:
        place = place[part]
    place[name] = {k: v.replace("VICTIM", str(victim)) if isinstance(v, str) else v for k, v in node.items()}
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=rf"{key}\._target_ = {node['_target_']}: must be a class of"):
        sample_script.sample(compose_for("sample", tmp_path, f"ckpt_path={tmp_path}/run/checkpoints/last.ckpt"))
    assert not victim.exists()
