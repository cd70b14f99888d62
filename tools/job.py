"""Run a notebook as a papermill job, with what papermill leaves open: parameters checked first,
live output, and a stop that loses nothing.

    python tools/job.py nbs/train.ipynb -p method cud -p steps 500

Arguments after the notebook go to papermill. What the lab's own jobs would refuse is refused here,
before a kernel starts. Ctrl-C, SIGTERM or a closed terminal
interrupts the running cell, which saves its run and ends; a second one, a second later, kills the
job. The executed notebook goes to runs/.jobs/, and from there
into the run's folder if the notebook displayed `{"run": folder}` as
application/vnd.cudlab.result+json. Exit status as of `cudlab train`: 0 done, 2 wrong
parameters, 3 stopped and resumable, 4 diverged, 5 data or a checkpoint that cannot be read; else 1,
130 for a stop that saved nothing, 138 for a kernel that died.
"""

import builtins
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

RESULT = "application/vnd.cudlab.result+json"
NOISE = "[IPKernelApp]"
NOTEBOOKS = Path(__file__).resolve().parents[1] / "nbs"


class Lasting(io.FileIO):
    """An output that drops what cannot be written: the job outlives its terminal, its reader and a
    full disk.
    """

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def lasting(fd: int) -> io.TextIOWrapper:
    "Text on a file descriptor, whatever becomes of it."
    return io.TextIOWrapper(
        io.BufferedWriter(Lasting(fd, "w", closefd=False)),
        encoding="utf-8",
        errors="backslashreplace",
        line_buffering=True,
    )


def code_of(error: str) -> int:
    "The exit status for an error that ended a notebook, by the name of its class."
    known = {
        "ValueError": 2,
        "TrainingStopped": 3,
        "ProcessLost": 3,
        "Diverged": 4,
        "CorruptData": 5,
    }
    found = getattr(builtins, error, None)
    return known.get(error) or (5 if isinstance(found, type) and issubclass(found, OSError) else 1)


def refuse(notebook: str, params: dict) -> None:
    """Raise what one of the lab's jobs would raise for these parameters before it computes
    anything; other notebooks check for themselves.
    """
    book, space = Path(notebook).resolve(), {}
    if book not in (NOTEBOOKS / "train.ipynb", NOTEBOOKS / "evaluate.ipynb"):
        return
    from cudlab import data, evaluate, features, methods, net, training
    from cudlab.config import lookup

    try:
        for cell in json.loads(book.read_text())["cells"]:
            if "parameters" in cell["metadata"].get("tags", []):
                exec("".join(cell["source"]), space)
    except Exception:
        return  # somebody is writing it: the kernel says where it fails
    params = training.notebook_parameters(space) | params
    if book.name == "train.ipynb":
        config, job = training.parse_parameters(params)
        training.resolve_run_dir(config, job.name)
        training.open_teacher(methods.make_method(config), config)
        if config.net != "auto":
            lookup("network", config.net, net.NETS)
        if config.data not in data.DATA:
            data.load_data(config.data)
    else:
        job = evaluate.parse_evaluation(params)
        if job.extractor and ":" not in job.extractor:
            lookup("feature extractor", job.extractor, features.FEATURES)
        for target in job.targets():
            job.points(target)


def verdict() -> None:
    """A process of its own, so that torch loads beside papermill and is gone when the job runs: the
    request comes on stdin, the answer goes to stdout.
    """
    from cudlab.config import CorruptData, get_settings

    request = sys.stdin.read()
    if not request:
        return  # papermill did not understand the command line
    folder, code, why, request = "", 0, "", json.loads(request)
    try:
        folder = str(get_settings().runs_path / ".jobs")
        with contextlib.chdir(request["cwd"] or "."):
            refuse(request["notebook"], request["params"])
    except (ValueError, OSError) as e:
        code, why = 5 if isinstance(e, (CorruptData, OSError)) else 2, str(e)
    print(json.dumps([folder, code, why]))


def asked(notebook: str, args: tuple) -> dict:
    """What papermill makes of a command line: the arguments of its `execute_notebook`; a
    `ValueError` if it can make nothing of it.
    """
    sys.modules.setdefault(
        "rfc3987_syntax",
        None,
        # jsonschema does without this check of internationalised addresses, whose import takes a
        # second
    )
    import click
    from papermill import cli

    found = {}
    cli.execute_notebook = lambda **given: found.update(given)
    try:
        context = cli.papermill.make_context(
            "papermill",
            [
                notebook,
                "executed.ipynb",
                "-k",
                "python3",
                "--log-level",
                "CRITICAL",
                "--no-progress-bar",
                *args,
            ],
        )
        with context.scope(cleanup=False):
            cli.papermill.invoke(context)
    except click.exceptions.Exit:  # --help
        pass
    except click.ClickException as e:
        raise ValueError(e.format_message()) from None
    except Exception as e:  # YAML, base64, a file of parameters
        raise ValueError(f"the parameters cannot be read: {' '.join(str(e).split())}") from None
    return found


def engine(stops: list, clients: list, words):
    """papermill's engine, which shows its client, keeps the kernel's own words apart and starts no
    cell after a stop.
    """
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import Engine

    class Client(PapermillNotebookClient):
        def execute(self):
            return super().execute(stdout=words, stderr=words)

        def execute_cell(self, cell, index):
            clients[:] = [self]
            if stops:
                raise KeyboardInterrupt
            return super().execute_cell(cell, index)

    class Watched(Engine):
        @classmethod
        def execute_managed_notebook(
            cls,
            book,
            kernel_name,
            start_timeout=60,
            execution_timeout=None,
            input_path=None,
            **given,
        ):
            Client(
                book,
                kernel_name=kernel_name,
                startup_timeout=start_timeout,
                timeout=execution_timeout,
                **given,
            ).execute()

    return Watched


def main(notebook: str, *args: str) -> int:
    "Run the job and return its exit status."
    if not Path(notebook).is_file():
        print(f"there is no notebook {notebook!r}", file=sys.stderr)
        return 2
    checker = subprocess.Popen(
        [sys.executable, __file__, "--check"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    stops, clients, failed = [], [], []

    def stop(number, frame):
        stops.append(time.monotonic())
        kernel = clients[0].km.provisioner.pid if clients else None
        if len(stops) == 1:
            if kernel:
                os.kill(kernel, signal.SIGINT)
            checker.kill()
            print(
                f"\nstopping{': the run is saved first' if kernel else ''} (once more to "
                "stop at once)",
                flush=True,
            )
        elif (
            number != signal.SIGHUP and stops[-1] - stops[0] > 1
        ):  # a closing terminal and `timeout` signal twice at once
            if kernel:
                os.killpg(kernel, signal.SIGKILL)
            os._exit(130)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if (
            number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        ):  # ignored under nohup
            signal.signal(number, stop)
    try:
        wanted = asked(notebook, args)
    except ValueError as e:
        print(e, file=sys.stderr)
        checker.kill()
        return 2
    if not wanted:
        checker.kill()
        return 0
    params = {str(key): value for key, value in wanted["parameters"].items()}
    answer, _ = checker.communicate(
        json.dumps({"notebook": notebook, "cwd": wanted["cwd"], "params": params}, default=str)
    )
    if checker.returncode or stops:
        return 130 if stops else 1
    folder, code, why = json.loads(answer)
    if code:
        print(why, file=sys.stderr)
        return code

    from nbclient.exceptions import DeadKernelError
    from papermill.engines import papermill_engines
    from papermill.exceptions import PapermillExecutionError
    from papermill.execute import execute_notebook

    out = (
        Path(folder) / f"{Path(notebook).stem}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.ipynb"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    words = tempfile.TemporaryFile()
    papermill_engines.register("job", engine(stops, clients, words))

    def work():
        try:
            execute_notebook(
                **wanted
                | {
                    "output_path": str(out),
                    "engine_name": wanted["engine_name"] or "job",
                    "stdout_file": wanted["stdout_file"] or sys.stdout,
                    "stderr_file": wanted["stderr_file"] or sys.stderr,
                }
            )
        except BaseException as e:
            failed.append(e)

    worker = threading.Thread(
        target=work
    )  # nbclient takes the signals of the main thread for itself, and gives a kernel 2.5 seconds
    worker.start()
    worker.join()
    if stops:
        signal.signal(
            signal.SIGTERM, signal.SIG_IGN
        )  # the second one of `timeout` may come on the way out
    run = result(out)
    status = (
        subprocess.run([sys.executable, "-m", "cudlab.cli", "adopt", run, str(out)]).returncode
        if run
        else 0
    )
    error = failed[0] if failed else None
    if isinstance(error, PapermillExecutionError) and (code := code_of(error.ename)) > 1:
        print(error.evalue, file=sys.stdout if code == 3 else sys.stderr)
        return code
    if stops:
        return 130
    if isinstance(error, PapermillExecutionError):
        print(f"{error.ename}: {error.evalue}\nThe traceback is in {out}", file=sys.stderr)
    elif error:
        words.seek(0)
        said = [
            line
            for line in words.read().decode(errors="replace").splitlines()
            if line.strip() and not line.startswith(NOISE)
        ]
        print(said[-1] if said else f"{type(error).__name__}: {error}", file=sys.stderr)
    return 138 if isinstance(error, DeadKernelError) else 1 if error else status


def result(out: Path) -> str:
    "The run folder that an executed notebook displayed, or ''."
    try:
        cells = json.loads(out.read_text())["cells"]
        found = [
            output["data"][RESULT]["run"]
            for cell in cells
            for output in cell.get("outputs", [])
            if RESULT in output.get("data", {})
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return found[-1] if found else ""


if __name__ == "__main__":
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # a job without a terminal
    if sys.argv[1:] == ["--check"]:
        sys.exit(verdict())
    sys.stdout, sys.stderr = lasting(1), lasting(2)
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) > 1 else __doc__)
