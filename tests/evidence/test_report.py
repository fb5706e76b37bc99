"""What a reader gets to see of a run: pictures, page, screen."""

import functools
import io
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import tiny_run
from made_run import run_arrays

from esper_jax.enums import HEADS
from esper_jax.evidence import canvas, figures, report, tables
from esper_jax.metric import bits_per_character
from esper_jax.run.console import Console, round_note
from esper_jax.types import Op, Stage

PNG = b"\x89PNG\r\n\x1a\n"
CARD = {"data": {"name": "shapes"}, "command": "--out '<b>&'"}
VOID = {"meta", "br"}  # elements without an end


def whole_run(**shape):
    """A run of which everything was measured."""
    arrays = run_arrays(**shape)
    rng, total = np.random.default_rng(1), arrays["rounds/reward"]
    rounds, policies = total.shape[:2]
    arms, envs, epochs, slots = arrays["arms/stage"].shape
    decided = np.zeros((arms, envs, epochs), bool)
    decided[..., 1:] = True
    learner = ("approx_kl", "clip_fraction", "explained_variance", "value_loss")
    head_entropy = rng.uniform(0, 1, (rounds, policies, len(HEADS)))
    head_entropy[..., 3] = np.nan  # never a choice of tempo
    return arrays | {
        "rounds/reward_gain": total * 2, "rounds/reward_size": -total,
        "rounds/val_accuracy": 50 + total, "rounds/val_loss": 2 + total,
        "arms/reward": np.where(decided, rng.normal(0, 1, decided.shape), np.nan), "arms/decision_valid": decided,
        "arms/requested_op": rng.integers(0, len(Op), decided.shape).astype(np.int8),
        "arms/slot": rng.integers(0, slots, decided.shape).astype(np.int8),
        "arms/contribution": np.where(arrays["arms/alpha"] > 0, 1.5, np.nan),
        "arms/test_table": rng.uniform(0, 100, (arms, envs, 2**slots)),
        "arms/train_flops": rng.uniform(1e9, 2e9, (arms, envs)),
        **{f"learner/{name}": rng.uniform(0, 1, (rounds, policies)) for name in learner},
        "learner/head_entropy": head_entropy,
    }  # fmt: skip


def drawn(arrays, data="shapes"):
    panels = {name: getattr(figures, name)(arrays, data) for name in figures.PICTURES}
    return report.Pictures({name: figures.inline(name, each) for name, each in panels.items() if each}, {})


@functools.cache
def pages():
    """Of a run of which everything was measured, and of one in which nothing was that can be missing."""
    poor = {name: array for name, array in run_arrays(policies=1).items() if not re.match("rounds/|learner/", name)}
    return tuple(report.page("a <title>", arrays, CARD, drawn(arrays)) for arrays in (whole_run(), poor))


class Elements(HTMLParser):
    """Collects attributes, and checks that elements are closed in order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.found = [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", list(figures.FILES))
@pytest.mark.parametrize(("envs", "policies"), [(1, 2), (6, 1), (6, 3)])
def test_files(tmp_path, name, envs, policies):
    panels = getattr(figures, name)(run_arrays(envs=envs, policies=policies), "shapes")
    figures.write(tmp_path / "x.png", name, panels, "shapes")
    assert (tmp_path / "x.png").read_bytes().startswith(PNG)
    assert all(len(panel.caption) > 20 for panel in panels)


def test_pictures_are_the_same_whatever_the_users_settings(tmp_path):
    panels = figures.learning(run_arrays(), "shapes")

    def draw():
        figures.write(tmp_path / "x.png", "learning", panels, "shapes")
        return (tmp_path / "x.png").read_bytes(), figures.inline("learning", panels)

    first = draw()
    mine = {"figure.facecolor": "red", "font.size": 30, "savefig.format": "svg", "savefig.bbox": "tight"}
    with matplotlib.rc_context(mine):
        assert draw() == first
        assert matplotlib.rcParams["font.size"] == 30


def test_a_picture_that_fails_leaves_no_file(tmp_path):
    def fail(figure):
        raise TypeError("no font")

    with pytest.raises(TypeError):
        figures.write(tmp_path / "x.png", "curves", [canvas.Panel(fail, "")], "shapes")
    (tmp_path / "y.png").mkdir()  # what it is written to cannot get its name
    with pytest.raises(OSError):
        figures.write(tmp_path / "y.png", "curves", figures.curves(run_arrays(), "shapes"), "shapes")
    assert [path.name for path in tmp_path.iterdir()] == ["y.png"]


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_an_unknown_backend_in_the_environment_does_not_matter(tmp_path, backend):
    code = "import os; from esper_jax.evidence import figures; print(os.environ['MPLBACKEND'])"
    env = os.environ | {"MPLBACKEND": backend, "MPLCONFIGDIR": str(tmp_path)}
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, f"{backend}\n"), done.stderr


def test_a_run_that_kept_nothing_can_be_drawn():
    arrays = run_arrays()
    arrays["arms/stage"][:] = Stage.DORMANT
    arrays["arms/fossilised"][:] = arrays["arms/germinated"][:] = 0
    svg = figures.inline("grown", figures.grown(arrays, "shapes"))[0].svg
    assert "nothing kept" in svg
    assert "No arm germinated a seed." in report.page("t", arrays, CARD, report.Pictures({}, {}))


def test_svg_follows_the_page():
    """Ink and paper are the page's, text is text in its font, nothing is a raster or comes from elsewhere."""
    (strips,) = figures.inline("paired", figures.paired(whole_run(), "shapes"))
    assert strips.svg.startswith('<svg viewBox="0 0 ') and f'aria-label="{strips.caption}"' in strips.svg
    assert "currentColor" in strips.svg and "var(--paper)" in strips.svg and ">policy</text>" in strips.svg
    for never in ("#000000", "#ffffff", "<image", "<style", "xmlns", "http", "font-family", "DejaVu"):
        assert never not in strips.svg, never


def test_numbers_on_axes_are_whole():
    """Coordinates are cut to two digits behind the point, what is read is not."""
    draw = lambda figure: figure.subplots().set_xticks([0.0125], ["0.0125"])
    svg = canvas.svg(canvas.Panel(draw, "c"), "x")
    assert ">0.0125</text>" in svg
    assert not re.search(r' d="[^"]*\.\d{3}', svg)


def test_page_is_one_file_that_stands_alone():
    for page in pages():
        assert len(page.encode()) < 3_000_000
        assert "http" not in page and "<script" not in page and "@import" not in page
        for tag, attributes in Elements(page).found:
            assert "src" not in attributes and tag not in ("img", "image", "link", "iframe")
            assert attributes.get("href", "#").startswith("#") and "url(" not in attributes.get("data", "")


def test_page_is_the_same_for_the_same_run():
    assert report.page("a <title>", whole_run(), CARD, drawn(whole_run())) == pages()[0]


def test_ids_of_a_page_are_its_own_and_lead_somewhere():
    for page in pages():
        elements = Elements(page).found
        ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
        assert len(ids) == len(set(ids)) > 10
        links = re.findall(r'(?:url\(|href=")#([^")]+)', page)
        assert set(links) <= set(ids)


def test_every_picture_says_what_it_is():
    elements = Elements(pages()[0]).found
    pictures = [attributes for tag, attributes in elements if tag == "svg"]
    assert len(pictures) == sum(len(getattr(figures, name)(whole_run(), "shapes")) for name in figures.PICTURES) >= 20
    assert all(each["role"] == "img" and len(each["aria-label"]) > 20 for each in pictures)


SECTIONS = (
    "Learning", "Paired differences", "Frontier", "While hosts train", "What was kept, where and when",
    "Lives of the seeds", "What became of the seeds", "What each slot is worth", "Parts of the reward",
    "Does the reward pay for gain?", "Health of the learner", "What is decided when",
)  # fmt: skip


def test_page_has_every_section_in_order():
    for page in pages():
        assert tuple(re.findall("<h2>(.*)</h2>", page)) == SECTIONS


def test_page_begins_with_the_verdict():
    page, arrays = pages()[0], whole_run()
    headline, claim = tables.headline(arrays, "shapes"), tables.sentence(arrays, "shapes")
    order = [page.index(text) for text in ('<p class="claim">' + headline, claim, "<table", "Run card", "<nav")]
    assert order == sorted(order)
    for cell in sum(tables.table(arrays), []):
        assert f"<td>{cell}</td>" in page
    assert "interquartile mean" in page


def section(page, heading):
    return re.search(rf"<h2>{re.escape(heading)}</h2>(.*?)</section>", page, re.DOTALL)[1]


def test_what_was_not_measured_is_said_and_not_drawn():
    rich, poor = pages()
    for heading in SECTIONS:
        assert "ot measured" not in section(rich, heading), heading
    for heading in ("Learning", "Parts of the reward", "Health of the learner"):
        assert "Not measured: no policy was trained" in section(poor, heading)
    for heading in ("What each slot is worth", "Does the reward pay for gain?", "What is decided when"):
        assert "Not measured" in section(poor, heading) and "<svg" not in section(poor, heading)
    assert section(rich, "Frontier").count("<svg") == 2
    assert section(poor, "Frontier").count("<svg") == 1 and "FLOPs of the training" in section(poor, "Frontier")
    contribution = re.findall(r"<tr><td>eager</td>.*<td>(.*)</td></tr>", section(poor, "What became of the seeds"))
    assert contribution == ["-"]


def test_tables_of_a_page():
    """Of 6 environments each: `eager` and policy 0 keep a seed in slot 0, both policies prune one in slot 1."""
    page = pages()[0]
    rows = re.findall(r"<tr>(<td>.*)</tr>", section(page, "What became of the seeds"))
    cells = [re.findall("<td>(.*?)</td>", row) for row in rows]
    # 12 episodes of two policies with a seed each that is pruned before it is blended in, and 6 of one with a kept one
    assert cells[0] == ["eager", "conv_light", "6", "6", "0", "0", "0", "+1.50 ± 0.00"]
    assert cells[1][:7] == ["policy", "conv_light", "18", "6", "12", "0", "0"]
    worth = section(page, "What each slot is worth")
    assert worth.count("<table") == 2 and "<td>together</td>" in worth
    assert re.search("<td>slot 0</td><td>[+-].*</td><td>50 %</td>", worth)  # of two policies one keeps a seed there
    assert "<tr><td>slot 1</td><td>-</td><td>0 %</td></tr>" in worth  # nothing was ever blended in there


@pytest.mark.parametrize(("slots", "said"), [(1, "exact Shapley value"), (5, "lost when it alone is off")])
def test_what_few_and_many_slots_are_worth(slots, said):
    arrays = whole_run(slots=3)
    for name in ("stage", "alpha", "blueprint", "contribution"):
        arrays[f"arms/{name}"] = np.repeat(arrays[f"arms/{name}"][..., :1], slots, -1)
    rows = 2**slots if slots < 5 else 2 + 2 * slots
    arrays["arms/test_table"] = arrays["arms/test_table"][..., :1].repeat(rows, -1)
    worth = section(report.page("t", arrays, CARD, report.Pictures({}, {})), "What each slot is worth")
    assert said in worth and worth.count("<table") == 1 and "interaction" not in worth


def test_page_is_escaped_and_says_what_was_meant():
    page = report.page("a <title>", whole_run(), CARD, drawn(whole_run(), "a & <b>"), meant="CIFAR-10", samples="1 < 2")
    for text in ("a &lt;title&gt;", "on a &amp; &lt;b&gt;", "&lt;b&gt;&amp;", "shapes, not CIFAR-10", "1 &lt; 2"):
        assert text in page
    Elements(page)
    assert "not CIFAR-10" not in pages()[0] and "Samples" not in pages()[0]


def test_a_picture_that_could_not_be_drawn_is_said():
    some = report.Pictures({}, {"paired": "TypeError: no <font>"})
    page = report.page("t", run_arrays(), CARD, some)
    assert "could not be drawn: TypeError: no &lt;font&gt;" in section(page, "Paired differences")
    none = report.page("t", run_arrays(), CARD, report.Pictures({}, {report.ALL: "ImportError: none"}))
    assert none.count("could not be drawn: ImportError: none") == len(figures.PICTURES)


def test_a_metric_of_which_less_is_better():
    """What is saved is a gain, so that right and up are better in every picture."""
    arrays = whole_run(metric=bits_per_character(64))
    eager = figures.gains(arrays)["eager"].mean()
    # 3 points are 0.06 nats here, and 0.087 bits a character
    assert 0.08 < eager < 0.095
    page = report.page("t", arrays, CARD, drawn(arrays))
    assert "gain over never (bits per character saved)" in page and "points of accuracy" not in page


def test_audit_is_the_correlation_over_all_episodes():
    arrays = whole_run()
    arrays["arms/reward"] = np.where(arrays["arms/decision_valid"], 0.0, np.nan)
    result = arrays["arms/test_committed_accuracy"]
    arrays["arms/reward"][..., 1] = result - result[0]
    (panel,) = figures.audit(arrays, "shapes")
    assert f"over all {result.size} episodes is 1.00:" in panel.caption
    arrays["arms/reward"][..., 1] = 0
    assert "cannot be told" in figures.audit(arrays, "shapes")[0].caption


def test_pages_of_real_runs():
    metrics = tiny_run.result().metrics
    page = report.page("t", metrics, {"data": {"name": "tiny"}}, drawn(metrics, "tiny"))
    Elements(page)
    assert "Not measured" not in section(page, "What is decided when")


def test_piped_output_is_plain_lines():
    out = io.StringIO()
    console = Console(file=out)
    with console.step("data", "shapes") as said:
        said.append("done [100%]")
    with console.bar("round", 4, done=2) as advance:
        advance("acc=1.0")
        advance("acc=2.0")
    console.table(("arm", "x"), [["never", "1"]])
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue()
    assert lines[0] == "  data      shapes ..." and re.fullmatch(r"  data      \d\.\d s  done \[100%\]", lines[1])
    assert re.fullmatch(r"  round 3/4  t=\d+s  left=\d+s  acc=1.0", lines[2]) and lines[3].startswith("  round 4/4")
    assert set(console.durations) == {"data", "round"}


def test_quiet_keeps_warnings_and_results():
    out = io.StringIO()
    console = Console(quiet=True, file=out)
    console.say("nothing")
    with console.bar("round", 1) as advance:
        advance("acc=1.0")
    console.say("WARNING", always=True)
    console.table(("arm", "x"), [["never", "1"]])
    assert out.getvalue().splitlines() == ["WARNING", "arm    x", "never  1"]


def test_round_note_has_the_numbers():
    note = round_note(tiny_run.result().rounds[0])
    number = r"-?\d+\.\d\d"  # a return for each of the two policies
    said = rf"acc=\d+\.\d  return={number} {number}  kept=\d\.\d  kl=-?\d\.\d+  entropy=\d\.\d\d( .*)?"
    assert re.fullmatch(said, note)


def test_every_stage_can_be_drawn():
    assert set(canvas.STAGE_COLOURS) == set(Stage) - {Stage.UNKNOWN, Stage.DORMANT}
