"""What a client may ask for: runs by id, solvers that fit, every value checked, every error one
sentence.
"""

import base64
import csv
import html
import io
import logging
import threading
import time
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import gradio as gr
import torch

from cudlab.catalog import list_runs
from cudlab.config import Options, did_you_mean, option
from cudlab.data import POINTS
from cudlab.dode import NATIVE
from cudlab.methods import METHODS
from cudlab.multistep import SOLVERS, Solver, find_steps
from cudlab.path import GRIDS
from cudlab.run import Run
from cudlab.solver import Trajectory

LOG = logging.getLogger("cudlab.explorer")
MOST = dict(
    steps=256, nfe=1024, count=64, columns=33, scores=24, n=10_000, seconds=120, walks=96 * 2**20
)
ANY = "any"
LOWER = {"auto": None, "yes": True, "no": False}


@dataclass
class SampleForm(Options):
    "Everything on the form that decides a picture."

    run: str = option("", "the run to sample")
    weights: str = option("ema", "average or raw weights", choices=("ema", "raw"))
    head: int = option(1, "output head of the network", low=1, high=64)
    solver: str = option("euler", "a name in SOLVERS, or a learned solver that fits the run")
    by: str = option("steps", "what the amount counts", choices=("steps", "NFE"))
    amount: int = option(8, "steps or NFE", low=1, high=MOST["nfe"])
    grid: str = option("uniform", "time grid", choices=(*GRIDS, NATIVE))
    seed: int = option(0, "seed of the starting noise", low=0, high=2**53 - 1)
    count: int = option(8, "samples", low=1, high=MOST["count"])
    label: str = option(ANY, "class")
    guidance: float = option(1.0, "guidance scale", low=0, high=20)
    lower_order_final: str = option("auto", "lower orders in the last moves", choices=tuple(LOWER))
    denoise: bool = option(True, "last move to t = 0")


NAMES = [f.name for f in fields(SampleForm)]


# Errors


def error_line(error: Exception) -> str:
    "What went wrong in one line of at most 200 characters, safe to show as HTML."
    words = " ".join(str(error).split()) or type(error).__name__
    return html.escape(words if len(words) <= 190 else words[:187] + "...", quote=False)[:200]


@contextmanager
def as_one_line():
    "Turn whatever goes wrong into one sentence for the person; the trace goes to the log."
    try:
        yield
    except gr.Error:
        raise
    except ValueError as e:
        raise gr.Error(
            error_line(e), duration=8, title="Not possible", print_exception=False
        ) from None
    except FileNotFoundError as e:
        raise gr.Error(
            f"a file of this run is gone: {error_line(e)[:150]}",
            duration=8,
            title="Run changed",
            print_exception=False,
        ) from None
    except torch.OutOfMemoryError:
        raise gr.Error(
            "not enough memory on the device: ask for fewer samples",
            duration=8,
            title="Not possible",
            print_exception=False,
        ) from None
    except Exception as e:
        LOG.exception("the explorer failed")
        raise gr.Error(
            f"the explorer failed ({type(e).__name__}); the server's log says more",
            duration=8,
            print_exception=False,
        ) from None


class Clock:
    "A limit on how long one request may take."

    def __init__(self, times: int = 1):
        self.began, self.limit = time.perf_counter(), times * MOST["seconds"]

    def check(self):
        if time.perf_counter() - self.began > self.limit:
            raise ValueError(
                f"stopped after {self.limit} s, the longest a request may take: ask for fewer "
                "samples, steps or points"
            )


def names_of(chosen, what: str, most: int) -> list:
    "A list of names from a client."
    found = [chosen] if isinstance(chosen, str) else chosen
    if not isinstance(found, list) or not all(isinstance(n, str) for n in found) or not found:
        raise ValueError(
            f"{what} = {str(chosen)[:40]!r} is not a list of names; choose at least one"
        )
    if len(found) > most:
        raise ValueError(f"{what}: {len(found)} are chosen; at most {most} are possible")
    return list(dict.fromkeys(found))


# Runs: known by id, opened once, read-only

ONLY = []
OPENED = OrderedDict()
GUARD = threading.Lock()


def listed_runs() -> list:
    "What the lab knows of its runs: yours first, the newest on top, then those that ship."
    return [r for r in list_runs() if not ONLY or r.name in ONLY]


def manifest_stamp(folder) -> tuple:
    "When and how long the manifest of a run is: it changes whenever the run does."
    try:
        stat = (Path(folder) / "MANIFEST.json").stat()
        return stat.st_mtime_ns, stat.st_size
    except OSError:
        return 0, 0


def run_choices() -> list:
    "Choices of the run menu: (what a person reads, id)."
    part = lambda r: "" if r.step == r.steps else f", step {r.step:,} of {r.steps:,}"
    return [
        (f"{r.name}  ·  {r.method} on {r.data}{part(r)}", r.name)
        for r in listed_runs()
        if not r.damaged
    ]


def open_run(name) -> Run:
    "An open run; the last four stay in memory as long as their manifests do not change."
    if not isinstance(name, str) or not name:
        raise ValueError("no run is chosen; train one with: python -m cudlab.cli train")
    known = {r.name: r for r in listed_runs()}
    if name not in known:
        raise ValueError(
            f"the run {name[:60]!r} is not here (any more){did_you_mean(name, known)}; reload the page "
            "for the runs there are"
        )
    if known[name].damaged:
        raise ValueError(f"the run {name!r} is damaged: {known[name].damaged}")
    key = str(known[name].dir), manifest_stamp(known[name].dir)
    with GUARD:
        if key not in OPENED:
            for stale in [k for k in OPENED if k[0] == key[0]]:
                del OPENED[stale]
            OPENED[key] = Run(known[name].dir)
            while len(OPENED) > 4:
                OPENED.popitem(last=False)
        OPENED.move_to_end(key)
        return OPENED[key]


def default_run(wanted: str = "") -> str:
    """The run a page opens with: the one wanted, else your newest that is finished, else one that
    ships, on full-size pictures if there is one, else one under way; None if there is none.
    """
    good = [r for r in listed_runs() if not r.damaged]
    rank = lambda r: (
        r.name != wanted,
        not r.step,
        r.step < r.steps,
        r.shipped and r.method != "cud",
        r.shipped and r.data in (*POINTS, "digits"),
        r.shipped and r.data in POINTS,
    )
    return min(good, key=rank).name if good else None


def class_choices(run: Run) -> list:
    "The classes that can be asked for: none where the run was trained without labels."
    return list(run.classes) if run.config.classes else []


def is_planar(run: Run) -> bool:
    "Whether the samples are points of the plane."
    return len(run.shape) == 1


# Solvers: those of the lab, and the learned ones that fit a run


def learned_solvers(run: Run = None) -> list:
    "The finished runs that hold a solver, those that fit the network of a run if one is given."
    held = [
        Run(r.dir)
        for r in listed_runs()
        if not r.damaged
        and r.step == r.steps
        and METHODS[r.method].product == "solver"
        and r.name not in SOLVERS
    ]
    if run is None:
        return [h.name for h in held]
    try:
        network = run.network_run.network_hash()
    except ValueError:
        return []
    return [h.name for h in held if h.info["teacher"]["network"] == network]


def solver_names(run: Run) -> list:
    "The solvers a run can be sampled with: those of the lab, and the learned ones that fit it."
    return [n for n in [*SOLVERS, *learned_solvers(run)] if not run.refuses(solver=n)]


def keep_solver(run: Run, names: list, solver) -> str:
    """The solver to go on with on a run: the one it is made for, else the one there was if it is
    offered, else Euler.
    """
    own = run.sampling_defaults["solver"]
    return next(
        (s for s in ([] if own == "euler" else [own]) + [solver, own] if s in names), "euler"
    )


def solver_choices(names: list) -> list:
    "Choices of a solver menu: (what a person reads, name)."
    return [(n if n in SOLVERS else f"{n}  ·  learned", n) for n in names]


def find_entry(name: str, run: Run = None) -> Solver:
    "The solver of that name, if it is offered (for a run)."
    if name in SOLVERS:
        return SOLVERS[name]
    if name in learned_solvers(run):
        return open_run(name).solver()
    if name in learned_solvers():
        raise ValueError(
            f"{name} was fitted for the network of {open_run(name).info['teacher']['name']}, not "
            f"for the one of {run.name}"
        )
    raise ValueError(
        f"the solver {name[:60]!r} is not offered "
        f"here{did_you_mean(name[:60], [*SOLVERS, *learned_solvers(run)])}; choose one of the list"
    )


def count_moves(
    name: str, solver: Solver, by: str, amount: int, denoise: bool = True, guided: bool = False
) -> int:
    "The number of moves an amount of steps or NFE stands for; with guidance a call counts twice."
    only = len(solver.ts) - 1
    if solver.ts and not denoise:
        raise ValueError(f"{name} was fitted with a last move to t = 0; switch that on")
    if by == "steps":
        if solver.ts and amount != only:
            raise ValueError(f"{name} was fitted for {only} steps, not for {amount}")
        if amount > MOST["steps"]:
            raise ValueError(f"steps = {amount} is out of range: at most {MOST['steps']}")
        return amount
    if solver.nfe is None:
        raise ValueError(f"{name} chooses its calls itself: ask for steps instead of NFE")
    if guided:
        if amount % 2:
            raise ValueError(
                f"NFE = {amount} is not possible with guidance: each of its calls counts twice; "
                f"{amount - 1 or 2} or {amount + 1} is"
            )
        amount //= 2
    steps = find_steps(solver, amount, denoise)
    if steps is None:
        costs = [solver.nfe(n, denoise) for n in ([only] if solver.ts else range(1, amount + 2))]
        near = (
            max((c for c in costs if c < amount), default=""),
            min((c for c in costs if c > amount), default=""),
        )
        raise ValueError(
            f"NFE = {amount} is not possible with {name}; "
            f"{' or '.join(str(c) for c in near if c)} is"
        )
    if steps > MOST["steps"]:
        raise ValueError(f"NFE = {amount} means {steps} steps; at most {MOST['steps']}")
    return steps


def is_guided(label, guidance) -> bool:
    "Whether every step asks the network twice, with and without the class."
    return label != ANY and guidance != 1


# A walk: what was asked for, opened and ready to go


@dataclass(frozen=True)
class SampleRequest:
    "A checked request: the run, the number of moves, and the arguments of `Run.iterate`."

    ask: SampleForm
    run: Run
    steps: int
    choices: dict  # of Run.iterate and Run.solve

    def states(self):
        "The states as they come, with a limit on the time."
        clock = Clock()
        for state in self.run.iterate(**self.choices):
            clock.check()
            yield state

    def script(self) -> str:
        "The Python that makes the same trajectory."
        usual = dict(
            weights="ema", head=1, y=None, guidance=1.0, lower_order_final=None, denoise=True
        )
        shown = ", ".join(
            f"{k}={v!r}" for k, v in self.choices.items() if k not in usual or usual[k] != v
        )
        return f"Run.open({self.ask.run!r}).solve({shown})"

    def flow(self):
        "The velocity the walk follows."
        ask = self.ask
        y = self.choices["y"]
        return self.run.velocity(
            ask.weights,
            ask.head,
            None if y is None else self.run.labels(y, ask.count),
            ask.guidance,
        )


def parse_form(form) -> SampleRequest:
    "The form as a walk that can be made, or a `ValueError`."
    ask = SampleForm(**dict(zip(NAMES, form)))
    run = open_run(ask.run)
    steps = count_moves(
        ask.solver,
        find_entry(ask.solver, run),
        ask.by,
        ask.amount,
        ask.denoise,
        is_guided(ask.label, ask.guidance),
    )
    y = None
    if ask.label != ANY:
        if ask.label not in class_choices(run):
            raise ValueError(
                f"class = {ask.label[:40]!r} is not one of {', '.join([ANY, *class_choices(run)])}"
            )
        y = class_choices(run).index(ask.label)
    if ask.head > run.heads:
        raise ValueError(f"head = {ask.head} is out of range: {run.name} has {run.heads}")
    return SampleRequest(
        ask,
        run,
        steps,
        dict(
            seed=ask.seed,
            index=ask.count,
            steps=steps,
            solver=ask.solver,
            grid=ask.grid,
            weights=ask.weights,
            head=ask.head,
            y=y,
            guidance=ask.guidance,
            lower_order_final=LOWER[ask.lower_order_final],
            denoise=ask.denoise,
        ),
    )


def time_states(states):
    "Each state with the seconds it took, what is done between two of them not counted."
    while True:
        began = time.perf_counter()
        state = next(states, None)
        if state is None:
            return
        yield state, time.perf_counter() - began


WALKS = OrderedDict()


def to_trajectory(states: list, run: Run) -> Trajectory:
    "The states of a walk as a trajectory on the CPU."
    return Trajectory(
        torch.tensor([float(s.t) for s in states]),
        torch.stack([s.x for s in states]).cpu(),
        torch.stack([s.v for s in states[1:]]).cpu(),
        states[-1].nfe,
        run.path,
    )


def remember_walk(walk: SampleRequest, tau: Trajectory = None) -> Trajectory:
    """Keep a finished trajectory for whoever asks for exactly the same next, or find one; None if
    it is not kept (any more).
    """
    key = (
        *asdict(walk.ask).values(),
        str(walk.run.dir),
        manifest_stamp(walk.run.dir),
        manifest_stamp(walk.run.network_run.dir),
    )
    size = lambda t: t.xs.numel() * 8
    with GUARD:
        if tau is not None and size(tau) < MOST["walks"] // 2:
            WALKS[key] = tau
            while sum(map(size, WALKS.values())) > MOST["walks"] or len(WALKS) > 16:
                WALKS.popitem(last=False)
        return WALKS.get(key)


def solve_request(walk: SampleRequest) -> Trajectory:
    "The whole trajectory of a walk: the one kept, or made now."
    tau = remember_walk(walk)
    if tau is None:
        tau = to_trajectory(list(walk.states()), walk.run)
        remember_walk(walk, tau)
    return tau


# Small pieces of a page


def figures_html(pairs: list) -> str:
    "Figures with small-caps names above them."
    return (
        "<dl class='numbers'>"
        + "".join(
            f"<div><dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd></div>"
            for k, v in pairs
        )
        + "</dl>"
    )


def table_html(rows: list, columns: list, caption: str) -> str:
    "Dicts as an HTML table."
    cell = lambda v: "" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v)
    head = "".join(f"<th scope='col'>{html.escape(c)}</th>" for c in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell(r.get(c)))}</td>" for c in columns) + "</tr>"
        for r in rows
    )
    return (
        "<div class='scroll' tabindex='0' role='group' "
        f"aria-label='{html.escape(caption)}'><table "
        f"class='plain'><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def details_html(name: str, inside: str) -> str:
    "A table alternative that stays out of the way until it is wanted."
    return f"<details class='folded'><summary>{html.escape(name)}</summary>{inside}</details>"


def csv_url(rows: list) -> str:
    "Dicts as an address of a CSV file."
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(k for row in rows for k in row)))
    writer.writeheader()
    writer.writerows(rows)
    return data_url(out.getvalue().encode(), "text/csv")


def data_url(data: bytes, kind: str) -> str:
    "Bytes as an address that a page can show or save."
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
