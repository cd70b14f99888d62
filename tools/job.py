"""Run one of the lab's notebooks through papermill, with what papermill lacks: parameters checked
before a kernel starts, live output, a stop that saves first, and an exit code.

    python tools/job.py nbs/train.ipynb -p method cud -p steps 500

Arguments after the notebook are papermill's. Ctrl-C or SIGTERM interrupts the running cell, which
saves its run; a second one kills the job. The executed notebook goes to runs/.jobs/ and, of a
training, into the run's folder. Exit codes are those of `cudlab train`; 130 = stopped before
anything was there to save, 138 = the kernel died.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parents[1] / "nbs"


def read_request(notebook: str, args: tuple) -> dict:
    "What papermill makes of a command line: the arguments of its `execute_notebook`."
    import click
    from papermill import cli

    found = {}
    cli.execute_notebook = lambda **given: found.update(given)
    quiet = ["-k", "python3", "--log-level", "CRITICAL", "--no-progress-bar"]
    try:
        words = [notebook, "executed.ipynb", *quiet, *args]
        context = cli.papermill.make_context("papermill", words)
        with context.scope(cleanup=False):
            cli.papermill.invoke(context)
    except click.exceptions.Exit:  # --help
        sys.exit(0)
    except click.ClickException as e:
        raise ValueError(e.format_message()) from None
    except Exception as e:  # YAML, base64, a file of parameters
        raise ValueError(f"the parameters cannot be read: {' '.join(str(e).split())}") from None
    return found


def default_parameters(book: Path) -> dict:
    "The values in the parameter cell of a notebook."
    from cudlab.jobs import notebook_parameters

    space = {}
    for cell in json.loads(book.read_text())["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            exec("".join(cell["source"]), space)
    return notebook_parameters(space)


def check_parameters(notebook: str, params: dict) -> Path | None:
    "Raise what one of the lab's jobs would raise; the folder of the run that it will train."
    book = Path(notebook).resolve()
    if book == NOTEBOOKS / "train.ipynb":
        from cudlab.create import check_config, resolve_run_dir
        from cudlab.jobs import parse_parameters

        config, options = parse_parameters(default_parameters(book) | params)
        check_config(config)
        return resolve_run_dir(config, options.name)
    if book == NOTEBOOKS / "evaluate.ipynb":
        from cudlab.evaluate import parse_evaluation
        from cudlab.features import get_features

        job = parse_evaluation(default_parameters(book) | params)
        if job.extractor:
            get_features(job.extractor)
        for run in job.targets():
            job.points(run)
    return None


def watched_engine(clients: list):
    "papermill's engine, which shows its client."
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import Engine

    class Watched(Engine):
        @classmethod
        def execute_managed_notebook(
            cls, book, kernel_name, start_timeout=60, execution_timeout=None, **given
        ):
            given.pop("input_path", None)
            limits = {"startup_timeout": start_timeout, "timeout": execution_timeout}
            client = PapermillNotebookClient(book, kernel_name=kernel_name, **limits, **given)
            clients.append(client)
            client.execute(stderr=subprocess.DEVNULL)  # a kernel's own words

    return Watched


def execute(request: dict, out: Path) -> tuple:
    "Execute the notebook in a thread while this one hears signals: (error or None, stopped)."
    from papermill.engines import papermill_engines
    from papermill.execute import execute_notebook

    stops, clients, errors = [], [], []

    def stop(number, frame):
        stops.append(number)
        kernel = clients[0].km.provisioner.pid if clients and clients[0].km else None
        if len(stops) == 1 and kernel:
            print("\nstopping: the run is saved first (once more to stop at once)", flush=True)
            os.kill(kernel, signal.SIGINT)
        else:
            if kernel:
                os.killpg(kernel, signal.SIGKILL)
            os._exit(130)

    def work():
        try:
            execute_notebook(
                **request
                | {"output_path": str(out), "engine_name": "job"}
                | {"stdout_file": sys.stdout, "stderr_file": sys.stderr}
            )
        except BaseException as e:
            errors.append(e)

    papermill_engines.register("job", watched_engine(clients))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    # nbclient would take the signals of the main thread, and give a kernel 2.5 seconds
    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    return errors[0] if errors else None, bool(stops)


def report(error: BaseException | None, stopped: bool, out: Path) -> int:
    "Say how a job ended; its exit code."
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    from cudlab.jobs import EXIT_CODES

    if isinstance(error, DeadKernelError):
        print(f"DeadKernelError: {error}", file=sys.stderr)
        return 138
    if isinstance(error, PapermillExecutionError):
        kind = getattr(__builtins__, error.ename, None)
        broken = isinstance(kind, type) and issubclass(kind, OSError)
        code = 5 if broken else EXIT_CODES.get(error.ename, 1)
        if error.ename == "KeyboardInterrupt":
            return 130
        if code > 1:
            print(error.evalue, file=sys.stdout if code == 3 else sys.stderr)
            return code
        print(f"{error.ename}: {error.evalue}\nThe traceback is in {out}", file=sys.stderr)
    elif error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    if stopped:
        return 130
    return 1 if error else 0


def main(notebook: str, *args: str) -> int:
    "Run the job; its exit code."
    if not Path(notebook).is_file():
        print(f"there is no notebook {notebook!r}", file=sys.stderr)
        return 2
    from cudlab.config import get_settings
    from cudlab.disk import links_in
    from cudlab.jobs import error_message, get_exit_code

    try:
        request = read_request(notebook, args)
        run_dir = check_parameters(notebook, dict(request["parameters"]))
        jobs = get_settings().runs_path / ".jobs"
    except (ValueError, OSError) as e:
        print(error_message(e), file=sys.stderr)
        return get_exit_code(e)
    jobs.mkdir(parents=True, exist_ok=True)
    name = f"{Path(notebook).stem}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.ipynb"
    error, stopped = execute(request, jobs / name)
    if run_dir and run_dir.is_dir() and not links_in(run_dir) and (jobs / name).is_file():
        shutil.copyfile(jobs / name, run_dir / "train.ipynb")
    return report(error, stopped, jobs / name)


if __name__ == "__main__":
    from cudlab.disk import plain_streams

    with plain_streams():
        sys.exit(main(*sys.argv[1:]) if len(sys.argv) > 1 else __doc__)
