"""The main job from its command line to its files."""

import contextlib
import csv
import dataclasses
import errno
import io
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_run
from jax.experimental import checkify

from esper_jax import evidence, presets
from esper_jax.config import Config
from esper_jax.data import cifar10
from esper_jax.evidence import figures
from esper_jax.run import checkpoint, compilation, devices, folder, provenance, records
from esper_jax.run import job as jobs
from esper_jax.run.console import Console
from experiments import audit, cifar

jax.device_count()  # the tests' devices are there before a command asks for others
FILES = {
    "checkpoints", "curves.png", "grown.png", "learning.png", "lifecycle.jsonl", "metrics.npz", "outcomes.csv",
    "report.html", "run.json", "seeds.png", "summary.txt",
}  # fmt: skip


def run(*options):
    process = tiny_run.command(*options)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def job(out, *, rounds=tiny_run.CONFIG.rounds, run=None, every=1):
    """The tiny run as a job; its programs are compiled already."""
    cfg = tiny_run.CONFIG.replace(rounds=rounds)
    card = {
        "status": "running",
        "preset": "smoke",
        "arms": list(tiny_run.ARMS),
        **provenance.run_card(cfg, tiny.dataset()),
    }
    start = tiny_run.result().states[0] if run is None else run
    card |= {"checkpoint_every": every}
    meta = {"config": provenance.computed(cfg), "data": "tiny"}
    options = cifar.Options(preset="smoke", config=cfg)
    return jobs.Job(
        options, cfg, out, Console(file=io.StringIO()), tiny_run.result().train, tiny_run.KEY(), start, meta, card
    )


def published(done, metrics):
    jobs.publish(done.out, done.console, done.card, metrics, done.train.dataset)


def test_compiling_ahead_compiles_everything():
    result = tiny_run.result()
    large = {"jit(keys)", "jit(<lambda>)", "jit(start)"}  # rollout, learn, report and pay are wrapped for the devices
    assert large <= set(result.ahead) and result.ahead.count("jit(<lambda>)") == 4
    assert not large & set(result.later), "compiled after compile_ahead"


def test_a_run_writes_its_files(tmp_path):
    start = job(tmp_path)
    state, rounds = jobs.learn(start)
    published(start, rounds | jobs.compare(start, state))
    assert {path.name for path in tmp_path.iterdir()} == FILES
    card = json.loads((tmp_path / "run.json").read_text())
    assert (card["status"], card["data"]["name"], card["versions"]["jax"]) == ("complete", "tiny", jax.__version__)
    assert Config.from_json(json.dumps(card["config"])) == start.cfg
    assert set(card["seconds"]) >= {"round", "arms", "total"}
    with np.load(tmp_path / "metrics.npz") as arrays:
        np.testing.assert_array_equal(arrays["rounds/reward"][1], tiny_run.result().rounds[1]["rounds/reward"])
        np.testing.assert_array_equal(arrays["arms/names"], tiny_run.ROWS)
        np.testing.assert_array_equal(arrays["arms/stage"], tiny_run.result().metrics["arms/stage"])
    with open(tmp_path / "outcomes.csv") as file:
        assert len(list(csv.DictReader(file))) == len(tiny_run.ROWS) * start.cfg.report_envs
    summary, shown = (tmp_path / "summary.txt").read_text(), start.console.rich.file.getvalue()
    claim = summary.splitlines()[-1]
    assert claim.startswith("On tiny") and claim in (tmp_path / "report.html").read_text()
    assert all(line in shown for line in summary.splitlines()[2:])
    assert re.search(r"round 2/2  t=\d+s  left=0s  acc=", shown)


@pytest.mark.parametrize("lost", ["curves", None])
def test_a_picture_that_fails_costs_only_itself(tmp_path, monkeypatch, lost):
    """`None`: matplotlib cannot be imported."""

    def fail(*args):
        assert (tmp_path / "summary.txt").exists(), "numbers come first"
        assert not (tmp_path / "run.json").exists(), "complete is said last"
        raise TypeError("no\nfont")

    if lost:
        monkeypatch.setattr(figures, lost, fail)
        fail.__name__ = lost
    else:
        monkeypatch.setitem(sys.modules, "esper_jax.evidence.figures", None)
        monkeypatch.delattr(evidence, "figures")
    start = job(tmp_path, rounds=0)
    published(start, tiny_run.result().metrics)
    pictures = {"grown.png", "seeds.png"} if lost else set()
    names = {"lifecycle.jsonl", "metrics.npz", "outcomes.csv", "report.html", "run.json", "summary.txt"}
    assert {path.name for path in tmp_path.iterdir()} == names | pictures
    drawn_not = (tmp_path / "report.html").read_text().count("could not be drawn: ")
    assert drawn_not == (1 if lost else len(figures.PICTURES))
    shown = start.console.rich.file.getvalue().splitlines()
    warnings = [line for line in shown if line.startswith("  no ")]
    assert len(warnings) == 1
    assert warnings[0].startswith("  no curves.png: TypeError: no font" if lost else "  no pictures: ")
    assert any(line.startswith("wrote ") for line in shown)


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path):
    whole, part = job(tmp_path / "whole"), job(tmp_path / "part", rounds=1)
    for out in (whole.out, part.out):
        out.mkdir()
    state, rounds = jobs.learn(whole)
    published(whole, rounds | jobs.compare(whole, state))
    jobs.learn(part)  # dies here, after one round
    again, done = checkpoint.restore(part.out / "checkpoints", part.run, part.meta)
    assert done == 1
    rest = job(part.out, run=again)
    state, rounds = jobs.learn(rest)
    published(rest, rounds | jobs.compare(rest, state))
    for name in FILES - {"checkpoints", "run.json", "report.html"}:  # what holds no time
        assert (whole.out / name).read_bytes() == (part.out / name).read_bytes(), name


@pytest.mark.parametrize("every", [1, 5])
def test_a_stop_is_asked_for_in_a_round(tmp_path, every):
    """The round in hand is done, kept, and shown; going on from it ends with the same run."""
    whole, stop = job(tmp_path, rounds=2, every=every), jobs.command.Interruption()

    def update(key, run):
        assert stop.patient
        stop.asked = signal.SIGTERM
        return whole.train.update(key, run)

    with pytest.raises(jobs.command.Stopped):
        jobs.learn(whole._replace(train=whole.train._replace(update=update)), stop)
    assert checkpoint.steps(tmp_path / "checkpoints") == [1] and stop.code == 143
    jobs.publish_stopped(whole.out, whole.console, whole.card)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "learning.png", "metrics.npz"}
    beside = records.RoundLog.hashes(tmp_path / "checkpoints" / "rounds")
    again, done, _ = checkpoint.resume([tmp_path / "checkpoints"], whole.run, whole.meta, beside)
    state, rounds = jobs.learn(whole._replace(run=again))
    assert done == 1 and tiny.equal(state, tiny_run.result().states[2])


@pytest.mark.slow
def test_debug_nans_names_the_operation(tmp_path):
    """A healthy round passes; of a price that is not a number, the first operation on it is named."""
    start = job(tmp_path, rounds=1)
    programs = start.train.programs._replace(learn=tiny_run.train().programs.learn)
    start = start._replace(train=jobs._checked(start.train._replace(programs=programs), start.cfg))
    jobs.learn(start)
    reward = start.run.hypers.reward
    sick = start.run.hypers.replace(reward=reward.replace(price=jnp.full_like(reward.price, jnp.nan)))
    with pytest.raises(checkify.JaxRuntimeError, match=r"nan generated by primitive: \w+"):
        jobs.learn(start._replace(run=start.run.replace(hypers=sick)))


def test_a_learner_that_is_dead_ends_the_run(tmp_path):
    """A price that is not a number makes all rewards so: the statistics stay finite, no step is taken, and the third
    such round is the last one."""
    start = job(tmp_path, rounds=5)
    nan = jnp.full_like(start.run.hypers.reward.price, jnp.nan)
    sick = start.run.replace(hypers=start.run.hypers.replace(reward=start.run.hypers.reward.replace(price=nan)))
    with pytest.raises(
        jobs.command.Refusal, match="policy 0 took no step in 3 rounds in a row.*first not finite: hypers.reward"
    ):
        jobs.learn(start._replace(run=sick))
    shown = start.console.rich.file.getvalue().splitlines()
    said = "  policies 0, 1 took no step in 2 rounds: there is no older checkpoint to return to"
    assert [line for line in shown if "  skipped=" not in line] == [said] and len(shown) == 4
    last, done = checkpoint.restore(tmp_path / "checkpoints", sick, start.meta)
    assert (
        done == 3 and np.isfinite(last.returns.var).all() and tiny.equal(last.learner.params, start.run.learner.params)
    )


def poisoned(run, policy):
    """A policy whose parameters are finite and useless."""
    spoil = lambda leaf: leaf.at[policy].set(1e30)
    return run.replace(learner=run.learner.replace(params=jax.tree.map(spoil, run.learner.params)))


@pytest.mark.parametrize(("every", "memory", "stops"), [(1, True, (3, 4)), (1, False, (1, 4)), (2, True, (1, 3))])
def test_a_learner_that_is_dead_returns_to_its_best_checkpoint(tmp_path, monkeypatch, every, memory, stops):
    """Policy 1 is poisoned before the sixth round and takes no step in it and in the seventh; it begins the eighth as
    it was at the best checkpoint from before, which lies in memory if that was asked for; policy 0 and the keys are
    those of a run that nothing happened to. A run that was stopped on the way does the same."""
    monkeypatch.setattr(checkpoint, "MEMORY", tmp_path)
    healthy, begun, poison, rounds = [tiny_run.result().states[0]], [], 5, 9
    healthy_update = tiny_run.result().train.update
    for _ in range(rounds):
        healthy.append(healthy_update(tiny_run.KEY(), healthy[-1])[0])

    def play(name, stops=()):
        """A run, stopped in these rounds and gone on with; its last state, its rounds and what was said."""
        out, run, said = tmp_path / name, None, ""
        out.mkdir()
        for at in (*stops, None):
            stop = jobs.command.Interruption()

            def update(key, run, at=at, stop=stop):
                begun.append(run)
                if memory:
                    assert at != stops[:1] or not checkpoint.steps(out / "checkpoints")
                stop.asked = signal.SIGTERM if run.round == at else stop.asked
                return healthy_update(key, poisoned(run, 1) if run.round == poison else run)

            start = job(out, rounds=rounds, run=run, every=every)
            start = start._replace(
                train=start.train._replace(update=update), memory=checkpoint.memory_of(out) if memory else None
            )
            with contextlib.suppress(jobs.command.Stopped):
                end, metrics = jobs.learn(start, stop)
            said += start.console.rich.file.getvalue()
            beside = records.RoundLog.hashes(start.disk / "rounds")
            run, done, damaged = checkpoint.resume([start.disk], start.run, start.meta, beside)
            assert not damaged and done == (rounds if at is None else at + 1)
            assert not list(tmp_path.glob("esper_jax-*"))
        return end, metrics, said

    end, metrics, said = play("whole")
    dead = (metrics["learner/updates_done"] == 0).tolist()
    assert dead == [[False, n in (poison, poison + 1)] for n in range(rounds)]
    of = lambda run, policy: jax.tree.map(lambda leaf: leaf[policy], (run.learner, run.observations, run.returns))
    reached = metrics["rounds/val_accuracy"][..., -1].mean((1, 2))
    saved = [step for step in range(every, poison, every)]  # step n was saved after round n, which it is scored by
    best = max(saved, key=lambda step: reached[step - 1])
    assert tiny.equal(of(begun[poison + 2], 1), of(healthy[best], 1))
    for number, run in enumerate([*begun, end]):
        assert tiny.equal(of(run, 0), of(healthy[number], 0)) and run.round == number
    assert f"  policy 1 took no step in 2 rounds: returned to round {best}\n" in said

    again, again_metrics, again_said = play("stopped", stops)
    assert tiny.equal(again, end) and f"returned to round {best}\n" in again_said
    for name, array in metrics.items():
        np.testing.assert_array_equal(again_metrics[name], array, err_msg=name)


def test_where_memory_fails_checkpoints_go_to_disk(tmp_path, monkeypatch):
    """Its folder is gone in the second round: said, and nothing is lost."""
    monkeypatch.setattr(checkpoint, "MEMORY", tmp_path)
    start = job(tmp_path / "run", rounds=4)
    start.out.mkdir()
    memory = checkpoint.memory_of(start.out)

    def update(key, run):
        if run.round == 2:
            memory.rename(tmp_path / "away")
            memory.write_text("in the way")
        return tiny_run.result().train.update(key, run)

    end, _ = jobs.learn(start._replace(train=start.train._replace(update=update), memory=memory))
    assert f"; checkpoints go to {start.disk} from now on" in start.console.rich.file.getvalue()
    assert checkpoint.steps(start.disk)[-1] == 4
    beside = records.RoundLog.hashes(start.disk / "rounds")
    assert tiny.equal(checkpoint.resume([start.disk], start.run, start.meta, beside)[0], end)


def card(cfg, **changes):
    """The text of a run card with what is read of it."""
    facts = {"preset": "smoke", "status": "running", "data": {"identity": "md5:1"}, "config": cfg.to_dict()}
    return json.dumps(facts | changes)


SMALL = ["--preset", "smoke", "--data", "digits", "--quiet"]


@pytest.fixture
def main(monkeypatch, capsys, tmp_path):
    """The command in this process, without a cache of programs: its exit code and the lines on stderr."""
    monkeypatch.setattr(compilation, "keep_programs", lambda folder: None)
    monkeypatch.chdir(tmp_path)
    before = jax.config.jax_include_full_tracebacks_in_locations

    def call(*argv):
        code = cifar.main([str(word) for word in argv])
        return code, capsys.readouterr().err.splitlines()

    yield call
    jax.config.update("jax_include_full_tracebacks_in_locations", before)


@pytest.fixture
def found(monkeypatch):
    """The data set that `auto` finds, in a list; no server is asked."""
    name = ["digits"]
    monkeypatch.setattr(cifar.data, "resolve", lambda data_dir, announce: name[0])
    return name


def test_defaults_follow_preset_and_data(found):
    assert cifar.parse([]).config == presets.get("quick", "digits") and cifar.parse([]).preset == "quick"
    smoke = cifar.parse("--preset smoke --n-envs 4 --training.epochs 5 --lifecycle.blueprints norm".split()).config
    expected = {"n_envs": 4, "training.epochs": 5, "lifecycle.blueprints": ("norm",)}
    assert smoke == presets.get("smoke", "digits").replace(**expected)
    found[0] = "cifar10"
    assert cifar.parse([]).config == cifar.parse(["--data", "auto"]).config == presets.get("quick", "cifar10")
    assert cifar.parse(["--preset=full"]).config == presets.get("full", "cifar10")


def test_sizes_of_named_data_need_no_look(monkeypatch):
    monkeypatch.setattr(cifar.data, "resolve", None)
    digits = cifar.parse("--data=digits --data-dir x --seed 3".split()).config
    assert digits == presets.get("quick", "digits").replace(seed=3, **{"data.data_dir": "x"})
    shapes = cifar.parse(["--data", "shapes", "--policy-seeds", "2"]).config
    assert shapes == presets.get("quick", "shapes").replace(policy_seeds=2) and shapes.data.image_size == 8
    assert cifar.parse(["--data", "cifar10"]).config.data == presets.get("quick", "cifar10").data
    assert cifar.parse("--data shapes --ppo.op-bias 0 0 0 0 0 1".split()).config.ppo.op_bias == (0, 0, 0, 0, 0, 1)


def test_data_that_are_looked_for_are_said_and_used(found):
    options = cifar.parse([])
    assert (options.data, options.config.data.name) == ("digits", "digits")
    with pytest.raises(ValueError, match="--data-dir nowhere: must be a folder that exists"):
        cifar.parse(["--data-dir", "nowhere"])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--preset smok", "--preset smok: must be one of smoke, quick, full"),
        ("--preset smoke --rounds -1", "--rounds -1: must be at least 0"),
        ("--host.kernel-size 2", "HostConfig.kernel_size = 2: must be odd"),
        ("--n-envs 7", "Config.n_envs = 7: must be a multiple of 2"),
        ("--env-chunk 3", "Config.n_envs = 16: must be a multiple of 3"),
        ("--script nowhere", "--script nowhere: must be a text file"),
        ("--devices 1000", "Config.devices = 1000: must be at most"),
        ("--data-dir nowhere", "--data-dir nowhere: must be a folder"),
        ("--help", None),
    ],
)
def test_no_server_is_asked_for_what_is_wrong(monkeypatch, argv, said):
    monkeypatch.setattr(cifar.data, "resolve", lambda *args, **kwargs: pytest.fail("asked"))
    with pytest.raises(ValueError if said else SystemExit, match=said and re.escape(said)):
        cifar.parse(argv.split())


def test_every_option_has_its_default_in_the_help():
    code, out, _ = run("--preset", "smoke", "--help")
    assert code == 0
    text = re.sub(r"[│\s]+", " ", out)
    said = "--n-envs INT environments of a round (E), for each policy seed"
    assert f"{said} (default: {presets.get('smoke').n_envs})" in text
    assert "and says so (default: auto)" in text
    names = [f.name for f in dataclasses.fields(cifar.Options) if f.name != "config"]
    for field in dataclasses.fields(Config):
        value = getattr(presets.get("smoke"), field.name)
        inner = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
        names += [f"{field.name}.{f.name}" for f in inner] or [field.name]
    for name in names:
        option = "--" + name.replace("_", "-")
        assert re.search(re.escape(option) + r"[ ,].*?\(default: ?", text), option


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--preste", "smoke"], "--preset"),
        (["--trainning.epochs", "3"], "--training.epochs"),
        (["--preset", "smok"], "--preset smok: must be one of smoke, quick, full"),
        (["--data", "cifar"], "--data cifar: must be one of auto, cifar10, shapes, digits"),
        (["--lifecycle.no-seqential"], "did you mean --lifecycle.no-sequential?"),
        (["--host.slots", "--quiet", "stray"], "--quiet stray: must be given without a value"),
        (["stray"], "stray: must be an option"),
        (["--no-quiet"], "Unrecognized options: --no-quiet"),
        (["--seed"], "--seed: must be given with one value, int, in [0, 4294967295]"),
        (["--rounds", "x"], "--rounds x: must be int, at least 0"),
        (["--rounds", "2.5"], "--rounds 2.5: must be int, at least 0"),
        (["--rounds=-1"], "--rounds -1: must be at least 0"),
        (["--checkpoint-every", "-1"], "--checkpoint-every -1: must be at least 0"),
        (["--n-envs", "2147483640"], "--n-envs 2147483640: must be in (0, 65536]"),
        (["--n_envs", "7"], "--n-envs 7: must be a multiple of 2 (ppo.minibatches)"),
        (["--ppo.minibatches", "5"], "--n-envs 8: must be a multiple of 5 (ppo.minibatches)"),
        (["--ppo.learning-rate", "nan"], "--ppo.learning-rate nan: must be finite and greater than 0"),
        (["--ppo.learning-rate", "1e-46"], "--ppo.learning-rate 1e-46: must be greater than 0 also as float32"),
        (["--ppo.hidden-size", "2147483647"], "--ppo.hidden-size 2147483647: must be in [2, 4096]"),
        (["--ppo.op-bias", "1", "x"], "--ppo.op-bias 1 x: must be a tuple of float"),
        (["--ppo.op-bias", "1", "2"], "--ppo.op-bias 1 2: must be 6 numbers, one per op"),
        (["--reward.mode", "paid"], "--reward.mode paid: must be one of paired, shaped, simplified, sparse"),
        (["--training.clip-norm", "abc"], "--training.clip-norm abc: must be float, greater than 0 or none"),
        (["--lifecycle.sequential", "maybe"], "--lifecycle.sequential maybe: must be given without a value"),
        (
            ["--lifecycle.blueprints", "conv_lite"],
            "--lifecycle.blueprints conv_lite: must be one or more of conv_light",
        ),
        (["--host.pool-layers", "9"], "--host.pool-layers 9: must be at most n_blocks = 2"),
        (["--host.n-blocks", "16"], "n_blocks = 16 or kernel_size = 3: the host has 25,770,7"),
        (["--host.base-channels", "100000"], "--host.base-channels 100000: must be in (0, 1024]"),
        (["--data.image-size", "9"], "--data.image-size 9: must be 8, 16, 32 or none"),
        (["--data.data-dir", "x"], "give --data-dir x, which sizes follow"),
        (["--data-dir", ""], "--data-dir '': must be the name of a folder, or none"),
        (["--data-dir", "x" * 300], f"--data-dir {'x' * 300}: must be a folder that exists"),
        (["--script", "nope.txt"], "--script nope.txt: must be a text file that can be read (No such file"),
        (["--script", "."], "--script .: must be a text file that can be read (Is a directory)"),
        (["--script", "binary"], "--script binary: must be a text file that can be read (it is not UTF-8)"),
        (["--script", "far"], "script line 2: decision = '999999999999': must be a number from 0 to 14"),
        (["--resume", "nowhere"], "nowhere: must be the folder of a run, with its run.json"),
    ],
)
def test_bad_options_name_the_good_ones(main, argv, said):
    Path("binary").write_bytes(b"0: wait\xff")
    Path("far").write_text("0: wait\n999999999999: wait\n")
    code, (line,) = main(*argv, *([] if "--preset" in argv else SMALL[:2]))
    assert code == 2 and line.startswith("error: ") and said in line
    assert sorted(path.name for path in Path().iterdir()) == ["binary", "far"]


def test_none_is_spelt_as_in_the_messages(found):
    for none in ("none", "None"):
        cfg = cifar.parse(["--training.clip-norm", none, f"--ppo.target-kl={none}"]).config
        assert cfg.training.clip_norm is cfg.ppo.target_kl is None


def test_memory_that_is_not_there_is_one_line(main, monkeypatch):
    for error in (MemoryError("Unable to allocate 9 GiB"), RuntimeError("RESOURCE_EXHAUSTED: Out of memory")):
        monkeypatch.setattr(jobs, "start", lambda job, error=error: (_ for _ in ()).throw(error))
        code, (line,) = main(*SMALL)
        assert code == 2 and line.startswith(f"error: out of memory ({error}): fewer or smaller --rounds, --n-envs, ")


def test_what_would_not_fit_is_refused_before_anything_is_written(main, monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "host_memory", lambda: 10**6)
    code, (line,) = main(*SMALL, "--out", "run")
    assert code == 2 and line.startswith("error: the arrays of all rounds and of the comparison would take ")
    assert not list(tmp_path.iterdir())


def test_a_plan_changes_nothing(main, monkeypatch, tmp_path, capsys):
    """Of a new run, and of one that would go on."""
    monkeypatch.setattr(jobs, "start", lambda job: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(*SMALL[:-1], "--plan") == (0, []) and not list(tmp_path.iterdir())
    assert main(*SMALL, "--out", "run")[0] == 130
    before = Path("run/run.json").read_bytes()
    capsys.readouterr()
    assert cifar.main(["--resume", "run", "--plan"]) == 0
    assert re.search(r"resume    after round 0\n.*\n  estimate  [\d.]+ s  rollouts ", capsys.readouterr().out)
    assert Path("run/run.json").read_bytes() == before and [path.name for path in Path("run").iterdir()] == ["run.json"]


def test_checkpoints_in_memory(main, monkeypatch, tmp_path):
    """A run goes on as it was: with its checkpoints in memory, and as many rounds between them."""
    monkeypatch.setattr(jobs, "start", lambda job: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(checkpoint, "MEMORY", tmp_path / "memory")
    code, (line,) = main(*SMALL, "--memory-checkpoints")
    assert code == 2 and line.startswith("error: --memory-checkpoints: there is no memory-backed storage here (")
    code, (line,) = main(*SMALL, "--memory-checkpoints", "--checkpoint-every", "0")
    assert code == 2 and line == "error: --checkpoint-every 0 and --memory-checkpoints: give one of them"
    assert not list(tmp_path.iterdir())
    checkpoint.MEMORY.mkdir()
    assert main(*SMALL, "--memory-checkpoints", "--checkpoint-every", "3", "--out", "run")[0] == 130
    card = json.loads(Path("run/run.json").read_text())
    cfg = Config.from_json(json.dumps(card["config"]))
    train = jobs.make_train(cfg, jobs.data.load(cfg.data))
    meta = {"config": provenance.computed(cfg), "data": provenance.digest(card["data"]["identity"])}
    checkpoint.save(checkpoint.memory_of(Path("run")), 0, train.init(jax.random.key(0)), meta)
    seen = []
    monkeypatch.setattr(jobs, "start", lambda job: seen.append(job) or (_ for _ in ()).throw(KeyboardInterrupt))
    assert main("--resume", "run", "--quiet")[0] == 130
    assert seen[-1].run is not None and seen[-1].memory == checkpoint.memory_of(Path("run"))
    assert seen[-1].card["checkpoint_every"] == 3
    shutil.rmtree(checkpoint.memory_of(Path("run")))
    assert main("--resume", "run", "--checkpoint-every", "1")[0] == 130
    assert seen[-1].run is None and seen[-1].memory and seen[-1].card["checkpoint_every"] == 1
    path = Path("run/run.json")
    for name, value in (("memory_checkpoints", 3), ("checkpoint_every", -1), ("checkpoint_every", True)):
        path.write_text(json.dumps(card | {name: value}))
        code, (line,) = main("--resume", "run", "--quiet")
        assert code == 2 and f"{name} = {value}: must be" in line


def test_a_disk_that_is_full_is_one_line(main, monkeypatch):
    for where, said in (("run/checkpoints", "run/checkpoints"), (None, "run")):
        full = OSError(errno.ENOSPC, "No space left on device", where)
        monkeypatch.setattr(jobs, "start", lambda job, full=full: (_ for _ in ()).throw(full))
        code, (line,) = main(*(["--resume", "run", "--quiet"] if where is None else [*SMALL, "--out", "run"]))
        assert code == 2
        assert line == f"error: {said}: No space left on device; free some, then go on with --resume run"
    assert not Path("run/traceback.txt").exists()


def test_what_does_not_go_together_is_refused(found, tmp_path):
    with pytest.raises(ValueError, match="must be the folder of a run, with its run.json"):
        cifar.parse(["--resume", str(tmp_path)])
    cfg = presets.get("smoke")
    (tmp_path / "run.json").write_text(card(cfg))
    assert cifar.parse(["--resume", str(tmp_path), "--rounds", "9"]).config == cfg.replace(rounds=9)
    with pytest.raises(ValueError, match="only rounds, report_envs, devices may differ"):
        cifar.parse(["--resume", str(tmp_path), "--seed", "9"])
    with pytest.raises(ValueError, match="is a run on digits"):
        cifar.parse(["--resume", str(tmp_path), "--data", "shapes"])
    with pytest.raises(ValueError, match="is a run of preset smoke"):
        cifar.parse(["--resume", str(tmp_path), "--preset", "quick"])
    with pytest.raises(ValueError, match="give one of them"):
        cifar.parse(["--resume", str(tmp_path), "--out", "x"])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--seed 1 --seed 2", "--seed: is given 2 times"),
        ("--seed=1 --rounds 2 --seed=1", "--seed: is given 2 times"),
        ("--data_dir . --data-dir ..", "--data-dir: is given 2 times"),
        ("--training.host-lr 1 --training.host_lr=2", "--training.host-lr: is given 2 times"),
    ],
)
def test_an_option_is_given_once(argv, said):
    with pytest.raises(ValueError, match=said):
        cifar.parse(argv.split())


@pytest.mark.parametrize("spelling", ["--data-dir {}", "--data_dir {}", "--data-dir={}", "--data_dir={}"])
def test_both_spellings_decide_the_sizes(tmp_path, monkeypatch, spelling):
    monkeypatch.setattr(cifar.data, "resolve", lambda data_dir, announce: {str(tmp_path): "cifar10"}[data_dir])
    cfg = cifar.parse(spelling.format(tmp_path).split()).config
    assert cfg == presets.get("quick", "cifar10").replace(**{"data.data_dir": str(tmp_path)})


def test_devices_are_asked_for_before_there_are_any(tmp_path, monkeypatch, found):
    asked = []
    monkeypatch.setattr(devices, "use_cpus", asked.append)
    monkeypatch.setattr(devices, "backend", lambda: "cpu" if asked else pytest.fail("too late"))
    cifar.parse(["--data", "digits", "--devices", "3"])
    cfg = presets.get("smoke").replace(devices=2)
    (tmp_path / "run.json").write_text(card(cfg))
    cifar.parse(["--resume", str(tmp_path)])
    cifar.parse(["--resume", str(tmp_path), "--devices", "1"])
    assert asked == [3, 2, 1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seed", "1" + "0" * 22], "--seed 1" + "0" * 22 + ": must be in"),
        (["--data-dir", "~nobody_at_all/x"], "--data-dir ~nobody_at_all/x: must be a folder that exists"),
        (["--seed", "1", "--seed", "2"], "--seed: is given 2 times"),
        (["--devices", "1000"], "--devices 1000: must be at most"),
        (["--out", "file"], "--out file: must be a folder that is empty or can be made"),
        (["--out", "x" * 300], f"--out {'x' * 300}: must be a folder that is empty or can be made (File name too"),
    ],
)
def test_known_causes_are_one_line(main, tmp_path, options, said):
    (tmp_path / "file").touch()
    code, (line,) = main(*SMALL, *options)
    assert code == 2 and line.startswith("error: ") and said in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_platform_that_is_not_there_is_one_line(main, monkeypatch):
    def none():
        raise AssertionError

    monkeypatch.setattr(jax, "default_backend", none)
    code, (line,) = main(*SMALL)
    assert code == 2 and line == "error: JAX_PLATFORMS = cpu: must name a platform that JAX finds here, such as cpu"


def test_what_nobody_foresaw_is_one_line_and_a_file(main, monkeypatch, tmp_path):
    def fail(*args):
        raise RuntimeError("out of memory\nmore")

    monkeypatch.setattr(jobs, "start", fail)
    code, (line,) = main(*SMALL, "--out", "run")
    assert code == 1
    assert line == "error: RuntimeError: out of memory more (the traceback is in run/traceback.txt)"
    assert "in fail" in (tmp_path / "run" / "traceback.txt").read_text()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json", "traceback.txt"}
    monkeypatch.setattr(jobs, "make_train", fail)  # before there is a run
    monkeypatch.setattr(jobs.command.tempfile, "tempdir", str(tmp_path))
    code, (line,) = main(*SMALL, "--out", "other")
    assert code == 1 and "out of memory more (the traceback is in " in line and not (tmp_path / "other").exists()


def test_a_run_that_is_at_work_is_not_resumed(main, monkeypatch, tmp_path):
    stop = lambda job: (_ for _ in ()).throw(KeyboardInterrupt)
    monkeypatch.setattr(jobs, "start", stop)
    code, (line,) = main(*SMALL, "--out", "run")
    assert (code, line) == (130, "stopped; go on with: python -m experiments.cifar --resume run")
    before = (tmp_path / "run" / "run.json").read_bytes()
    with folder.locked(Path("run")):
        code, (line,) = main("--resume", "run", "--quiet")
    assert code == 2 and line == f"error: run: process {os.getpid()} is at work in this run; wait until it has ended"
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    assert main("--resume", "run", "--quiet")[0] == 130
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json"}


def test_what_a_run_goes_on_from_is_read_before_anything_is_written(main, monkeypatch, tmp_path):
    monkeypatch.setattr(jobs, "start", lambda job: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(*SMALL, "--out", "run")[0] == 130
    path = Path("run/run.json")
    path.write_text(path.read_text().replace('"running"', '"complete"'))
    before = path.read_bytes()
    place = Path("run/checkpoints/step_00000001")
    place.mkdir(parents=True)
    (place / checkpoint.FINGERPRINT).write_text("[]")
    code, (line,) = main("--resume", "run", "--quiet")
    assert code == 2 and f"{place}/fingerprint.json: cannot be read" in line and path.read_bytes() == before
    monkeypatch.setattr(checkpoint, "resume", lambda *args: (None, 1, []))
    code, (line,) = main("--resume", "run", "--quiet")
    assert code == 2 and line.startswith("error: run/checkpoints/rounds/000000.npz: is missing; put it back")
    code, (line,) = main("--resume", "run", "--quiet", "--rounds", "0")
    assert code == 2 and line == "error: --rounds 0: must be at least 1, which run has done already"
    assert path.read_bytes() == before and {path.name for path in Path("run").iterdir()} == {"checkpoints", "run.json"}


def test_a_run_goes_on_as_what_it_was(main, monkeypatch, tmp_path, capsys):
    """Its parts are recorded; other versions are refused, unless that is forced; an older run's missing fields are
    named, with what they were before there was a choice."""
    monkeypatch.setattr(jobs, "start", lambda job: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(*SMALL, "--out", "run")[0] == 130
    path = Path("run/run.json")
    read = lambda: json.loads(path.read_text())
    assert main("--resume", "run", "--quiet")[0] == 130
    assert [part["command"].split()[-1] for part in read()["parts"]] == ["run", "--quiet"]

    def edit(change):
        card = read()
        change(card)
        path.write_text(json.dumps(card))

    edit(lambda card: card["parts"][-1]["versions"].update(jax="0.1.2"))
    code, (line,) = main("--resume", "run", "--quiet")
    assert code == 2 and line == (
        f"error: --resume run: jax 0.1.2 then, {jax.__version__} now: its numbers may become others; --force goes on "
        "all the same"
    )
    assert main("--resume", "run", "--quiet", "--force")[0] == 130 and len(read()["parts"]) == 3

    edit(lambda card: [card["config"]["training"].pop("optimiser"), card["config"]["governor"].pop("rules")])
    assert main("--resume", "run")[0] == 130
    out = read()
    assert out["added"] == ["governor.rules", "training.optimiser"]
    assert out["config"]["training"]["optimiser"] == "sgd" and out["config"]["governor"]["rules"] == "reference"
    assert main("--resume", "run")[0] == 130 and read()["added"] == out["added"]


def test_a_run_card_that_is_lost_is_rebuilt(main, monkeypatch, tmp_path):
    """From the newest checkpoint, before anything is compiled; without one it is one line."""
    monkeypatch.setattr(jobs, "start", lambda job: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(*SMALL, "--out", "run")[0] == 130
    path = Path("run/run.json")
    card = json.loads(path.read_text())
    path.unlink()
    code, (line,) = main("--resume", "run", "--quiet")
    assert (
        code == 2 and line == "error: run: must be the folder of a run, with its run.json (No such file or directory)"
    )
    cfg = Config.from_json(json.dumps(card["config"]))
    train = jobs.make_train(cfg, jobs.data.load(cfg.data))
    meta = {"config": provenance.computed(cfg), "data": provenance.digest(card["data"]["identity"])}
    checkpoint.save("run/checkpoints", 0, train.init(jax.random.key(0)), meta, about=card)
    for damaged in (None, "", "[]", "{", '{"config": 3}', json.dumps({**card, "preset": None})):
        if damaged is not None:
            path.write_text(damaged)
        assert main("--resume", "run", "--quiet")[0] == 130
        again = json.loads(path.read_text())
        assert again["config"] == card["config"] and again["preset"] == "smoke" and again["script"] is None
    Path("run/checkpoints").rename("run/aside")
    Path("run/checkpoints").write_text("x")
    code, (line,) = main("--resume", "run", "--quiet")
    assert code == 2 and line == "error: run/checkpoints: must be a folder; move that file away, then go on"


def test_starts_at_the_same_time_have_folders_of_their_own(main, monkeypatch, tmp_path):
    class Now(jobs.datetime):
        now = staticmethod(lambda: jobs_now)

    jobs_now = jobs.datetime(2030, 1, 2)
    monkeypatch.setattr(jobs, "datetime", Now)
    seen = []

    def start(job):
        seen.append(job.out.name)
        if len(seen) == 1:
            assert cifar.main(SMALL) == 130
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "start", start)
    assert main(*SMALL)[0] == 130
    assert seen == ["2030-01-02_000000-smoke-seed0", "2030-01-02_000000-smoke-seed0-2"]


def test_the_same_data_may_lie_elsewhere(main, monkeypatch, tmp_path):
    def write(place, pixel):
        place.mkdir()
        for name in cifar10.BINARY_FILES:
            records = np.random.default_rng(0).integers(0, 256, (100, 3073)).astype(np.uint8)
            records[:, 0] %= 10
            records[0, 1] = pixel
            records.tofile(place / name)

    write(tmp_path / "a", 1)
    write(tmp_path / "other", 2)
    stop = lambda job: (_ for _ in ()).throw(KeyboardInterrupt)
    monkeypatch.setattr(jobs, "start", stop)
    sizes = ["--data.validation-size", "50", "--data.train-limit", "100", "--data.test-limit", "50", "--quiet"]
    start = ["--preset", "smoke", "--data", "cifar10", "--data-dir", tmp_path / "a", "--out", "run", *sizes]
    assert main(*start)[0] == 130
    (tmp_path / "a").rename(tmp_path / "moved")
    assert main("--resume", "run", "--data-dir", tmp_path / "moved", "--quiet")[0] == 130
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"]["source"] == str(tmp_path / "moved")
    code, (line,) = main("--resume", "run", "--data-dir", tmp_path / "other", "--quiet")
    assert code == 2 and line.startswith("error: --resume run: its data are md5:")


def test_an_interrupt_while_compiling_ends_at_once(tmp_path):
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONUNBUFFERED": "1"}
    process = tiny_run.command("--preset", "smoke", "--data", "digits", "--out", tmp_path / "run", **env)
    while not (line := process.stdout.readline()).startswith("  compile"):
        assert line, process.communicate()
    assert (tmp_path / "run" / folder.LOCK).exists()
    time.sleep(3)  # it is in the compiler by now, or about to be
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - began < 4
    assert err == f"stopped; go on with: python -m experiments.cifar --resume {tmp_path / 'run'}\n"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "digits", "--n-envs", "3"], "--n-envs 3: must be a multiple of 2 (ppo.minibatches)"),
        (["--data", "digits", "--training.batch-size", "5000"], "--training.batch-size 5000: must be at most"),
        (["--data", "digits", "--script", "{script}"], "script line 1: slot = '7': must be one of 0, 1"),
        (["--data", "digits", "--out", "{folder}"], "is not empty"),
        (["--data-dir", "{folder}/nowhere"], "nowhere: must be a folder that exists"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(tmp_path, options, said):
    script = tmp_path / "script.txt"
    script.write_text("0: germinate slot=7 blueprint=conv_light\n")
    options = [option.format(script=script, folder=tmp_path) for option in options]
    if "--out" not in options:
        options += ["--out", tmp_path / "out"]
    code, out, err = run("--preset", "smoke", *options)
    assert code == 2 and "Traceback" not in out + err
    assert len(err.splitlines()) == 1 and err.startswith("error: ") and said in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "must be the folder of a run, with its run.json"),
        ('{"status": "comp', "run.json: must be the run.json of a run: Unterminated string"),
        ("[1]", "run.json: must be the run.json of a run"),
        ('{"status": "complete"}', "must be the run.json of a run: no 'config'"),
        ("[" * 10**5, "must be the run.json of a run: maximum recursion depth"),
        ({}, "its status is 'running': must be complete"),
        ({"data": None}, "run.json: must be the run.json of a run: data = None: must be an object"),
        ({"data": {}}, "run.json: must be the run.json of a run: no 'identity'"),
        ({"data": {"identity": 5}}, "data.identity = 5: must be a text"),
        ({"script": 5}, "run.json: must be the run.json of a run: script = 5: must be a text or null"),
        ({"status": []}, "run.json: must be the run.json of a run: status = []: must be a word"),
        ({"preset": "huge"}, "preset = 'huge': must be one of smoke, quick, full"),
        ({"preset": []}, "preset = []: must be one of smoke, quick, full"),
        ({"config": []}, "must be the run.json of a run: Config = []: must be an object"),
    ],
)
def test_only_a_finished_run_is_audited(tmp_path, text, said):
    if text is not None:
        (tmp_path / "run.json").write_text(text if isinstance(text, str) else card(presets.get("smoke"), **text))
    with pytest.raises(ValueError, match=re.escape(said)):
        audit.audit(tmp_path, Console(file=io.StringIO()))


def test_full_on_a_cpu_is_loud(tmp_path):
    stop = ("--training.batch-size", "5000")  # before anything is compiled
    options = ("--preset", "full", "--data", "digits", "--quiet", *stop, "--out", tmp_path / "out")
    code, out, _ = run(*options)
    assert code == 2 and "PRESET full IS MADE FOR A GPU" in out


def test_devices_share_environments_evenly():
    assert jax.device_count() == 4
    cfg = presets.get("smoke").replace(n_envs=8, report_envs=8, env_chunk=1, **{"ppo.minibatches": 2})
    assert compilation.spread(cfg).devices == 4
    assert compilation.spread(cfg.replace(report_envs=6)).devices == 4  # a comparison is played in blocks of a round
    assert compilation.spread(cfg.replace(n_envs=6)).devices == 3
    assert compilation.spread(cfg.replace(n_envs=10)).devices == 2
    assert compilation.spread(cfg.replace(env_chunk=4)).devices == 2
    assert compilation.spread(cfg.replace(devices=3)).devices == 3
