"""Which runs the ablation trains, and in which order."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import compose_config

from mvsplit.benchmarks import ablation
from mvsplit.training import settings
from mvsplit.utils.config import check_config, to_plain, to_yaml
from mvsplit.utils.entry import plain_overrides
from mvsplit.utils.errors import UserError


def config(*overrides: str) -> dict[str, Any]:
    plain = to_plain(compose_config("paths.output_dir=/x", "folder=/y", *overrides, name="ablate.yaml"))
    check_config(plain, ablation.Config)
    return plain


CONFIG = config()
VARIANTS = ablation.variants(CONFIG["questions"])


@cache
def composed(name: str) -> dict[str, Any]:
    overrides = plain_overrides([*CONFIG["overrides"], *VARIANTS[name]])
    return to_plain(compose_config("paths.output_dir=/x", *overrides))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_a_valid_config(name: str) -> None:
    plain = composed(name)
    check_config(plain, settings.TrainConfig)
    settings.check_together(plain)


def test_no_two_variants_are_the_same() -> None:
    configs = [to_yaml(composed(name)) for name in VARIANTS]
    assert len(set(configs)) == len(configs)


def test_the_questions_are_those_documented() -> None:
    questions = CONFIG["questions"]
    assert list(questions) == ["residuals", "split_or_gain", "initialisation_or_schedule", "where_they_part"]
    assert [len(members) for members in questions.values()] == [12, 18, 7, 6]
    assert len(VARIANTS) == 12 + 18 + 7 + 6 - 2  # mvsplit and post_norm belong to two questions


def test_the_first_seed_of_all_variants_comes_first() -> None:
    runs = ablation.all_runs(config("seeds=[3,1,3]"))
    assert [run.seed for run in runs] == [3] * len(VARIANTS) + [1] * len(VARIANTS)
    assert [run.variant for run in runs[: len(VARIANTS)]] == list(VARIANTS)
    assert list(VARIANTS)[:12] == list(CONFIG["questions"]["residuals"])
    assert len({run.folder for run in runs}) == len(runs)
    assert runs[0].folder == Path("/y/post_norm/seed_3")


def test_questions_variants_and_patterns_can_be_selected() -> None:
    questions = CONFIG["questions"]
    assert list(ablation.variants(questions, ["residuals"])) == list(questions["residuals"])
    assert list(ablation.variants(questions, ["*_lr_0.25", "rezero"])) == [
        "rezero", "post_norm_lr_0.25", "post_norm_standard_lr_0.25"
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"only = \['nothing'\]: no such question or variant; allowed: residuals, "):
        ablation.variants(questions, ["nothing"])


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ({"q": {"../a": []}}, r"questions\.q\.\.\./a: a name may contain letters"),
        (
            {"q": {"a": ["x=1"]}, "r": {"a": ["x=2"]}},
            r"questions\.r\.a: has different overrides under another question",
        ),
    ],
)
def test_names_must_be_folders_and_mean_one_thing(questions: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ablation.variants(questions)


def test_the_report_gets_all_variants_and_their_questions() -> None:
    rows = ablation.describe(CONFIG["questions"])["variants"]
    assert len(rows) == 43
    assert [row["question"] for row in rows if row["name"] == "mvsplit"] == ["residuals", "split_or_gain"]
    assert rows[0] == {"name": "post_norm", "question": "residuals", "overrides": ["residual=post_norm"]}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seeds=[]", "seeds = "),
        ("seeds=[-1]", "seeds = "),
        ("processes=0", "processes = 0: must be greater than 0"),
        ("only=residuals", "only = 'residuals'"),
        ("questions.residuals.post_norm=residual", "questions = "),
        ("+colour=red", "colour: unknown key"),
    ],
)
def test_mistakes_are_reported(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        config(override)
    assert message in str(caught.value)
