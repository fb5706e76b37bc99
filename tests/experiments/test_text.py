"""The command line of `experiments.text`: its options, and a whole small run."""

import json

import pytest

from esper_jax import presets
from esper_jax.config import Config, TextConfig
from esper_jax.run import devices
from experiments import cifar, text


@pytest.fixture(autouse=True)
def no_devices_are_chosen(monkeypatch):
    monkeypatch.setattr(devices, "use_cpus", lambda asked: None)


@pytest.fixture
def story(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("It was a dark and stormy night; the rain fell in torrents. " * 60)
    return path


def test_options_become_a_configuration(story):
    chosen = text.parse(["--preset", "smoke", "--text", str(story), "--training.epochs", "9", "--data.window", "12"])
    expected = presets.text("smoke").replace(
        **{"data.name": "files", "data.files": (str(story),), "training.epochs": 9, "data.window": 12}
    )
    assert chosen.config == expected and type(chosen.config) is TextConfig
    assert text.parse(["--preset", "quick"]).config == presets.text("quick")
    assert text.parse(["--preset", "smoke", "--data", "tinystories"]).config.data.name == "tinystories"


def test_a_configuration_is_what_it_was_written_as():
    for name in presets.TEXT:
        cfg = presets.text(name)
        assert Config.from_json(cfg.to_json()) == cfg == TextConfig.from_json(cfg.to_json())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--text"], "--text: must be followed by one or more files"),
        (["--text", "{story}", "--data", "topics"], "--text and --data: give one of them"),
        (["--text", "nowhere.txt"], "--text nowhere.txt: No such file or directory"),
        (["--text", "{story}", "--data.name", "topics"], "--data.name: give --text FILE... or --data instead"),
        (["--data.window", "65"], "--data.window 65: must be at most 16, the host's block_size"),
        (["--data.window", "400", "--host.block-size", "400", "--text", "{story}"],
         "--data.window 400: the validation block of story.txt has 354 tokens, and must have more than a window"),
        (["--lifecycle.blueprints", "conv_light"], "must be one or more of norm, lora, lora_large, attention"),
        (["--host.n-heads", "3"], "--host.n-heads 3: must be a divisor of width = 20"),
        (["--host.width", "30", "--host.n-heads", "3", "--lifecycle.blueprints", "attention"],
         "attention at width 30: must be a multiple of its 4 heads"),
        (["--text", "{story}", "--data.tokens", "words"], "--data.tokens words: must be one of characters, bpe"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(tmp_path, monkeypatch, capsys, story, argv, said):
    monkeypatch.chdir(tmp_path)
    argv = ["--preset", "smoke", "--out", "run", *(word.format(story=story) for word in argv)]
    assert text.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line and not (tmp_path / "run").exists()


def test_a_run_of_images_is_not_gone_on_with(tmp_path, capsys):
    for experiment, cfg in ((text, presets.get("smoke")), (cifar, presets.text("smoke"))):
        card = {"preset": "smoke", "status": "running", "command": "python -m other", "data": {"identity": "md5:0"}}
        (tmp_path / "run.json").write_text(json.dumps(card | {"config": cfg.to_dict()}))
        assert experiment.main(["--resume", str(tmp_path)]) == 2
        assert "is a run of another experiment: python -m other" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_writes_its_files(tmp_path, story):
    sizes = ["--rounds", "1", "--report-envs", "2", "--n-envs", "2", "--ppo.minibatches", "1", "--training.epochs", "6"]
    argv = ["--preset", "smoke", "--text", str(story), "--devices", "1", "--quiet", *sizes]
    assert text.main([*argv, "--out", str(tmp_path / "run")]) == 0
    card = json.loads((tmp_path / "run" / "run.json").read_text())
    assert card["status"] == "complete" and card["data"]["vocabulary"] == len(set(story.read_text()))
    summary = (tmp_path / "run" / "summary.txt").read_text()
    assert "test bits" in summary and "report-test bits per character of what was kept" in summary
    samples = (tmp_path / "run" / "samples.txt").read_text()
    prompt = story.read_text()[-354:][:16]  # where the last tenth of the text begins
    assert samples.split("\n\n")[1].endswith(f": {prompt!r}") and samples.count("--- ") == 3  # never and two learned
    assert "perplexity" in summary
    moved = story.rename(tmp_path / "moved.txt")
    resume = ["--resume", str(tmp_path / "run"), "--rounds", "2", "--quiet"]
    assert text.main(resume) == 2 and text.main([*resume, "--text", str(moved)]) == 0
