"""The commands, examples, keys and links of the README and of `.github/docs/` are those that work."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch
import yaml
from conftest import PROJECT_ROOT, compose_config
from data_tools import image_folder
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep

import bench
import study
from mvsplit.benchmarks import ablation, memory, monitor_cost
from mvsplit.training import settings
from mvsplit.utils.config import build, check_config, to_plain
from mvsplit.utils.entry import plain_overrides

SRC, CONFIGS = PROJECT_ROOT / "src", PROJECT_ROOT / "configs"
FILES = [PROJECT_ROOT / "README.md", *sorted((PROJECT_ROOT / ".github").rglob("*.md"))]
PAGES = {str(path.relative_to(PROJECT_ROOT)): path.read_text() for path in FILES}
README = PAGES["README.md"]
ROOMS = [
    *("utils", "kernels", "models", "flow", "stability", "data"),
    *("training", "evaluation", "callbacks", "reports", "benchmarks"),
]


def blocks(language: str, *pages: str) -> list[str]:
    """The code blocks of a language, in all pages if none is named."""
    return [b for page in pages or PAGES for b in re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)]


LINES = [
    shlex.split(part, comments=True) for b in blocks("bash") for line in b.splitlines() for part in line.split("&&")
]
LAUNCHED = [line for b in blocks("sh") for line in b.replace("\\\n", " ").splitlines() if "src/train.py" in line]
IN_EXPERIMENTS = [
    shlex.split(part.replace("srun ", ""), comments=True)
    for path in sorted((CONFIGS / "experiment").glob("imagenet*.yaml"))
    for line in path.read_text().splitlines()
    if line.startswith("#   ") and "python src/" in line
    for part in line[1:].split("&&")
]
COMMANDS = {
    " ".join(command): command
    for command in [line for line in LINES + IN_EXPERIMENTS if line[:1] == ["python"]]
    + [["python", *shlex.split(line[line.index("src/train.py") :])] for line in LAUNCHED]
}


def first_job(overrides: list[str]) -> list[str]:
    """The overrides of a sweep's first job, without the intervals that a sweeper samples from."""
    parsed = OverridesParser.create().parse_overrides(plain_overrides([o for o in overrides if o != "-m"]))
    return [
        f"{o.get_key_element()}={next(o.sweep_string_iterator())}" if o.is_sweep_override() else str(o.input_line)
        for o in parsed
        if not isinstance(o.value(), IntervalSweep)
    ]


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_command_has_a_valid_config(command: list[str], tmp_path: Path) -> None:
    script, overrides = command[1].removeprefix("src/").removesuffix(".py"), command[2:]
    assert (SRC / f"{script}.py").is_file()
    if script == "report":  # has no config
        return
    name = script
    if script == "bench":
        kind, overrides = bench.split_command(["bench.py", *overrides])[0], overrides[1:]
        overrides += bench.experiments_groups(overrides) if kind == "memory" else []
        name = f"bench_{kind}"
    elif script == "study":
        kind, overrides = study.command(["study.py", *overrides]), overrides[1:]
        if kind == "report":  # has no config
            return
        name = f"study_{kind}"
    overrides = first_job(overrides)
    if "data=image_folder" in overrides:  # reads the folder
        image_folder(tmp_path, ("ant", "bee"), (300, 400))
        overrides += [f"data.folder={tmp_path}"]
    cfg = compose_config("paths.output_dir=/nowhere", *overrides, name=f"{name}.yaml")
    schemas = {
        "train": settings.TrainConfig,
        "ablate": ablation.Config,
        "bench_memory": memory.Config,
        "bench_stability": monitor_cost.Config,
    }
    if name in schemas:
        check_config(to_plain(cfg), schemas[name])
    elif script == "bench":
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):  # some compose train.yaml
            bench.check(kind, cfg)
    elif script == "study":
        study.checked(kind, cfg)
    else:
        importlib.import_module(script).checked(cfg)
    if name == "train":
        settings.check_together(to_plain(cfg))


def test_all_scripts_are_shown() -> None:
    scripts = {f"src/{path.name}" for path in SRC.glob("*.py")}
    assert {command[1] for command in COMMANDS.values()} == scripts
    assert {command[2] for command in COMMANDS.values() if command[1] == "src/bench.py"} == bench.BENCHMARKS.keys()
    assert {command[2] for command in COMMANDS.values() if command[1] == "src/study.py"} == {*study.STUDIES, "report"}
    assert len(COMMANDS) > 50


def test_other_commands_name_extras_and_tests_that_exist() -> None:
    extras = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    others = [line for line in LINES if line and line[0] not in ("python", "tensorboard")]
    assert {line[0] for line in others} == {"pip", "pytest", "pre-commit", ".ci/run", "ruff", "mypy"}
    installed = {extra for text in PAGES.values() for extra in re.findall(r"pip install -e '\.\[(\w+)\]'", text)}
    assert {"test", "remote", "latents"} <= installed <= extras.keys()
    for line in others:
        for word in line:
            assert not word.startswith("tests/") or (PROJECT_ROOT / word.partition("::")[0]).is_file(), word
        if "-k" in line:
            assert re.search(rf"def test_\w*{line[-1]}", (PROJECT_ROOT / line[1]).read_text())


TITLE = re.compile(r"^# (configs/\S+\.yaml)(?:, then: python src/train.py (.*))?$", re.MULTILINE)
EXAMPLES = [(page, *TITLE.findall(block)[0], block) for page in PAGES for block in blocks("yaml", page)]


@pytest.mark.parametrize(("page", "file", "command", "content"), EXAMPLES, ids=[file for _, file, *_ in EXAMPLES])
def test_every_example_config_works(
    page: str, file: str, command: str, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a copy of `configs/`, with the modules that the page shows."""
    for code in blocks("python", page):
        if found := re.match(r"# src/(\S+)\.py", code):
            module = types.ModuleType(found[1].replace("/", "."))
            exec(code, module.__dict__)
            monkeypatch.setitem(sys.modules, module.__name__, module)
    assert not (PROJECT_ROOT / file).exists()
    shutil.copytree(CONFIGS, tmp_path / "configs", ignore=shutil.ignore_patterns("local"))
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content)
    if file == "configs/local/allowed.yaml":  # read by the project, not by Hydra; its tests are in test_config
        assert yaml.safe_load(content)
        return
    compose_config("paths.output_dir=/x")  # registers the resolvers
    with initialize_config_dir(version_base="1.3", config_dir=str(tmp_path / "configs")):
        config = to_plain(compose("train.yaml", ["paths.output_dir=/x", *shlex.split(command)]))
    check_config(config, settings.TrainConfig)
    settings.check_together(config)
    if file == "configs/local/default.yaml":
        assert config["data"]["folder"] == "/scratch/data/digits"
    if file == "configs/callbacks/halt.yaml":
        assert build(config["callbacks"]["halt"]).below == 0.5
    if file == "configs/residual/half.yaml":
        residual = build(config["residual"])(width=4)
        x = torch.tensor([[[1.0, 1.0, -1.0, 1.0]]])
        torch.testing.assert_close(residual(x, x, (1,)), x)
        assert residual.strength == 0.1
        with pytest.raises(ValueError, match=r"residual\.strength = -1\.0: must be greater than 0"):
            check_config(config | {"residual": config["residual"] | {"strength": -1.0}}, settings.TrainConfig)


def test_the_example_of_writing_shards_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(code for code in blocks("python") if "write_shards" in code)
    image_folder(tmp_path / "source", ("ant", "bee"), (30, 40))
    (tmp_path / "source" / "train").rename(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    photos = len(list((tmp_path / "photos").glob("*/*.jpg")))
    assert photos > 1
    listed = subprocess.run(["tar", "tf", "data/mine/train-000000.tar"], capture_output=True, text=True, check=True)
    assert len(listed.stdout.splitlines()) == 2 * photos


def test_every_python_block_is_run() -> None:
    """Here, as an example with a config or of writing shards; or in test_python or test_prompts."""
    assert len(blocks("py", "README.md")) == len(blocks("py", ".github/docs/prompts.md")) == 1
    assert len(blocks("py")) == 2
    assert all(code.startswith("# src/mvsplit/") or "write_shards" in code for code in blocks("python"))


def slug(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_every_link_leads_somewhere() -> None:
    links = [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    assert len(links) > 60
    for page, link in links:
        if "://" not in link:
            path, _, heading = link.partition("#")
            target = (PROJECT_ROOT / page).parent / path if path else PROJECT_ROOT / page
            assert target.exists(), f"{page}: {link}"
            if heading:
                headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
                assert heading in map(slug, headings), f"{page}: {link}"


def test_every_page_and_picture_is_shown() -> None:
    linked = {
        ((PROJECT_ROOT / page).parent / link.partition("#")[0]).resolve()
        for page, text in PAGES.items()
        for link in re.findall(r"\]\(([^)\s]+)\)", text)
    }
    assert [path.name for path in (PROJECT_ROOT / ".github").rglob("*.png") if path not in linked] == []
    assert [page for page in PAGES if page.startswith(".github/docs/") and f"]({page})" not in README] == []


def test_every_key_in_the_text_exists() -> None:
    config = to_plain(compose_config("paths.output_dir=/x", "data=imagenet_images"))
    keys = [
        (page, found[1])
        for page, text in PAGES.items()
        for code in " ".join(re.findall(r"`([^`\n]+)`", text)).split()
        if (found := re.fullmatch(r"(\w+(?:\.\w+)+)(?:=\S+)?", code))
        and isinstance(config.get(found[1].partition(".")[0]), dict)
    ]
    assert len(keys) > 40
    missing = []
    for page, key in keys:
        node = config
        for part in key.split("."):
            node = node.get(part, missing) if isinstance(node, dict) else missing
        if node is missing and not key.startswith("trainer.strategy."):
            missing.append(f"{page}: {key}")
    assert missing == []


def test_the_table_of_groups_is_complete() -> None:
    table = README.partition("| group | choices |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`([\w/]+)`", table))  # not those with a `=`
    alone = {"paths", "extras", "hydra", "local"}  # groups of one choice
    folders = {path.parent.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml")} - {Path(name) for name in alone}
    groups = {str(folder) for folder in folders if folder != Path()}
    choices = {path.stem for group in groups for path in (CONFIGS / group).glob("*.yaml")}
    assert named - {"null"} == groups | choices


def test_the_tree_names_every_room_lowest_first() -> None:
    tree = README.partition("## The tree")[2].partition("\n## ")[0]
    assert re.findall(r"^    (\w+)/", tree, re.MULTILINE) == ROOMS
    assert {path.name for path in (SRC / "mvsplit").iterdir() if path.is_dir() and path.name[0] != "_"} == set(ROOMS)
    assert all(path.name in tree for path in SRC.glob("*.py"))


def test_pages_stay_short_and_the_fork_is_on_the_second_screen() -> None:
    lines = README.splitlines()
    assert len(lines) <= 160
    assert 35 <= lines.index("## Fork it") + 1 <= lines.index("## Configs") <= 90
    assert {page: n for page, text in PAGES.items() if (n := len(text.splitlines())) > 150 and text != README} == {}


def test_nothing_says_to_install_a_package_that_somebody_else_may_publish() -> None:
    """The project is on no index: whoever takes its name there would run code on users' machines."""
    tracked = subprocess.run(["git", "ls-files"], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True).stdout
    texts = {name: PROJECT_ROOT / name for name in tracked.splitlines() if not name.endswith(".png")}
    asks = re.compile(r"pip3? install\s(?!-e \.).*\bmvsplit\b|'mvsplit\[\w")
    found = [f"{name}: {line}" for name, path in texts.items() for line in asks.findall(path.read_text())]
    assert len(texts) > 100
    assert found == []


TRANSLATED = re.compile(r"\b(told|gone on from|what lies|goes on with)\b", re.IGNORECASE)


def test_the_english_is_plain() -> None:
    """These words stood for: reported, resumed from, is stored in, continues with. See the glossary in CONTRIBUTING."""
    files = [path for pattern in ("src/**/*.py", "configs/**/*.yaml") for path in PROJECT_ROOT.glob(pattern)]
    found = [
        f"{path.relative_to(PROJECT_ROOT)}:{number}: {line.strip()}"
        for path in [*files, *FILES]
        if path.name != "CONTRIBUTING.md"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if TRANSLATED.search(line)
    ]
    assert found == []
