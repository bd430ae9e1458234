"""Pictures from prompts: a network conditioned on captions, and a small Qwen3 that encodes them."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import compose_config, convert_here
from omegaconf import DictConfig
from PIL import Image
from random_weights import random_run
from reference_dit import ReferenceDiT, euler, save_release
from small_autoencoders import saved_autoencoder
from small_qwen3 import save_qwen3
from torch import Tensor

import mvsplit
import sample
from mvsplit.data.text_encoder import TextEncoder
from mvsplit.evaluation.prompts import Prompts, read_prompts
from mvsplit.flow.sampler import Sampler, sample_noise
from mvsplit.utils.config import to_plain
from mvsplit.utils.errors import UserError
from mvsplit.utils.images import enlarge, to_uint8
from mvsplit.utils.run_dirs import PROJECT_ROOT

PROMPTS = ["a corgi in the snow", "seven", "an orange cat"]
STEPS, SCALE = 3, 2.0


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen3(tmp_path_factory.mktemp("text") / "qwen3")


def captioned(config: dict[str, Any], width: int = 32) -> dict[str, Any]:
    """The config of a network that reads captions' embeddings."""
    target = "mvsplit.models.conditioning.SampleEmbeddings"
    context = {"_target_": target, "_partial_": True, "num_tokens": 16, "embedding_width": width}
    return config | {"model": config["model"] | {"context": context}}


@pytest.fixture
def run(config: Callable[..., DictConfig], tmp_path: Path) -> Path:
    return random_run(captioned(to_plain(config())), tmp_path)


@pytest.fixture
def loaded(run: Path) -> Any:
    return mvsplit.load(run, log_dir=run.parents[2])


def encoder(path: Path, **options: Any) -> TextEncoder:
    return TextEncoder(str(path), dtype="float32", **options)


def sample_here(tmp_path: Path, *overrides: str) -> None:
    """`sample.py` in this process."""
    paths = [f"paths.data_dir={tmp_path}", f"paths.log_dir={tmp_path}/logs", f"paths.output_dir={tmp_path}/out"]
    sample.sample(compose_config(*paths, *overrides, name="sample.yaml"))


def guided_euler(network: Any, states: Tensor, null: Tensor, noise: Tensor, shift: float) -> Tensor:
    """Guidance and Euler steps, written down again: both branches one after the other."""
    x = noise
    for i in range(STEPS, 0, -1):
        t, t_next = (shift * u / (1 + (shift - 1) * u) for u in (i / STEPS, (i - 1) / STEPS))
        times = torch.full((len(x),), t)
        with torch.no_grad():
            conditional, unconditional = network(x, times, states), network(x, times, null)
        x = x + (t - t_next) * (unconditional + SCALE * (conditional - unconditional))
    return x


def test_prompts_are_encoded_as_the_reference_does(loaded: Any, qwen3: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(qwen3), AutoModel.from_pretrained(qwen3).eval()
    inputs = tokenizer([*PROMPTS, *[""] * len(PROMPTS)], padding="longest", return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    conditional, unconditional = states.chunk(2)
    assert conditional.shape[1] < 16  # no longer than the longest prompt
    noise = sample_noise(5, torch.arange(3), loaded.network.input_shape)
    expected = guided_euler(loaded.network, conditional, unconditional, noise, loaded.flow.time_shift)
    found = loaded.sample(prompts=PROMPTS, seed=5, sampler=Sampler(steps=STEPS), text_encoder=encoder(qwen3))
    assert (found - expected).abs().max() < 1e-5


def test_a_longer_neighbour_changes_the_picture_as_its_padding_does(loaded: Any, qwen3: Path) -> None:
    text, chosen = encoder(qwen3), Sampler(steps=STEPS)
    long = "a red panda climbing a bamboo stalk, drawn with a pencil"
    alone = loaded.sample(prompts=["seven"], sampler=chosen, text_encoder=text)
    beside = loaded.sample(prompts=["seven", long], sampler=chosen, text_encoder=text)[:1]
    apart = loaded.sample(prompts=["seven", long], sampler=chosen, text_encoder=text, batch_size=1)[:1]
    assert torch.equal(alone, apart)
    assert (alone - beside).abs().max() > 1e-3

    states, counts = text.encode(["seven", long, ""])
    assert states.shape[1] == counts[1] > counts[0]
    noise = sample_noise(0, torch.arange(1), loaded.network.input_shape)
    padded = guided_euler(loaded.network, states[:1], states[2:], noise, loaded.flow.time_shift)
    assert (beside - padded).abs().max() < 1e-5


def test_fixed_padding_does_not_depend_on_neighbours(loaded: Any, qwen3: Path) -> None:
    text, chosen = encoder(qwen3, padding="fixed", max_tokens=16), Sampler(steps=STEPS)
    alone = loaded.sample(prompts=["seven"], sampler=chosen, text_encoder=text)
    beside = loaded.sample(prompts=["seven", "an orange cat in the snow"], sampler=chosen, text_encoder=text)[:1]
    assert (alone - beside).abs().max() < 1e-5


def test_a_caption_padded_and_cut_is_the_caption_padded_less(qwen3: Path) -> None:
    short, counts = encoder(qwen3).encode([*PROMPTS, ""])
    long, same = encoder(qwen3, padding="fixed", max_tokens=40, batch_size=1).encode([*PROMPTS, ""])
    assert (short.shape[1], long.shape[1], counts.tolist()) == (max(counts), 40, same.tolist())
    assert (long[:, : short.shape[1]] - short).abs().max() < 1e-5
    assert int(counts[-1]) == 0
    cut, _ = encoder(qwen3, max_tokens=3).encode(PROMPTS)
    assert (cut - short[:3, :3]).abs().max() < 1e-5


def test_prompts_are_read_from_a_list_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff# not this one\r\na corgi\r\n\n  ein\u2028Käfer  \n".encode())
    assert read_prompts(str(file)) == ["a corgi", "ein\u2028Käfer"]
    assert read_prompts(["", "a corgi"]) == ["", "a corgi"]
    (tmp_path / "latin").write_bytes(b"K\xe4fer\n")
    (tmp_path / "empty").write_text("# nothing\n")
    for given, reason in (
        ("a corgi", "prompts = a corgi: no such file; a prompt itself is given in a list"),
        (str(tmp_path / "latin"), "not a text file in UTF-8"),
        ("x" * 400, "no such file"),
        (str(tmp_path / "empty"), "empty: 0 prompts; must be between 1 and 100000"),
        ([], "prompts: 0 prompts; must be between"),
        (["a", 3], "prompts = 3: must be a text"),
        (["caf\udce9"], "not valid text; is the terminal in UTF-8?"),
        (["x" * 10_001], "must have at most 10000 characters"),
    ):
        with pytest.raises(UserError, match=re.escape(reason)):
            read_prompts(given)


def test_what_does_not_fit_the_network_is_one_line(
    loaded: Any, qwen3: Path, config: Callable[..., DictConfig], tmp_path: Path
) -> None:
    text = encoder(qwen3)
    (tmp_path / "classes").mkdir()
    classes = mvsplit.load(random_run(to_plain(config()), tmp_path / "classes"), log_dir=tmp_path)
    other = encoder(save_qwen3(tmp_path / "wide", width=48))
    for call, reason in (
        (lambda: loaded.sample(), "prompts = null: the network was trained on captions"),
        (lambda: loaded.sample(classes=[3]), "classes = [3]: the network was trained on captions, not classes"),
        (lambda: loaded.sample(prompts=PROMPTS), "text_encoder = None: prompts need the text encoder"),
        (lambda: loaded.sample(prompts=PROMPTS, text_encoder=other), "states have width 48, but the network needs 32"),
        (
            lambda: loaded.sample(prompts=PROMPTS, text_encoder=text, image_size=[7, 8]),
            "image_size = [7, 8]: model: images of",
        ),
        (
            lambda: loaded.sample(prompts="a corgi", text_encoder=text),
            "prompts = a corgi: no such file; a prompt itself",
        ),
        (lambda: classes.sample(prompts=PROMPTS, text_encoder=text), "trained on classes, not captions"),
    ):
        with pytest.raises(UserError, match=re.escape(reason)):
            call()  # type: ignore[no-untyped-call]


def test_another_encoder_than_that_of_the_captions_is_refused(loaded: Any, qwen3: Path, tmp_path: Path) -> None:
    mine, chosen = encoder(qwen3), Sampler(steps=1)
    loaded.text = {"encoder": {**mine.identity(), "path": "elsewhere"}, "padding": "longest"}
    assert loaded.sample(prompts=["seven"], text_encoder=mine, sampler=chosen).shape == (1, 1, 8, 8)
    other = encoder(save_qwen3(tmp_path / "other", seed=1))
    with pytest.raises(UserError, match=r"not as it encoded the captions: weights = \w+, but theirs is \w+, from else"):
        loaded.sample(prompts=["seven"], text_encoder=other, sampler=chosen)
    with pytest.raises(UserError, match="padding = fixed, but theirs is longest"):
        loaded.sample(prompts=["seven"], text_encoder=encoder(qwen3, padding="fixed"), sampler=chosen)


def test_larger_pictures_than_it_was_trained_on(loaded: Any, qwen3: Path) -> None:
    wide = loaded.sample(prompts=["seven"], text_encoder=encoder(qwen3), sampler=Sampler(steps=1), image_size=[8, 12])
    assert wide.shape == (1, 1, 8, 12)


def test_the_command_writes_each_prompt_into_its_picture(
    run: Path, qwen3: Path, run_script: Callable[..., Any], tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a corgi in the snow\nein Käfer\n")
    common = [f"ckpt_path={run}", f"prompts={file}", f"text_encoder.path={qwen3}", "text_encoder.dtype=float32"]
    output = tmp_path / "out"
    done = run_script("sample.py", *common, "sampler.steps=2", f"paths.output_dir={output}")
    assert done.returncode == 0, done.stderr
    pictures = sorted(output.glob("*_prompt_*.png"))
    assert [path.name for path in pictures] == ["00000_prompt_0.png", "00001_prompt_1.png"]
    assert [Image.open(path).text["prompt"] for path in pictures] == ["a corgi in the snow", "ein Käfer"]  # type: ignore[attr-defined]

    made = tmp_path / "set"
    sample_here(tmp_path, *common, "sampler.steps=2", "num_samples=5", "batch_size=2", f"output={made}")
    assert json.loads((made / "prompts.json").read_text()) == ["a corgi in the snow", "ein Käfer"]
    settings = json.loads((made / "settings.json").read_text())["prompts"]
    assert (settings["count"], settings["encoder"]["padding"]) == (2, "longest")
    last = made / "png" / "000004_prompt_0.png"
    assert Image.open(last).text["prompt"] == "a corgi in the snow"  # type: ignore[attr-defined]

    with pytest.raises(UserError, match=r"^classes = \[3\]: the network was trained on captions, not classes; use"):
        sample_here(tmp_path, f"ckpt_path={run}", "classes=[3]")


def test_the_lines_for_a_notebook(
    run: Path, qwen3: Path, monkeypatch: pytest.MonkeyPatch, config: Callable[..., DictConfig]
) -> None:
    page = (PROJECT_ROOT / ".github" / "docs" / "prompts.md").read_text()
    lines = re.search(r"```py\n(import mvsplit\n.*?)```", page, re.DOTALL)
    assert lines is not None
    text = lines[1].replace("mvsplit_1000l.safetensors", str(run)).replace("Qwen/Qwen3-0.6B", str(qwen3))
    text = re.sub(r"    autoencoder=.*\n", "", text)  # this network draws images, not latents
    names: dict[str, Any] = {}
    exec(text, names)
    assert names["pictures"].shape == (2, 1, 8, 8)
    assert next(names["network"].network.parameters()).dtype == torch.bfloat16


def test_the_lines_of_a_model_card(
    qwen3: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_script: Callable[..., Any],
    config: Callable[..., DictConfig],
) -> None:
    identity = encoder(qwen3, max_tokens=24).identity()
    data = {"text": {"encoder": identity, "padding": "longest"}, "samples": 40}
    run = random_run(captioned(to_plain(config())), tmp_path, data)
    done = run_script("convert.py", f"ckpt_path={run}", "hub=true", "license=mit", f"output={tmp_path}/hub")
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "hub" / "README.md").read_text()
    lines = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert lines is not None
    assert "text_encoder=TextEncoder(\"Qwen/Qwen3-0.6B\", max_tokens=24, dtype='float32'))" in lines[1]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(lines[1].replace("Qwen/Qwen3-0.6B", str(qwen3)), names)
    assert names["images"].shape == (1, 1, 8, 8)


@torch.no_grad()
def test_a_release_draws_as_its_code_does(qwen3: Path, tmp_path: Path) -> None:
    """From released weights and prompts to decoded pictures, beside transformers and diffusers themselves."""
    torch.manual_seed(1)
    theirs = ReferenceDiT(depth=4, channels=12, text=32).eval()
    save_release(tmp_path / "model.pt", theirs)
    vae = saved_autoencoder(tmp_path / "vae" / "vae", "AutoencoderKLFlux2")
    file = tmp_path / "weights.safetensors"
    given = [f"release={tmp_path}/model.pt", "num_heads=2", f"output={file}", f"paths.output_dir={tmp_path}"]
    convert_here(*given)
    prompts = "[" + ",".join(f'"{prompt}"' for prompt in PROMPTS) + "]"
    sample_here(
        tmp_path, f"ckpt_path={file}", "protocol=released", f"prompts={prompts}", "image_size=[8,8]",
        "sampler.steps=5", "precision=float32", f"text_encoder.path={qwen3}", "text_encoder.dtype=float32",
        f"autoencoder.path={tmp_path}/vae",
    )  # fmt: skip

    states, null = encoder(qwen3).with_null(PROMPTS)
    x = euler(theirs, sample_noise(0, torch.arange(3), (12, 8, 8)), states, null, 2.0, 5)
    std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    latents = x * std.view(-1, 1, 1) + vae.bn.running_mean.view(-1, 1, 1)
    pictures = vae.decode(torch.nn.functional.pixel_shuffle(latents, 2)).sample
    assert pictures.shape == (3, 3, 32, 32)
    expected = enlarge(to_uint8(pictures))
    for number, path in enumerate(sorted((tmp_path / "out").glob("*_prompt_*.png"))):
        found = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)
        assert (found.int() - expected[number].int()).abs().max() <= 1
        assert Image.open(path).text["prompt"] == PROMPTS[number]  # type: ignore[attr-defined]


def test_the_weights_of_a_whole_language_model_are_read(qwen3: Path, tmp_path: Path) -> None:
    """As the published ones are saved: with a head, and names that begin with `model`."""
    from transformers import AutoConfig, AutoTokenizer, Qwen3ForCausalLM

    torch.manual_seed(0)
    whole = Qwen3ForCausalLM(AutoConfig.from_pretrained(qwen3)).eval()
    whole.save_pretrained(tmp_path / "whole")
    AutoTokenizer.from_pretrained(qwen3).save_pretrained(tmp_path / "whole")
    text = encoder(tmp_path / "whole")
    inputs = text.tokenizer(PROMPTS, padding="longest", return_tensors="pt")
    with torch.no_grad():
        expected = whole.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert torch.equal(text.encode(PROMPTS)[0], expected.last_hidden_state)


def edited(name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))


def without_a_weight(folder: Path) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights["norm.weight"]
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})


BAD_ENCODERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "lacks a weight": (without_a_weight, "1 of its weights are missing or do not fit, first norm.weight"),
    "cut": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "cannot be loaded"),
    "another kind": (edited("config.json", lambda c: c | {"model_type": "llama"}), "a model of type llama; must be"),
    "no heads": (edited("config.json", lambda c: c | {"num_key_value_heads": 0}), "cannot be loaded"),
    "a token too many": (edited("tokenizer_config.json", lambda c: c | {"pad_token": "<new>"}), "its tokenizer has"),
    "adapters": (lambda f: (f / "adapter_config.json").write_text("{}"), "contains adapters; must be a whole model"),
    "files elsewhere": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}'),
        "names the file '../../etc/passwd', which must be in the same folder",
    ),
}


@pytest.mark.parametrize("name", BAD_ENCODERS)
def test_text_encoders_that_cannot_be_used_are_refused(qwen3: Path, tmp_path: Path, name: str) -> None:
    damage, message = BAD_ENCODERS[name]
    damage(Path(shutil.copytree(qwen3, tmp_path / "qwen3")))
    with pytest.raises(UserError, match=rf"^[^\n]*{re.escape(message)}[^\n]*$"):
        TextEncoder(str(tmp_path / "qwen3"))


def test_folders_that_do_not_exist_are_not_asked_for_on_a_hub(tmp_path: Path) -> None:
    for path in (f"{tmp_path}/none", "./none", "none", "a/b/none", "tests/none"):
        with pytest.raises(UserError, match=rf"^text_encoder\.path = {path}: no such folder; must be one, or a repo"):
            TextEncoder(path)
    with pytest.raises(UserError, match=r"^text_encoder\.padding = shortest: allowed: longest, fixed$"):
        TextEncoder("Qwen/Qwen3-0.6B", padding="shortest")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", {"rms_norm_eps": 0.1}),
        ("config.json", {"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}}),
        ("config.json", {"hidden_act": "gelu"}),
        ("tokenizer_config.json", {"pad_token": "a"}),
    ],
)
def test_what_changes_the_states_changes_the_identity(
    qwen3: Path, tmp_path: Path, name: str, change: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(qwen3, tmp_path / "qwen3"))
    edited(name, lambda content: content | change)(folder)
    mine, other = encoder(qwen3), encoder(folder)
    assert not torch.equal(mine.encode([*PROMPTS, ""])[0], other.encode([*PROMPTS, ""])[0])
    assert mine.identity()["weights"] != other.identity()["weights"]
    assert encoder(qwen3).identity() == mine.identity()


def test_sets_of_other_prompts_are_other_sets(qwen3: Path) -> None:
    text = encoder(qwen3)
    first, second = (Prompts(list(texts), text).identity() for texts in (("a\nb", "c"), ("a", "b\nc")))
    assert first["sha256"] != second["sha256"]
