"""Run the suite and say where its minutes went: lint, notebooks, tests.

    python tools/suite.py [--all] [arguments of pytest]

`--all` adds the long tests. A part that fails ends the run with its exit code.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORKERS = str(min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2))


def list_parts(everything: bool, args: list) -> dict:
    "The commands of each part, by name."
    tests = ["pytest", "-n", WORKERS, "--dist", "loadfile", "--durations", "20"]
    if not everything:
        tests += ["-m", "not long"]
    return {
        "lint": [["ruff", "check", "."], ["ruff", "format", "--check", "."]],
        "notebooks": [["nbdev-test", "--n-workers", WORKERS]],
        "tests": [[*tests, *args]],
    }


def main(args: list) -> int:
    "Run all parts; the exit code of the first that fails."
    everything = "--all" in args
    parts = list_parts(everything, [arg for arg in args if arg != "--all"])
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    minutes, code = {}, 0
    for name, commands in parts.items():
        began = time.monotonic()
        for command in commands:
            code = code or subprocess.run(command, cwd=ROOT, env=env).returncode
        minutes[name] = (time.monotonic() - began) / 60
        if code:
            break
    for name, spent in minutes.items():
        print(f"{name:10} {spent:5.1f} min")
    print(f"{'in all':10} {sum(minutes.values()):5.1f} min", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
