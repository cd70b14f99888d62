"What can be chosen on the page: runs by name, opened read-only, and solvers that fit them."

import threading
from collections import OrderedDict
from pathlib import Path

from cudlab.catalog import RunInfo, list_runs
from cudlab.config import did_you_mean
from cudlab.data import POINTS
from cudlab.methods import METHODS
from cudlab.run import Run
from cudlab.runfiles import read_log, run_stamp
from cudlab.solver import SOLVERS, Solver

LOG_BYTES = 2**22  # of a log that are read, from its end
ALLOWED_RUNS = []  # the only ones shown, if there are any
GUARD = threading.Lock()
opened = OrderedDict()  # (folder, stamp) -> Run


def listed_runs() -> list[RunInfo]:
    "What the lab knows of its runs: yours first, the newest on top, then those that ship."
    return [info for info in list_runs() if not ALLOWED_RUNS or info.name in ALLOWED_RUNS]


def sound_runs() -> list[RunInfo]:
    "The listed runs without the damaged ones."
    return [info for info in listed_runs() if not info.damaged]


def describe_run(info: RunInfo) -> str:
    "A run as a line of the menu."
    line = f"{info.name}  ·  {info.method} on {info.data}"
    if info.step != info.steps:
        line += f", step {info.step:,} of {info.steps:,}"
    return line


def run_choices() -> list:
    "Choices of the run menu: (what a person reads, name)."
    return [(describe_run(info), info.name) for info in sound_runs()]


def open_run(name) -> Run:
    "An open run; the last four stay in memory as long as nothing changes on disk."
    if not isinstance(name, str) or not name:
        raise ValueError("no run is chosen; choose one of the list, or train one: cudlab train")
    known = {info.name: info for info in listed_runs()}
    if name not in known:
        raise ValueError(
            f"the run {name[:60]!r} is not here (any more){did_you_mean(name, known)}; reload the "
            "page for the runs there are"
        )
    if known[name].damaged:
        raise ValueError(f"the run {name!r} is damaged: {known[name].damaged}")
    return reopen(known[name].dir)


def reopen(folder: Path) -> Run:
    "The run in a folder, from memory if it is there."
    key = str(folder), run_stamp(folder)
    with GUARD:
        if key not in opened:
            for stale in [other for other in opened if other[0] == key[0]]:
                del opened[stale]
            opened[key] = Run(folder)
            while len(opened) > 4:
                opened.popitem(last=False)
        opened.move_to_end(key)
        return opened[key]


def default_run(wanted: str = "") -> str | None:
    """The run a page opens with: the one wanted, else your newest that is finished, else one that
    ships, on full-size pictures if there is one, else one under way; None if there is none.
    """

    def rank(info: RunInfo) -> tuple:
        small = info.data in (*POINTS, "digits")
        return (
            info.name != wanted,
            not info.step,
            info.step < info.steps,
            info.shipped and info.method != "cud",
            info.shipped and small,
            info.shipped and info.data in POINTS,
        )

    found = min(sound_runs(), key=rank, default=None)
    return found and found.name


def class_choices(run: Run) -> list:
    "The classes that can be asked for: none where the run was trained without labels."
    return list(run.classes) if run.config.classes else []


def recent_log(run: Run) -> list:
    "The end of a run's log: one dict a line."
    return read_log(run.dir, LOG_BYTES)[0]


def is_planar(run: Run) -> bool:
    "Whether the samples are points of the plane."
    return len(run.shape) == 1


# Solvers: those of the lab, and the learned ones that fit a run


def learned_solvers(run: Run = None) -> list:
    "The finished runs that hold a solver, those that fit the network of a run if one is given."
    held = [
        Run(info.dir)
        for info in sound_runs()
        if info.step == info.steps
        and METHODS[info.method].trains == "solver"
        and info.name not in SOLVERS
    ]
    if run is None:
        return [solver.name for solver in held]
    try:
        network = run.network_run.network_hash()
    except ValueError:
        return []
    return [solver.name for solver in held if solver.info["teacher"]["network"] == network]


def is_possible(run: Run, **choices) -> bool:
    "Whether a run can be sampled like this."
    try:
        run.check_sampling(**choices)
    except ValueError:
        return False
    return True


def solver_names(run: Run) -> list:
    "The solvers a run can be sampled with: those of the lab, and the learned ones that fit it."
    return [name for name in [*SOLVERS, *learned_solvers(run)] if is_possible(run, solver=name)]


def keep_solver(run: Run, solver) -> str:
    """The solver to go on with on a run: the one it is made for, else the one there was if it is
    offered, else Euler.
    """
    offered = solver_names(run)
    own = run.sampling_defaults["solver"]
    wanted = [solver, own] if own == "euler" else [own, solver]
    return next((name for name in wanted if name in offered), "euler")


def solver_choices(names: list) -> list:
    "Choices of a solver menu: (what a person reads, name)."
    return [(name if name in SOLVERS else f"{name}  ·  learned", name) for name in names]


def countable_solvers() -> list:
    "Choices of the solvers whose calls can be counted beforehand, the learned ones too."
    names = [name for name, solver in SOLVERS.items() if solver.nfe]
    return solver_choices([*names, *learned_solvers()])


def pick_solver(name: str, run: Run = None) -> Solver:
    "The solver of that name, if it is offered (for a run)."
    if name in SOLVERS:
        return SOLVERS[name]
    fitting = learned_solvers(run)
    if name in fitting:
        return open_run(name).solver()
    if name in learned_solvers():
        raise ValueError(
            f"{name} was fitted for the network of {open_run(name).info['teacher']['name']}, not "
            f"for the one of {run.name}"
        )
    raise ValueError(
        f"the solver {name[:60]!r} is not offered here"
        f"{did_you_mean(name[:60], [*SOLVERS, *fitting])}; choose one of the list"
    )
