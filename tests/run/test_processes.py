"""Several processes that share a run, on this machine: the bytes of one process, and all refuse what one refuses."""

import signal
import socket
import time

import pytest
import tiny_run

TINY = (
    "--preset", "smoke", "--data", "digits", "--training.epochs", "4", "--training.batches-per-epoch", "1",
    "--lifecycle.blueprints", "norm", "--host.base-channels", "4", "--n-envs", "4", "--report-envs", "4",
    "--ppo.minibatches", "2", "--ppo.hidden-size", "8", "--rounds", "2", "--policy-seeds", "2", "--quiet",
)  # fmt: skip
SECONDS = 240


def start(*options, cpus, cache):
    few = {"JAX_NUM_CPU_DEVICES": str(cpus), "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return tiny_run.command(*options, XDG_CACHE_HOME=str(cache), **few)


def together(cache, *each, count=2):
    """Processes with these options of each, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", count)
    return [start(*options, *shared, "--process-id", i, cpus=1, cache=cache) for i, options in enumerate(each)]


def ends(processes, seconds=SECONDS):
    """Exit codes and the lines on stderr that are ours; whatever happens, no process is left."""
    try:
        said = [process.communicate(timeout=seconds)[1] for process in processes]
        ours = [[line for line in err.splitlines() if line.startswith(("error: ", "stop"))] for err in said]
        return [process.returncode for process in processes], ours
    finally:
        for process in processes:
            process.kill()


def test_two_processes_give_the_bytes_of_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    alone = start(*TINY, "--out", one, "--devices", 2, cpus=2, cache=tmp_path / "cache")
    assert ends([alone])[0] == [0]
    assert ends(together(tmp_path / "cache", *[(*TINY, "--out", two)] * 2)) == ([0, 0], [[], []])
    for name in tiny_run.BYTES:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert not list(two.glob("traceback*"))


@pytest.mark.slow
def test_a_signal_to_one_stops_all_and_one_goes_on(tmp_path):
    cache, out, whole = tmp_path / "cache", tmp_path / "out", tmp_path / "whole"
    processes = together(cache, *[(*swap(TINY, "--rounds", "300"), "--out", out)] * 2)
    deadline = time.time() + SECONDS
    while not (out / "checkpoints" / "rounds" / "000001.npz").exists():
        assert time.time() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    codes, said = ends(processes)
    assert codes == [143, 143] and all(lines[-1].startswith("stopped; go on with: ") for lines in said)
    done = len(list((out / "checkpoints" / "rounds").glob("*.npz")))
    alone = start("--resume", out, "--rounds", done + 1, "--quiet", "--devices", 1, cpus=1, cache=cache)
    assert ends([alone])[0] == [0]
    alone = start(*swap(TINY, "--rounds", done + 1), "--out", whole, cpus=1, cache=cache)
    assert ends([alone])[0] == [0]
    for name in tiny_run.BYTES:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def swap(options, name, value):
    """Options with another value of one."""
    at = options.index(name)
    return (*options[: at + 1], str(value), *options[at + 2 :])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("each", "said"),
    [
        ((TINY, swap(TINY, "--rounds", 3)), "process 1 has another configuration than process 0: all must have"),
        ((swap(TINY, "--n-envs", 3),) * 2, "--n-envs 3: must be a multiple of 2"),
        (((*TINY, "--devices", 1),) * 2, "--devices 1: must be 2, all that the 2 processes have"),
        ((TINY, (*TINY, "--nonsense", 1)), None),
        (((*TINY, "--memory-checkpoints"),) * 2, "--memory-checkpoints: the processes of a run do not share"),
    ],
)
def test_what_one_refuses_all_refuse(tmp_path, each, said):
    codes, lines = ends(together(tmp_path / "cache", *[(*options, "--out", tmp_path / "out") for options in each]))
    assert codes[1] == 2 and codes[0] != 0 and not (tmp_path / "out").exists()
    if said is not None:
        assert codes == [2, 2] and all(said in line for (line,) in lines), lines


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others(tmp_path):
    """Within a minute, by JAX's heartbeats or at the next exchange."""
    processes = together(tmp_path / "cache", *[(*swap(TINY, "--rounds", 3000), "--out", tmp_path / "out")] * 2)
    deadline = time.time() + SECONDS
    while not (tmp_path / "out" / "checkpoints" / "rounds" / "000001.npz").exists():
        assert time.time() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.01)
    processes[1].kill()
    killed = time.time()
    codes, _ = ends(processes, seconds=90)
    assert codes[0] not in (0, None) and time.time() - killed < 75
