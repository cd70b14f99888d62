"""Sweeps: plans, failures, stops, killed workers, foreign clients, other schedulers."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cudlab.config import error_of
from cudlab.create import create_run
from cudlab.disk import is_locked, run_lock
from cudlab.jobs import parse_parameters, read_status
from cudlab.plan import SweepOptions, TaskStatus, format_table, load_sweep, sweep_status
from cudlab.run import Run
from cudlab.runfiles import find_run
from cudlab.sweep import (
    open_cluster,
    run_here,
    run_sweep,
    run_sweep_file,
    show_live,
    stop_on_signals,
)
from cudlab.training import train

ROOT = Path(__file__).parent.parent
WILD = {"name": "wild", "method": "cud", "lr": 1, "clip": 0, "args.w2": 1e38, "steps": 200}
LONG = {"data": "moons", "steps": 300_000, "batch": 32, "save_every": 50}
SHORT = {"data": "moons", "steps": 20, "batch": 32, "save_every": 10}
ROW = {
    "train": SHORT,
    "jobs": [
        {"name": "a", "method": "rf"},
        {"name": "b", "method": "reflow", "args.teacher": "a", "args.pairs": 64},
        {"name": "c", "method": "cud"},
    ],
    "evaluate": {"nfes": "2", "solvers": "euler", "n": 64},
}


@pytest.fixture
def lab(tmp_path, monkeypatch):
    "A folder for runs and sweep files, for this process and those it starts."
    monkeypatch.setenv("CUDLAB_RUNS_PATH", str(tmp_path / "runs"))
    monkeypatch.setenv("CUDLAB_DEVICE", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def grid(lab, content) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (lab / "grid.json").write_text(text)
    return lab / "grid.json"


def last(tables) -> dict:
    "The last status of a sweep by name."
    *_, rows = tables
    return {row.name: row for row in rows}


def states(rows) -> dict:
    return {row.name: row.state for row in rows}


# The file

BAD = {
    "2 times": '{"train": {}, "train": {}}',
    "NaN": '{"train": {"lr": NaN}}',
    "Infinity": '{"train": {"lr": Infinity}}',
    "line 1": '{"train": ',
    "nested": "[" * 100000,
    "braces": "[]",
    "makes 0 jobs": "{}",
    "10,001": json.dumps({"train": {"seed": list(range(10_001))}}),
    "did you mean 'train'": '{"tarin": {}}',
    "train = '3'": '{"train": 3}',
    "jobs and evaluate": '{"jobs": [{}, 1]}',
    "lists of sets": '{"train": {}, "evaluate": 3}',
    "empty list": '{"train": {"seed": []}}',
    "two jobs make the run": '{"train": {"data": "moons", "seed": [0, 0]}}',
    "wait for each other": '{"train": {"method": "distill"}, "jobs": [{"name": "a", '
    '"args.teacher": "b"}, {"name": "b", "args.teacher": "a"}]}',
    "'a.evaluate' names 2 jobs": '{"jobs": [{"name": "a"}, {"name": "a.evaluate"}], '
    '"evaluate": {}}',
    "workers": '{"train": {}, "workers": -1}',
    "cluster": '{"train": {}, "cluster": "pbs"}',
}


@pytest.mark.parametrize("words, text", BAD.items(), ids=list(BAD))
def test_a_bad_file_is_refused_in_a_sentence(lab, words, text):
    message = error_of(load_sweep, grid(lab, text))
    assert words in message and "\n" not in message and len(message) < 400
    assert not (lab / "runs").exists()


def test_a_bad_job_is_listed_and_the_others_are_done(lab, capsys):
    bad = {
        "typo": {"stpes": 3},
        "value": {"steps": "many"},
        "args": {"method": "rf", "args.haeds": 4},
        "data": {"data": f"folder:{lab}/nowhere"},
        "net": {"net": "unknown"},
        "teacher": {"method": "distill", "args.teacher": "nobody"},
        "until": {"until": 3},
        "taken": {"method": "rf"},
    }
    jobs = [SHORT | {"method": "rf", "name": name} | more for name, more in bad.items()]
    jobs += [SHORT | {"name": "../up"}, SHORT | {"name": "good", "method": "rf"}]
    config, options = parse_parameters(SHORT | {"method": "rf", "name": "taken", "steps": 7})
    create_run(config, options.name)
    evaluations = [
        {"run": ["good", "value", "nobody"], "nfes": 2, "solvers": ["euler"], "n": 64},
        {"run": "good", "nfe": 3},
    ]
    file = grid(lab, {"jobs": jobs, "evaluate": evaluations})
    assert run_sweep_file(file, status=True) == 3
    assert "steps = 'many' is not a whole number" in capsys.readouterr().out
    assert run_sweep_file(file, here=True) == 1
    rows = {row.name: row for row in sweep_status(load_sweep(file))}
    assert {name for name, row in rows.items() if row.state == "done"} == {"good", "good.evaluate"}
    said = {
        "typo": "did you mean 'steps'",
        "value": "steps = 'many'",
        "args": "argument of method rf",
        "data": "nowhere",
        "net": "unknown",
        "teacher": "nobody",
        "until": "until = 3 is not for a job of a sweep",
        "taken": "run 'taken' exists with steps = 7",
        "job-9": "name = '../up'",
        "value.evaluate": "waits for value, which failed",
        "nobody.evaluate": "unknown run",
        "good.evaluate-2": "did you mean 'nfes'",
    }
    for name, words in said.items():
        assert rows[name].state == "failed" and words in rows[name].why, rows[name]
    assert len(capsys.readouterr().err.splitlines()) == len(said)
    assert run_sweep_file(file, status=True) == 1


def test_jobs_keep_the_order_of_the_file_where_they_can(lab):
    jobs = [
        {"name": "late", "method": "reflow", "args.teacher": "early", "args.pairs": 64},
        {"name": "z", "method": "cud"},
        {"name": "early", "method": "rf"},
        {"name": "a", "method": "rf", "seed": 3},
    ]
    evaluate = [{"run": "z", "nfes": "2", "n": 64}, {"nfes": "1", "n": 64}]
    tasks = load_sweep(grid(lab, ROW | {"jobs": jobs, "evaluate": evaluate})).tasks
    first = ["z", "z.evaluate", "z.evaluate-2", "early", "early.evaluate-2"]
    assert list(tasks) == [*first, "late", "late.evaluate-2", "a", "a.evaluate-2"]


def test_options_win_over_the_file_which_windows_may_have_marked(lab):
    file = grid(lab, "")
    file.write_text('{"train": {"name": "one"}, "workers": 3, "tries": 7}', encoding="utf-8-sig")
    options = load_sweep(file, {"workers": 2, "minutes": 9}).options
    assert (options.workers, options.tries, options.minutes) == (2, 7, 9)
    assert "workers" in error_of(load_sweep, file, {"workers": "many"})


def test_the_status_says_what_is_damaged(lab):
    shipped = Path(find_run("digits-dode-euler5"))
    for name, file in (("whole", ""), ("torn", "config.json")):
        shutil.copytree(shipped, lab / "runs" / name)
        if file:
            data = (lab / "runs" / name / file).read_bytes()
            (lab / "runs" / name / file).write_bytes(data[:-9])
    evaluate = {"run": "whole torn", "solvers": "euler", "nfes": "4"}
    rows = sweep_status(load_sweep(grid(lab, {"evaluate": evaluate})))
    assert {row.name: row.state for row in rows} == {
        "whole.evaluate": "waiting",
        "torn.evaluate": "failed",
    }
    assert "config.json" in rows[1].why


def test_a_run_that_is_being_made_is_no_failure(lab):
    (lab / "runs" / "new").mkdir(parents=True)
    (lab / "runs" / "new" / "config.json").write_text("{}")
    sweep = load_sweep(grid(lab, {"evaluate": {"run": "new", "solvers": "euler", "nfes": "4"}}))
    sweep.dir.mkdir(parents=True, exist_ok=True)
    with run_lock(sweep.dir):
        (row,) = sweep_status(sweep)
    assert (row.state, row.why) == ("waiting", "")
    assert sweep_status(sweep)[0].state == "failed"


@pytest.mark.parametrize(
    "record",
    [b"[]", b'{"seconds": "x", "began": [], "code": "0"}', b'{"why": "\\u001b[31m", "code": 4}'],
)
def test_an_odd_record_of_a_task_does_no_harm(lab, record):
    sweep = load_sweep(grid(lab, {"train": {"method": "rf", "data": "moons", "name": "whole"}}))
    sweep.dir.mkdir(parents=True)
    (sweep.dir / "whole.json").write_bytes(record)
    (row,) = sweep_status(sweep)
    assert row.state in ("waiting", "failed") and "\x1b" not in "".join(format_table([row]))


def test_on_a_terminal_the_table_is_rewritten_in_place(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((50, 6)))
    first = [TaskStatus(f"job-{i}") for i in range(9)]
    second = [*first[:8], TaskStatus("job-8", "running", 3, 9, worker="1")]
    rows = show_live(iter([first, second]))
    out = capsys.readouterr().out
    assert rows[8].step == 3 and out.count("\x1b[5F\x1b[J") == 1 == out.count("\x1b[J")
    lines = out.splitlines()
    assert lines[6].split()[:3] == ["job-8", "running", "3/9"]
    assert lines[9] == "9 jobs: 1 running, 8 waiting" and max(map(len, lines)) < 60


# One job after another

BLOCKED = """
import sys
MISSING = {"dask", "distributed", "psutil", "papermill", "fsspec", "nbformat", "plotly", "gradio"}
class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Bare())
from cudlab.sweep import run_sweep_file
sys.exit(run_sweep_file(sys.argv[1], here=True))
"""


def test_here_needs_neither_dask_nor_papermill_and_takes_the_order_of_the_file(lab):
    command = [sys.executable, "-c", BLOCKED, grid(lab, ROW)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    names = ["a", "a.evaluate", "b", "b.evaluate", "c", "c.evaluate"]
    told = [line.split()[0] for line in done.stdout.splitlines() if "done" in line]
    assert told == [*names, "6"] and done.stdout.endswith("6 jobs: 6 done\n")
    assert len(list(run_sweep(load_sweep(lab / "grid.json")))) == 1  # nothing is left for Dask


def test_here_makes_the_same_weights_as_a_training_by_hand(lab):
    rows = last(run_here(load_sweep(grid(lab, {"train": SHORT | {"name": "swept"}}))))
    config, _ = parse_parameters(SHORT)
    for _ in train(create_run(config, "alone")):
        pass
    assert rows["swept"].state == "done"
    assert Run.open("swept").network_hash() == Run.open("alone").network_hash()


def test_a_divergence_spoils_only_its_students(lab):
    jobs = [
        WILD,
        {"name": "pupil", "method": "reflow", "args.teacher": "wild", "args.pairs": 64},
        {"name": "c", "method": "cud"},
    ]
    rows = last(run_here(load_sweep(grid(lab, ROW | {"jobs": jobs}))))
    assert states(rows.values()) == {
        "wild": "failed",
        "wild.evaluate": "failed",
        "pupil": "failed",
        "pupil.evaluate": "failed",
        "c": "done",
        "c.evaluate": "done",
    }
    assert "not finite" in rows["wild"].why and not (lab / "runs" / "pupil").exists()
    assert rows["pupil"].why == "waits for wild, which failed"


@pytest.mark.parametrize("way", ["signal", "minutes", "reader", "file"])
def test_here_every_stop_saves_and_the_same_command_goes_on(lab, way):
    file = grid(lab, {"train": LONG | {"name": "long"}, "jobs": [{"seed": 0}]})
    sweep = load_sweep(file, {"minutes": 0.02} if way == "minutes" else {})
    steps = []
    for _ in range(2):
        with stop_on_signals(sweep.dir / "STOP"):
            tables = run_here(sweep)
            asked = way == "minutes"
            for rows in tables:
                if rows[0].step > (steps or [0])[-1] and not asked:
                    asked = True
                    if way == "signal":
                        os.kill(os.getpid(), signal.SIGTERM)
                    elif way == "reader":
                        tables.close()
                    elif way == "file":
                        (sweep.dir / "STOP").touch()
        row = sweep_status(sweep)[0]
        assert row.state == "stopped" and Run.open("long").verify()
        assert not (lab / "runs" / "long" / "STOP").exists()
        steps.append(Run.open("long").step)
    assert 0 < steps[0] < steps[1]


def test_a_second_sweep_of_the_file_is_refused(lab):
    sweep = load_sweep(grid(lab, {"train": LONG | {"name": "long"}}))
    tables = run_here(sweep)
    next(tables)
    assert "is running already" in error_of(next, run_here(sweep))
    tables.close()


# On Dask


def kill_a_worker(sweep, killed: list) -> None:
    "Kill the process of the first training that has a checkpoint."
    end = time.monotonic() + 200
    while not killed and time.monotonic() < end:
        time.sleep(0.02)
        for task in sweep.tasks.values():
            with contextlib.suppress(ValueError, OSError):  # a run that is being made
                if is_locked(task.dir) and 40 <= Run(task.dir).step < 160:
                    killed.append(read_status(task.dir).pid)
                    os.kill(killed[0], signal.SIGKILL)
                    return


@pytest.mark.parametrize("seeds", [[0, 1], pytest.param([0, 1, 2], marks=pytest.mark.long)])
def test_a_killed_worker_costs_nothing_and_a_second_time_there_is_nothing_to_do(lab, seeds):
    pytest.importorskip("distributed")
    pytest.importorskip("cryptography")
    jobs = [{"method": "rf"}, {"method": "cud", "args.aim": [2, 4, 8] if len(seeds) > 2 else 4}]
    steps = {"steps": 200, "save_every": 40, "seed": seeds}
    sweep = load_sweep(grid(lab, {"train": SHORT | steps, "jobs": jobs, "workers": 2}))
    killed = []
    killer = threading.Thread(target=kill_a_worker, args=(sweep, killed))
    killer.start()
    *_, rows = run_sweep(sweep)
    killer.join()
    assert killed and len(rows) == len(seeds) * (4 if len(seeds) > 2 else 2)
    assert all((row.state, row.step) == ("done", 200) for row in rows), rows
    runs = [Run.open(row.name) for row in rows]
    assert all(run.verify() for run in runs)
    assert all(len({m["step"] for m in run.metrics}) == len(run.metrics) for run in runs)
    assert len(list(run_sweep(sweep))) == 1


def test_a_foreign_client_cannot_command_the_cluster_which_needs_no_proxy(lab, monkeypatch):
    for kind in ("http", "https", "all"):
        monkeypatch.setenv(f"{kind}_proxy", "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    distributed = pytest.importorskip("distributed")
    pytest.importorskip("cryptography")
    import psutil

    def refused(address, **security):
        with pytest.raises(OSError):
            distributed.Client(address, timeout=1, set_as_default=False, **security)

    with open_cluster(SweepOptions(), 1) as client:
        address = client.scheduler.address
        assert address.startswith("tls://127.0.0.1:")
        assert client.submit(os.getpid).result(timeout=60) != os.getpid()
        refused(address, security=distributed.Security.temporary())
        refused(address.replace("tls", "tcp"))
        worker = next(iter(client.scheduler_info()["workers"]))
        assert worker.startswith("tls://127.0.0.1:")
        here = psutil.Process()
        sockets = [s for p in (here, *here.children(True)) for s in p.net_connections()]
        heard = {s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN}
        assert heard <= {"127.0.0.1", "::1"}, heard


def test_a_cluster_that_is_not_there_is_a_sentence(lab):
    pytest.importorskip("distributed")
    file = grid(lab, {"train": SHORT, "scheduler": "tcp://127.0.0.1:1"})
    assert "127.0.0.1:1" in error_of(list, run_sweep(load_sweep(file)))
    file = grid(lab, {"train": SHORT, "cluster": "slurm"})
    assert "cluster = 'slurm'" in error_of(list, run_sweep(load_sweep(file)))


@pytest.mark.long
def test_any_scheduler_and_a_stop_from_elsewhere(lab):
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**options, local_directory=str(lab / "dask")) as cluster:
        content = {"train": LONG | {"name": "long"}, "scheduler": cluster.scheduler_address}
        sweep = load_sweep(grid(lab, content))
        for rows in run_sweep(sweep):
            if rows[0].step:
                (sweep.dir / "STOP").touch()
        assert rows[0].state == "stopped" and Run.open("long").verify()
        assert len(cluster.scheduler_info["workers"]) == 1


@pytest.mark.long
def test_slurm_by_a_stand_in(lab, monkeypatch):
    """What sbatch is given is copied and run here, as Slurm would do there; a job that ends too
    early is asked for again.
    """
    pytest.importorskip("dask_jobqueue")
    tools = lab / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text(
        f'#!/bin/bash\ncp "$1" {lab}/script-$$\nsetsid bash {lab}/script-$$ >{lab}/slurm.log 2>&1 '
        f"&\necho $! >>{lab}/asked\necho Submitted batch job $!\n"
    )
    (tools / "scancel").write_text('#!/bin/bash\nkill -- -"$1"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("DASK_TEMPORARY_DIRECTORY", str(lab / "dask"))
    slurm = {"cores": 2, "memory": "2GB", "interface": "lo", "queue": "short"}
    train = SHORT | {"steps": 300, "save_every": 100, "seed": [0, 1]}
    content = {"train": train, "cluster": "slurm", "workers": 1, "slurm": slurm}
    asked = lab / "asked"
    killed = False
    for rows in run_sweep(load_sweep(grid(lab, content))):
        if not killed and any(row.state == "running" for row in rows):
            killed = True
            os.killpg(int(asked.read_text().split()[0]), signal.SIGKILL)
    assert killed and {row.state for row in rows} == {"done"}, (lab / "slurm.log").read_text()
    assert {row.worker.rpartition("-")[0] for row in rows} == {"SLURMCluster"}
    assert len(asked.read_text().split()) >= 2
    script = next(lab.glob("script-*")).read_text()
    for words in ("#SBATCH -p short", "--cpus-per-task=2", "--nthreads 1"):
        assert words in script


COMMAND = """
import sys
from cudlab.sweep import run_sweep_file
sys.exit(run_sweep_file(sys.argv[1]))
"""


def start(file) -> subprocess.Popen:
    "A sweep as a process with a session of its own, as a terminal starts it."
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", COMMAND, str(file)]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)


def wait_for(condition) -> None:
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


@pytest.mark.long
def test_a_killed_sweep_goes_on_and_ctrl_c_stops_it_in_order(lab):
    file = grid(lab, {"train": LONG | {"seed": [0, 1]}, "workers": 2})
    sweep = load_sweep(file)

    def steps():
        return [row.step for row in sweep_status(sweep)]

    process = start(file)
    wait_for(lambda: min(steps()) > 50)
    process.kill()
    process.communicate()
    dirs = [task.dir for task in sweep.tasks.values()]
    wait_for(lambda: not any(map(is_locked, dirs)))  # the workers end with the sweep
    assert {row.state for row in sweep_status(sweep)} == {"stopped"}
    before = [Run(folder).step for folder in dirs]
    process = start(file)
    wait_for(lambda: all(now > then + 50 for now, then in zip(steps(), before)))
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (3, "") and "the same command continues it" in out
    for row, then in zip(sweep_status(sweep), before):
        assert row.state == "stopped" and row.step > then and Run.open(row.name).verify()
