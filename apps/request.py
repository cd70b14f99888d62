"What a client may ask for: every value is checked once, here, and every error is one sentence."

import html
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields

import gradio as gr
import torch
from offer import class_choices, open_run, pick_solver

from cudlab.config import Options, option
from cudlab.disk import printable
from cudlab.dode import NATIVE
from cudlab.path import GRIDS
from cudlab.run import Run
from cudlab.runfiles import run_stamp
from cudlab.solver import Solver, SolverState, Trajectory, find_steps

LOG = logging.getLogger("cudlab.explorer")
LIMITS = dict(steps=256, nfe=1024, count=64, columns=33, n=10_000)
LIMITS |= dict(runs=24, solvers=12, scores=24, seeds=10, beside=6)
SECONDS = 120  # the longest a request may take
SOLVED_BYTES = 96 * 2**20  # of finished trajectories that are kept
ANY = "any"
LOWER_ORDER = {"auto": None, "yes": True, "no": False}


# Errors


def error_line(error: Exception) -> str:
    "What went wrong in one line of at most 200 characters, safe to show as HTML."
    words = printable(" ".join(str(error).split())) or type(error).__name__
    if len(words) > 190:
        words = words[:187] + "..."
    return html.escape(words, quote=False)[:200]


def friendly_error(error: Exception) -> gr.Error:
    "An error as the page shows it; the trace of what nobody expected goes to the log."
    title = "Not possible"
    if isinstance(error, ValueError):
        line = error_line(error)
    elif isinstance(error, FileNotFoundError):
        title = "Run changed"
        line = f"a file of this run is gone: {error_line(error)[:150]}"
    elif isinstance(error, torch.OutOfMemoryError):
        line = "not enough memory on the device: ask for fewer samples"
    else:
        LOG.error("the explorer failed", exc_info=error)
        title = "Error"
        line = f"the explorer failed ({type(error).__name__}); the server's log says more"
    return gr.Error(line, duration=8, title=title, print_exception=False)


@contextmanager
def as_one_line():
    "Turns whatever goes wrong into one sentence for the person."
    try:
        yield
    except gr.Error:
        raise
    except Exception as e:
        raise friendly_error(e) from None


class Clock:
    "A limit on how long one request may take."

    def __init__(self, times: int = 1):
        self.began = time.perf_counter()
        self.limit = times * SECONDS

    def check(self) -> None:
        if time.perf_counter() - self.began > self.limit:
            raise ValueError(
                f"stopped after {self.limit} s, the longest a request may take: ask for fewer "
                "samples, steps or points"
            )


# The form


def parse_names(chosen, what: str) -> list:
    "A list of names from a client."
    names = [chosen] if isinstance(chosen, str) else chosen
    is_list = isinstance(names, list) and bool(names)
    if not is_list or not all(isinstance(n, str) and n.isprintable() for n in names):
        raise ValueError(
            f"{what} = {str(chosen)[:40]!r} is not a list of names; choose at least one"
        )
    if len(names) > LIMITS[what]:
        raise ValueError(f"{what}: {len(names)} are chosen; at most {LIMITS[what]} are possible")
    return list(dict.fromkeys(names))


@dataclass
class SampleForm(Options):
    "Everything on the form that decides a picture."

    run: str = option("", "the run to sample")
    weights: str = option("ema", "average or raw weights", choices=("ema", "raw"))
    head: int = option(1, "output head of the network", low=1, high=64)
    solver: str = option("euler", "a name in SOLVERS, or a learned solver that fits the run")
    by: str = option("steps", "what the amount counts", choices=("steps", "NFE"))
    amount: int = option(8, "steps or NFE", low=1, high=LIMITS["nfe"])
    grid: str = option("uniform", "time grid", choices=(*GRIDS, NATIVE))
    seed: int = option(0, "seed of the starting noise", low=0, high=2**53 - 1)
    count: int = option(8, "samples", low=1, high=LIMITS["count"])
    label: str = option(ANY, "class")
    guidance: float = option(1.0, "guidance scale", low=0, high=20)
    lower_order_final: str = option(
        "auto", "lower orders in the last moves", choices=tuple(LOWER_ORDER)
    )
    denoise: bool = option(True, "last move to t = 0")

    def is_guided(self, run: Run = None) -> bool:
        "Whether every step asks the network of a run twice, with and without the class."
        is_told = run is not None and run.method.guidance_range is not None
        return self.label != ANY and self.guidance != 1 and not is_told

    def changed(self, names: tuple) -> dict:
        "Those of these fields that are not the default."
        usual = {field.name: field.default for field in fields(self)}
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value != usual[name]}


FORM_FIELDS = [field.name for field in fields(SampleForm)]


def count_steps(form: SampleForm, solver: Solver, run: Run = None) -> int:
    "The number of moves an amount of steps or NFE stands for."
    if solver.ts and not form.denoise:
        raise ValueError(f"{form.solver} was fitted with a last move to t = 0; switch that on")
    if form.by == "NFE":
        return count_steps_for_nfe(form, solver, run)
    only = len(solver.ts) - 1
    if solver.ts and form.amount != only:
        raise ValueError(f"{form.solver} was fitted for {only} steps, not for {form.amount}")
    if form.amount > LIMITS["steps"]:
        raise ValueError(f"steps = {form.amount} is out of range: at most {LIMITS['steps']}")
    return form.amount


def count_steps_for_nfe(form: SampleForm, solver: Solver, run: Run = None) -> int:
    "The number of moves that spend exactly these calls; with guidance a call counts twice."
    nfe = form.amount
    if solver.nfe is None:
        raise ValueError(f"{form.solver} chooses its calls itself: ask for steps instead of NFE")
    if form.is_guided(run):
        if nfe % 2:
            raise ValueError(
                f"NFE = {nfe} is not possible with guidance: each of its calls counts twice; "
                f"{nfe - 1 or 2} or {nfe + 1} is"
            )
        nfe //= 2
    steps = find_steps(solver, nfe, form.denoise)
    if steps is None:
        possible = [len(solver.ts) - 1] if solver.ts else range(1, nfe + 2)
        costs = [solver.nfe(n, form.denoise) for n in possible]
        below = [cost for cost in costs if cost < nfe]
        above = [cost for cost in costs if cost > nfe]
        near = " or ".join(map(str, sorted(below)[-1:] + sorted(above)[:1]))
        raise ValueError(f"NFE = {nfe} is not possible with {form.solver}; {near} is")
    if steps > LIMITS["steps"]:
        raise ValueError(f"NFE = {nfe} means {steps} steps; at most {LIMITS['steps']}")
    return steps


# A request: what was asked for, opened and ready to go

GUARD = threading.Lock()
solved = OrderedDict()  # key of a request -> Trajectory


def size_in_bytes(trajectory: Trajectory) -> int:
    "States and velocities of a trajectory."
    return trajectory.xs.numel() * 8


@dataclass(frozen=True)
class SampleRequest:
    "A checked request: the form, its run and solver, and the arguments of `Run.iterate`."

    form: SampleForm
    run: Run
    solver: Solver
    steps: int
    choices: dict

    @property
    def key(self) -> tuple:
        "Everything the samples depend on."
        stamps = run_stamp(self.run.dir), run_stamp(self.run.network_run.dir)
        return (*asdict(self.form).values(), str(self.run.dir), *stamps)

    def states(self) -> Iterator[SolverState]:
        "The states as they come, with a limit on the time."
        clock = Clock()
        for state in self.run.iterate(**self.choices):
            clock.check()
            yield state

    def timed_states(self) -> Iterator[tuple]:
        "Each state with the seconds it took, what is done between two of them not counted."
        states = self.states()
        while True:
            began = time.perf_counter()
            state = next(states, None)
            if state is None:
                return
            yield state, time.perf_counter() - began

    def remember(self, states: list) -> Trajectory:
        "The states as a trajectory on the CPU, kept for whoever asks for exactly the same next."
        trajectory = Trajectory(
            torch.tensor([float(state.t) for state in states]),
            torch.stack([state.x for state in states]).cpu(),
            torch.stack([state.v for state in states[1:]]).cpu(),
            states[-1].nfe,
            self.run.path,
        )
        key = self.key
        with GUARD:
            if size_in_bytes(trajectory) < SOLVED_BYTES // 2:
                solved[key] = trajectory
                while sum(map(size_in_bytes, solved.values())) > SOLVED_BYTES or len(solved) > 16:
                    solved.popitem(last=False)
        return trajectory

    def solve(self) -> Trajectory:
        "The whole trajectory: the one kept, or made now."
        return solved.get(self.key) or self.remember(list(self.states()))

    def script(self) -> str:
        "The Python that makes the same trajectory."
        usual = dict(weights="ema", y=None, guidance=1.0, lower_order_final=None, denoise=True)
        usual |= {"head": self.run.sampling_defaults["head"]}
        shown = [
            f"{key}={value!r}"
            for key, value in self.choices.items()
            if key not in usual or usual[key] != value
        ]
        return f"Run.open({self.run.name!r}).solve({', '.join(shown)})"

    def labels(self) -> torch.Tensor | None:
        "The class of each sample, (B,), or None."
        y = self.choices["y"]
        return None if y is None else self.run.labels(y, self.form.count)

    def velocity(self) -> Callable:
        "The velocity that is followed, f(x, t) -> v."
        form = self.form
        return self.run.velocity(form.weights, form.head, self.labels(), form.guidance)


def make_request(form: SampleForm) -> SampleRequest:
    "The form as a request that can be answered, or a `ValueError`."
    run = open_run(form.run)
    solver = pick_solver(form.solver, run)
    steps = count_steps(form, solver, run)
    labels = [ANY, *class_choices(run)]
    if form.label not in labels:
        raise ValueError(f"class = {form.label[:40]!r} is not one of {', '.join(labels)}")
    if form.head > run.heads:
        raise ValueError(f"head = {form.head} is out of range: {run.name} has {run.heads}")
    choices = dict(
        seed=form.seed,
        index=form.count,
        steps=steps,
        solver=form.solver,
        grid=form.grid,
        weights=form.weights,
        head=form.head,
        y=None if form.label == ANY else labels.index(form.label) - 1,
        guidance=form.guidance,
        lower_order_final=LOWER_ORDER[form.lower_order_final],
        denoise=form.denoise,
    )
    decided = ("solver", "steps", "grid", "denoise", "guidance")
    run.check_sampling(**{key: choices[key] for key in decided})
    return SampleRequest(form, run, solver, steps, choices)


def parse_form(values) -> SampleRequest:
    "The values of the form, in the order of FORM_FIELDS, as a request."
    return make_request(SampleForm(**dict(zip(FORM_FIELDS, values))))
