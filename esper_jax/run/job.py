"""A job from its options to its arrays: prepare, start, learn, compare. What every experiment shares."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import re
import shlex
import signal
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

import jax
import numpy as np
import tyro
from jax.experimental import checkify

from esper_jax import data
from esper_jax.config import Config, number
from esper_jax.control.arms import controllers
from esper_jax.enums import LEARNED
from esper_jax.env.environment import make_env
from esper_jax.network.host import param_count
from esper_jax.run import (
    checkpoint,
    command,
    compilation,
    devices,
    estimate,
    files,
    folder,
    provenance,
    records,
    scalars,
)
from esper_jax.run.console import Console, round_note
from esper_jax.run.options import check as check_words
from esper_jax.run.options import typed
from esper_jax.run.publish import publish, publish_stopped
from esper_jax.train import Metrics, RunState, Train, bind, make_train
from esper_jax.types import Controller

# rounds in a row in which a policy takes no step, until it returns to what it was, and until the run ends
RETURN_AFTER, MOST_IDLE_ROUNDS = 2, 3


C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class JobOptions:
    """Options of every experiment's command line."""

    preset: Literal["smoke", "quick", "full"] = "quick"
    """size of the job; by default full on a GPU, else quick"""
    out: Path | None = None
    """folder for the files of the run; none makes a new one in runs/"""
    script: Path | None = None
    """file with lines such as `3: germinate slot=0 blueprint=conv_light`; adds the arm `script`"""
    resume: Path | None = None
    """folder of a run to go on with; its configuration becomes the default"""
    checkpoint_every: int | None = number(None, low=0)
    """rounds between checkpoints; 0 writes none; by default 1, or what the run had that goes on"""
    memory_checkpoints: tyro.conf.FlagCreatePairsOff[bool] = False
    """keep checkpoints in memory-backed storage while the run goes on, and move them to its folder in the end: till
    then they outlive the process, but not the machine"""
    tensorboard: tyro.conf.FlagCreatePairsOff[bool] = False
    """also write the numbers of each round as TensorBoard's event files (needs the extra of that name)"""
    plan: tyro.conf.FlagCreatePairsOff[bool] = False
    """check everything, say what would be computed and what it may take, and end"""
    distributed: tyro.conf.FlagCreatePairsOff[bool] = False
    """this is one of several processes that share the run, started by SLURM, Open MPI, Kubernetes or on a TPU"""
    coordinator: str | None = None
    """the same without a cluster: where process 0 can be reached by all, such as 10.0.0.1:1234"""
    num_processes: int | None = number(None, above=0)
    """with --coordinator: how many processes share the run"""
    process_id: int | None = number(None, low=0)
    """with --coordinator: which of them this one is, from 0 on"""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """print only warnings and the result"""
    force: tyro.conf.FlagCreatePairsOff[bool] = False
    """resume with other versions, sources or devices than before, which may change the numbers"""
    debug_nans: tyro.conf.FlagCreatePairsOff[bool] = False
    """stop at the first operation of the learner's update whose result is not a number, and name it; slow"""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)

    def meant(self, dataset: data.AnyDataset) -> str | None:
        """Data that were meant if these are others, about which a report has to say so."""
        return None

    def check_data(self) -> None:
        """Raises ValueError if the data that are named are not there."""


class Planned(Exception):
    """No more than a plan was asked for."""


class Job(NamedTuple):
    """A run that is ready to start."""

    options: JobOptions
    cfg: Config
    out: Path
    console: Console
    train: Train
    key: jax.Array
    run: RunState | None  # None before the first round
    meta: dict  # what a checkpoint has to agree with
    card: dict  # run.json
    first: Future | None = None  # a run before its first round, on its way
    memory: Path | None = None  # where checkpoints are while the run goes on, if not in its folder

    @property
    def disk(self) -> Path:
        """Where checkpoints are in the end."""
        return self.out / "checkpoints"


class Asked(NamedTuple, Generic[C]):
    """What the words of a command line decide before the others are read."""

    words: dict[str, list[str]]  # after each option
    preset: str
    card: dict | None  # of the run that is to go on
    then: C | None  # its configuration

    def word(self, name: str) -> str | None:
        return self.words[name][0] if name in self.words else None


def asked(argv: list[str], options: type[JobOptions], kind: type[C]) -> Asked[C]:
    """Checks each option by itself and chooses the devices. Raises ValueError for what is wrong, also for a run of
    another experiment."""
    words = check_words(argv, options)
    word = lambda name: words[name][0] if name in words else None
    join(word, "--distributed" in words)
    card, then = None, None
    if (resume := word("--resume")) is not None:
        card = provenance.read_card(Path(resume))
        then = Config.from_json(json.dumps(card["config"]))
        if type(then) is not kind:
            raise ValueError(f"--resume {resume}: is a run of another experiment: {card['command']}")
    devices.use_cpus(int(word("--devices") or 0) or (then.devices if then else 0))
    backend = devices.backend()
    preset = card["preset"] if card else word("--preset") or ("quick" if backend == "cpu" else "full")
    return Asked(words, preset, card, then)


def join(word: Callable[[str], str | None], distributed: bool) -> None:
    """Makes this process one of several, if it is. Raises ValueError."""
    address, *numbers = (word(name) for name in ("--coordinator", "--num-processes", "--process-id"))
    given = [value for value in (address, *numbers) if value is not None]
    if distributed and given:
        raise ValueError("--distributed and --coordinator: give one of them")
    if given and len(given) < 3:
        raise ValueError("--coordinator, --num-processes and --process-id: give all three")
    if given:
        count, process = map(int, numbers)
        if process >= count:
            raise ValueError(f"--process-id {process}: must be below --num-processes {count}")
        if not re.fullmatch(r".+:\d{1,5}", address):
            raise ValueError(f"--coordinator {address}: must be HOST:PORT")
        devices.join(address, count, process)
    elif distributed:
        devices.join()


def check_resumed(chosen: JobOptions, cfg: Config, card: dict) -> None:
    """Raises ValueError if options differ from those of the run that is to go on, whose configuration was `cfg`."""
    resume, then = chosen.resume, provenance.computed(cfg)
    if chosen.out:
        raise ValueError("--out and --resume: give one of them; a resumed run goes on in its own folder")
    if chosen.preset != card["preset"]:
        raise ValueError(f"--preset {chosen.preset} and --resume: {resume} is a run of preset {card['preset']}")
    if (now := provenance.computed(chosen.config)) != then:
        lines = (json.dumps(computed, indent=0).splitlines() for computed in (now, then))
        changed = [line.strip(", ") for line, before in zip(*lines, strict=False) if line != before]
        allowed = ", ".join(provenance.NOT_COMPUTED)
        raise ValueError(f"--resume {resume}: {changed[0]}: only {allowed} may differ from then")


def check(cfg: Config, script: Path | str | None) -> tuple[dict[str, Controller], str | None]:
    """The rules that a run compares, and the text of its script, from its file or as it is. Raises ValueError for what
    is wrong with options whatever the data are."""
    devices.check_divides(devices.make_mesh(cfg.devices), cfg)
    if isinstance(script, Path):
        try:
            script = script.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ValueError(f"--script {script}: must be a text file that can be read ({reason})") from None
    return controllers(cfg, script), script


def prepare(options: JobOptions, command_line: str, held: contextlib.ExitStack) -> Job:
    """What can be wrong with configuration, data and files is found here. Raises ValueError and OSError.

    Args:
      command_line: for the run card.
      held: keeps the run's folder from other processes until it is closed.

    Raises Planned where only that was asked for, with nothing written.
    """
    now = datetime.now()
    cfg = compilation.spread(options.config.replace(devices=1) if options.debug_nans else options.config)
    silent = None if devices.first() else held.enter_context(open(os.devnull, "w"))
    console = Console(quiet=options.quiet, file=silent)
    devices.check_same("configuration", json.dumps([cfg.to_dict(), str(options.script)]))
    if not options.resume:
        options.check_data()
        name = Path("runs") / f"{now:%Y-%m-%d_%H%M%S}-{options.preset}-seed{cfg.seed}"
        take = lambda: str(held.enter_context(folder.new(options.out or name, named=options.out is not None)))
        out = Path(devices.of_first(take))
    else:
        out = options.resume
        devices.of_first(lambda: str(held.enter_context(folder.locked(out))))
    before = provenance.read_card(out) if options.resume else {}
    every = options.checkpoint_every
    every = before.get("checkpoint_every", 1) if every is None else every
    in_memory = options.memory_checkpoints or before.get("memory_checkpoints", False)
    if in_memory and not every:
        raise ValueError("--checkpoint-every 0 and --memory-checkpoints: give one of them")
    if in_memory and devices.several():
        raise ValueError("--memory-checkpoints: the processes of a run do not share their memory")
    memory = checkpoint.memory_of(out) if in_memory else None
    events = options.tensorboard or before.get("tensorboard", False)
    if events:
        scalars.check()
    rules, script = check(cfg, options.script or before.get("script"))
    estimate.check_counts(cfg, len(rules))
    header(console, options, cfg, out)

    warn = lambda line: console.say(f"  {line}", style="bold red", always=True)
    if options.preset == "full" and jax.default_backend() == "cpu":
        warn("PRESET full IS MADE FOR A GPU, AND THIS IS A CPU: --preset quick takes minutes, this may take weeks")
    with console.step("data", cfg.data.name) as said:
        dataset = data.load(cfg.data, announce=warn)
        if before and not provenance.same_data(then := before["data"]["identity"], dataset.identity):
            raise ValueError(f"--resume {out}: its data are {then}, those found here {dataset.identity}")
        card = provenance.run_card(cfg, dataset)
        said.append(f"{dataset.name} {dataset.sizes()}; {dataset.source}; identity {dataset.identity[:16]}")
    meant = options.meant(dataset)
    if meant:
        warn(f"THE DATA ARE '{dataset.name}', NOT {meant}")
    make_env(cfg, dataset)  # which sees whether the examples are large enough, and enough of them
    plan(console, cfg, dataset, rules=len(rules))
    train, key = make_train(cfg, dataset, rules), jax.random.key(cfg.seed)

    added = before.get("added", [])
    if new := before.get("new"):
        fields = ", ".join(f"{name} = {json.dumps(value)}" for name, value in new.items())
        warn(f"the run is of an older version, and goes on with {fields}")
    meta = {"config": provenance.computed(cfg, added), "data": provenance.digest(dataset.identity)}
    run, done, damaged = None, 0, []
    kept = out / "checkpoints"
    for place in (kept, kept / "rounds"):
        if os.path.lexists(place) and not place.is_dir():
            raise ValueError(f"{place}: must be a folder; move that file away, then go on")
    if before.get("rebuilt"):
        warn(f"{out / 'run.json'} is missing or damaged: rebuilt from the newest checkpoint")
    template = compilation.run_template(train, cfg, key)
    places = [kept, memory] if memory else [kept]
    beside = records.RoundLog.hashes(kept / "rounds")
    if options.resume and any(map(checkpoint.steps, places)):
        run, done, damaged = checkpoint.resume(places, template, meta, beside)
        if done > cfg.rounds:
            raise ValueError(f"--rounds {cfg.rounds}: must be at least {done}, which {out} has done already")
        records.RoundLog.check(kept / "rounds", done)
    if options.resume:
        again = max(0, len(beside) - done)
        console.facts(
            {"resume": f"after round {done}" + f", of which {again} more were done and are again" * (again > 1)}
        )
    part = {"command": command_line, "started": now.isoformat(timespec="seconds")}
    part |= {name: card[name] for name in ("versions", "source", "device", "config_hash")}
    _compare_parts(before, part, out, options.force, warn)
    # tracing leaves a core to whatever has to be compiled besides
    init = {"init": lambda: train.init(key)} if run is None and not options.plan else {}
    first = compilation.background(init).get("init")
    with console.step("estimate", "rollouts and memory") as said:
        said.append(str(estimate.of(train, cfg, template, key, done)))
    if options.plan:
        raise Planned
    card = {
        "status": "running",
        "command": command_line,
        "started": now.isoformat(timespec="seconds"),
        "preset": options.preset,
        "arms": list(train.controllers),
        "meant": meant,
        "script": script,
        "added": added,
        "parts": [*before.get("parts", []), part],
        "checkpoint_every": every,
        "memory_checkpoints": in_memory,
        "tensorboard": events,
        **card,
    }
    if devices.first():
        _begin(out, card, before, damaged, done, None if options.resume else memory, warn)
    return Job(options, cfg, out, console, train, key, run, meta, card, first, memory)


def _begin(
    out: Path,
    card: dict,
    before: dict,
    damaged: list[tuple[Path, str]],
    done: int,
    old: Path | None,
    warn: Callable[[str], None],
) -> None:
    """The first changes to the files of a run: what is damaged is set aside, then its card is written.

    Args:
      old: where checkpoints of another run may be, whose folder is gone.
    """
    kept = out / "checkpoints"
    for line in checkpoint.set_aside(damaged):
        warn(line)
    if damaged:  # what was computed since the checkpoint that is gone on from is kept, too
        records.RoundLog.set_aside(kept / "rounds", done, kept / "damaged_rounds")
    if before.get("rebuilt") and (out / "run.json").exists():
        (out / "run.json").replace(out / "run.json.damaged")
    if old:
        checkpoint.forget(old)
    files.write_json(out / "run.json", card)


def _checked(train: Train, cfg: Config) -> Train:
    """The same run, whose updates raise checkify's error at the first operation that gives what is not a number."""
    learn = jax.jit(checkify.checkify(train.programs.learn, errors=checkify.nan_checks))

    def checked(*args):
        error, out = learn(*args)
        error.throw()
        return out

    return bind(cfg, train.dataset, train.controllers, train.programs._replace(learn=checked))


def _compare_parts(before: dict, now: dict, out: Path, force: bool, warn: Callable[[str], None]) -> None:
    """Says what differs from the last part of a run. Raises ValueError where its numbers would become others."""
    if not before:
        return
    then = before["parts"][-1] if before.get("parts") else before
    facts = {
        **{name: ("versions", name) for name in ("jax", "jaxlib", "numpy")},
        "esper_jax's sources": ("source", "sha256"),
        "device": ("device", "kind"),
        "devices used": ("device", "used"),
    }
    at = lambda part, keys: (part.get(keys[0]) or {}).get(keys[1])
    differs = {name: (at(then, keys), at(now, keys)) for name, keys in facts.items()}
    shown = {name: pair for name, pair in differs.items() if pair[0] is not None and pair[0] != pair[1]}
    if not shown:
        return
    line = "; ".join(f"{name} {str(old)[:20]} then, {str(new)[:20]} now" for name, (old, new) in shown.items())
    if set(shown) == {"devices used"} or force:  # a run may go on with another number of them
        warn(f"not as the last part of this run: {line}")
    else:
        raise ValueError(f"--resume {out}: {line}: its numbers may become others; --force goes on all the same")


def start(job: Job) -> Job:
    """The job with its rollout compiled, the other programs on their way, and a run to go on with."""
    if job.options.debug_nans:
        return job._replace(train=_checked(job.train, job.cfg), run=job.first.result() if job.first else job.run)
    with job.console.step("compile", "rollout; learn and report follow") as said:
        note = lambda name, seconds: said.append(f"{name} {seconds:.1f} s")
        cfg = job.cfg.replace(rounds=job.cfg.rounds - (0 if job.run is None else int(job.run.round)))
        train = compilation.compile_ahead(job.train, cfg, job.key, note)
    return job._replace(train=train, run=job.first.result() if job.first else job.run)


def header(console: Console, options: JobOptions, cfg: Config, out: Path) -> None:
    device = provenance.device(cfg)
    console.say(f"esper_jax {provenance.versions()['esper_jax']}  preset {options.preset}", style="bold")
    console.facts({
        "run": str(out),
        "device": f"{device['kind']} x{device['used']} of {device['available']}  {device['precision']}",
    })  # fmt: skip


def plan(console: Console, cfg: Config, dataset: data.AnyDataset, rules: int) -> None:
    """What is grown, and how much will be computed."""
    host = estimate.bare_host(cfg, dataset)
    epochs, twins = cfg.training.epochs, " and their twins" if cfg.reward.mode == "paired" else ""
    of_round, of_comparison = estimate.episodes(cfg, rules)
    total = epochs * (cfg.rounds * of_round + of_comparison)
    console.facts({
        "host": f"{param_count(host):,} parameters  {len(cfg.host.slot_names)} slots  "
        + "blueprints " + " ".join(cfg.lifecycle.offered),
        "plan": f"policies: {cfg.policy_seeds} x {cfg.rounds} rounds x {cfg.n_envs} environments{twins} x {epochs} "
        f"epochs, then {rules} rules and {len(LEARNED)} ways to act of each policy x {cfg.report_envs} environments: "
        f"{total:,} epochs of a host",
    })  # fmt: skip


def learn(job: Job, stop: command.Interruption | None = None) -> tuple[RunState, dict[str, np.ndarray]]:
    """Trains the policy. Every round is on disk before the checkpoint that counts it.

    A policy that took no step in two rounds in a row returns to the best checkpoint from before them.

    Raises Stopped if that was asked for, with the round in hand done and kept, and Refusal when a policy took no step
    in three.
    """
    run, every, rounds = job.run, job.card["checkpoint_every"], job.cfg.rounds
    stop, start = stop or command.Interruption(), int(run.round)
    log = records.RoundLog(job.disk / "rounds", start, reader=not devices.first())
    metric = job.train.dataset.metric(job.train.dataset.validation)
    idle = np.zeros(job.cfg.policy_seeds, int)  # rounds in a row in which a policy took no step
    for arrays in map(log.arrays, range(max(0, start - MOST_IDLE_ROUNDS), start)):
        idle = np.where(records.dead(arrays), idle + 1, 0)
    why, asked = None, False
    events = job.out / "tensorboard" if job.card.get("tensorboard") and devices.first() else None
    written = start if events is None or events.exists() else 0  # a run may be asked for them when it goes on
    writer = scalars.Writer(events, job.cfg.policy_seeds, written)
    with _Store(job) as store, writer, job.console.bar("round", rounds, start) as advance:
        for number in range(written, start):
            writer.write(number + 1, log.arrays(number), metric)
        for number in range(start, rounds):
            stop.patient = bool(every)
            if (back := idle == RETURN_AFTER).any():
                run = _returned(job, store, run, back, number - RETURN_AFTER)
            run, metrics = job.train.update(job.key, run)
            arrays = records.round_arrays(metrics)
            log.write(number, arrays)
            writer.write(number + 1, arrays, metric)
            idle = np.where(records.dead(arrays), idle + 1, 0)
            advance(round_note(arrays, metric), style="bold red" if idle.any() else None)
            why = _why_idle(int(idle.argmax()), run, metrics) if idle.max() >= MOST_IDLE_ROUNDS else None
            # of all processes, each of which has to ask; a signal that comes after that is for the next round, or
            # one process would leave alone
            asked = devices.any_says(stop.asked is not None)
            stop.asked = stop.asked or (signal.SIGTERM if asked else None)
            last = number + 1 == rounds or asked or why
            planned = every and (number + 1) % every == 0
            if planned or (every and last):
                # what a policy may return to must not depend on where the run was stopped
                scored = planned and not idle.any()
                score = metric.score(*records.reached(arrays)) if scored else None
                store.save(number + 1, run, score=score, about=job.card, beside=log.known)
            if last:
                break
            stop.patient = False
    stop.patient = False
    if why:
        raise command.Refusal(why)
    if asked or (stop.asked and not devices.several()):
        raise command.Stopped
    return run, log.stacked()


class _Store:
    """The checkpoints of a run while it goes on: in memory or on disk, and in the end on disk."""

    def __init__(self, job: Job):
        self.job = job
        self.to = checkpoint.Checkpoints(job.memory or job.disk, job.meta)

    def __enter__(self) -> _Store:
        return self

    def save(self, step: int, run: RunState, **extra: Any) -> None:
        """As `Checkpoints.save`, in the first process; where memory fails, on disk from then on."""
        if not devices.first():
            return
        try:
            self.to.save(step, run, **extra)
        except OSError as error:
            if self.to.folder == self.job.disk.absolute():
                raise
            what = f"{error.filename}: {error.strerror}; checkpoints go to {self.job.disk} from now on"
            self.job.console.say(f"  {what}", style="bold red", always=True)
            self.to = checkpoint.Checkpoints(self.job.disk, self.job.meta)
            self.to.save(step, run, **extra)
        self.latest = step, run, extra

    def restore_best(self, like: RunState, before: int) -> tuple[RunState, int] | None:
        self.to.wait()
        devices.each_says("written")  # which others wait for
        places = [place for place in (self.job.memory, self.job.disk) if place]
        return checkpoint.restore_best(places, like, self.job.meta, before=before)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        memory = self.job.memory
        if kind is not None:
            with contextlib.suppress(OSError):
                self.to.close()
            return
        try:
            self.to.close()
        except OSError:  # the last one could not be written to memory after all
            if self.to.folder == self.job.disk.absolute():
                raise
            step, run, extra = self.latest
            checkpoint.save(self.job.disk, step, run, self.job.meta, **extra)
        if memory:
            checkpoint.move(memory, self.job.disk)


def _returned(job: Job, store: _Store, run: RunState, back: np.ndarray, sick: int) -> RunState:
    """A run some of whose policies are what they were in the best checkpoint from before the round `sick`, which they
    began as they are; the others go on, and so does the count of rounds: what comes is played with other keys.

    Without such a checkpoint the run as it is.
    """
    found = store.restore_best(run, before=sick)
    numbers = np.flatnonzero(back)
    who = ("policies " if len(numbers) > 1 else "policy ") + ", ".join(map(str, numbers))
    what = "there is no older checkpoint to return to" if found is None else f"returned to round {found[1]}"
    job.console.say(f"  {who} took no step in {RETURN_AFTER} rounds: {what}", style="bold red", always=True)
    return run if found is None else run.returned(found[0], back)


def _why_idle(policy: int, run: RunState, metrics: Metrics) -> str:
    """What is not finite, in the order in which one thing leads to another."""
    rows = metrics.rollout
    tensors = {
        "learner": run.learner, "observations": run.observations, "returns": run.returns, "hypers": run.hypers,
        "features": rows.features, "reward": rows.reward, "value": rows.value, "log_prob": rows.log_prob,
    }  # fmt: skip
    bad = (
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, leaf in jax.tree_util.tree_leaves_with_path(tensors)
        if not np.isfinite(np.asarray(leaf[policy], np.float64)).all()
    )
    return (
        f"policy {policy} took no step in {MOST_IDLE_ROUNDS} rounds in a row, since losses or gradients were not "
        f"finite; first not finite: {next(bad, 'only the gradients')}; --debug-nans names the operation"
    )


def compare(job: Job, run: RunState) -> dict[str, np.ndarray]:
    # matplotlib takes a third of a second, which nobody has to wait for while the arms are played
    load = lambda: importlib.import_module("esper_jax.evidence.figures")
    beside = compilation.background({"work": lambda: estimate.work(job.cfg, job.train.dataset), "figures": load})
    with job.console.step("arms", " ".join(job.train.controllers)):
        dataset = job.train.dataset
        arms = job.train.compare(job.key, run, job.train.controllers)
        flops = beside["work"].result()
        return records.arm_arrays(arms, job.cfg.lifecycle.catalog, dataset.metric(dataset.test), *flops)


def stopped(error: OSError, out: Path) -> str:
    """What a person has to know when the files of a run cannot be written."""
    free = "free some, then " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    what = f"{error.filename or out}: {error.strerror or command.line(error)}"
    return f"{what}; {free}go on with --resume {shlex.quote(str(out))}"


def main(program: str, kind: type[JobOptions], parse: Callable[[list[str]], JobOptions], argv: list[str]) -> int:
    """The command line of an experiment: its exit code. Of several processes none ends before the others do.

    Args:
      program: how it is called, for messages.
      kind: what its arguments can be.
      parse: the options of its arguments. Raises ValueError for what cannot be.
    """
    try:
        return _main(program, kind, parse, argv)
    finally:
        devices.leave_together()


def _main(program: str, kind: type[JobOptions], parse: Callable[[list[str]], JobOptions], argv: list[str]) -> int:
    compilation.prepare()
    job, stop = None, command.Interruption()
    stop.message = lambda: f"stopped; go on with: {program} --resume {shlex.quote(str(job.out))}" if job else "stopped"
    try:
        with stop.watched(), contextlib.ExitStack() as held:
            stop.tidy = held.close
            with command.refusing(ValueError, OSError):
                chosen = devices.all_or_none(lambda: parse(argv))  # while it is read, processes find each other
                job = devices.all_or_none(lambda: prepare(chosen, " ".join([program, *argv]), held))
            try:
                job = start(job)
                run, rounds = learn(job, stop)
                arms = compare(job, run)
                if devices.first():
                    publish(job.out, job.console, job.card, rounds | arms, job.train.dataset)
            except command.Stopped:
                if devices.first():
                    with contextlib.suppress(OSError, ValueError):  # a full disk: the checkpoint is there
                        publish_stopped(job.out, job.console, job.card)
                command.say(stop.message())
                return stop.code
            except checkify.JaxRuntimeError as error:
                raise command.Refusal(f"--debug-nans: {error}") from error
            except OSError as error:  # such as a full disk
                raise command.Refusal(stopped(error, job.out)) from error
    except Planned:
        return 0
    except command.Refusal as refusal:
        return command.refused(typed(str(refusal), argv, kind))
    except KeyboardInterrupt:
        command.say(stop.message())
        return command.STOPPED
    except devices.TooLarge as error:
        return command.refused(f"{error}: {estimate.LESS}")
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            return command.refused(f"out of memory ({command.line(error)[:200]}): {estimate.LESS}")
        return command.broken(error, job and job.out)
    return 0
