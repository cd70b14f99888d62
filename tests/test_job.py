"""tools/job.py: parameters checked before a kernel starts, a stop that saves, an exit code."""

import ast
import importlib.util
import json
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import nbformat
import pytest

from cudlab.config import Config
from cudlab.evaluate import EvaluationOptions, parse_evaluation
from cudlab.jobs import TrainOptions, parse_parameters, read_status
from cudlab.run import Run

papermill = pytest.importorskip("papermill")
ROOT = Path(__file__).parents[1]
TRAIN, EVALUATE = (str(ROOT / "nbs" / f"{name}.ipynb") for name in ("train", "evaluate"))
spec = importlib.util.spec_from_file_location("job", ROOT / "tools" / "job.py")
job = importlib.util.module_from_spec(spec)
spec.loader.exec_module(job)


@pytest.fixture(autouse=True)
def lab(tmp_path, monkeypatch):
    "Runs go to a folder of the test's own."
    for key, value in {"RUNS_PATH": tmp_path / "runs", "THREADS": 1, "DEVICE": "cpu"}.items():
        monkeypatch.setenv(f"CUDLAB_{key}", str(value))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


@pytest.fixture
def front(monkeypatch):
    "tools/job.py in this process, up to the kernel: what would be executed."
    asked = []
    monkeypatch.setattr(job, "execute", lambda request, out: asked.append(request) or (None, False))
    monkeypatch.setattr(job, "report", lambda error, stopped, out: 0)
    return lambda *words: (job.main(*words), asked)


@pytest.mark.parametrize(
    "notebook, key, value, code",
    [
        (TRAIN, "stpes", "100", 2),
        (TRAIN, "In", "5", 2),
        (TRAIN, "open", "1", 2),
        (TRAIN, "", "5", 2),
        (TRAIN, "steps", "ten", 2),
        (TRAIN, "args", '{"aim": 8', 2),
        (TRAIN, "args", "teacher=../../etc", 2),
        (TRAIN, "net", "mnsit", 2),
        (TRAIN, "data", "folder:/dev", 2),
        (TRAIN, "name", '"; import os; "', 2),
        (EVALUATE, "nfe", "3", 2),
        (EVALUATE, "run", "nope", 2),
        (EVALUATE, "solvers", "eulr", 2),
        (EVALUATE, "extractor", "digits-v3", 2),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_before_a_kernel_starts(
    front, lab, capsys, notebook, key, value, code
):
    ended, asked = front(notebook, "-p", key, value)
    said = capsys.readouterr().err
    assert ended in (code, 5) and not asked and said.count("\n") == 1, said
    assert not lab.exists()


@pytest.mark.parametrize(
    "args, name",
    [
        (("-y", "steps: many"), "steps"),
        (("-y", "{steps: !!python/object/apply:os.system ['true']}"), "parameters"),
        (("-y", "- steps"), "parameters"),
        (("-y", "1: 2"), "'1'"),
        (("-y", "steps: 2026-01-01"), "steps"),
        (("-r", "batch", "1e9"), "batch"),
        (("-b", "c3RwZXM6IDU="), "stpes"),
        (("-f", "/nowhere/p.yaml"), "/nowhere"),
        (("-p", "steps"), "-p"),
        (("--stpes", "5"), "--stpes"),
        (("-p", "steps", "5", "-y", "stpes: 5"), "stpes"),
    ],
    ids=str,
)
def test_every_way_to_pass_a_parameter_is_checked(front, capsys, args, name):
    ended, asked = front(TRAIN, *args)
    said = capsys.readouterr().err
    assert ended == 2 and not asked and said.count("\n") == 1 and name in said, said


@pytest.mark.parametrize(
    "notebook, classes", [(TRAIN, (Config, TrainOptions)), (EVALUATE, (EvaluationOptions,))]
)
def test_papermill_lists_every_parameter_with_its_default_and_a_word_on_it(notebook, classes):
    listed = papermill.inspect_notebook(notebook)
    known = {f.name: getattr(cls(), f.name) for cls in classes for f in fields(cls)}
    known |= {"args": ""} if "args" in known else {}
    assert list(listed) == list(known)
    for name, entry in listed.items():
        assert ast.literal_eval(entry["default"]) == known[name], name
        assert entry["help"] and entry["inferred_type_name"] == type(known[name]).__name__, name


def test_texts_of_yaml_become_the_numbers_and_truth_values_they_mean(front):
    yaml = "{lr: 1e-3, steps: '2', classes: 'off', args: {aim: '8', w2: 1e-3, coupling: 'yes'}}"
    for words, want in (
        (("-y", yaml), {"lr": 1e-3, "steps": 2, "classes": False}),
        (("-r", "steps", "2", "-r", "lr", "1e-3", "-r", "classes", "no"), {"steps": 2, "lr": 1e-3}),
        (("-p", "name", "2026"), {}),
    ):
        ended, asked = front(TRAIN, *words)
        config, options = parse_parameters(asked[-1]["parameters"])
        assert ended == 0 and {key: getattr(config, key) for key in want} == want
    assert options.name == "2026"
    args = parse_parameters({"method": "cud", "args": {"aim": "8", "w2": "1e-3", "heads": "2"}})
    assert args[0].args == {"aim": 8, "w2": 1e-3, "heads": 2}
    row = parse_parameters({"method": "cud", "args": "aim=8 w2=1e-3 coupling=yes"})[0].args
    assert row == {"aim": 8, "w2": 1e-3, "coupling": True}
    assert parse_parameters({"method": "boot", "args": "teacher=007"})[0].args == {"teacher": "007"}
    job = parse_evaluation({"n": "2e3", "denoise": "no", "guidance": "1e0", "nfes": 4, "run": ""})
    assert (job.n, job.denoise, job.guidance, job.nfes) == (2000, False, 1.0, "4")


def test_what_papermill_would_run_is_let_through(front, tmp_path):
    "Numbers as text, YAML's 1e-3, a file; the notebook's own parameter cell counts."
    (tmp_path / "p.yaml").write_text("steps: 5\nargs: aim=8 heads=2")
    for count, args in enumerate(
        (
            ("-p", "steps", "5"),
            ("-r", "steps", "5"),
            ("-y", "{lr: 1e-3, classes: true}"),
            ("-f", str(tmp_path / "p.yaml")),
            ("-r", "name", "2026"),
            ("-p", "method", "boot", "-p", "args", "teacher=digits-rf"),
            ("-p", "data", "moons", "-p", "net", "mlp"),
            (),
        ),
        1,
    ):
        ended, asked = front(TRAIN, *args)
        assert ended == 0 and len(asked) == count, args


def start(*words: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "tools" / "job.py"), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def flags(**params) -> list:
    return [word for key, value in params.items() for word in ("-p", key, str(value))]


def test_a_training_through_papermill_is_a_run(lab):
    words = flags(
        method="cud", args="aim=8", data="moons", steps=8, batch=16, log_every=4, name="pm"
    )
    process = start(TRAIN, *words)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0 and not err, err
    run = Run.open("pm")
    assert run.step == 8 and len(run.metrics) == 2 and "step      8/8" in out
    cells = nbformat.read(run.dir / "train.ipynb", 4).cells
    assert any("step      8/8" in json.dumps(cell.get("outputs", [])) for cell in cells)


def test_a_stopped_job_saves_and_the_same_command_goes_on(lab):
    words = flags(data="moons", steps=10**6, batch=16, log_every=5, name="leg")
    for sign in (signal.SIGTERM, signal.SIGINT):
        process = start(TRAIN, *words)
        next(line for line in process.stdout if line.startswith("step") and "/1000000" in line)
        process.send_signal(sign)
        out, err = process.communicate(timeout=100)
        run = Run.open("leg")
        assert process.returncode == 3 and not err and f"at step {run.step} of" in out, err
        assert run.verify() and read_status(run.dir).status == "stopped"


def write_notebook(path: Path, code: str) -> str:
    "A notebook of one parameter and one cell."
    cells = [
        nbformat.v4.new_code_cell("n = 1", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(code),
    ]
    meta = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=meta), path)
    return str(path)


@pytest.mark.parametrize(
    "code, status, says",
    [
        ("print('n is', n)\nraise ValueError('n = 3 is too large')", 2, "n = 3 is too large\n"),
        ("raise FileNotFoundError('no file')", 5, "no file\n"),
        ("raise KeyError('n')", 1, "KeyError: 'n'\nThe traceback is in "),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", 138, "DeadKernelError: "),
    ],
    ids=["value", "file", "bug", "dead"],
)
def test_a_notebook_that_fails_is_a_line_and_a_code(tmp_path, code, status, says):
    process = start(write_notebook(tmp_path / "job.ipynb", code), "-p", "n", "3")
    out, err = process.communicate(timeout=100)
    assert process.returncode == status and err.startswith(says), err
    assert err.count("\n") == says.count("\n") or status in (1, 138)
    assert status != 2 or out == "n is 3\n"


def test_a_missing_notebook_is_a_line(capsys):
    assert job.main("nowhere.ipynb") == 2
    assert capsys.readouterr().err == "there is no notebook 'nowhere.ipynb'\n"


def test_an_evaluation_stops_between_two_scores_and_goes_on(lab):
    process = start(TRAIN, *flags(method="rf", data="moons", steps=20, batch=64, name="little"))
    assert process.wait(200) == 0
    words = flags(run="little", solvers="euler heun", nfes="2 4", n=500)
    process = start(EVALUATE, *words)
    next(line for line in process.stdout if " NFE " in line)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    kept = Run.open("little").scores
    assert process.returncode in (0, 3) and 1 <= len(kept) <= 4
    process = start(EVALUATE, *words)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0 and out.count("measured before") == len(kept), err
    assert Run.open("little").scores[: len(kept)] == kept and len(Run.open("little").scores) == 4
