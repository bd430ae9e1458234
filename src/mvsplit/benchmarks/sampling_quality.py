"""The metrics of trained networks by seconds per sample, over depth, steps, solver and guidance.

Networks and samplers take turns, batch by batch: other load on the machine affects all of them alike.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Column, Table

from mvsplit.benchmarks.sampling_by_depth import seconds_now
from mvsplit.data.datamodule import ShardDataModule
from mvsplit.evaluation.generation import Generator
from mvsplit.evaluation.measuring import chosen_network, chosen_reference, floor
from mvsplit.evaluation.quality import Quality
from mvsplit.evaluation.sample_set import choose_labels
from mvsplit.python import Run
from mvsplit.stability.taps import blocks_of
from mvsplit.utils.config import build
from mvsplit.utils.console import info, print_table, progress
from mvsplit.utils.errors import UserError
from mvsplit.utils.images import to_uint8
from mvsplit.utils.run_dirs import find_checkpoint

SHOWN = {"fid": "FID", "is": "IS", "precision": "precision", "recall": "recall", "recognised": "recognised"}
"""Metrics of the table."""


def sampler_node(keys: dict[str, Any]) -> dict[str, Any]:
    """The node of a sampler in `samplers`, from which it is built."""
    return keys | {"_target_": "mvsplit.flow.sampler.Sampler"}


@dataclass
class Candidate:
    """A trained network with one sampler.

    Attributes:
        about: `run`, `depth`, `width`, `step`, `sampler`, `solver` and `guided`.
        generator: draws its samples.
        quality: compares them.
        seconds: per sample, of each batch.
        evaluated: samples that went through the network, at all steps.
    """

    about: dict[str, Any]
    generator: Generator
    quality: Quality
    seconds: list[float] = field(default_factory=list)
    evaluated: int = 0

    def draw(self, index: torch.Tensor, labels: torch.Tensor) -> None:
        """Draw samples number `index` (B,) of the classes `labels` (B,), timed, and add them to the metrics."""
        device = next(self.generator.network.parameters()).device
        count = self.generator.network.register_forward_pre_hook(self._count)
        begun = seconds_now(device)
        images = to_uint8(self.generator.samples(index.to(device), labels.to(device)))
        self.seconds.append((seconds_now(device) - begun) / len(index))
        count.remove()
        self.quality.update(images.cpu(), labels)

    def _count(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        self.evaluated += len(inputs[0])

    def result(self) -> dict[str, Any]:
        """`about`; `calls` of the network per sample; `sample_s`, of the fastest batch; the metrics."""
        cost = {"calls": self.evaluated / self.quality.count, "sample_s": min(self.seconds)}
        return self.about | cost | self.quality.metrics()


class TrainedNetworks:
    """The runs to compare.

    Args:
        runs: shallowest first, all trained on the same data.
        data: a set with their images.
        config: of `bench_sampling.yaml`.
        device: on which they sample.

    Raises:
        UserError: if they were trained on different data, or the metrics cannot be computed.
    """

    def __init__(self, runs: list[Run], data: ShardDataModule, config: dict[str, Any], device: torch.device) -> None:
        for run in runs[1:]:
            if run.config["data"] != runs[0].config["data"] or run.latents != runs[0].latents:
                raise UserError(
                    f"runs: {run.path} was trained on other data than {runs[0].path}; compare runs of one set"
                )
        self.device = device
        self.candidates: list[Candidate] = []
        network = chosen_network(build(config["features"]), data).to(device)
        cache = Path(config["paths"]["data_dir"], "cache")
        for run in runs:
            for name, keys in config["samplers"].items():
                chosen = {"sampler": sampler_node(keys), "autoencoder": None}
                generator = run.generator(chosen | {key: config[key] for key in ("seed", "precision")}, whole_set=True)
                if not self.candidates:
                    reference = chosen_reference(config["reference"], network, data, generator.image_shape, cache)
                    self.floor = floor(Quality(network, reference), data)
                about = {"run": str(run.path), "depth": len(blocks_of(run.network)) or None, "step": run.step,
                         "width": run.config["model"].get("width"), "sampler": name,
                         "solver": generator.sampler.solver, "guided": generator.sampler.cfg_scale != 1}  # fmt: skip
                self.candidates.append(Candidate(about, generator, Quality(network, reference)))
        self.classes = list(range(runs[0].config["data"]["num_classes"]))

    @classmethod
    def load(cls, config: dict[str, Any], device: torch.device) -> "TrainedNetworks | None":
        """Those of `runs`; None, and a line that says so, if there are none.

        Raises:
            UserError: if one is missing or damaged.
        """
        paths, logs = config["runs"], config["paths"]["log_dir"]
        if paths is None:
            try:
                found = [find_checkpoint("last", logs)]
            except UserError:
                info(f"quality not measured: no trained network in {logs}; train one, or pass runs=[…]")
                return None
        elif not paths:
            info("quality not measured: runs = []")
            return None
        else:
            found = [find_checkpoint(path, logs) for path in paths]
        try:
            runs = [Run(path, config["weights"], config["precision"], Path(logs)) for path in found]
        except UserError as error:
            raise UserError(str(error).replace("ckpt_path", "runs", 1)) from None
        runs.sort(key=lambda run: (len(blocks_of(run.network)), run.step))
        data = runs[0].data(config["data"])
        data.prepare_data()
        data.setup()
        return cls(runs, data, config, device)

    def measure(self, config: dict[str, Any]) -> dict[str, Any]:
        """Draw `num_samples` samples with each candidate.

        Returns:
            `points`, see `Candidate.result`; `real`, the metrics of real held-out images.
        """
        for candidate in self.candidates:
            for part in (candidate.generator, candidate.generator.decoder):
                if part is not None:
                    part.to(self.device)
        batches = torch.arange(config["num_samples"]).split(config["draw_batch"])
        with progress("sampling", len(batches) * len(self.candidates)) as advance:
            for index in batches:
                labels = choose_labels(config["seed"], index, self.classes, "equal")
                for candidate in self.candidates:
                    candidate.draw(index, labels)
                    advance(1)
        points = [candidate.result() for candidate in self.candidates]
        return {"points": points, "real": self.floor, "num_samples": config["num_samples"]}


def show_quality(found: dict[str, Any]) -> None:
    """Print the table of points."""
    points = found["points"]
    metrics = {key: name for key, name in SHOWN.items() if any(key in point for point in points)}
    names = ("blocks", "sampler", "calls", "ms per sample", *metrics.values())
    title = f"Metrics of {found['num_samples']} samples by cost"
    justify = {"sampler": "left"}
    columns = [Column(name, justify=justify.get(name, "right")) for name in names]  # type: ignore[arg-type]
    table, last = Table(*columns, title=title, title_justify="left"), points[0]["run"]
    for point in points:
        if point["run"] != last:
            table.add_section()
        values = (f"{point[key]:.4g}" if key in point else "–" for key in metrics)
        cost = (f"{point['calls']:.3g}", f"{1000 * point['sample_s']:.3g}")
        table.add_row(str(point["depth"] or "–"), point["sampler"], *cost, *values)
        last = point["run"]
    real = [f"{found['real'][f'real_{key}']:.4g}" if f"real_{key}" in found["real"] else "–" for key in metrics]
    if found["real"]:
        table.add_section()
        table.add_row("", "real held-out images", "", "", *real)
    print_table(table)


def in_words(found: dict[str, Any] | None, deep: tuple[int, float, int], config: dict[str, Any]) -> list[str]:
    """What the other samplers of the deepest network save, in plain words.

    Args:
        found: see `TrainedNetworks.measure`.
        deep: a depth, the cost of its samples as a multiple of those at a reference depth, and that depth.
        config: of `bench_sampling.yaml`.
    """
    if found is None:
        return []
    points = [point for point in found["points"] if point["run"] == found["points"][-1]["run"]]
    first, *others = points
    lines = [f"of {first['depth']} trained blocks, with {first['sampler']}: {_metrics(first)}"]
    lines += [
        f"{point['sampler']} takes {point['sample_s'] / first['sample_s']:.2f} of the time: {_metrics(point)}"
        for point in others
    ]
    alike = [p for p in points if _guidance(p, config) == _guidance(first, config)]
    good = [p for p in alike if p["fid"] <= config["equal_fid"] * first["fid"]]
    cheapest = min(good, key=lambda point: float(point["sample_s"]))
    depth, ratio, reference = deep
    share = ratio * cheapest["sample_s"] / first["sample_s"]
    lines.append(
        f"the cheapest with the same guidance and an FID up to {config['equal_fid']:g} times that of"
        f" {first['sampler']} is {cheapest['sampler']}: with it {depth} blocks take {share:.1f} times as long as"
        f" {reference} with {first['sampler']}"
    )
    return lines


def _metrics(point: dict[str, Any]) -> str:
    recognised = f", recognised {point['recognised']:.3f}" if "recognised" in point else ""
    return f"FID {point['fid']:.3g}{recognised}"


def _guidance(point: dict[str, Any], config: dict[str, Any]) -> tuple[Any, ...]:
    sampler = build(sampler_node(config["samplers"][point["sampler"]]))
    return sampler.cfg_scale, sampler.cfg_interval, sampler.guide
