"""Every config composes, is accepted and builds; every mistake is told in one line."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import compose_config
from data_tools import image_folder
from lightning import Trainer
from omegaconf import OmegaConf
from safetensors.torch import save_file

import encode
import eval as evaluation
import sample
from mvsplit.flow.sampler import Sampler
from mvsplit.training import session, settings
from mvsplit.utils.config import EXTERNAL, NOT_SUPPORTED, build, build_each, check_config, to_plain
from mvsplit.utils.entry import plain_overrides
from mvsplit.utils.errors import UserError
from mvsplit.utils.run_dirs import PROJECT_ROOT

CONFIGS = PROJECT_ROOT / "configs"
GROUPS = [g.name for g in sorted(CONFIGS.iterdir()) if g.is_dir() and g.name not in ("hydra", "local", "paths")]
OPTIONS = [
    (group, file.stem) for group in GROUPS if group != "study" for file in sorted((CONFIGS / group).glob("*.yaml"))
]
EVALUATED = ("features", "protocol", "text_encoder")
"""Groups of `eval.yaml`."""
ENCODED = {"autoencoder", "data"}
"""Groups of encode.yaml."""


def checked(*overrides: str) -> dict[str, Any]:
    config = to_plain(compose_config("paths.output_dir=/nowhere", *overrides))
    check_config(config, settings.TrainConfig)
    settings.check_together(config)
    return config


def there(option: str, folder: Path) -> list[str]:
    """The folder of pictures that this option reads while it is composed."""
    if option != "image_folder":
        return []
    image_folder(folder, ("ant", "bee"), (32, 32))
    return [f"data.folder={folder}"]


def test_all_groups_of_the_design_are_there() -> None:
    expected = {"data", "model", "residual", "flow", "sampler", "optim", "trainer", "callbacks", "logger", "experiment",
                "module", "debug", "hparams_search", "extras", "autoencoder", "features", "protocol", "text_encoder",
                "study"}  # fmt: skip
    assert set(GROUPS) == expected
    named = {group: {option for g, option in OPTIONS if g == group} for group in GROUPS}
    assert named["trainer"] >= {"default", "cpu", "gpu", "ddp", "ddp_sim", "fsdp", "deepspeed", "deepspeed_offload"}
    assert named["debug"] >= {"default", "fdr", "limit", "overfit", "profiler", "depth"}
    assert named["logger"] >= {"tensorboard", "csv", "many_loggers"}


@pytest.mark.parametrize(("group", "option"), [pair for pair in OPTIONS if pair[0] not in (*EVALUATED, "autoencoder")])
def test_every_config_composes_and_builds(group: str, option: str, tmp_path: Path) -> None:
    # Hydra's own settings in debug and hparams_search are for its launcher and are not composed here.
    # The networks of width 1024 are for pictures of 256 × 256.
    large = ["data=imagenet_images"] if option.startswith("layers_") else []
    config = checked(f"{group}={option}", *large, *there(option, tmp_path))
    for name in ("data", "residual", "flow", "sampler", "optim"):
        assert build(config[name]) is not None
    build(config["module"])
    build_each(config["callbacks"])
    build_each(config["logger"])
    strategy = config["trainer"]["strategy"]
    if isinstance(strategy, dict):
        build(strategy)
    if group != "trainer" or option in ("default", "cpu"):  # the others ask for GPUs or processes when built
        settings = config["trainer"] | {"logger": False, "callbacks": None, "accelerator": "cpu", "devices": 1}
        if not (group == "experiment" and isinstance(strategy, dict)):
            assert isinstance(build(settings), Trainer)
    if group != "model" or int(config["model"]["depth"]) < 28:
        return
    with torch.device("meta"):
        network = build(config["model"])()
    assert len(network.blocks) == config["model"]["depth"]


@pytest.mark.parametrize(("group", "option"), [pair for pair in OPTIONS if pair[0] in ENCODED])
def test_every_config_of_encode_composes_and_builds(group: str, option: str, tmp_path: Path) -> None:
    overrides = [f"{group}={option}", *there(option, tmp_path)]
    config = to_plain(compose_config("paths.output_dir=/nowhere", *overrides, name="encode.yaml"))
    check_config(config, encode.EncodeConfig)
    assert build(config["data"]) is not None
    if config["autoencoder"]["_target_"].endswith("Diffusers"):  # these must be fetched
        return
    images = torch.zeros(1, 3, 8, 8)
    autoencoder = build(config["autoencoder"])
    assert autoencoder.decode(autoencoder.encode(images)[0]).shape == images.shape


@pytest.mark.parametrize(("group", "option"), [pair for pair in OPTIONS if pair[0] in EVALUATED])
def test_every_config_of_eval_composes_and_checks(group: str, option: str) -> None:
    """The networks must be fetched: their classes are tried in `test_feature_networks.py`."""
    overrides = ["paths.output_dir=/nowhere", f"{group}={option}"]
    config = evaluation.checked(compose_config(*overrides, name="eval.yaml"))
    assert isinstance(build(config["sampler"]), Sampler)
    if group == "features":
        assert config["features"].keys() == {"_target_", "weights", "sha256"}
        in_training = checked(f"features@callbacks.metrics.features={option}", "callbacks=metrics")
        assert in_training["callbacks"]["metrics"]["features"] == config["features"]


def test_every_context_composes_and_builds(tmp_path: Path) -> None:
    save_file({"embeddings": torch.randn(11, 3, 7)}, tmp_path / "table.safetensors")
    table = f"model.context.embeddings={tmp_path}/table.safetensors"
    contexts = {"class_tokens": [], "caption_table": [table], "captions": []}
    assert {f.stem for f in (CONFIGS / "model" / "context").glob("*.yaml")} == set(contexts)
    for name, overrides in contexts.items():
        network = build(checked("model=tiny", f"model/context={name}", *overrides)["model"])()
        assert network.segments[1] == {"class_tokens": 4, "caption_table": 3, "captions": 256}[name]
    with pytest.raises(UserError, match=r"embeddings"):
        checked("model/context=caption_table")


@pytest.mark.parametrize("group", ["logger", "callbacks"])
def test_groups_can_be_switched_off(group: str) -> None:
    assert build_each(checked(f"~{group}")[group]) == []
    first = next(iter(checked()[group]))
    assert len(build_each(checked(f"{group}.{first}=null")[group])) == len(checked()[group]) - 1


def test_null_switches_a_group_off_on_the_command_line() -> None:
    argv = ["train.py", "logger=null", "debug=null", "ckpt_path=null", "trainer=cpu"]
    assert plain_overrides(argv) == ["train.py", "~logger", "ckpt_path=null", "trainer=cpu"]
    assert plain_overrides(["eval.py", "features=null", "protocol=null", "autoencoder=null"]) == ["eval.py"]
    given = ["sample.py", "protocol=released", "autoencoder=null"]  # which that protocol chooses
    config = sample.checked(
        compose_config("paths.output_dir=/nowhere", *plain_overrides(given)[1:], name="sample.yaml")
    )
    assert (config["autoencoder"], config["sampler"]["steps"]) == (None, 35)


def test_braces_are_typed_as_they_are_or_refused() -> None:
    assert plain_overrides(["data.train=t-{0..3}.tar", "data.val='v-{0..3}'"])[0] == 'data.train="t-{0..3}.tar"'
    assert compose_config('data.train="t-{0..3}.tar"').data.train == "t-{0..3}.tar"
    with pytest.raises(
        UserError, match=r"data\.train: given several times; quote it"
    ):  # what bash makes of it unquoted
        plain_overrides(["data.train=t-0.tar", "data.train=t-1.tar"])


def test_every_yaml_key_has_a_comment_or_says_itself() -> None:
    """Files of the groups begin with what they are, or explain their keys one by one."""
    for group, option in OPTIONS:
        text = (CONFIGS / group / f"{option}.yaml").read_text()
        assert "#" in text or len(text.splitlines()) <= 3, f"{group}/{option}.yaml has no comment"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.depth=0"], "model.depth = 0: must be greater than 0"),
        (["model.depth=-3"], "model.depth = -3: must be greater than 0"),
        (["model.depth=2.5"], "model.depth = 2.5: must be an integer"),
        (["model.width=66"], "model.width = 66: must be divisible by model.num_heads = 4"),
        (["model.num_heads=32"], "width / num_heads = 2 must be divisible by 4"),
        (["model.patch_size=3"], "model.patch_size = 3: must divide the image size [8, 8]"),
        (["data.image_size=[8,9]"], "must divide the image size [8, 9]"),
        (["data.image_size=[8]"], "data.image_size = [8]: "),
        (["residual.mean_update=leky"], "residual.mean_update = 'leky': must be 'leaky', 'plain' or 'none'"),
        (["residual.beta_init=big"], "residual.beta_init = 'big': must be a number or 'auto'"),
        (["+residual.gamma=1"], "residual.gamma = 1: unknown key; allowed: "),
        (["+model.deptth=1"], "did you mean depth?"),
        (["model.checkpointing.every=-1"], "model.checkpointing.every = -1: must be"),
        (["model.checkpointing.every=often"], "must be an integer or 'auto'"),
        (["model.checkpointing.every=2", "model.checkpointing.fraction=0"], "fraction = 0: must be greater than 0"),
        (["model.checkpointing.budget_gib=2"], "model.checkpointing.budget_gib = 2: only allowed with every=auto"),
        (["model.checkpointing.offload=true"], "offload = True: nothing to offload, since every = 0"),
        (["optim.lr=0"], "optim.lr = 0: must be greater than 0"),
        (["optim.schedule=linear"], "optim.schedule = 'linear': must be 'constant' or 'cosine'"),
        (["optim.betas=[0.9,1.0]"], "optim.betas = [0.9, 1.0]: must be less than 1"),
        (["flow.label_dropout=1.5"], "flow.label_dropout = 1.5: must be less than or equal to 1"),
        (["flow.times=uniform"], "flow.times = 'uniform': must be a node with a _target_"),
        (["sampler.solver=rk4"], "sampler.solver = 'rk4': must be 'euler', 'heun' or 'multistep'"),
        (["sampler.steps=0"], "sampler.steps = 0: must be greater than 0"),
        (["data.channels=2"], "data.channels = 2: must be 1 (grey) or 3 (RGB)"),
        (["data.batch_size=???"], "data.batch_size"),
        (["seed=-1"], "seed = -1: must be greater than or equal to 0"),
        (["seed=one"], "seed = 'one': "),
        (["trainer.max_steps=-1"], "trainer.max_steps = -1: must be greater than 0"),
        (["+trainer.max_epochs=3"], "trainer.max_epochs = 3: not supported, since runs are counted in"),
        (["trainer.devices=3"], "data.batch_size = 32: must be divisible by"),
        (["trainer.accumulate_grad_batches=5"], "data.batch_size = 32: must be divisible by"),
        (["trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches = 0: must be greater than 0"),
        (["trainer.accumulate_grad_batches=4", "trainer.val_check_interval=6"], "must be divisible by"),
        (["trainer.devices=abc"], "trainer.devices = 'abc': must be an integer, a list or 'auto'"),
        (["trainer.devices=0"], "trainer.devices = 0: must be greater than 0, a list or 'auto'"),
        (["trainer.precision=fp8"], "trainer.precision = fp8: must be one of 32-true, bf16-mixed, "),
        (["trainer.precision=fp16"], "trainer.precision = fp16: must be one of 32-true, bf16-mixed, "),
        (["optim.lr=inf"], "optim.lr = inf: must be a finite number"),
        (["seed=9223372036854775808"], "seed = 9223372036854775808: must be less than"),
        (["sampler.cfg_interval=[0.8,0.2]"], "low must not exceed high"),
        (["~model.depth"], "model.depth: missing; DiT needs it"),
        (["+residual.depth=3"], "residual.depth = 3: supplied by the network"),
        (["+extras.foo=1"], "extras.foo: unknown key"),
        (["extras.print_config=abc"], "extras.print_config = 'abc': must be a boolean"),
        (["flow._target_=mvsplit.training.session.save_config"], "must be a class of"),
        (["flow._target_=mvsplit.data.digits.write_digits"], "is a function"),
        (["+surprise=1"], "surprise: unknown key"),
        (["callbacks.ema.decay=1.0"], "callbacks.ema.decay = 1.0: must be less than 1"),
        (["model._target_=os.system"], "model._target_ = os.system: must be"),
        (["model._target_=mvsplit.training.checkpoints.torch"], "model._target_"),
        (["model._target_=mvsplit.models.dit.checkpoint"], "model._target_"),
        (["model._target_=mvsplit.models.dit.Missing"], "not found"),
        (["~data.folder"], "data.folder: missing"),
    ],
)
def test_mistakes_are_told_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        checked(*overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize("plus", ["", "+", "++"])
@pytest.mark.parametrize("key", NOT_SUPPORTED)
def test_what_lightning_has_and_runs_do_not_is_told_alike(key: str, plus: str) -> None:
    (override,) = plain_overrides([f"{plus}{key}=3"])
    with pytest.raises(UserError, match=rf"^{key} = 3: not supported, .* use {NOT_SUPPORTED[key]}$"):
        checked(override)


@pytest.mark.parametrize(
    "target", ["torch.load", "torch.hub.load", "webdataset.WebDataset", "builtins.eval", "subprocess.run", "os.system"]
)
def test_targets_outside_the_list_are_refused(target: str) -> None:
    config = checked()
    config["callbacks"]["evil"] = {"_target_": target}
    with pytest.raises(UserError, match="must be a class of"):
        check_config(config, settings.TrainConfig)


def test_an_interpolation_cannot_stand_in_a_resolved_config() -> None:
    """Else it would be resolved while building, into a node that was never checked."""
    config = checked()
    config["data"]["folder"] = '${oc.create:"{_target_: os.system, command: true}"}'
    with pytest.raises(UserError, match=r"data\.folder = .*an interpolation is not allowed here"):
        check_config(config, settings.TrainConfig)


def test_allowed_external_targets_exist() -> None:
    from mvsplit.utils.config import locate

    for name in EXTERNAL:
        assert callable(locate(name, "test"))


@pytest.mark.parametrize("name", ["ddp", "fsdp", "deepspeed", "deepspeed_offload"])
def test_without_a_gpu_the_same_command_takes_cpu_processes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def trainer(*overrides: str) -> dict[str, Any]:
        return checked(f"trainer={name}", "data.batch_size=64", *overrides)["trainer"]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (trainer()["devices"], trainer()["precision"]) == (2, "32-true")
    with pytest.raises(UserError, match="this machine has no usable GPU"):
        settings.check_machine(checked(f"trainer={name}", "trainer.accelerator=gpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert (trainer()["devices"], trainer()["precision"]) == (8, "bf16-mixed")
    forced = trainer("trainer.accelerator=cpu")
    assert (forced["devices"], forced["precision"]) == (2, "32-true")


def test_without_an_apple_gpu_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    config = checked("trainer=mps")
    assert (config["trainer"]["devices"], config["trainer"]["precision"]) == (1, "32-true")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^trainer\.accelerator = mps: this machine has no Apple GPU"):
        settings.check_machine(config)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (["offload_optimizer=disk"], "must be 'none', 'cpu' or 'nvme'"),
        (["offload_optimizer=nvme"], "nvme_path = null: must be a folder on a local disk"),
        (["nvme_path=/disk"], "nvme_path = /disk: unused"),
        (["offload_parameters=cpu"], "also set offload_optimizer to cpu or nvme"),
        (["offload_optimizer=cpu", "offload_parameters=nvme", "nvme_path=/disk"], "would keep the larger part"),
    ],
)
def test_places_to_offload_to_must_go_together(places: list[str], message: str) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        checked("trainer=deepspeed", *(f"trainer.strategy.{place}" for place in places))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("precision", "trainer", "allowed"),
    [
        *((precision, "cpu", "32-true, bf16-mixed, bf16-true, 64-true") for precision in ("16-mixed", "16-true", "16")),
        ("16-mixed", "gpu", "32-true, bf16-mixed, bf16-true, 64-true"),
        ("16-mixed", "ddp", "32-true, bf16-mixed, bf16-true, 64-true"),
        ("16-mixed", "deepspeed", "32-true, bf16-mixed, bf16-true"),
        ("16-true", "deepspeed_offload", "32-true, bf16-mixed, bf16-true"),
        ("64-true", "deepspeed", "32-true, bf16-mixed, bf16-true"),
        ("16-mixed", "fsdp", "32-true, bf16-mixed"),
        ("bf16-true", "fsdp", "32-true, bf16-mixed"),
    ],
)
def test_precisions_that_nothing_is_trained_in(precision: str, trainer: str, allowed: str) -> None:
    with pytest.raises(UserError) as caught:
        checked(f"trainer={trainer}", f"trainer.precision={precision}")
    assert str(caught.value) == f"trainer.precision = {precision}: must be one of {allowed} with this strategy"


PAPER_400L, PAPER_1000L = ["experiment=imagenet256_400l"], ["experiment=imagenet256_1000l"]
CLASS_TOKENS = 1001 * 4 * 1024


@pytest.mark.parametrize("classes", [False, True], ids=["captions", "classes"])
@pytest.mark.parametrize(
    ("overrides", "parameters", "start"),
    [
        ([*PAPER_400L, "residual=post_norm"], 5_452_858_496, None),
        ([*PAPER_400L, "residual=layerscale", "residual.lambda_init=1e-4"], 5_452_858_496 + 800 * 1024, 1e-4),
        (PAPER_400L, 5_454_496_896, 1.0),
        (PAPER_1000L, 13_635_847_296, 0.03),
    ],
    ids=["post_norm", "layerscale", "mvsplit_400", "mvsplit_1000"],
)
def test_the_papers_experiments(overrides: list[str], parameters: int, start: float | None, classes: bool) -> None:
    experiment, *others = overrides
    config = checked(experiment + "_classes" * classes, *others)
    trainer, optim, residual = config["trainer"], config["optim"], config["residual"]
    ranks = trainer["devices"] * trainer["num_nodes"]
    assert ranks == (16 if overrides == PAPER_1000L else 8)
    assert config["data"]["batch_size"] == 1024
    assert 1024 // ranks // trainer["accumulate_grad_batches"] == 64  # samples at a time on a GPU
    assert (trainer["max_steps"], trainer["gradient_clip_val"], config["flow"]["time_shift"]) == (100_000, 1.0, 4.0)
    assert trainer["val_check_interval"] == 2500 * trainer["accumulate_grad_batches"]
    assert (optim["lr"], optim["warmup_steps"], optim["schedule"]) == (1.5625e-4, 1000, "constant")
    assert (optim["betas"], optim["eps"], optim["weight_decay"]) == ([0.9, 0.999], 1e-8, 0.1)
    sampler = config["sampler"]
    assert (sampler["solver"], sampler["steps"], sampler["cfg_scale"], sampler["time_shift"]) == ("euler", 25, 2, None)
    assert config["data"]["text"] == (None if classes else "longest")
    assert config["data"]["folder"].endswith("imagenet_latents" if classes else "imagenet_captions")
    with torch.device("meta"):
        network = build(config["model"])()
    assert network.input_shape == (128, 16, 16)
    assert network.segments == (256, 4 if classes else 256)
    assert network.embedding_width == (None if classes else 1024)
    # The paper's context, encoded captions, has no weights of its own; our learned class tokens do.
    assert CLASS_TOKENS == 4_100_096
    assert sum(p.numel() for p in network.parameters()) == parameters + classes * CLASS_TOKENS
    assert residual.get("beta_init", residual.get("lambda_init")) == start
    block = network.blocks[0]  # of the input norms, of the merges, of queries and keys: as in the reference code
    assert (network.eps, block.residual1.eps, block.attention.qk_eps) == (1e-5, 1e-5, 1e-6)
    assert network.not_decayed == {"patch_proj.weight"}
    assert block.attention.proj.init_std == block.ffn.w2.init_std == (0.02 if "lambda_init" in residual else 0)


@pytest.mark.parametrize("size", ["400l", "1000l"])
def test_the_two_forms_of_an_experiment_differ_in_their_context_alone(size: str) -> None:
    captions, classes = (checked(f"experiment=imagenet256_{size}{form}") for form in ("", "_classes"))
    for config in (captions, classes):
        for part in (config["model"], config["module"]["network"]):
            del part["context"]
        del config["data"]["folder"], config["data"]["text"], config["tags"]
    assert captions == classes


def test_seed_zero_is_a_seed() -> None:
    assert checked("seed=0")["module"]["seed"] == 0
    assert checked("seed=5")["data"]["seed"] == 5


def test_resolved_config_survives_its_file(tmp_path: Path) -> None:
    config = checked()
    session.save_config(config, tmp_path)
    assert OmegaConf.to_container(OmegaConf.load(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize(
    ("task", "choice", "message"),
    [
        (["data.batch_size=4", "residual=rezero"], "rezero", r"^residual = rezero: model MLP takes no residual$"),
        (["residual=mvsplit"], "mvsplit", r"^residual = mvsplit: model MLP takes no residual$"),
        (["++residual.beta_init=1"], "mvsplit", r"^residual\.beta_init = 1: model MLP takes no residual$"),
        (["experiment=mine"], "rezero", r"^residual = rezero: model MLP takes no residual$"),
    ],
)
def test_a_residual_that_goes_nowhere_is_refused(task: list[str], choice: str, message: str) -> None:
    hydra: Any = SimpleNamespace(overrides=SimpleNamespace(task=task), runtime=SimpleNamespace(choices={}))
    hydra.runtime.choices["residual"] = choice
    config = to_plain(compose_config("paths.output_dir=/nowhere", f"residual={choice}"))
    settings.check_used(config, settings.chosen_parts(hydra))  # the DiT takes it
    config["module"]["network"] = config["model"] = {"_target_": "mvsplit.models.mlp.MLP", "width": 4}
    with pytest.raises(UserError, match=message):
        settings.check_used(config, settings.chosen_parts(hydra))
    hydra.overrides.task, hydra.runtime.choices["residual"] = ["data.batch_size=4"], "mvsplit"
    settings.check_used(config, settings.chosen_parts(hydra))  # nobody chose it
