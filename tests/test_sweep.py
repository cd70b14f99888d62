"""Sweeps as real processes: killed workers, stops, failures, teachers, copies, other schedulers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("distributed")
psutil = pytest.importorskip("psutil")

import cudlab.cli  # noqa: E402
import cudlab.run  # noqa: E402
from cudlab.run import Run  # noqa: E402
from cudlab.sweep import (
    TaskStatus,
    is_blocked,
    load_sweep,
    run_sweep,
    show_live,
    sweep_main,
    sweep_status,
)

ROOT = Path(__file__).parent.parent
STARTED = []
WILD = {"name": "wild", "lr": 1, "clip": 0, "args.w2": 1e38, "steps": 200}


@pytest.fixture
def lab(tmp_path, monkeypatch):
    "A folder for runs and sweep files, for this process and those it starts."
    monkeypatch.setenv("CUDLAB_RUNS_PATH", str(tmp_path / "runs"))
    monkeypatch.setenv("CUDLAB_DEVICE", "cpu")
    yield tmp_path
    for process in STARTED:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
    STARTED.clear()


def grid(lab, content) -> str:
    (lab / "grid.json").write_text(
        content if isinstance(content, str) else json.dumps({"notebooks": "no"} | content)
    )
    return str(lab / "grid.json")


def start(file, *words):
    command = [sys.executable, "-m", "cudlab.cli", "sweep", file, *words]
    STARTED.append(
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    )
    return STARTED[-1]


def finish(process) -> tuple:
    out, err = process.communicate(timeout=250)
    return process.returncode, out, err


def wait_for(condition, process=None, seconds=100):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
    return found


def at_work(file) -> list:
    "(row, process) of the jobs that have one."
    sweep, found = load_sweep(file), []
    for row in sweep_status(sweep):
        if row.state == "running":
            known = json.loads((sweep.folder / f"{row.job}.json").read_text())
            if "pid" in known and psutil.pid_exists(known["pid"]):
                found.append((row, psutil.Process(known["pid"])))
    return found


@pytest.mark.long
def test_a_killed_worker_costs_nothing_and_a_second_time_there_is_nothing_to_do(lab):
    file = grid(
        lab,
        {
            "train": {"steps": 20, "batch": 32, "save_every": 5, "seed": [0, 1, 2]},
            "workers": 2,
            "jobs": [{"method": "rf"}, {"method": "cud", "args.aim": [2, 4, 8]}],
        },
    )
    process = start(file)
    assert (
        "done" in process.stdout.readline() + process.stdout.readline() + process.stdout.readline()
    )
    other = finish(start(file, "status"))
    assert (
        other[0] == 3
        and "12 jobs: " in other[1]
        and any(word in other[1].splitlines()[-1] for word in (" running", " queued"))
    )  # between two jobs none runs
    row, job = wait_for(lambda: at_work(file), process)[0]
    worker = psutil.Process(job.ppid())
    assert process.pid in [p.pid for p in worker.parents()] and worker.pid != process.pid
    worker.kill()
    code, out, err = finish(process)
    assert (code, err) == (0, "") and "12 jobs: 12 done" in out
    assert not job.is_running() and not worker.is_running()
    table = sweep_status(load_sweep(file))
    assert len(table) == 12 and all(
        r.state == "done" and (r.step, r.of, r.code) == (20, 20, 0) for r in table
    )
    made = {r.job: Run.open(r.job) for r in table}
    assert all(found.verify() == 5 for found in made.values()) and row.job in made
    stamps = {
        name: (found.dir / "MANIFEST.json").stat().st_mtime_ns for name, found in made.items()
    }
    code, out, err = finish(start(file))
    assert (code, err) == (0, "") and "12 jobs: 12 done" in out
    assert stamps == {
        name: (found.dir / "MANIFEST.json").stat().st_mtime_ns for name, found in made.items()
    }
    assert not [p for p in ROOT.iterdir() if "dask" in p.name]


@pytest.mark.long
def test_a_failure_takes_only_those_that_wait_for_it(lab):
    file = grid(
        lab,
        {
            "train": {"data": "moons", "batch": 32},
            "workers": 2,
            "evaluate": {"run": ["wild", "good"], "nfes": 2, "solvers": "euler", "n": 64},
            "jobs": [
                WILD,
                {"name": "good", "method": "rf", "steps": 20},
                {"name": "pupil", "method": "distill", "args.teacher": "wild"},
            ],
        },
    )
    code, out, err = finish(start(file))
    table = {r.job: r for r in sweep_status(load_sweep(file))}
    assert code == 1 and {name: r.state for name, r in table.items()} == {
        "wild": "failed",
        "good": "done",
        "pupil": "failed",
        "wild.evaluate": "failed",
        "good.evaluate": "done",
    }
    assert (
        table["wild"].code == 4
        and "not finite" in table["wild"].why
        and table["pupil"].why.startswith("wild is not there: ")
    )
    assert (
        len(err.splitlines()) == 3
        and err.startswith("wild: failed with code 4: ")
        and "5 jobs: 2 done, 3 failed" in out
    )
    assert not (lab / "runs" / "pupil").exists() and Run.open("good").scores[0]["nfe"] == 2


@pytest.mark.long
def test_a_killed_sweep_goes_on_and_a_second_one_is_refused(lab):
    file = grid(
        lab,
        {
            "train": {
                "data": "moons",
                "steps": 100000,
                "batch": 32,
                "save_every": 20,
                "seed": [0, 1],
            },
            "workers": 2,
        },
    )
    process = start(file)
    jobs = wait_for(lambda: [j for j in at_work(file) if j[0].step > 20][1:], process) and [
        j for _, j in at_work(file)
    ]
    process.kill()
    process.wait()
    psutil.wait_procs(jobs, 60)
    assert not any(j.is_running() for j in jobs) and {
        r.state for r in sweep_status(load_sweep(file))
    } == {"stopped"}
    before = {r.job: r.step for r in sweep_status(load_sweep(file))}
    process = start(file)
    wait_for(lambda: [j for j in at_work(file) if j[0].step > before[j[0].job]][1:], process)
    code, out, err = finish(start(file))
    assert code == 2 and "is running already" in err
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, err) == (3, "") and "the same command continues it" in out
    table = sweep_status(load_sweep(file))
    assert all(
        r.state == "stopped" and before[r.job] < r.step < r.of and "SIGTERM" in r.why for r in table
    )
    assert all(Run.open(r.job).verify() == 5 for r in table) and not at_work(file)


@pytest.mark.long
def test_interrupted_midway_and_continued(lab):
    file = grid(
        lab, {"train": {"data": "moons", "steps": 20, "batch": 32, "seed": [0, 1, 2]}, "workers": 1}
    )
    process = start(file)
    assert "running" in process.stdout.readline() and "done" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, err) == (3, "") and out.endswith("the same command continues it\n")
    assert (
        sweep_status(load_sweep(file))[0].state == "done"
        and sweep_status(load_sweep(file))[-1].state != "done"
    )
    code, out, err = finish(start(file))
    assert (code, err) == (0, "") and "3 jobs: 3 done" in out


@pytest.mark.long
def test_legs_of_some_minutes_lead_to_the_end(lab):
    file = grid(
        lab, {"train": {"data": "moons", "steps": 3, "batch": 32, "minutes": 1e-4, "name": "legs"}}
    )
    assert finish(start(file))[0] == 0
    log = next((lab / "runs" / ".sweeps").glob("*/legs.log")).read_text()
    assert log.count("stopped by its time limit") == 2 and "run legs: done" in log


@pytest.mark.long
def test_notebooks_teacher_student_and_scores_are_copied(lab):
    out = lab / "elsewhere"
    file = grid(
        lab,
        {
            "train": {"data": "moons", "steps": 20, "batch": 32},
            "jobs": [
                {"name": "b", "method": "distill", "args.teacher": "a"},
                {"name": "a", "method": "rf"},
            ],
            "evaluate": {"nfes": "1", "solvers": "euler", "n": 64, "run": "b"},
            "notebooks": "yes",
            "keep": "slim",
            "out": out.as_uri(),
            "workers": 2,
        },
    )
    code, said, err = finish(start(file))
    assert (code, err) == (0, ""), said
    for name in ("a", "b"):
        copy = Run(out / name)
        assert (
            copy.verify() == 4
            and copy.solve(index=2).x.shape == (2, 2)
            and not (out / name / "train_state.pt").exists()
        )
        book = json.loads((out / name / "train.ipynb").read_text())
        assert any(
            "papermill" in c["metadata"] for c in book["cells"]
        ) and f'name = "{name}"' in json.dumps(book["cells"]).replace("\\", "")
    assert Run(out / "b").scores and Run.open("b").info["teacher"]["name"] == "a"
    assert "1/1  seed 0" in (out / "b" / "evaluate.ipynb").read_text()
    assert [r["state"] for r in json.loads((out / "sweep.json").read_text())] == ["done"] * 3


def test_what_is_done_is_copied_to_any_file_system(lab, capsys):
    fsspec = pytest.importorskip("fsspec")
    file = grid(lab, {"train": {"data": "moons", "steps": 3, "batch": 8, "name": "x"}})
    assert finish(start(file))[0] == 0
    assert sweep_main([file, "out=memory://there/sweep"]) == 0 and fsspec.filesystem(
        "memory"
    ).exists("/there/sweep/x/config.json")
    assert not fsspec.filesystem("memory").exists("/there/sweep/x/ema.safetensors")
    capsys.readouterr()
    assert (
        sweep_main([file, "out=memroy://there"]) == 2
        and "did you mean 'memory'" in capsys.readouterr().err
    )
    (lab / "file").touch()
    assert (
        sweep_main([file, f"out={lab / 'file' / 'below'}"]) == 2
        and len(capsys.readouterr().err.splitlines()) == 1
    )


def test_a_reader_who_leaves_stops_the_jobs(lab):
    file = grid(lab, {"train": {"data": "moons", "steps": 100000, "batch": 32, "name": "long"}})
    tables = run_sweep(load_sweep(file))
    while not next(tables)[0].step:
        pass
    tables.close()
    assert (
        sweep_status(load_sweep(file))[0].state == "stopped"
        and Run.open("long").step > 0
        and not at_work(file)
    )


@pytest.mark.long
def test_any_scheduler_and_a_stop_from_elsewhere(lab):
    address, environment = (
        lab / "scheduler.json",
        os.environ | {"DASK_TEMPORARY_DIRECTORY": str(lab / "dask")},
    )
    command = [
        sys.executable,
        "-m",
        "distributed.cli.dask_scheduler",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--no-dashboard",
        "--scheduler-file",
        address,
    ]
    scheduler = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    wait_for(address.exists, scheduler)
    command = [
        sys.executable,
        "-m",
        "distributed.cli.dask_worker",
        "--scheduler-file",
        address,
        "--nthreads",
        "1",
        "--no-dashboard",
        "--name",
        "far",
    ]
    worker = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        tcp = json.loads(address.read_text())["address"]
        file = grid(
            lab,
            {
                "train": {"data": "moons", "steps": 100000, "batch": 32, "name": "long"},
                "scheduler": tcp,
            },
        )
        process = start(file)
        assert (
            wait_for(lambda: [j for j in at_work(file) if j[0].step], process)[0][0].worker == "far"
        )
        assert finish(start(file, "stop"))[0] == 0
        code, out, err = finish(process)
        assert (
            (code, err) == (3, "")
            and sweep_status(load_sweep(file))[0].state == "stopped"
            and worker.poll() is None
        )
    finally:
        for process in (worker, scheduler):
            process.terminate()
            process.wait(30)


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
    file = grid(
        lab,
        {
            "train": {"data": "moons", "steps": 20, "batch": 32, "seed": [0, 1]},
            "cluster": "slurm",
            "workers": 1,
            "slurm": {"cores": 2, "memory": "2GB", "interface": "lo", "walltime": "00:10:00"},
        },
    )
    process = start(file, "slurm.queue=short")
    wait_for(lambda: at_work(file), process)
    os.killpg(int((lab / "asked").read_text().split()[0]), signal.SIGKILL)
    code, out, err = finish(process)
    assert (code, err) == (0, ""), (lab / "slurm.log").read_text()
    script = next(lab.glob("script-*")).read_text()
    assert (
        "#SBATCH -p short" in script and "--cpus-per-task=2" in script and "--nthreads 1" in script
    )
    assert len((lab / "asked").read_text().split()) >= 2 and {
        r.worker.rpartition("-")[0] for r in sweep_status(load_sweep(file))
    } == {"SLURMCluster"}


BAD = {
    "2 times": '{"train": {}, "train": {}}',
    "NaN": '{"train": {"lr": NaN}}',
    "not JSON": '{"train": ',
    "Infinity": '{"train": {"lr": Infinity}}',
    "nested": "[" * 100000,
    "braces": "[]",
    "no job": "{}",
    "did you mean 'train'": '{"tarin": {}}',
    "train = 3": '{"train": 3}',
    "jobs = {}": '{"jobs": {}}',
    "jobs[1] = 1": '{"jobs": [{}, 1]}',
    "empty list": '{"train": {"seed": []}}',
    "did you mean 'steps'": '{"train": {"stpes": [1, 2]}}',
    "job 2 (method=cdu)": '{"train": {"method": ["rf", "cdu"]}}',
    "argument of method rf": '{"train": {"method": "rf", "args.haeds": 4}}',
    "steps = 'many'": '{"train": {"steps": "many"}}',
    "as job 1 is": '{"train": {"seed": [0, 0]}}',
    "unknown data set": '{"train": {"data": "mnits"}}',
    "until": '{"train": {"until": 3}}',
    "unknown teacher": '{"train": {"method": "distill", "args.teacher": "nobody"}}',
    "waits for it in turn": '{"train": {"method": "distill"}, "jobs": [{"name": "a", '
    '"args.teacher": "b"}, {"name": "b", "args.teacher": "a"}]}',
    "must agree": '{"jobs": [{"name": "a", "method": "rf"}, {"name": "b", "method": "distill", '
    '"args.teacher": "a", "data": "moons"}]}',
    "n = 30 is too few": '{"train": {"data": "digits"}, "evaluate": {"n": 30}}',
    "unknown feature extractor": '{"train": {"data": "digits"}, "evaluate": {"extractor": '
    '"inceptoin"}}',
    "did you mean 'nfes'": '{"train": {}, "evaluate": {"nfe": 3}}',
    "evaluate = 3": '{"train": {}, "evaluate": 3}',
    "unknown run": '{"evaluate": {"run": "nobody"}}',
    "workers": '{"train": {}, "workers": -1}',
    "cluster": '{"train": {}, "cluster": "pbs"}',
    "keep": '{"train": {}, "keep": "all"}',
    "10,000": json.dumps({"train": {"seed": list(range(10_001))}}),
    "exclude each other": '{"train": {}, "cluster": "slurm", "scheduler": "tcp://127.0.0.1:1"}',
    "slurm.cores": '{"train": {"data": "moons"}, "cluster": "slurm", "workers": 1}',
    "127.0.0.1:1'": '{"train": {"data": "moons"}, "scheduler": "tcp://127.0.0.1:1"}',
    "how many jobs of Slurm": '{"train": {"data": "moons"}, "cluster": "slurm"}',
    "name = '../up'": '{"train": {"name": "../up"}}',
    "net = 'mlp'": '{"train": {"net": "mlp"}}',
}


@pytest.mark.parametrize("names, text", BAD.items(), ids=list(BAD))
def test_a_bad_file_is_refused_in_a_sentence(lab, capsys, names, text):
    assert sweep_main([grid(lab, text)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and names in err, err
    assert not [p for p in (lab / "runs").glob("*") if p.name != ".sweeps"]


def test_what_windows_writes_before_a_file_and_words_in_the_wrong_order(lab, capsys):
    file = lab / "marked.json"
    file.write_text('{"train": {"data": "moons", "name": "one"}}', encoding="utf-8-sig")
    assert sweep_main([str(file), "plan"]) == 0 and "1 job: 1 waiting" in capsys.readouterr().out
    assert (
        sweep_main(["plan", str(file)]) == 2
        and capsys.readouterr().err
        == f"error: sweep = 'plan' is not a file, which comes first: cudlab sweep {file} "
        "[plan|here|status|stop]\n"
    )


def test_who_waits_for_a_stopped_job_says_so(lab):
    sweep = load_sweep(
        grid(
            lab,
            {
                "train": {"data": "moons", "batch": 32},
                "jobs": [
                    {"name": "first", "method": "rf"},
                    {"name": "pupil", "method": "distill", "args.teacher": "first"},
                ],
            },
        )
    )
    sweep.folder.mkdir(parents=True)
    ended = {"first": 3}
    assert (
        is_blocked(sweep, sweep.tasks["pupil"], ended)
        and ended["pupil"] == 3
        and sweep_status(sweep)[1].why == "waits for first, which was stopped"
    )


def test_on_a_terminal_the_table_is_rewritten_in_place(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((50, 6)))
    first = [TaskStatus(f"job-{i}", "queued") for i in range(9)]
    table = show_live(
        iter([first, [*first[:8], TaskStatus("job-8", "running", 3, 9, loss=0.5, worker="1")]])
    )
    out = capsys.readouterr().out
    assert table[8].step == 3 and out.count("\x1b[5F\x1b[J") == 1 == out.count("\x1b[J")
    assert out.splitlines()[6].split()[:3] == ["job-8", "running", "3/9"] and out.splitlines()[
        9
    ].startswith("9 jobs: 1 running, 8 queued")
    assert max(map(len, out.splitlines())) < 60


def test_a_name_that_another_configuration_has_is_refused(lab, capsys):
    assert (
        finish(start(grid(lab, {"train": {"data": "moons", "steps": 3, "batch": 8, "name": "x"}})))[
            0
        ]
        == 0
    )
    assert (
        sweep_main([grid(lab, {"train": {"data": "moons", "steps": 4, "batch": 8, "name": "x"}})])
        == 2
    )
    assert "job 1: run 'x' exists with steps = 3" in capsys.readouterr().err


# One job after another

BLOCKED = """
import sys
class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"dask", "distributed", "psutil", "papermill", "fsspec", "nbformat", "plotly", "gradio"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Bare())
from cudlab.sweep import sweep_main
sys.exit(sweep_main(sys.argv[1:]))
"""
ROW = {
    "train": {"data": "moons", "steps": 30, "batch": 32},
    "jobs": [
        {"name": "a", "method": "rf"},
        {"name": "b", "method": "reflow", "args.teacher": "a", "args.pairs": 64},
        {"name": "c", "method": "cud"},
    ],
    "evaluate": {"nfes": "2", "solvers": "euler", "n": 64},
}


def test_here_needs_neither_dask_nor_papermill_and_makes_the_same_weights(lab):
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, grid(lab, ROW | {"notebooks": "auto"}), "here"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    heads = list(dict.fromkeys(line.split(": ")[0] for line in done.stdout.splitlines()))
    assert (
        heads[:6] == ["a", "a.evaluate", "b", "b.evaluate", "c", "c.evaluate"]
        and "6 done" in heads[-1] + done.stdout.splitlines()[-1]
    )
    assert (
        cudlab.cli.run_main(
            ["train", "name=alone", "data=moons", "steps=30", "batch=32", "method=cud"]
        )
        == 0
    )
    assert (lab / "runs" / "alone" / "ema.safetensors").read_bytes() == (
        lab / "runs" / "c" / "ema.safetensors"
    ).read_bytes()
    assert {r.state for r in sweep_status(load_sweep(str(lab / "grid.json")))} == {"done"} and len(
        list(run_sweep(load_sweep(str(lab / "grid.json"))))
    ) == 1


def test_here_goes_on_in_legs_and_stops_at_a_signal(lab):
    file, steps = (
        grid(
            lab,
            {
                "train": {"data": "moons", "steps": 300_000, "batch": 32},
                "jobs": [{"name": "long", "method": "rf"}],
            },
        ),
        [],
    )
    for way in ("minutes=0.1", ""):
        process = start(file, "here", *[way] * bool(way))
        if not way:
            wait_for(
                lambda: (
                    (lab / "runs" / "long" / "progress.json").is_file()
                    and "running" in str(sweep_status(load_sweep(file))[0])
                ),
                process,
            )
            process.terminate()
        code, out, err = finish(process)
        assert code == 3 and "the same command continues it" in out, (code, out, err)
        assert (
            Run(lab / "runs" / "long").verify() >= 4
            and sweep_status(load_sweep(file))[0].state == "stopped"
        )
        steps.append(Run(lab / "runs" / "long").step)
    assert 0 < steps[0] < steps[1]


def test_here_a_failure_spoils_only_its_students_and_only_takes_a_part(lab, capsys):
    content = ROW | {
        "jobs": [
            {"name": "a", "method": "rf"}
            | {k: v for k, v in WILD.items() if k in ("lr", "clip")}
            | {"name": "wild", "method": "cud", "args.w2": 1e38, "steps": 200},
            {"name": "pupil", "method": "reflow", "args.teacher": "wild", "args.pairs": 64},
            {"name": "c", "method": "cud"},
            {"name": "d", "method": "cud", "seed": 1},
        ]
    }
    file = grid(lab, content)
    assert sweep_main([file, "here", "only=pupil,c"]) == 1
    states = {r.job: (r.state, r.code) for r in sweep_status(load_sweep(file))}
    assert (
        states["wild"] == ("failed", 4)
        and states["pupil"][0] == "failed"
        and states["c"] == states["c.evaluate"] == ("done", 0)
        and states["d"][0] == "waiting"
    ), states
    for words, told in (
        (["only=pupl"], "did you mean 'pupil'"),
        (["here", "workers=2"], "workers = 2"),
        (["here", "scheduler=tcp://x:1"], "scheduler"),
        (["here", "cluster=slurm", "slurm.cores=1", "slurm.memory=1GB", "workers=1"], "cluster"),
        (["here", "minutes=-1"], "minutes = -1"),
    ):
        assert sweep_main([file, *words]) == 2
        assert told in capsys.readouterr().err, words


def test_minutes_stop_a_sweep_on_dask(lab):
    file = grid(
        lab,
        {
            "train": {"data": "moons", "steps": 300_000, "batch": 32},
            "jobs": [{"name": "long", "method": "rf"}],
        },
    )
    code, out, err = finish(start(file, "workers=1", "minutes=0.15"))
    assert code == 3 and sweep_status(load_sweep(file))[0].state in ("stopped", "waiting"), (
        out,
        err,
    )


def test_the_order_of_the_file_is_kept_where_it_can_be(lab):
    jobs = [
        {"name": "late", "method": "reflow", "args.teacher": "early", "args.pairs": 64},
        {"name": "z", "method": "cud"},
        {"name": "early", "method": "rf"},
        {"name": "a", "method": "rf", "seed": 3},
    ]
    tasks = load_sweep(
        grid(
            lab,
            ROW
            | {
                "jobs": jobs,
                "evaluate": [{"run": "z", "nfes": "2", "n": 64}, {"nfes": "1", "n": 64}],
            },
        )
    ).tasks
    assert list(tasks) == [
        "z",
        "z.evaluate",
        "z.evaluate-2",
        "early",
        "early.evaluate-2",
        "late",
        "late.evaluate-2",
        "a",
        "a.evaluate-2",
    ]


def test_the_plan_says_what_is_damaged(lab):
    shipped = Path(cudlab.run.find_run("digits-dode-euler5"))
    for name, file in (("blunt", "ema.safetensors"), ("torn", "config.json")):
        shutil.copytree(shipped, lab / "runs" / name)
        data = (lab / "runs" / name / file).read_bytes()
        (lab / "runs" / name / file).write_bytes(data[:-9])
    (lab / "bad.json").write_text(
        json.dumps({"evaluate": [{"run": "blunt torn", "solvers": "euler", "nfes": "4"}]})
    )
    table = sweep_status(load_sweep(str(lab / "bad.json")))
    assert [(r.job, r.state) for r in table] == [
        ("blunt.evaluate", "waiting"),
        ("torn.evaluate", "waiting"),
    ], table
    assert "ema.safetensors" in table[0].why and "config.json" in table[1].why, table
