"""The allow-list in `configs/local/allowed.yaml`: what it adds, what stays refused, and that no other file counts."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from mvsplit.utils import allowed, hydra_node
from mvsplit.utils.allowed import owners_list
from mvsplit.utils.config import locate
from mvsplit.utils.errors import UserError

Owner = Callable[[str], Path]
FOLDERS = {key.removeprefix("hydra."): usual[0] for key, usual in hydra_node.FOLDERS.items() if key[:5] == "hydra"}
LISTED = "targets: [decimal.Decimal]\nhydra: {launcher._target_: [my_plugin.Launcher], launcher.n_jobs: null}\n"


def check(node: dict[str, Any]) -> None:
    """Check such a node for Hydra, with the usual folders."""
    config = OmegaConf.create({"hydra": node})
    for key, folder in FOLDERS.items():
        OmegaConf.update(config, f"hydra.{key}", folder)
    hydra_node.check_hydra_node(config)


@pytest.fixture
def owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Owner:
    """`owner(text)`: the content of this checkout's list."""

    def write(text: str) -> Path:
        file = tmp_path / "configs" / "local" / "allowed.yaml"
        file.parent.mkdir(parents=True)
        file.write_text(text)
        monkeypatch.setattr(allowed, "FILE", file)
        return file

    return write


def test_the_list_is_that_of_this_checkout() -> None:
    assert Path(__file__).parents[2] / "configs" / "local" / "allowed.yaml" == allowed.FILE


def test_without_a_file_nothing_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowed, "FILE", tmp_path / "allowed.yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "local").mkdir(parents=True)
    (tmp_path / "configs" / "local" / "allowed.yaml").write_text(LISTED)  # of another project
    assert owners_list() == allowed.OwnersList()
    with pytest.raises(UserError, match="must be a class of"):
        locate("decimal.Decimal", "callbacks.mine")


@pytest.mark.parametrize(
    "target",
    ["os.system", "subprocess.run", "subprocess.Popen", "wandb.init", "wandb.util.os.system", "decimal.Context",
     "lightning.pytorch.loggers.WandbLogger", "mvsplit.utils.loggers.find_spec"],
)  # fmt: skip
def test_a_listed_class_is_allowed_and_others_are_not(owner: Owner, target: str) -> None:
    owner(LISTED)
    assert locate("decimal.Decimal", "callbacks.mine").__name__ == "Decimal"
    with pytest.raises(
        UserError, match=rf"^callbacks\.mine\._target_ = {target}: must be .*decimal\.Decimal.*; more can"
    ):
        locate(target, "callbacks.mine")


def test_a_listed_function_is_refused(owner: Owner) -> None:
    owner("targets: [os.system]")
    with pytest.raises(UserError, match="the allow-list cannot name functions"):
        locate("os.system", "callbacks.mine")


def test_listed_keys_of_hydra_are_allowed_and_others_are_not(owner: Owner) -> None:
    owner(LISTED)
    node = {"launcher": {"_target_": "my_plugin.Launcher", "n_jobs": 3}}
    check(node)
    for key, value in (("_target_", "os.system"), ("setup", ["touch canary"])):
        with pytest.raises(UserError, match=rf"^hydra\.launcher\.{key} = "):
            check({"launcher": {**node["launcher"], key: value}})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("targets: os.system", "targets = 'os.system': Input should be a valid list"),
        ("hydra: {launcher.n_jobs: []}", "hydra.launcher.n_jobs = []: List should have at least 1 item"),
        ("targets: ['os system']", "targets.0 = 'os system': String should match pattern"),
        ("packages: [os]", "packages = ['os']: Extra inputs are not permitted"),
        ("hydra: {launcher.setup: {a: 1}}", "hydra.launcher.setup = "),
        ("- 1", "content = [1]: Input should be a valid dictionary"),
        ("targets: !!python/name:os.system", "not valid YAML for a config"),
    ],
)
def test_a_mistake_in_the_list_names_file_and_entry(owner: Owner, text: str, says: str) -> None:
    file = owner(text)
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        owners_list()
    assert str(caught.value).startswith(f"{file}: ")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("node", "accepted"),
    [
        ({"launcher": {"partition": "gpu\n#SBATCH --wrap=x"}}, False),
        ({"launcher": {"partition": "gpu; touch canary"}}, False),
        ({"launcher": {"submitit_folder": "/home/jobs/%j"}}, False),
        ({"launcher": {"setup": ["touch canary"]}}, False),
        ({"launcher": {"additional_parameters": {"wrap": "touch canary"}}}, False),
        ({"launcher": {"timeout_min": "60"}}, False),
        ({"launcher": {"_target_": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.os.system"}}, False),
        ({"sweeper": {"storage": "sqlite:////home/study.db"}}, False),
        ({"sweeper": {"custom_search_space": "os.system"}}, False),
        ({"sweeper": {"sampler": {"_target_": "os.system"}}}, False),
        ({"sweeper": {"sampler": {"independent_sampler": "os.system"}}}, False),
        ({"sweeper": {"n_trials": 0}}, False),
        ({"launcher": {"partition": "gpu", "gres": "gpu:a100:2", "nodes": 1, "mem_per_gpu": "32G"}}, True),
        ({"sweeper": {"n_trials": 9, "sampler": {"seed": 1, "multivariate": True, "prior_weight": 1.0}}}, True),
    ],
)  # fmt: skip
def test_keys_of_the_shipped_plugins_are_typed(node: dict[str, Any], accepted: bool) -> None:
    with nullcontext() if accepted else pytest.raises(UserError, match=r"^hydra\.(launcher|sweeper)\."):
        check(node)
