"""Training jobs as real processes: resume bit for bit, real signals, bad parameters, papermill."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cudlab.checkpoint import is_locked, load_optimizer, read_file
from cudlab.run import Run

ROOT = Path(__file__).parent.parent


@pytest.fixture
def lab(tmp_path):
    "Environment of a job whose runs go to a temporary folder."
    return os.environ | {
        "CUDLAB_RUNS_PATH": str(tmp_path / "runs"),
        "CUDLAB_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "CUDLAB_DEVICE": "cpu",
    }


def start(lab, *words):
    command = [sys.executable, "-m", "cudlab.cli", "train", *words]
    return subprocess.Popen(
        command, cwd=ROOT, env=lab, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def job(lab, *words):
    process = start(lab, *words)
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def runs_path(lab) -> Path:
    return Path(lab["CUDLAB_RUNS_PATH"])


def content(folder: Path) -> dict:
    "Hashes of weights, average, log and every tensor of the optimiser."
    sums = {
        n: hashlib.sha256((folder / n).read_bytes()).hexdigest()
        for n in ("net.safetensors", "ema.safetensors", "metrics.jsonl")
    }
    state = load_optimizer(read_file(folder, "train_state.safetensors"))["state"]
    for player, optim in state["optim"].items():
        for i, slots in optim["state"].items():
            for key, value in slots.items():
                sums[f"{player}.{i}.{key}"] = hashlib.sha256(value.numpy().tobytes()).hexdigest()
    return sums | {k: state[k] for k in ("step", "skipped", "streak")}


def until_step(process, least: int) -> None:
    "Read the job's lines until it has passed a step."
    for line in process.stdout:
        if line.startswith("step") and int(line.split()[1].split("/")[0]) >= least:
            return
    raise AssertionError(process.stderr.read())


MANY = ("steps=100000", "batch=32", "log_every=5", "save_every=20")


@pytest.mark.parametrize(
    "method",
    [
        ("method=rf",),
        ("method=cud", "args.heads=2"),
        ("method=cud", "args.coupling=true", "dropout=0.1"),
        ("method=cud", "classes=true", "args.target=ema"),
    ],
    ids=["rf", "heads", "coupling", "classes"],
)
def test_three_interruptions_change_nothing(lab, method):
    words = (*method, "steps=60", "batch=16", "log_every=10", "save_every=7")
    assert job(lab, *words, "name=whole")[0] == 0
    for stop, code in ((20, 3), (33, 3), (40, 3), (0, 0)):
        assert job(lab, *words, "name=legs", f"until={stop}")[0] == code
    assert content(runs_path(lab) / "whole") == content(runs_path(lab) / "legs")


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_resumable(lab, sign):
    process = start(lab, *MANY, "name=signalled")
    until_step(process, 10)
    process.send_signal(sign)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    status = json.loads((runs_path(lab) / "signalled" / "status.json").read_text())
    assert (
        status["status"] == "stopped"
        and status["code"] == 3
        and status["pid"] == process.pid
        and sign.name in status["why"]
    )
    run = Run.open(runs_path(lab) / "signalled")
    assert run.step >= 10 and run.verify() == 5 and f"step {run.step} of" in out
    assert job(lab, *MANY, "name=signalled", f"until={run.step + 3}")[0] == 3
    assert Run.open(runs_path(lab) / "signalled").step == run.step + 3


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_is_heard_while_the_pairs_are_made(lab, processes):
    process = start(
        lab,
        "method=reflow",
        "args.pairs=50000000",
        "steps=100",
        "batch=16",
        f"processes={processes}",
        "name=early",
    )
    assert any(" of 50,000,000 pairs" in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (
        process.returncode == 3
        and "stopped by " in out
        and "before step 1 of 100; the same command continues it" in out
    ), (out, err)
    run = Run.open(runs_path(lab) / "early")
    assert (
        run.step == 0
        and run.verify()
        and json.loads((run.dir / "status.json").read_text())["status"] == "stopped"
    )


def test_a_stop_file_and_the_time_limit_end_a_job(lab):
    process = start(lab, *MANY, "name=stopped")
    until_step(process, 5)
    (runs_path(lab) / "stopped" / "STOP").touch()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 3 and "STOP file" in out
    code, out, _ = job(lab, *MANY, "name=stopped", "minutes=0.05")
    assert code == 3 and "time limit" in out


def test_a_second_job_on_the_same_folder_refuses(lab):
    process = start(lab, *MANY, "name=shared")
    until_step(process, 5)
    code, _, err = job(lab, *MANY, "name=shared")
    process.terminate()
    process.wait()
    assert code == 2 and "another process" in err
    assert (
        json.loads((runs_path(lab) / "shared" / "status.json").read_text())["code"] == 3
    )  # the first one's ending, not the second's


def test_divergence_keeps_the_last_good_state(lab):
    code, _, err = job(
        lab,
        "data=moons",
        "steps=200",
        "lr=1",
        "clip=0",
        "args.w2=1e38",
        "batch=32",
        "save_every=1",
        "name=wild",
    )
    assert code == 4 and "not finite" in err
    status = json.loads((runs_path(lab) / "wild" / "status.json").read_text())
    assert status["status"] == "diverged" and status["code"] == 4 and "not finite" in status["why"]
    assert all(
        torch.isfinite(p).all() for p in Run.open(runs_path(lab) / "wild").net("raw").parameters()
    )


BAD = [
    ("metod=rf", "metod"),
    ("method=cdu", "cdu"),
    ("steps=ten", "steps"),
    ("steps=0", "steps"),
    ("lr=nan", "lr"),
    ("lr=-1", "lr"),
    ("batch=1e9", "batch"),
    ("schedule=linear", "schedule"),
    ("dtype=float16", "float16"),
    ("args.aim=-1", "aim"),
    ("args.heads=two", "heads"),
    ("args.haeds=2", "haeds"),
    ("data=imagenet", "imagenet"),
    ("data=folder:/nowhere", "/nowhere"),
    ("net=vit", "vit"),
    ("path=vp", "path"),
    ("seed=-1", "seed"),
    ("name=../up", "../up"),
    ("device=gpu", "gpu"),
    ("minutes=-3", "minutes"),
    ("classes=maybe", "classes"),
    ("steps", "steps"),
]


@pytest.mark.parametrize("word,names", BAD, ids=[w for w, _ in BAD])
def test_bad_parameters_are_refused_in_a_sentence(lab, capsys, monkeypatch, word, names):
    from cudlab.cli import run_main

    for key in ("CUDLAB_RUNS_PATH", "CUDLAB_DEVICE"):
        monkeypatch.setenv(key, lab[key])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run_main(["train", "steps=3", word]) == (5 if "/nowhere" in word else 2)
    said = capsys.readouterr().err
    assert (
        said.startswith("error: ")
        and names in said
        and said.count("\n") == 1
        and "Traceback" not in said
    )
    assert not runs_path(lab).exists() or not list(runs_path(lab).iterdir())


def papermill(lab, out, *params):
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(ROOT / "nbs/train.ipynb"),
        str(out),
        "--no-progress-bar",
        "--log-output",
    ]
    for key, value in params:
        command += ["-p", key, str(value)]
    return subprocess.Popen(
        command, env=lab, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    "method,args",
    [
        ("rf", ""),
        ("cud", "aim=8 heads=2"),
        ("boot", "teacher=digits-rf"),
        ("gdd", "width=8"),
        ("meanflow", ""),
    ],
)
def test_papermill_makes_a_run(lab, tmp_path, method, args):
    process = papermill(
        lab,
        tmp_path / "out.ipynb",
        ("method", method),
        ("args", args),
        ("steps", 20),
        ("log_every", 5),
        ("name", "pm"),
    )
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-2000:]
    run = Run.open(runs_path(lab) / "pm")
    assert run.step == 20 and run.config.method == method and len(run.metrics) == 4
    first = run.solve(seed=1, index=4).x
    assert torch.equal(first, Run.open(runs_path(lab) / "pm").solve(seed=1, index=4).x)
    kept = json.loads((run.dir / "train.ipynb").read_text())
    assert any(
        "step     20/20" in "".join(o.get("text", []))
        for c in kept["cells"]
        for o in c.get("outputs", [])
    )


@pytest.mark.parametrize("key,value", [("stpes", 100), ("steps", "many"), ("args", "haeds=2")])
def test_papermill_refuses_bad_parameters_before_training(lab, tmp_path, key, value):
    process = papermill(lab, tmp_path / "out.ipynb", (key, value))
    _, err = process.communicate(timeout=100)
    assert (
        process.returncode != 0
        and "ValueError" in err
        and str(key if key != "args" else "haeds") in err
    )
    assert not runs_path(lab).exists()


def ended(sign, lab, out, *params):
    """The run `pm` and its status, once papermill got `sign` after the first row of its log and the
    kernel, which outlives it, has come to an end.
    """
    folder = runs_path(lab) / "pm"
    process = papermill(lab, out, *params, ("name", "pm"))
    deadline = time.time() + 100
    while time.time() < deadline and not (
        (folder / "metrics.jsonl").is_file() and (folder / "metrics.jsonl").stat().st_size
    ):
        time.sleep(0.1)
    process.send_signal(sign)
    process.communicate(timeout=60)
    while time.time() < deadline and is_locked(folder / ".lock"):
        time.sleep(0.1)
    return Run.open(folder), json.loads((folder / "status.json").read_text())["status"]


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_papermill_leaves_a_resumable_run(lab, tmp_path, sign):
    run, status = ended(
        sign,
        lab,
        tmp_path / "out.ipynb",
        ("steps", 100000),
        ("batch", 16),
        ("log_every", 5),
        ("save_every", 10_000),
    )
    assert status == "stopped" and run.step >= 5 and run.verify() == 5


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_a_kernel_saves_the_run_when_papermill_ends_in_a_long_step(
    lab, tmp_path, sign
):  # longer than the second after which a kernel looks for its parent
    run, status = ended(
        sign,
        lab,
        tmp_path / "out.ipynb",
        ("steps", 100),
        ("batch", 512),
        ("log_every", 1),
        ("save_every", 100),
    )
    assert status == "stopped" and run.step >= 1 and run.verify() == 5
