"""What else could explain what a policy gained? Controls of a finished run, on its own keys.

    python -m experiments.controls RUN

plays, in the environments in which the run's arms were compared: growing each kind of seed everywhere at once; a tuned
periodic rule and the best schedule that a search finds (both chosen on keys of training); as many random operations as
the policy's; each grown network's final shape, trained from the first epoch on; a host as wide as those are large; each
policy's most frequent schedule without the policy; and policies that were trained in the same way but saw the time
alone. It writes controls.npz, controls.json and controls.txt into the run's folder, and its report.html anew.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from esper_jax import Config
from esper_jax.config import TextConfig
from esper_jax.enums import BASELINE, GREEDY, HEADS, MATCHED, PLANNED, POLICY, Op
from esper_jax.evidence import tables
from esper_jax.evidence.controls import EAGER, ORACLE, STATIC, TUNED, WIDE
from esper_jax.network.host import param_count
from esper_jax.run import command, compilation, estimate, files, options, provenance, publish, records
from esper_jax.run.compilation import prepare
from esper_jax.run.console import Console
from esper_jax.run.folder import locked
from esper_jax.train import Comparison, Orders, by_arm, episodes, make_train, report_key, round_key
from experiments import schedules
from experiments.finished import Finished, learn, made_by, open_run

PROGRAM = "python -m experiments.controls"


def reported(of: Finished, arms: dict[str, tuple[str, Orders]]) -> dict[str, Comparison]:
    """Plays arms in the environments of the run's comparison: for each its controller and orders [P, R, ...]."""
    envs = of.cfg.report_envs
    rows = {name: orders.ops.shape[0] for name, (_, orders) in arms.items()}
    who = episodes(
        of.cfg, of.train.controllers,
        [(controller, p, e) for name, (controller, _) in arms.items() for p in range(rows[name]) for e in range(envs)],
    )  # fmt: skip
    flat = [jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), orders) for _, orders in arms.values()]
    who = who._replace(orders=jax.tree.map(lambda *parts: np.concatenate(parts), *flat))
    _, played = of.train.play(report_key(of.key), of.run, who)
    return by_arm(played, rows, envs)


def planned(of: Finished, plan: np.ndarray) -> tuple[str, Orders]:
    orders = Orders.none(of.cfg, (1, of.cfg.report_envs))
    return PLANNED, orders._replace(plan=np.broadcast_to(plan, orders.plan.shape).astype(np.int32))


def static_final(of: Finished, policy: Comparison) -> tuple[str, Orders]:
    """What each episode of the policy kept, there from the first epoch on."""
    return BASELINE, Orders.none(of.cfg, policy.germinated.shape)._replace(shape=policy.shape.astype(np.int32))


def matched(of: Finished, policy: Comparison) -> tuple[str, Orders]:
    """As many of each operation as the policy asked for in each episode, gates that failed included."""
    ops = np.stack([(policy.rollout.info.requested_op[..., 1:] == op).sum(-1) for op in Op], axis=-1)
    return MATCHED, Orders.none(of.cfg, policy.germinated.shape)._replace(ops=ops.astype(np.int32))


def fixed(of: Finished) -> tuple[str, Orders]:
    """Each policy's most frequent schedule in environments of training, as its likeliest actions are."""
    cfg, envs = of.cfg, range(of.cfg.n_envs)
    who = episodes(cfg, of.train.controllers, [(GREEDY, p, e) for p in range(cfg.policy_seeds) for e in envs])
    _, played = of.train.play(round_key(of.key, cfg.rounds), of.run, who, report=False)
    heads = np.stack([getattr(played.rollout.action, head) for head in HEADS], axis=-1)
    heads = heads.reshape(cfg.policy_seeds, len(envs), *heads.shape[1:])
    orders = Orders.none(cfg, (cfg.policy_seeds, cfg.report_envs))
    usual = np.stack([schedules.most_frequent(rows) for rows in heads])
    return BASELINE, orders._replace(action=np.broadcast_to(usual[:, None], orders.action.shape).astype(np.int32))


def blind(of: Finished, console: Console) -> Comparison:
    """Policies trained as the run's were, on the same environments, that see nothing but the time and what is legal."""
    start = of.train.init(of.key, of.run.hypers.replace(sight=0.0 * of.run.hypers.sight))
    run = learn(of.train, of.key, start, of.cfg.rounds, console, "blind")
    return of.train.compare(of.key, run, [POLICY])[POLICY]


def widened(cfg: Config, size: float, params: Callable[[Config], int]) -> Config:
    """The configuration whose host is nearest to so many times the parameters by being wider, by a step at least."""
    field, step = ("width", cfg.host.n_heads) if isinstance(cfg, TextConfig) else ("base_channels", 1)
    at = lambda width: cfg.replace(**{f"host.{field}": width})
    width = getattr(cfg.host, field)
    target = size * params(cfg)
    while params(at(width + step)) <= target:
        width += step
    wider = [w for w in (width, width + step) if w > getattr(cfg.host, field)]
    return at(min(wider, key=lambda w: abs(params(at(w)) - target)))


def static_wide(of: Finished, size: float) -> tuple[Comparison, estimate.Work, float]:
    """The bare host, but as large as what the policies kept: its episodes, their work, and its relative size."""

    params = lambda cfg: param_count(estimate.bare_host(cfg, of.dataset))
    # no seed will be grown, and one kind compiles faster than all
    cfg = of.cfg.replace(**{"lifecycle.blueprints": of.cfg.lifecycle.blueprints[:1]})
    wide = widened(cfg, size, params)
    train = make_train(wide, of.dataset, {})
    found = train.compare(of.key, train.init(of.key), [BASELINE])[BASELINE]
    times = params(wide) / params(cfg)
    info = found.rollout.info
    info = info.replace(
        committed_size=info.committed_size * np.float32(times), blended_size=info.blended_size * np.float32(times)
    )
    return found.replace(rollout=found.rollout.replace(info=info)), estimate.work(wide, of.dataset), times


def as_recorded(now: dict[str, np.ndarray], then: dict[str, np.ndarray]) -> bool:
    """Whether the run's own arms were played again bit by bit."""
    mine = np.isin(now["arms/names"], then["arms/names"])
    names = np.array_equal(now["arms/names"][mine], then["arms/names"])
    fields = [f"arms/{name}" for name in ("test_loss", "test_committed_loss", "reward", "requested_op")]
    return names and all(np.array_equal(now[name][mine], then[name], equal_nan=True) for name in fields)


def without_twice(arms: dict[str, Comparison]) -> dict[str, Comparison]:
    """Without the kind of seed that the rule `eager` grows everywhere as well."""
    losses = {name: result.test.loss for name, result in arms.items()}
    same = lambda name: name.startswith(EAGER) and "eager" in arms and np.array_equal(losses[name], losses["eager"])
    return {name: result for name, result in arms.items() if not same(name)}


def controls(of: Finished, console: Console) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of all arms as in metrics.npz, and what the controls were and took."""
    cfg, catalog = of.cfg, of.cfg.lifecycle.catalog
    with console.step("arms", " ".join(of.train.controllers)):
        arms = of.train.compare(of.key, of.run, of.train.controllers)
    policy = arms[POLICY]
    with console.step("periodic", "kinds and periods, in environments of training"):
        periodic = schedules.tuned_periodic(of)
    with console.step("oracle", "schedules, in environments of training"):
        best = schedules.oracle(of, console.say)
    with console.step("controls", "on the keys of the report"):
        wanted = {EAGER + catalog[kind]: planned(of, schedules.everywhere(cfg, kind)) for kind in schedules.kinds(cfg)}
        wanted |= {TUNED: planned(of, periodic.plan), ORACLE: planned(of, best.plan)}
        wanted |= {"random_matched": matched(of, policy), STATIC: static_final(of, policy), "fixed": fixed(of)}
        arms = without_twice(arms | reported(of, wanted))
    with console.step("wide", "a wider host, compiled and played"):
        size = float(policy.rollout.info.committed_size[..., -1].mean())
        wide, wide_work, times = static_wide(of, size)
    if cfg.rounds:
        arms["blind"] = blind(of, console)
    metric = of.dataset.metric(of.dataset.test)
    arrays = records.arm_arrays(arms | {WIDE: wide}, catalog, metric, *estimate.work(cfg, of.dataset))
    arrays["arms/train_flops"][arrays["arms/names"] == WIDE] = wide_work.host * cfg.training.epochs
    searched = {TUNED: periodic, ORACLE: best}
    facts: dict[str, Any] = {
        name: {
            "schedule": schedules.in_words(found.plan, cfg), "plan": found.plan.tolist(), "plans": found.plans,
            "episodes": found.episodes, "return": found.worth,
        }
        for name, found in searched.items()
    }  # fmt: skip
    facts[ORACLE]["seconds"] = round(console.durations["oracle"], 1)
    facts[WIDE] = {"size": times, "policy_size": size}
    facts["source"] = provenance.source()
    return arrays, facts


def text_of(arrays: dict[str, np.ndarray], facts: dict[str, Any], card: dict[str, Any]) -> str:
    """What controls.txt says."""
    columns, rows, notes, _ = publish.result(arrays, card)
    lines = [
        f"{publish.title(card)}: controls",
        made_by(
            card, (arrays["arms/names"] == POLICY).sum(), card["seconds"]["total"] + facts["seconds"], f"{PROGRAM} RUN"
        ),
        *(
            []
            if facts["as_recorded"]
            else ["THE RUN'S OWN ARMS CAME OUT OTHERWISE THAN RECORDED: these are other episodes"]
        ),
        "",
        tables.text_table(columns, rows),
        *notes,
        "",
        tables.text_table(*tables.robust(arrays)),
        "",
        tables.headline(arrays, card["data"]["name"], card.get("meant")),
        "",
        *(f"{question} {answer}." for question, answer in tables.answers(arrays)),
        "",
        f"The tuned rule: {facts[TUNED]['schedule']} (of {facts[TUNED]['plans']}).",
        f"The best schedule found: {facts[ORACLE]['schedule']} (of {facts[ORACLE]['plans']}, in "
        f"{facts[ORACLE]['episodes']:,} episodes and {facts[ORACLE]['seconds']:.0f} s).",
        f"Of the requests of the usual schedules {refused(arrays, 'fixed')} were refused, of those of the policies' "
        f"likeliest actions {refused(arrays, GREEDY)}.",
        *(
            f"{arm}: x{point.size:.2f} the parameters, x{point.flops:.2f} the work of training."
            for arm, point in tables.frontier(arrays).items()
            if arm in (POLICY, STATIC, WIDE, ORACLE)
        ),
    ]
    return "\n".join(lines) + "\n"


def refused(arrays: dict[str, np.ndarray], arm: str) -> str:
    """The share of an arm's requests, but for waiting, that were not legal or failed at a gate."""
    mine = arrays["arms/names"] == arm
    asked = arrays["arms/requested_op"][mine][..., 1:] != Op.WAIT
    failed = ~arrays["arms/success"][mine][..., 1:][asked]
    return f"{100 * failed.mean():.0f} %" if failed.size else "nothing (there were no requests)"


def main(argv: list[str] | None = None) -> int:
    prepare()

    def chosen(
        run: Annotated[Path, tyro.conf.Positional], data_dir: Path | None = None, text: tuple[str, ...] = ()
    ) -> tuple[Path, Path | None, tuple[str, ...]]:
        """Plays the controls of a finished run: what else could explain what its policies gained?

        Takes several times as long as the run did.

        Args:
          run: folder of the run.
          data_dir: folder that holds the CIFAR-10 files; none looks where the run did.
          text: files of the run's text, if they were moved.
        """
        return run, data_dir, text

    def work() -> None:
        console = Console()
        folder, *places = options.cli(chosen, sys.argv[1:] if argv is None else argv, prog=PROGRAM)
        of = open_run(folder, console, *places)
        with locked(folder):
            files.check_free(
                *(folder / name for name in ("controls.npz", "controls.json", "controls.txt", "report.html"))
            )
            metrics = records.read_arrays(folder / "metrics.npz")
            with console.step("compile", "or found from the run itself"):
                of = of._replace(train=compilation.compile_ahead(of.train, of.cfg, of.key))
            arrays, facts = controls(of, console)
            facts["as_recorded"] = as_recorded(arrays, metrics)
            facts["seconds"] = round(console.elapsed(), 1)
            said = text_of(arrays, facts, of.card)
            records.write_arrays(folder / "controls.npz", arrays)
            files.write_json(folder / "controls.json", facts)
            files.write_text(folder / "controls.txt", said)
            console.say(said, always=True)
            with console.step("report", str(folder / "report.html")):
                publish.write_report(folder, console, of.card, metrics, png=False)

    return command.ended(work)


if __name__ == "__main__":
    command.leave(main())
