"""Run a notebook as a papermill job, with what papermill leaves open: live output without its log, and a stop that loses nothing.

    python tools/job.py nbs/train.ipynb -p method cud -p steps 500

Arguments after the notebook go to papermill. Ctrl-C, SIGTERM or a closed terminal interrupts the running cell, which saves its run and ends; a second
one kills the job. The executed notebook goes to runs/.jobs/, and from there into the run's folder if the notebook displayed
`{"run": folder}` as application/vnd.cudlab.result+json. Exit status as of `cudlab train`: 0 done, 2 wrong parameter, 3 stopped and resumable, 4 diverged;
else papermill's, or 130 for a stop that saved nothing.
"""
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import psutil

from cudlab.core import settings

RESULT = "application/vnd.cudlab.result+json"
STATUS = {"ValueError": 2, "Stopped": 3, "Diverged": 4}
NOISE = re.compile(r"^\[IPKernelApp\]")


def kernel(job: int) -> int | None:
    "The process of papermill's kernel, or None before it is up and after it ended."
    try:
        return next((p.pid for p in psutil.Process(job).children() if any("ipykernel" in a for a in p.cmdline())), None)
    except psutil.Error:
        return None


def outputs(book) -> list:
    "Every output of a notebook, in order."
    return [o for c in book.cells if c.cell_type == "code" for o in c.get("outputs", [])]


def main(notebook: str, *args: str) -> int:
    "Run the job and return its exit status."
    jobs = settings().runs_path / ".jobs"
    jobs.mkdir(parents=True, exist_ok=True)
    out = jobs / f"{Path(notebook).stem}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.ipynb"
    command = [sys.executable, "-m", "papermill", notebook, str(out), "-k", "python3", "--log-level", "WARNING", "--no-progress-bar",
               "--stdout-file", "-", "--stderr-file", "-", *args]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
                           env=os.environ | {"CUDLAB_NOTEBOOK": str(out)})
    log, stops = [], []
    reader = threading.Thread(target=lambda: log.extend(job.stderr), daemon=True)
    reader.start()

    def stop(number, frame):
        stops.append(number)
        pid = kernel(job.pid)
        if len(stops) > 1 or not pid:
            os.killpg(job.pid, signal.SIGKILL)
            if pid:
                os.kill(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGINT)
            with contextlib.suppress(OSError):
                print("\nstopping: the run is saved first (once more to stop at once)", flush=True)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    status = job.wait()
    reader.join(1)
    try:
        found = outputs(nbformat.read(out, 4))
    except (OSError, ValueError):
        found = []
    run = next((o.data[RESULT].get("run") for o in reversed(found) if RESULT in o.get("data", {})), None)
    if run:
        status = subprocess.run([sys.executable, "-m", "cudlab.run", "adopt", run, str(out)]).returncode or status
    error = next((o for o in found if o.output_type == "error"), None)
    if error and error.ename in STATUS:
        print(f"{error.evalue}", file=sys.stdout if error.ename == "Stopped" else sys.stderr)
        return STATUS[error.ename]
    if stops:
        return 130
    if error:
        print(f"{error.ename}: {error.evalue}\nThe traceback is in {out}", file=sys.stderr)
    elif status:
        print(next((line.strip() for line in reversed(log) if line.strip() and not NOISE.match(line)), ""), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) > 1 else __doc__)
