"""What does learned growth gain at which size? Policies that pay other prices for parameters, trained in one program.

    python -m experiments.prices --data digits

The price is the return that as many parameters as the host has cost. Prices are weights, not constants, of the compiled
program, so all policies of all prices are trained side by side on the same environments, and compared, as in the main
job, on keys that no training has seen. Writes prices.npz, prices.txt and prices.png.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from esper_jax import data, make_train, presets
from esper_jax.config import number
from esper_jax.enums import BASELINE, LEARNED, POLICY
from esper_jax.evidence import figures, tables
from esper_jax.evidence.canvas import png
from esper_jax.run import command, compilation, devices, estimate, files, folder, options, provenance, records
from esper_jax.run.compilation import prepare
from esper_jax.run.console import Console
from esper_jax.train import Comparison, Hypers
from experiments.finished import learn, made_by

PROGRAM = "python -m experiments.prices"


@dataclass(frozen=True)
class Options:
    """Trains policies that pay different prices for parameters side by side, and compares what they gain at which size.

    Takes as long as the main job with as many policies.
    """

    prices: tuple[float, ...] = (0.0, 0.2, 1.0, 5.0)
    """of as many parameters as the host has, in units of the return; 30 is a nat of validation loss"""
    policies: int = number(3, above=0)
    """trained at each price, from different seeds"""
    preset: Literal["smoke", "quick", "full"] = "quick"
    """size of the job"""
    data: Literal["cifar10", "shapes", "digits"] = "digits"
    """data of the hosts"""
    data_dir: Path | None = None
    """folder that holds the CIFAR-10 files; none looks in $ESPER_DATA and the user's cache, then downloads"""
    seed: int = number(0, low=0)
    """of everything random"""
    report_envs: int | None = number(None, above=0)
    """environments of the comparison; by default those of the preset"""
    out: Path | None = None
    """folder for the files; none makes a new one in runs/"""


def sweep(chosen: Options, out: Path, console: Console) -> None:
    """Raises ValueError and OSError."""
    prices = chosen.prices
    alike = len({float(f"{price:g}") for price in prices}) < len(prices)  # arms are named so
    if not prices or any(not np.isfinite(p) or p < 0 for p in prices) or alike:
        given = " ".join(map(str, prices))
        raise ValueError(f"--prices {given}: must be finite numbers, at least 0, that differ in six digits")
    cfg = presets.get(chosen.preset, chosen.data).replace(
        policy_seeds=len(prices) * chosen.policies, seed=chosen.seed, **{"reward.mode": "paired"}
    )
    cfg = cfg.replace(report_envs=chosen.report_envs or cfg.report_envs)
    if chosen.data_dir and chosen.data != "cifar10":
        raise ValueError(f"--data-dir {chosen.data_dir}: is of --data cifar10 alone, not of {chosen.data}")
    cfg = cfg.replace(**{"data.data_dir": str(chosen.data_dir) if chosen.data_dir else None})
    devices.use_cpus(cfg.devices)
    devices.backend()
    cfg = compilation.spread(cfg)
    dataset = data.load(cfg.data, announce=console.say)
    train, key = make_train(cfg, dataset), jax.random.key(cfg.seed)
    hypers = Hypers.from_config(cfg)
    each = jnp.repeat(jnp.asarray(prices, jnp.float32), chosen.policies)
    with console.step("compile", "rollout; learn and report follow"):
        train = compilation.compile_ahead(train, cfg, key)
    run = train.init(key, hypers.replace(reward=hypers.reward.replace(price=each)))
    run = learn(train, key, run, cfg.rounds, console)
    with console.step("arms", f"{BASELINE}, rules, and the policies of each price"):
        rules = [name for name in train.controllers if name not in LEARNED]
        arms = train.compare(key, run, [*rules, POLICY])
    work = estimate.work(cfg, dataset)
    arrays = records.arm_arrays(by_price(arms, prices), cfg.lifecycle.catalog, dataset.metric(dataset.test), *work)
    card = {"command": command_line(chosen), "prices": prices, **provenance.run_card(cfg, dataset)}
    del card["config"]["reward"]["price"]  # which no policy paid
    records.write_arrays(out / "prices.npz", arrays)
    files.write_json(out / "prices.json", card)
    columns, rows = tables.columns(arrays), tables.table(arrays)
    head = (
        f"Prices of parameters: {chosen.preset} on {dataset.name}, seed {cfg.seed}, {chosen.policies} policies a price"
    )
    made = made_by(card, cfg.policy_seeds, console.elapsed())
    text = "\n".join([head, made, "", tables.text_table(columns, rows), *tables.notes(arrays), ""])
    files.write_text(out / "prices.txt", text)
    png(out / "prices.png", figures.frontier(arrays, dataset.name), head, columns=2)
    console.table(columns, rows)
    console.say(f"wrote {out}/", always=True)


def by_price(arms: dict[str, Comparison], prices: tuple[float, ...]) -> dict[str, Comparison]:
    """The policies as an arm for each price."""
    policy = arms[POLICY]
    count = len(policy.germinated) // len(prices)
    part = lambda i: jax.tree.map(lambda leaf: leaf[i * count : (i + 1) * count], policy)
    rules = {name: result for name, result in arms.items() if name != POLICY}
    return rules | {f"price {price:g}": part(i) for i, price in enumerate(prices)}


def command_line(chosen: Options) -> str:
    """That gives these numbers again."""
    shown = dataclasses.replace(chosen, out=None)
    words: list[str] = []
    for field in dataclasses.fields(shown):
        value = getattr(shown, field.name)
        if value is not None:
            words += ["--" + field.name.replace("_", "-"), *map(str, value if isinstance(value, tuple) else (value,))]
    return f"{PROGRAM} {shlex.join(words)}"


def main(argv: list[str] | None = None) -> int:
    prepare()

    def work() -> None:
        console = Console()
        words = sys.argv[1:] if argv is None else argv
        options.check(words, Options)
        chosen = options.cli(Options, words, prog=PROGRAM)
        name = Path("runs") / f"{datetime.now():%Y-%m-%d_%H%M%S}-prices-seed{chosen.seed}"
        with folder.new(chosen.out or name, named=chosen.out is not None) as out:
            sweep(chosen, Path(out), console)

    return command.ended(work)


if __name__ == "__main__":
    command.leave(main())
