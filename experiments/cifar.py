"""The main job: learn when and where a small network should grow, then compare the controllers.

    python -m experiments.cifar [--preset smoke|quick|full] [--data auto|cifar10|shapes|digits] [--seed N] [--out DIR]

Trains the policy for the preset's rounds, then runs every controller on the same keys (same host initialisation, same
batches) and writes a table, pictures and the files of the run.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from esper_jax import checkpoint, compilation, data, devices, plots, presets, report, statistics, telemetry
from esper_jax.config import Config
from esper_jax.control import baselines
from esper_jax.network import cnn
from esper_jax.train import POLICY, default_controllers, make_train


@dataclasses.dataclass
class Options:
    """Learn when to grow a small network, then compare the controllers on the same keys."""

    preset: Literal["auto", "smoke", "quick", "full"] = "auto"
    """smoke: a minute and a half; quick: some minutes on a CPU; full: for a GPU; auto: full with a GPU, else quick"""
    data: Literal["auto", "cifar10", "shapes", "digits"] = "auto"
    """auto: CIFAR-10 if it can be had, else the synthetic shapes, and says so"""
    data_dir: Path | None = None
    """folder with the CIFAR-10 files (official binary or python layout)"""
    out: Path | None = None
    """folder for the files of the run; by default runs/<time>-<preset>-<seed>"""
    resume: bool = False
    """go on from the last checkpoint in --out"""
    checkpoint_every: int = 10
    """rounds between checkpoints; one is also taken after the last round"""
    script: Path | None = None
    """file with an action a line (`3: germinate slot=0 blueprint=conv_light`), run as one more controller"""
    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)


def parse(argv: list[str]) -> tuple[Options, str]:
    """Options and the name of the preset whose values are the defaults of all others. Exits with 2 on unknown ones."""
    chosen = "auto"
    for here, following in zip(argv, [*argv[1:], ""], strict=True):
        chosen = following if here == "--preset" else here.removeprefix("--preset=") if "--preset=" in here else chosen
    name = chosen if chosen != "auto" else ("quick" if jax.default_backend() == "cpu" else "full")
    config = presets.PRESETS.get(name, Config())  # an unknown name is refused below, with all others
    options = tyro.cli(Options, args=argv, default=Options(config=config), prog="python -m experiments.cifar")
    changes = {"data.name": options.data, "data.data_dir": str(options.data_dir) if options.data_dir else None}
    return dataclasses.replace(options, config=options.config.replace(**changes)), name


def use_cores() -> None:
    """One XLA device per core: faster here than one device that splits its small operations over threads."""
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)


def spread(cfg: Config) -> Config:
    """As many devices as share the environments evenly."""
    available = cfg.devices or jax.device_count()
    fits = lambda n: (
        cfg.n_envs % (n * cfg.env_chunk) == 0
        and cfg.report_envs % (n * cfg.env_chunk) == 0
        and (cfg.n_envs // n) % cfg.ppo.minibatches == 0
    )
    return cfg.replace(devices=max((n for n in range(1, available + 1) if fits(n)), default=1))


def run_card(cfg: Config, preset: str, dataset: data.Dataset) -> dict:
    device = jax.devices()[0]
    return {
        "version": version("esper_jax"),
        "command": " ".join(["python -m experiments.cifar", *sys.argv[1:]]),
        "preset": preset,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")},
        "device": f"{cfg.devices} x {device.device_kind} ({device.platform})",
        "precision": cfg.training.compute_dtype,
        "data": {"name": dataset.name, "identity": dataset.identity, "source": dataset.source},
        "seed": cfg.seed,
        "config": json.loads(cfg.to_json()),
    }


def table_rows(outcomes: list[dict], baseline: str) -> tuple[list[str], list[list[str]], dict[str, np.ndarray]]:
    """Header, one row per arm, and the report-test accuracies per arm f[E]."""
    arms = list(dict.fromkeys(row["arm"] for row in outcomes))
    column = lambda arm, name: np.array([row[name] for row in outcomes if row["arm"] == arm], float)
    accuracy = {arm: column(arm, "test_accuracy") for arm in arms}
    header = ["arm", "test accuracy %", "95 % interval", f"minus {baseline}", "95 % interval", "params",
              "germinated", "kept", "pruned", "rollbacks"]  # fmt: skip
    bounds = lambda i, f: f"[{f(i.low)}, {f(i.high)}]"
    rows = []
    for arm in arms:
        own, gain = statistics.mean_interval(accuracy[arm]), statistics.mean_interval(accuracy[arm] - accuracy[baseline])
        difference = ["-", "-"] if arm == baseline else [
            statistics.signed(gain.mean) + ("*" if gain.excludes_zero else ""), bounds(gain, statistics.signed)
        ]  # fmt: skip
        counts = [f"{column(arm, name).mean():.1f}" for name in ("germinated", "fossilised", "pruned", "rollbacks")]
        rows.append([arm, f"{own.mean:.2f}", bounds(own, lambda v: f"{v:.2f}"), *difference,
                     f"x{column(arm, 'params_ratio').mean():.2f}", *counts])  # fmt: skip
    return header, rows, accuracy


def train_rounds(train, cfg: Config, key, run, log, out: Path, options: Options, say: Console):
    """The rounds, with a progress bar on a terminal and a line each elsewhere."""
    meta = {"config": json.loads(cfg.to_json()), "data": train.dataset.identity}
    done = int(run.round)
    started = time.perf_counter()
    with progress(say) as bar:
        task = bar.add_task("rounds", total=cfg.rounds, completed=done)
        for number in range(done, cfg.rounds):
            run, metrics = train.update(key, run)
            arrays = telemetry.round_arrays(metrics)
            log.write(number, arrays)
            last = number + 1 == cfg.rounds
            if last or (number + 1) % options.checkpoint_every == 0:
                checkpoint.save(out / "checkpoints", number + 1, run, meta)
            bar.advance(task)
            line = (
                f"round {number + 1}/{cfg.rounds}  t={time.perf_counter() - started:.0f}s  "
                f"acc={arrays['rounds/val_accuracy'][:, -1].mean():.1f}  "
                f"return={np.nansum(arrays['rounds/reward'], 1).mean():.2f}  "
                f"kl={arrays['learner/approx_kl']:.4f}  entropy={arrays['learner/entropy']:.2f}  "
                f"rollbacks={arrays['rounds/panic'].sum()}"
            )
            bar.console.print(line, highlight=False) if not say.is_terminal else bar.update(task, description=line)
    return run


def progress(say: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=say, disable=not say.is_terminal)


def main(argv: list[str] | None = None) -> None:
    use_cores()
    compilation.use_cache(compilation.cache_folder())
    say = Console(width=None if sys.stdout.isatty() else 140)
    try:
        options, preset = parse(sys.argv[1:] if argv is None else argv)
        execute(options, preset, say)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def execute(options: Options, preset: str, say: Console) -> None:
    cfg = spread(options.config)
    tell = lambda text: say.print(text, highlight=False, markup=False, soft_wrap=True)
    out = options.out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{preset}-{cfg.seed}"
    if options.resume and not (out / "checkpoints").is_dir():
        raise ValueError(f"--resume: no checkpoints in {out}; give the folder of the run with --out")
    if not options.resume and out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out}: exists and is not empty; add --resume to go on with it")
    clock, seconds = time.perf_counter(), {}

    def lap(name: str) -> float:
        nonlocal clock
        seconds[name] = round(time.perf_counter() - clock, 2)
        clock = time.perf_counter()
        return seconds[name]

    t, kind = cfg.training, jax.devices()[0]
    tell(f"esper_jax {version('esper_jax')}  cifar  preset {preset}  ->  {out}")
    tell(f"  device  {cfg.devices} x {kind.device_kind}  {t.compute_dtype}  jax {jax.__version__}")
    tell(f"  plan    {cfg.rounds} rounds x {cfg.n_envs} environments x {t.epochs} epochs = "
         f"{cfg.rounds * cfg.n_envs * t.epochs:,} epochs of {t.batches_per_epoch} x {t.batch_size} images")  # fmt: skip
    dataset = data.load(cfg.data, announce=tell)
    tell(f"  data    {dataset.name}: {len(dataset.train.labels):,} train, {len(dataset.validation.labels):,} validation, "
         f"{len(dataset.test.labels):,} report-test images of {'x'.join(map(str, dataset.train.images.shape[1:]))}  "
         f"({dataset.identity})  {lap('data')}s")  # fmt: skip
    rules = default_controllers(cfg)
    if options.script:
        rules["script"] = baselines.script(baselines.parse_script(options.script.read_text()))
    train = make_train(cfg, dataset, rules)
    key = jax.random.key(cfg.seed)
    run = train.init(key)
    host = cnn.param_count(cnn.init(key, cfg.host, channels=dataset.train.images.shape[-1], classes=len(dataset.classes)))
    tell(f"  host    {host:,} parameters, slots {', '.join(cfg.host.slot_names)}; seeds: {', '.join(cfg.lifecycle.blueprints)}")
    tell("  compile ... (kept in the user's cache: faster next time)")
    compilation.compile_ahead(train, cfg, key, run, lambda name, s: tell(f"          {name}  {s:.1f}s"))
    lap("compile")

    if options.resume:
        meta = {"config": json.loads(cfg.to_json()), "data": dataset.identity}
        run, at = checkpoint.restore(out / "checkpoints", run, meta)
        run = devices.replicate(run, devices.make_mesh(cfg.devices))
        tell(f"  resume  after round {at}")
    out.mkdir(parents=True, exist_ok=True)
    card = run_card(cfg, preset, dataset)
    telemetry.write_json(out / "run.json", card)
    log = telemetry.RoundLog(out / "rounds", int(run.round))
    run = train_rounds(train, cfg, key, run, log, out, options, say)
    lap("rounds")

    arms = {}
    with progress(say) as bar:
        task = bar.add_task("comparison", total=len(train.controllers))
        for name in train.controllers:
            bar.update(task, description=f"comparison: {name}")
            arms[name] = jax.block_until_ready(train.compare(key, run, name))
            bar.advance(task)
    lap("comparison")
    write(out, card | {"seconds": seconds}, log, arms, cfg, dataset, tell)


def write(out: Path, card: dict, log, arms: dict, cfg: Config, dataset: data.Dataset, tell) -> None:
    """All files of the run, and the end block on the screen."""
    arrays = log.stacked() | telemetry.arm_arrays(arms)
    outcomes = telemetry.outcomes(arrays)
    telemetry.write_arrays(out / "metrics.npz", arrays)
    telemetry.write_csv(out / "outcomes.csv", outcomes, telemetry.OUTCOMES)
    telemetry.write_lines(out / "lifecycle.jsonl", telemetry.lifecycle(arrays))
    telemetry.write_json(out / "run.json", card)
    header, rows, accuracy = table_rows(outcomes, "never")
    sentence = statistics.verdict(
        accuracy, policy=POLICY, baseline="never", data=dataset.name, metric="report-test accuracy"
    )
    plots.accuracy_curves(out / "curves.png", arrays, dataset.name)
    plots.seed_lives(out / "seeds.png", arrays, cfg.host.slot_names, dataset.name)
    title = f"{dataset.name}, {cfg.report_envs} environments per arm, seed {cfg.seed}"
    report.write(out / "report.html", title=title, header=header, rows=rows, sentence=sentence, card=card)
    end = Console(record=True, width=140, file=io.StringIO())
    table = Table(*header, title=title, title_justify="left", caption="* the interval of the paired difference excludes 0")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    end.print(table)
    summary = end.export_text() + sentence + "\n"
    (out / "summary.txt").write_text(summary)
    tell("\n" + summary)
    spent = "  ".join(f"{name} {value:.0f}s" for name, value in card["seconds"].items())
    tell(f"{spent}\nwrote {out}/: report.html (open it), summary.txt, curves.png, seeds.png, metrics.npz, outcomes.csv, "
         "lifecycle.jsonl, run.json, checkpoints/")  # fmt: skip


if __name__ == "__main__":
    main()
