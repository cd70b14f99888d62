"""tools/job.py: live output, a stop that waits for the save, one sentence for a failure."""

import os
import signal
import subprocess
import sys
import time

import nbformat
import pytest

pytest.importorskip("papermill")


@pytest.fixture
def job(tmp_path, root):
    "Start a two-cell notebook as a job."

    def start(code, *args):
        cells = [
            nbformat.v4.new_code_cell("n = 1", metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell(code),
        ]
        meta = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=meta), tmp_path / "job.ipynb")
        return subprocess.Popen(
            [sys.executable, root / "tools" / "job.py", "job.ipynb", *args],
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"CUDLAB_RUNS_PATH": str(tmp_path)},
        )

    return start


def notebook(tmp_path):
    return nbformat.read(next((tmp_path / ".jobs").glob("*.ipynb")), 4)


def test_a_stop_waits_for_the_save(job, tmp_path):
    "papermill alone gives a stopped kernel 2.5 seconds; a large checkpoint takes longer."
    process = job(
        "import time\ntry:\n    print('ready', flush=True)\n    time.sleep(100)\nexcept "
        "KeyboardInterrupt:\n"
        "    time.sleep(4)\n    open('saved', 'w').close()\n    print('saved')"
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "saved" in out and not err
    assert (tmp_path / "saved").exists()
    assert {o.output_type for o in notebook(tmp_path).cells[-1].outputs} == {"stream"}


@pytest.mark.parametrize(
    "error, status, lines",
    [
        ("ValueError", 2, ["n = 3 is out of range: at most 2"]),
        ("FileNotFoundError", 5, ["n = 3 is out of range: at most 2"]),
        ("KeyError", 1, ["KeyError: 'n = 3 is out of range: at most 2'", "The traceback is in "]),
    ],
)
def test_parameters_arrive_and_a_failure_is_a_sentence(job, tmp_path, error, status, lines):
    process = job(
        f"print('n is', n)\nraise {error}('n = 3 is out of range: at most 2')", "-p", "n", "3"
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == status and out == "n is 3\n"
    assert len(err.splitlines()) == len(lines) and all(
        a.startswith(b) for a, b in zip(err.splitlines(), lines)
    )
    assert notebook(tmp_path).cells[0].source


def test_wrong_usage_is_a_sentence(job):
    process = job("pass", "-p", "n")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "requires 2 arguments" in err and len(err.splitlines()) == 1


def test_a_stop_before_anything_began_leaves_nothing(job, tmp_path):
    process = job("print('ready')")
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and not err and "ready" not in out
    assert not (tmp_path / ".jobs").exists()


def test_a_kernel_that_dies_is_a_sentence(job):
    process = job(
        "import os, signal\nprint('ready', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 138 and err == "DeadKernelError: Kernel died\n"


def test_another_notebook_is_not_checked_and_a_missing_one_is_a_sentence(job, tmp_path):
    process = job("print(n, extra)", "-p", "extra", "5")
    assert process.communicate(timeout=60) == ("1 5\n", "") and process.returncode == 0
    (tmp_path / "job.ipynb").unlink()
    process = subprocess.run(process.args, cwd=tmp_path, text=True, capture_output=True)
    assert (
        process.returncode == 2
        and "job.ipynb" in process.stderr
        and process.stderr.count("\n") == 1
    )
