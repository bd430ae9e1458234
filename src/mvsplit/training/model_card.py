"""The README of a model on a hub, generated from what is recorded of a run.

Only numbers and single words are taken from a config: no paths, addresses or other values of the machine.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import torch

from mvsplit import __version__
from mvsplit.training.weight_sources import Source

WORD = re.compile(r"[A-Za-z0-9][\w.+-]{0,60}", re.ASCII)
PLACES = ("checkpoint", "folder", "output", "subfolder")
"""Keys of records that say where something was."""
HOMES = ("home", "Users", "users")
"""Folders that contain folders named after users."""
PARTS = re.compile(r"\S[:@]\S")
"""Parts of an address: host and port, or a user's name."""
MAX_LEVELS = 8
MAX_NUMBER = 1 << 63
ENCODER = "Qwen/Qwen3-0.6B"
"""The text encoder that the card names: the default."""
FLUX2 = {"name": "Diffusers", "model": "AutoencoderKLFlux2"}
"""What is recorded of the autoencoder that the card can name."""
FLUX2_CALL = 'Diffusers("black-forest-labs/FLUX.2-klein-4B", "AutoencoderKLFlux2", subfolder="vae")'


def model_card(
    source: Source, sizes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], name: str, license: str,
    metrics: dict[str, Any] | None, raw: bool,
) -> str:  # fmt: skip
    """The card, in Markdown with YAML in front.

    Args:
        source: the weights; its config has been checked as far as it is portable.
        sizes: type and shape of each tensor that is written.
        name: of the folder.
        license: its identifier on the hub.
        metrics: content of a `metrics.json`, unchecked.
        raw: the weights are the trained ones, not their average.
    """
    captions = source.text is not None
    count = sum(torch.Size(shape).numel() for name, (_, shape) in sizes.items() if name.startswith("raw.") == raw)
    types = sorted({str(dtype).removeprefix("torch.") for dtype, _ in sizes.values()})
    title = _word(name) or "model"
    front = [
        "---",
        f"license: {license}",
        "library_name: mvsplit",
        f"pipeline_tag: {'text-to-image' if captions else 'unconditional-image-generation'}",
        "tags:",
        *(f"- {tag}" for tag in ("diffusion-transformer", "flow-matching", "image-generation", "mvsplit")),
        "---",
    ]
    model = source.config["model"]
    what = "captions" if captions else "classes"
    which = f"{'trained' if raw else 'averaged'} weights, " if source.step else ""  # not recorded in a release
    return "\n".join(
        [
            *front,
            f"# {title}",
            f"\nA diffusion transformer conditioned on {what}: {count:,} parameters"
            f" ({', '.join(types)}), {which}written by mvsplit {__version__}.",
            *_table("Network", _words(model, "model") | _words(model.get("residual"), "residual")),
            *_table("Data", _data(source)),
            *_table("Training", _training(source)),
            *_metrics(metrics),
            *_use(title, source, raw),
            "",
        ]
    )


def _data(source: Source) -> dict[str, str]:
    keys = ("image_size", "channels") if source.text is not None else ("image_size", "channels", "num_classes")
    rows = _words(source.config["data"], "data", keys)
    folder = source.config["data"].get("folder")
    if isinstance(folder, str) and (name := _word(without_places(folder))):
        rows["set"] = name
    recorded = source.data if isinstance(source.data, dict) else {}
    rows |= {key: word for key in ("fingerprint",) if (word := _word(recorded.get(key)))}
    for key, record in (("latents", source.latents), ("text", source.text)):
        if isinstance(record, dict):
            rows |= _words(without_places(record.get("encoder")), f"{key}.encoder")
            rows |= _words(record, key, ("padding", "own"))
    return rows


def _training(source: Source) -> dict[str, str]:
    config = source.config
    rows = {"steps": f"{source.step:,}"} if source.step else {}
    if "optim" not in config:  # only the portable part is known; the rest of it is not used by samplers
        return rows | _words(config["flow"], "flow", ("time_shift",))
    rows |= _words(config["flow"], "flow") | _words(config["flow"].get("times"), "flow.times")
    rows |= _words(config.get("optim"), "optim") | _words(config["data"], "data", ("batch_size",))
    rows |= _words(config.get("trainer"), "trainer", ("max_steps", "precision", "gradient_clip_val"))
    callbacks = config.get("callbacks")
    rows |= _words(callbacks.get("ema") if isinstance(callbacks, dict) else None, "callbacks.ema", ("decay",))
    return rows | _words(config.get("module"), "module", ("seed",))


def _metrics(metrics: dict[str, Any] | None) -> list[str]:
    if metrics is None:
        return []
    measured = {key: value for key, value in metrics.items() if key.startswith("eval/") and _word(key[5:])}
    numbers = {key: f"{value:.6g}" for key, value in measured.items() if _is_number(value)}
    lines = _table("Metrics", numbers)
    protocol = without_places(metrics.get("protocol"))
    if protocol:
        text = json.dumps(protocol, indent=2, ensure_ascii=True).replace("`", "'")
        lines += ["\nThey depend on this protocol:\n", "```json", text[:10_000], "```"]
    return lines


def _use(name: str, source: Source, raw: bool) -> list[str]:
    option, weights = (", weights='raw'", " weights=raw") if raw else ("", "")
    imports, call, override = "import mvsplit\n", "classes=[0, 1, 2]", "'classes=[0,1,2]'"
    if source.text is not None:
        imports = "import mvsplit\nfrom mvsplit.data.text_encoder import TextEncoder\n"
        settings = _encoder_settings(source.text)
        arguments = "".join(f", {key}={value!r}" for key, value in settings.items())
        call = f'prompts=["a corgi in the snow"], text_encoder=TextEncoder("{ENCODER}"{arguments})'
        override = "'prompts=[\"a corgi in the snow\"]'"
        override += "".join(f" text_encoder.{key}={value}" for key, value in settings.items())
    notes: list[str] = []
    encoder = source.latents.get("encoder") if isinstance(source.latents, dict) else None
    flux2 = isinstance(encoder, dict) and {key: encoder.get(key) for key in FLUX2} == FLUX2
    if flux2:
        imports = imports.replace("mvsplit\n", "mvsplit\nfrom mvsplit.data.autoencoders import Diffusers\n", 1)
        call += f", autoencoder={FLUX2_CALL}"
    elif source.latents is not None:
        kind = _word(encoder.get("name")) if isinstance(encoder, dict) else None
        notes = [f"# Draws latents; autoencoder=… decodes them, the one of the training set: {kind or 'unknown'}"]
    if flux2 and source.text is not None and not source.step:  # as the authors draw from their release
        options = "protocol=released "
    else:
        options = "autoencoder=flux2 " if flux2 else ""
    return [
        "\n## Use\n",
        "```python",
        imports,
        *notes,
        f'images = mvsplit.load("{name}"{option}).sample({call})',
        "```\n",
        "```bash",
        *notes,
        f"python src/sample.py ckpt_path={name} {options}{override}{weights}",
        "```",
    ]


def _encoder_settings(text: dict[str, Any]) -> dict[str, Any]:
    """How the captions were encoded, where it is not as by default."""
    encoder = text.get("encoder")
    recorded = {**(encoder if isinstance(encoder, dict) else {}), "padding": text.get("padding")}
    usual = {"padding": "longest", "max_tokens": 256, "dtype": "bfloat16"}
    given = {key: recorded.get(key, value) for key, value in usual.items()}
    return {key: value for key, value in given.items() if _word(value) and value != usual[key]}


def _table(title: str, rows: Mapping[str, str]) -> list[str]:
    return [f"\n## {title}\n", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]


def _words(node: Any, path: str, keys: tuple[str, ...] | None = None) -> dict[str, str]:
    """The numbers and words of a config's node, and its class."""
    found: dict[str, str] = {}
    for key, value in node.items() if isinstance(node, dict) else ():
        if key == "_target_" and keys is None and isinstance(value, str):
            found[path] = _word(value.rpartition(".")[2]) or "unknown"
        elif (keys is None or key in keys) and _word(key) and not key.startswith("_") and (word := _word(value)):
            found[f"{path}.{key}"] = word
    return found


def _word(value: Any) -> str | None:
    """A number, a word, or a short list of them; None for anything else."""
    if isinstance(value, list) and 0 < len(value) <= 4 and all(map(_is_number, value)):
        return " × ".join(map(str, value))
    if type(value) is bool or _is_number(value):
        return str(value).lower()
    return value if isinstance(value, str) and WORD.fullmatch(value) else None


def _is_number(value: Any) -> bool:
    """Whether it can be shown: a number of the usual size, not NaN."""
    return type(value) in (int, float) and -MAX_NUMBER < value < MAX_NUMBER


def without_places(value: Any, level: int = 0) -> Any:
    """A record without the places of files: of a path, only the last part is left, and of an address not its host.

    An address may contain a user's name and password, and a home folder has the name of its user.
    """
    if level > MAX_LEVELS:
        return None
    if isinstance(value, dict):
        named = [(without_places(str(key)), child) for key, child in value.items() if key not in PLACES]
        return {key: without_places(child, level + 1) for key, child in named if key is not None}
    if isinstance(value, list):
        return [without_places(child, level + 1) for child in value]
    if isinstance(value, str) and ("/" in value or "\\" in value):
        before, _, last = value.replace("\\", "/").rstrip("/").rpartition("/")
        parent = before.rpartition("/")[2]
        host = before.endswith((":", "/")) or (before.startswith("//") and "/" not in before[2:])
        private = host or parent in HOMES or (last == "root" and not before)
        return last if WORD.fullmatch(last) and not private else None
    if isinstance(value, str) and PARTS.search(value):
        return None
    return value
