"""The main job from its command line to its files."""

import csv
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import tiny_run

from esper_jax import presets
from esper_jax.config import Config
from esper_jax.run import checkpoint, compilation, provenance
from esper_jax.run import job as jobs
from esper_jax.run.console import Console
from experiments import audit, cifar

ROOT = Path(__file__).parent.parent.parent
FILES = {
    "checkpoints", "curves.png", "grown.png", "learning.png", "lifecycle.jsonl", "metrics.npz", "outcomes.csv",
    "report.html", "run.json", "seeds.png", "summary.txt",
}  # fmt: skip


def command(*options, **kwargs):
    arguments = [sys.executable, "-W", "error", "-m", "experiments.cifar", *map(str, options)]
    env = {**os.environ, **kwargs.pop("env", {}), "JAX_PLATFORMS": "cpu", "COLUMNS": "120"}
    return subprocess.Popen(
        arguments, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs
    )


def run(*options, **kwargs):
    process = command(*options, **kwargs)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def job(out, *, rounds=tiny_run.CONFIG.rounds, run=None):
    """The tiny run as a job; its programs are compiled already."""
    cfg = tiny_run.CONFIG.replace(rounds=rounds)
    card = {"status": "running", "arms": list(tiny_run.ARMS), **provenance.run_card(cfg, tiny.dataset())}
    start = tiny_run.result().states[0] if run is None else run
    meta = {"config": provenance.computed(cfg), "data": "tiny"}
    options = cifar.Options(preset="smoke", config=cfg)
    return jobs.Job(
        options, cfg, out, Console(file=io.StringIO()), tiny_run.result().train, tiny_run.KEY(), start, meta, card
    )


def test_compiling_ahead_compiles_everything():
    result = tiny_run.result()
    assert max(result.ahead) > 1, "the rollout takes seconds to compile"
    assert max(result.later, default=0) < max(result.ahead) / 10, "something large was compiled after compile_ahead"


def test_a_run_writes_its_files(tmp_path):
    start = job(tmp_path)
    state, rounds = jobs.learn(start)
    jobs.publish(start, rounds | jobs.compare(start, state))
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


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path):
    whole, part = job(tmp_path / "whole"), job(tmp_path / "part", rounds=1)
    for folder in (whole.out, part.out):
        folder.mkdir()
    state, rounds = jobs.learn(whole)
    jobs.publish(whole, rounds | jobs.compare(whole, state))
    jobs.learn(part)  # dies here, after one round
    again, done = checkpoint.restore(part.out / "checkpoints", part.run, part.meta)
    assert done == 1
    rest = job(part.out, run=again)
    state, rounds = jobs.learn(rest)
    jobs.publish(rest, rounds | jobs.compare(rest, state))
    for name in FILES - {"checkpoints", "run.json", "report.html"}:  # what holds no time
        assert (whole.out / name).read_bytes() == (part.out / name).read_bytes(), name


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


def test_every_option_has_its_default_in_the_help():
    code, out, _ = run("--preset", "smoke", "--help")
    assert code == 0
    text = re.sub(r"[│\s]+", " ", out)
    said = "--n-envs INT environments of a round (E), for each policy seed"
    assert f"{said} (default: {presets.get('smoke').n_envs})" in text
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
        (["--preset", "smok"], "'smoke', 'quick', 'full'"),
        (["--data", "cifar"], "'cifar10'"),
        (["--rounds", "x"], "--rounds"),
        (["--lifecycle.blueprints", "conv_lite"], "conv_light"),
    ],
)
def test_bad_options_name_the_good_ones(found, argv, said, capsys):
    with pytest.raises(SystemExit) as stop:
        cifar.parse(argv)
    assert stop.value.code == 2
    assert said in re.sub(r"[│\s]+", " ", "".join(capsys.readouterr()))


def test_what_does_not_go_together_is_refused(found, tmp_path):
    with pytest.raises(ValueError, match="checkpoint-every = -1"):
        cifar.parse(["--checkpoint-every", "-1"])
    with pytest.raises(ValueError, match="must be the folder of a run, with its run.json"):
        cifar.parse(["--resume", str(tmp_path)])
    cfg = presets.get("smoke")
    (tmp_path / "run.json").write_text(json.dumps({"preset": "smoke", "config": dataclasses.asdict(cfg)}))
    assert cifar.parse(["--resume", str(tmp_path), "--rounds", "9"]).config == cfg.replace(rounds=9)
    with pytest.raises(ValueError, match="only rounds, report_envs, devices may differ"):
        cifar.parse(["--resume", str(tmp_path), "--seed", "9"])
    with pytest.raises(ValueError, match="is a run of preset smoke"):
        cifar.parse(["--resume", str(tmp_path), "--preset", "quick"])
    with pytest.raises(ValueError, match="give one of them"):
        cifar.parse(["--resume", str(tmp_path), "--out", "x"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "digits", "--n-envs", "3"], "Config.n_envs = 3: must be a multiple of ppo.minibatches"),
        (["--data", "digits", "--training.batch-size", "5000"], "batch_size = 5000: must be at most"),
        (["--data", "digits", "--script", "{script}"], "slot = 7: must be 0 to 1"),
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
    ("card", "said"),
    [
        (None, "must be the folder of a run, with its run.json"),
        ('{"status": "comp', "run.json: must be the run.json of a run: Unterminated string"),
        ("[1]", "run.json: must be the run.json of a run"),
        ('{"status": "complete"}', "must be the run.json of a run: no 'config'"),
        ("{running}", "its status is 'running': must be complete"),
    ],
)
def test_only_a_finished_run_is_audited(tmp_path, card, said):
    whole = {"preset": "smoke", "status": "running", "config": dataclasses.asdict(presets.get("smoke"))}
    if card is not None:
        (tmp_path / "run.json").write_text(card.replace("{running}", json.dumps(whole)))
    with pytest.raises(ValueError, match=re.escape(said)):
        audit.audit(tmp_path, Console(file=io.StringIO()))


def test_full_on_a_cpu_is_loud(tmp_path):
    script = tmp_path / "script.txt"
    script.write_text("0: germinate slot=7 blueprint=conv_light\n")  # stops it before anything is compiled
    options = ("--preset", "full", "--data", "digits", "--quiet", "--script", script, "--out", tmp_path / "out")
    code, out, _ = run(*options)
    assert code == 2 and "PRESET full IS MADE FOR A GPU" in out


def test_devices_share_environments_evenly():
    assert jax.device_count() == 4
    cfg = presets.get("smoke").replace(n_envs=8, report_envs=8, env_chunk=1, **{"ppo.minibatches": 2})
    assert compilation.spread(cfg).devices == 4
    assert compilation.spread(cfg.replace(report_envs=6)).devices == 4  # a comparison is played in blocks of a round
    assert compilation.spread(cfg.replace(n_envs=6)).devices == 3
    assert compilation.spread(cfg.replace(n_envs=10)).devices == 1
    assert compilation.spread(cfg.replace(env_chunk=4)).devices == 2
    assert compilation.spread(cfg.replace(devices=3)).devices == 3


@pytest.mark.slow
def test_killed_and_resumed_from_the_command_line(tmp_path):
    tiny_options = (
        "--preset", "smoke", "--data", "digits", "--training.epochs", "6", "--training.batches-per-epoch", "2",
        "--lifecycle.blueprints", "norm", "conv_light", "--host.base-channels", "4", "--n-envs", "2", "--report-envs",
        "2", "--ppo.minibatches", "1", "--ppo.hidden-size", "8", "--devices", "1", "--rounds", "3", "--policy-seeds",
        "2",
    )  # fmt: skip
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    code, out, err = run(*tiny_options, "--out", tmp_path / "whole", env=env)
    assert code == 0, err
    assert "NOT CIFAR-10" in out and re.search(r"compile   \d+\.\d s", out) and "round 3/3" in out
    assert {path.name for path in (tmp_path / "whole").iterdir()} == FILES

    process = command(*tiny_options, "--out", tmp_path / "killed", env=env)
    while not (tmp_path / "killed" / "checkpoints" / "rounds" / "000000.npz").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "metrics.npz").exists()
    code, out, err = run("--resume", tmp_path / "killed", env=env)
    assert code == 0, err
    whole, resumed = ((tmp_path / name / "metrics.npz").read_bytes() for name in ("whole", "killed"))
    assert whole == resumed
    code, out, err = run("--resume", tmp_path / "killed", "--training.host-lr", "0.5", env=env)
    assert code == 2 and "only rounds, report_envs, devices may differ" in err
