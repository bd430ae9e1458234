"""Overrides of training runs; all that name callbacks are here, and `training` in `bench_gpu.yaml`."""

PROBES = "mvsplit.benchmarks.gpu.probes"
STEPS, HALF, SAVE_EVERY = 40, 20, 4
SPOILED, SKIPPED, BACK = 6, 3, 8
"""Steps at which a gradient is corrupted, a step is skipped, the guard rolls back."""
SHORT = [
    f"trainer.max_steps={STEPS}", "trainer.val_check_interval=100000", "optim.warmup_steps=5",
    f"callbacks.checkpoint.every_n_steps={SAVE_EVERY}", f"callbacks.checkpoint.keep_every_n_steps={HALF}",
    "callbacks.checkpoint.keep_best=0", "callbacks.sample_grid=null",
]  # fmt: skip
ENDLESS = [*SHORT, "trainer.max_steps=1000000", "callbacks.checkpoint.keep_every_n_steps=null"]
FORGED = [
    f"callbacks.monitor._target_={PROBES}.Forged", f"+callbacks.monitor.skip={SKIPPED}",
    f"+callbacks.monitor.back={BACK}", "callbacks.monitor.guard.action=skip",
    "callbacks.monitor.guard.snapshot_every=2", "callbacks.monitor.guard.margin=2",
]  # fmt: skip
SPOIL = [f"+callbacks.spoil._target_={PROBES}.Spoil", f"+callbacks.spoil.step={SPOILED}"]
MEASURE = [f"+callbacks.measure._target_={PROBES}.Measure", "+callbacks.measure.folder=${paths.output_dir}"]
UNSAVED = [
    "trainer.max_steps=7", "trainer.limit_val_batches=0", "test=false",
    *(f"callbacks.{name}=null" for name in ("checkpoint", "stop_signals", "sample_grid", "time_probe")),
]  # fmt: skip
TWO_MACHINES = ["trainer.num_nodes=2", "trainer.devices=1"]
