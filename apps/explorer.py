"""The explorer: sample any run with any solver, watch every step, and measure what each network call buys.

    python apps/explorer.py [--port 7860] [--host 127.0.0.1] [--runs NAME ...]
"""
import argparse
import base64
import html
import logging
import os
import shlex
import socket
import sys
import threading
import time
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import MISSING
from dataclasses import dataclass
from dataclasses import fields
from functools import lru_cache
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
import torch

from cudlab import plot
from cudlab.core import Args
from cudlab.core import guess
from cudlab.core import settings
from cudlab.core import spec
from cudlab.core import use_threads
from cudlab.data import load
from cudlab.dode import NATIVE
from cudlab.metrics import PROTOCOL
from cudlab.metrics import comparable
from cudlab.metrics import curve as missing
from cudlab.path import GRIDS
from cudlab.run import METHODS
from cudlab.run import Run
from cudlab.run import count_of
from cudlab.run import runs
from cudlab.solver import SOLVERS
from cudlab.solver import Solver
from cudlab.solver import Trajectory
from cudlab.solver import steps_for

LOG = logging.getLogger("cudlab.explorer")
MOST = dict(steps=256, nfe=1024, count=64, columns=33, scores=24, n=10_000)
EVERY = 0.1
SHARP = 2_000_000
ANY = "any"
BUDGETS = "1, 2, 4, 8, 16"
LOWER = {"auto": None, "yes": True, "no": False}


# What a person asked for, checked

@dataclass
class Ask(Args):
    "Everything on the form that decides a picture."
    run: str = spec("", "the run to sample")
    weights: str = spec("ema", "average or raw weights", choices=("ema", "raw"))
    head: int = spec(1, "output head of the network", low=1, high=64)
    solver: str = spec("euler", "a name in SOLVERS, or a learned solver that fits the run")
    by: str = spec("steps", "what the amount counts", choices=("steps", "NFE"))
    amount: int = spec(8, "steps or NFE", low=1, high=MOST["nfe"])
    grid: str = spec("uniform", "time grid", choices=(*GRIDS, NATIVE))
    seed: int = spec(0, "seed of the starting noise", low=0, high=2**53 - 1)
    count: int = spec(8, "samples", low=1, high=MOST["count"])
    label: str = spec(ANY, "class")
    guidance: float = spec(1.0, "guidance scale", low=0, high=20)
    lower_order_final: str = spec("auto", "lower orders in the last moves", choices=tuple(LOWER))
    denoise: bool = spec(True, "last move to t = 0")


NAMES = [f.name for f in fields(Ask)]


def sentence(error: Exception) -> str:
    "What went wrong in one line of at most 200 characters, safe to show as HTML."
    words = " ".join(str(error).split()) or type(error).__name__
    return html.escape(words if len(words) <= 190 else words[:187] + "...", quote=False)[:200]


@contextmanager
def in_words():
    "Turn whatever goes wrong into one sentence for the person; the trace goes to the log."
    try:
        yield
    except gr.Error:
        raise
    except ValueError as e:
        raise gr.Error(sentence(e), duration=8, title="Not possible", print_exception=False) from None
    except FileNotFoundError as e:
        raise gr.Error(f"a file of this run is gone: {sentence(e)[:150]}", duration=8, title="Run changed", print_exception=False) from None
    except torch.OutOfMemoryError:
        raise gr.Error("not enough memory on the device: ask for fewer samples", duration=8, title="Not possible", print_exception=False) from None
    except Exception as e:
        LOG.exception("the explorer failed")
        raise gr.Error(f"the explorer failed ({type(e).__name__}); the server's log says more", duration=8, print_exception=False) from None


# Runs: known by id, opened once, read-only

ONLY = []
OPENED = OrderedDict()
GUARD = threading.Lock()


def listed() -> list:
    "What the lab knows of its runs: yours first, the newest on top, then those that ship."
    return [r for r in runs() if not ONLY or r.name in ONLY]


def manifest(folder) -> tuple:
    "When and how long the manifest of a run is: it changes whenever the run does."
    try:
        stat = (Path(folder) / "MANIFEST.json").stat()
        return stat.st_mtime_ns, stat.st_size
    except OSError:
        return 0, 0


def menu() -> list:
    "Choices of the run menu: (what a person reads, id)."
    part = lambda r: "" if r.step == r.steps else f", step {r.step:,} of {r.steps:,}"
    return [(f"{r.name}  ·  {r.method} on {r.data}{part(r)}", r.name) for r in listed() if not r.damaged]


def opened(name) -> Run:
    "An open run; the last four stay in memory as long as their manifests do not change."
    if not isinstance(name, str) or not name:
        raise ValueError("no run is chosen; train one with: python -m cudlab.run train")
    known = {r.name: r for r in listed()}
    if name not in known:
        raise ValueError(f"the run {name[:60]!r} is not here (any more){guess(name, known)}; reload the page for the runs there are")
    if known[name].damaged:
        raise ValueError(f"the run {name!r} is damaged: {known[name].damaged}")
    key = str(known[name].path), manifest(known[name].path)
    with GUARD:
        if key not in OPENED:
            for stale in [k for k in OPENED if k[0] == key[0]]:
                del OPENED[stale]
            OPENED[key] = Run(known[name].path)
            while len(OPENED) > 4:
                OPENED.popitem(last=False)
        OPENED.move_to_end(key)
        return OPENED[key]


@lru_cache(4)
def cloud(name: str):
    "Points of a 2-D data set to lay behind the paths, (M, 2)."
    return load(name).batch(0, 0, 600)[0]


def labels(run: Run) -> list:
    "The classes that can be asked for: none where the run was trained without labels."
    return list(run.classes) if run.config.classes else []


def flat(run: Run) -> bool:
    "Whether the samples are points of the plane."
    return len(run.shape) == 1


# Solvers: those of the lab, and the learned ones that fit a run

def learned(run: Run = None) -> list:
    "The finished runs that hold a solver, those that fit the network of a run if one is given."
    held = [Run(r.path) for r in listed() if not r.damaged and r.step == r.steps and METHODS[r.method].product == "solver" and r.name not in SOLVERS]
    if run is None:
        return [h.name for h in held]
    try:
        network = run.source.network_hash()
    except ValueError:
        return []
    return [h.name for h in held if h.info["teacher"]["network"] == network]


def entry(name: str, run: Run = None) -> Solver:
    "The solver of that name, if it is offered (for a run)."
    if name in SOLVERS:
        return SOLVERS[name]
    if name in learned(run):
        return opened(name).solver()
    if name in learned():
        raise ValueError(f"{name} was fitted for the network of {opened(name).info['teacher']['name']}, not for the one of {run.name}")
    raise ValueError(f"the solver {name[:60]!r} is not offered here{guess(name[:60], [*SOLVERS, *learned(run)])}; choose one of the list")


def moves(name: str, solver: Solver, by: str, amount: int, denoise: bool = True) -> int:
    "The number of moves an amount of steps or NFE stands for."
    only = len(solver.ts) - 1
    if solver.ts and not denoise:
        raise ValueError(f"{name} was fitted with a last move to t = 0; switch that on")
    if by == "steps":
        if solver.ts and amount != only:
            raise ValueError(f"{name} was fitted for {only} steps, not for {amount}")
        if amount > MOST["steps"]:
            raise ValueError(f"steps = {amount} is out of range: at most {MOST['steps']}")
        return amount
    if solver.calls is None:
        raise ValueError(f"{name} chooses its calls itself: ask for steps instead of NFE")
    steps = steps_for(solver, amount, denoise)
    if steps is None:
        costs = [solver.calls(n, denoise) for n in ([only] if solver.ts else range(1, amount + 2))]
        near = max((c for c in costs if c < amount), default=""), min((c for c in costs if c > amount), default="")
        raise ValueError(f"NFE = {amount} is not possible with {name}; {' or '.join(str(c) for c in near if c)} is")
    if steps > MOST["steps"]:
        raise ValueError(f"NFE = {amount} means {steps} steps; at most {MOST['steps']}")
    return steps


def cost(solver, by, amount, denoise=True, run="") -> str:
    "The lines under the amount: steps and NFE, always both, and what kind of solver this is."
    try:
        ask = Ask(solver=solver, by=by, amount=amount, denoise=denoise)
        found = entry(ask.solver, opened(run) if run else None)
        steps = moves(ask.solver, found, ask.by, ask.amount, ask.denoise)
    except ValueError as e:
        return f"<p class='cost bad' role='status'>{sentence(e)}</p>"
    nfe = f"{found.calls(steps, ask.denoise)} NFE" if found.calls else "NFE as needed"
    kind = f"fitted for {len(found.ts) - 1} steps on the {found.grid} grid" if found.ts else f"native grid {found.grid}"
    return (f"<p class='cost' role='status'><b>{steps}</b> {'step' if steps == 1 else 'steps'} <i>=</i> <b>{nfe}</b> "
            f"<span>{f'order {found.order:g}' if found.order else 'no order: it follows no ODE'}, {kind}</span> <span>{html.escape(found.source)}</span></p>")


BOUND = ("by", "amount", "grid", "weights", "lower_order_final", "denoise", "head", "guidance")


def bound(solver: Solver, run: Run) -> dict:
    "The controls that a learned solver or the run itself decides, and their values; none for other solvers and runs."
    usual = dict(by="steps", lower_order_final="auto", denoise=True)
    if run.fixed:
        return usual | dict(amount=run.fixed["steps"], grid=run.fixed["grid"])
    return usual | dict(weights="ema", amount=len(solver.ts) - 1, grid=solver.grid, head=solver.made_for["head"], guidance=solver.made_for["guidance"]) if solver.ts else {}


def possible(run: Run) -> list:
    "The solvers a run can be sampled with: those of the lab, and the learned ones that fit it."
    return [n for n in [*SOLVERS, *learned(run)] if not run.refuses(solver=n)]


def decided(name, solver) -> tuple:
    "What choosing a solver does to the controls in BOUND."
    with in_words():
        run = opened(name)
        values = bound(entry(Ask(solver=solver).solver, run), run)
        return tuple(values.get(key, gr.skip()) for key in BOUND)


def budgeted(name, solver, wanted="") -> tuple:
    "What choosing a solver does to grid and NFE of the measurement; the one NFE of a learned solver goes with it."
    with in_words():
        run = opened(name)
        found = entry(Ask(solver=solver).solver, run)
        if values := bound(found, run):
            return values["grid"], str(found.calls(values["amount"]))
        return gr.skip(), BUDGETS if str(wanted).strip().isdecimal() else gr.skip()


# The film: one column a step, sent as it is made

def picture(x: torch.Tensor, quality: int) -> str:
    "One column of the film, (B, C, H, W), as a data address."
    kind = "webp" if quality else "png"
    return f"data:image/{kind};base64," + base64.b64encode(plot.encoded(plot.film(x[None].cpu(), 1, 1), quality)).decode()


class Film:
    "The film strip as a page that only ever grows, so that each update sends one column."

    def __init__(self, shape: tuple, count: int, steps: int):
        channels, height, width = shape
        self.every = max(1, -(-(steps + 1) // MOST["columns"]))
        columns = len([i for i in range(steps + 1) if self.keeps(i, steps)])
        self.quality = 86 if channels * height * width * count * columns * 2 > SHARP else 0
        near = 48 if count <= 16 else 32
        self.scale = max(1, round(near / max(height, width)))
        self.steps, self.count, self.box = steps, count, (width * self.scale, (count * (height + 1) - 1) * self.scale)
        self.columns = {i: k + 2 for k, i in enumerate(i for i in range(steps + 1) if self.keeps(i, steps))}
        self.page = (f"<div class='film' role='group' aria-label='film strip: {count} samples by {steps} steps' tabindex='0' style='--w:{self.box[0]}px;--h:{self.box[1]}px;--n:{columns}'>"
                     "<span class='name' style='grid-row:2'>state<var>x<sub>t</sub></var></span><span class='name' style='grid-row:4'>estimate<var>x̂<sub>0</sub></var></span>"
                     "<span class='name tick' style='grid-row:1'>step</span><span class='name tick' style='grid-row:5'>time t</span>"
                     "<i class='bed' style='grid-row:2'></i><i class='bed' style='grid-row:4'></i>")

    def keeps(self, i: int, steps: int) -> bool:
        "Whether step i is shown; the first and the last always are."
        return i % self.every == 0 or i == steps

    def add(self, i: int, t: float, row: int, x: torch.Tensor):
        "One column of a row: 2 holds the states, 4 the estimates."
        if i not in self.columns:
            return
        what = "state x_t" if row == 2 else "estimate of x_0"
        place = f"grid-column:{self.columns[i]}"
        self.page += (f"<img style='{place};grid-row:{row}' width='{self.box[0]}' height='{self.box[1]}' decoding='sync' "
                      f"alt='{what} of {self.count} samples at step {i} of {self.steps}, t = {t:.3f}' src='{picture(x, self.quality)}'>")
        if row == 2:
            self.page += f"<span class='tick' style='{place};grid-row:1'>{i}</span><span class='tick' style='{place};grid-row:5'>{t:.2f}</span>"


def numbers(pairs: list) -> str:
    "Figures with small-caps names above them."
    return "<dl class='numbers'>" + "".join(f"<div><dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd></div>" for k, v in pairs) + "</dl>"


def script(ask: Ask, run: Run, steps: int, y) -> str:
    "The Python that makes the same picture."
    given = dict(seed=ask.seed, index=ask.count, steps=steps, solver=ask.solver, grid=ask.grid, weights=ask.weights, head=ask.head, y=y, guidance=ask.guidance,
                 lower_order_final=LOWER[ask.lower_order_final], denoise=ask.denoise)
    usual = dict(weights="ema", head=1, y=None, guidance=1.0, lower_order_final=None, denoise=True)
    shown = ", ".join(f"{k}={v!r}" for k, v in given.items() if k not in usual or usual[k] != v)
    return f"from cudlab.run import Run\n\ntrajectory = Run.open({run.name!r}).solve({shown})\ntrajectory.x, trajectory.nfe, trajectory.straightness.mean()"


def sampled(*form):
    "Stream a sampling: (film, paths, velocities, schedule, numbers, script) as they come to be."
    with in_words():
        ask = Ask(**dict(zip(NAMES, form)))
        run = opened(ask.run)
        steps = moves(ask.solver, entry(ask.solver, run), ask.by, ask.amount, ask.denoise)
        y = None
        if ask.label != ANY:
            if ask.label not in labels(run):
                raise ValueError(f"class = {ask.label[:40]!r} is not one of {', '.join([ANY, *labels(run)])}")
            y = labels(run).index(ask.label)
        if ask.head > run.heads:
            raise ValueError(f"head = {ask.head} is out of range: {run.name} has {run.heads}")
        start = shown = time.perf_counter()
        walk = run.walk(seed=ask.seed, index=ask.count, steps=steps, solver=ask.solver, grid=ask.grid, weights=ask.weights, head=ask.head, y=y, guidance=ask.guidance,
                        lower_order_final=LOWER[ask.lower_order_final], denoise=ask.denoise)
        plane, states, spent, drawing = flat(run), [], 0.0, 0.0
        film = None if plane else Film(tuple(run.shape), ask.count, steps)
        code = script(ask, run, steps, y)
        while True:
            began = time.perf_counter()
            state = next(walk, None)
            spent += time.perf_counter() - began
            if state is None:
                break
            states.append(state)
            t = float(state.t)
            if film:
                if state.i:
                    left = states[-2]
                    film.add(left.i, float(left.t), 4, run.noise_path.x0(left.x, state.v, torch.full((ask.count,), float(left.t), device=left.x.device)))
                film.add(state.i, t, 2, state.x)
            now = time.perf_counter()
            if len(states) == 1 or now - shown >= EVERY and drawing <= spent:
                shown = now
                done = numbers([("step", f"{state.i} of {steps}"), ("NFE so far", f"{state.nfe:g}"), ("time", f"{1000 * spent:.0f} ms")])
                chart = plot.plane(torch.stack([s.x for s in states]), cloud(run.config.data), reach=3.2) if plane else None
                drawing += time.perf_counter() - now
                yield film.page if film else "", chart, gr.skip(), gr.skip(), done, gr.skip()
        if film:
            if not t:
                film.add(steps, t, 4, states[-1].x)
            film.page += "</div>"
        tau = Trajectory(torch.tensor([float(s.t) for s in states]), torch.stack([s.x for s in states]).cpu(),
                         torch.stack([s.v for s in states[1:]]).cpu(), states[-1].nfe, run.noise_path)
        bent = tau.straightness
        lost = int((~tau.x.flatten(1).isfinite().all(1)).sum())
        done = numbers([("steps", len(states) - 1), ("NFE counted", f"{tau.nfe:g}"), ("solver time", f"{1000 * spent:.0f} ms"),
                        ("shown after", f"{1000 * (time.perf_counter() - start):.0f} ms"), ("deviation from straight", f"{float(bent.mean()):.3g}"),
                        *([("not finite", f"{lost} of {ask.count}")] if lost else [])])
        yield (film.page if film else "", plot.plane(tau.xs, cloud(run.config.data), reach=3.2) if plane else None,
               plot.speeds(tau.vs, tau.ts), plot.schedule(tau.ts, 300), done, code)


# Quality

def protocol(scores: list) -> list:
    "The largest set of scores that may share an axis, the newest where sizes tie."
    groups = []
    for score in scores:
        home = next((g for g in groups if not comparable(g[0], score)), None)
        if home is None:
            groups.append([score])
        else:
            home.append(score)
    return max(reversed(groups), key=len) if groups else []


def table(rows: list, columns: list, caption: str) -> str:
    "Dicts as an HTML table."
    cell = lambda v: "" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v)
    head = "".join(f"<th scope='col'>{html.escape(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell(r.get(c)))}</td>" for c in columns) + "</tr>" for r in rows)
    return f"<div class='scroll' tabindex='0' role='group' aria-label='{html.escape(caption)}'><table class='plain'><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def peers(run: Run) -> list:
    "The names of other runs on the same data, and those of them that ship with the lab."
    others = [r for r in listed() if not r.damaged and r.data == run.config.data and r.name != run.name]
    return [r.name for r in others], [r.name for r in others if r.shipped]


def curve(name, against=None, solver="euler", grid="uniform") -> tuple:
    "The quality chart of a run beside others with the same solver and grid, its protocol in words, and the same as a table."
    with in_words():
        ask, run = Ask(solver=solver, grid=grid), opened(name)
        return drawn(run, against, kept(run, possible(run), ask.solver), ask.grid)


def drawn(run: Run, against=None, solver="euler", grid="uniform") -> tuple:
    "Chart, caption and table of a run's scores; other runs join the chart where their protocol is the same."
    scores = list(run.scores)
    group, same = protocol(scores), entry(solver, run)
    alike = {solver} if solver in SOLVERS else {solver, getattr(opened(solver).method, "base", solver)}
    grid = same.grid if grid == NATIVE else grid
    for name in against or []:
        if name != run.name:
            found = [s for s in opened(name).scores if s.get("solver") in alike and s.get("grid", "uniform") == grid]
            group = group or protocol(found)[:1]
            group = group + [s for s in found if s not in group and not comparable(group[0], s)]
    if not group:
        return plot.quality([]), "<p class='caption'>Nothing measured yet. Choose a solver and the numbers of calls, then press <b>Measure missing points</b>.</p>", ""
    words = ", ".join(f"{html.escape(k)} <b>{html.escape(str(group[0][k]))}</b>" for k in (*PROTOCOL, "device") if group[0].get(k) not in (None, ""))
    seeds = ", ".join(str(s) for s in sorted({s.get("seed", 0) for s in group}))
    note = next((s["note"] for s in group if s.get("note")), "")
    other = sum(s not in group for s in scores)
    caption = (f"<p class='caption'>Protocol: {words}, seeds <b>{seeds}</b>.{f' {html.escape(note)}.' if note else ''}"
               f"{f' {other} scores measured under another protocol are in the table and not in the chart.' if other else ''}</p>")
    wide = [k for k in ("solver", "grid", "head", "steps", "nfe", "fd", "kd", "precision", "recall", "endpoint", "reference", "seen", "straightness", "seconds", "n", "seed", "weights", "extractor") if any(k in s for s in scores)]
    wide += [k for k in ("lower_order_final", "denoise") if any(s.get(k, plot.USUAL[k]) != plot.USUAL[k] for s in scores)]
    rows = sorted(scores, key=lambda s: (str(s.get("solver")), s.get("nfe") or 0))
    mine = table(rows, wide, f"{len(scores)} scores of {run.name}") if scores else f"<p class='caption'>Nothing is measured on {html.escape(run.name)} yet.</p>"
    return plot.quality(group, height=380 + 16 * max(0, len({plot.line_name(s) for s in group}) - 6)), caption, mine


def calls_wanted(text) -> list:
    "NFE values from what a person typed: 1, 2, 4."
    parts = str(text or "").replace(";", ",").replace(" ", ",").split(",")
    values = []
    for part in filter(None, parts):
        if not part.isdecimal() or not 1 <= int(part) <= MOST["nfe"]:
            raise ValueError(f"NFE = {part[:40]!r} is not a whole number from 1 to {MOST['nfe']}; write them as 1, 2, 4, 8")
        values.append(int(part))
    if not values:
        raise ValueError("no numbers of calls are given; write them as 1, 2, 4, 8")
    return sorted(set(values))[:MOST["scores"]]


def measured(name, solver, wanted, n, seed, against=None, grid="uniform", progress=gr.Progress()):
    "Measure the points that are missing, one by one: (chart, caption, table)."
    with in_words():
        ask, run = Ask(run=name, solver=solver, seed=seed, count=1, grid=grid), opened(name)
        n, found = Count(n=n).n, entry(ask.solver, run)
        budgets = calls_wanted(wanted)
        for nfe in budgets:
            if why := run.refuses(solver=ask.solver, steps=moves(ask.solver, found, "NFE", nfe), grid=ask.grid):
                raise ValueError(why)
        made, fixed = 0, {k: v for k, v in bound(found, run).items() if k in ("head", "guidance")}

        def tell(done, size):
            progress((made * size + done, len(budgets) * size), desc=f"{ask.solver}: point {made + 1} of at most {len(budgets)}", unit="samples")

        for score in missing(run, (ask.solver,), tuple(budgets), progress=tell, n=n, seed=ask.seed, grid=ask.grid, **fixed):
            run.add_score(score)
            made += 1
            yield drawn(run, against, ask.solver, ask.grid)
        if not made:
            gr.Info("All of these points are measured already.", duration=4)
        yield drawn(run, against, ask.solver, ask.grid)


@dataclass
class Count(Args):
    "How many samples a score is made of."
    n: int = spec(1000, "samples per score", low=16, high=MOST["n"])


# The run itself

def command(config) -> str:
    "The command line that trains this run again."
    parts = ["python", "-m", "cudlab.run", "train"]
    for f in fields(config):
        value, usual = getattr(config, f.name), f.default if f.default is not MISSING else f.default_factory()
        if f.name == "args":
            parts += [f"args.{k}={v}" for k, v in value.items()]
        elif value != usual:
            parts.append(f"{f.name}={value}")
    return shlex.join(parts)


def numbers_of(run: Run) -> str:
    "What a run that holds a solver has learned, in a line each: for which network, and the numbers with their spread."
    if run.method.product != "solver":
        return ""
    teacher, held = run.info["teacher"], run.tensors("ema.safetensors")
    batches = held["solver.by_batch"][: held["solver.done"]]
    spread = batches.std(0) if len(batches) > 1 else None
    shown = [" / ".join(f"{v:.3f}" if spread is None or not spread[i, k] else f"{v:.3f}\u00a0±\u00a0{spread[i, k]:.3f}" for k, v in enumerate(row)) for i, row in enumerate(held["solver.lam"].tolist())]
    told = f"Learned numbers, one a call, mean ± standard deviation over {len(batches)} batches: <code>{', '.join(shown)}</code>." if len(batches) else "Nothing is learned yet."
    return (f"<p class='caption'>{told}</p><p class='caption'>A solver for the network of <b>{html.escape(teacher['name'])}</b>, step {teacher['step']:,}, "
            f"SHA-256 <code>{html.escape(teacher['network'][:12])}</code>.</p>")


def training(run: Run):
    "The training curve; where a solver was fitted, its error on held-out noise after each batch."
    chart = plot.training(run.metrics)
    if run.method.product == "solver":
        chart.update_xaxes(title_text="calibration batch", tickformat="d", dtick=max(1, run.length // 10)).update_yaxes(title_text="held-out error")
    return chart


def about(name) -> tuple:
    "Everything known of a run: summary, training curve, command, configuration."
    with in_words():
        run = opened(name)
        try:
            state, held = f"all {run.verify()} files match their SHA-256", numbers_of(run)
        except ValueError as e:
            state, held = str(e), ""
        unit = "fitted batches" if run.method.product == "solver" else "trained steps"
        facts = numbers([("method", run.config.method), ("data", run.config.data), (unit, f"{run.step:,} of {run.length:,}"),
                         ("parameters", count_of(run.info["parameters"]).removesuffix(" parameters")), ("heads", run.heads), ("classes", len(labels(run)) or "none")])
        rows = [dict(key=f.name, value=str(getattr(run.config, f.name)), meaning=f.metadata.get("help", "")) for f in fields(run.config)]
        return (facts + held + f"<p class='caption'>Manifest: {html.escape(state)}. Created {html.escape(run.info['created'])}. Folder <code>{html.escape(str(run.path))}</code></p>",
                training(run), command(run.config), table(rows, ["key", "value", "meaning"], "configuration"))


def shelf() -> str:
    "All runs as a table, the damaged ones with the reason."
    rows = [dict(run=r.name, method=r.method, data=r.data, steps=f"{r.step:,} of {r.steps:,}" if r.steps else "",
                 state=f"damaged: {r.damaged}" if r.damaged else "shipped" if r.shipped else "yours") for r in listed()]
    return table(rows, ["run", "method", "data", "steps", "state"], f"{len(rows)} runs")


# The page

def greeted(*form):
    "The first picture of a page, if there is anything to show."
    if form[0]:
        yield from sampled(*form)
    else:
        yield tuple(gr.skip() for _ in range(6))


def kept(run: Run, names: list, solver) -> str:
    "The solver to go on with on a run: the one it is made for, else the one there was if it is offered, else Euler."
    own = run.own["solver"]
    return next((s for s in ([] if own == "euler" else [own]) + [solver, own] if s in names), "euler")


def offered(names: list) -> list:
    "Choices of a solver menu: (what a person reads, name)."
    return [(n if n in SOLVERS else f"{n}  ·  learned", n) for n in names]


def fitted(name, solver="", q_solver="", wanted="") -> tuple:
    "The controls that depend on the run: classes, heads, solvers and what they decide, and a line about it."
    with in_words():
        run = opened(name)
        done = f"{run.step:,} training steps" if run.method.product == "net" else f"a solver for the network of <b>{html.escape(run.info['teacher']['name'])}</b>"
        line = (f"<p class='about'><b>{html.escape(run.config.method)}</b> on <b>{html.escape(run.config.data)}</b>, {done}, "
                f"samples of {' × '.join(map(str, run.shape))}{f', {run.heads} heads' if run.heads > 1 else ''}</p>")
        others, ours = peers(run)
        names = possible(run)
        counted = [n for n in names if n not in SOLVERS or SOLVERS[n].calls]
        solver, q_solver = kept(run, names, solver), kept(run, counted, q_solver)
        values = bound(entry(solver, run), run)
        return (line, gr.update(choices=others, value=ours), gr.update(choices=[ANY, *labels(run)], value=ANY, visible=bool(labels(run))),
                gr.update(value=64 if flat(run) else 8), gr.update(visible=flat(run)), gr.update(visible=not flat(run)),
                gr.update(choices=offered(names), value=solver), gr.update(choices=offered(counted), value=q_solver), *budgeted(name, q_solver, wanted),
                *(values.get(key, gr.skip()) for key in BOUND[:-2]), gr.update(maximum=max(run.heads, 2), value=values.get("head", 1), interactive=run.heads > 1),
                gr.update(value=values.get("guidance", 1.0), visible=bool(labels(run))))


def preferred(wanted: str = "") -> str:
    "The run a page opens with: the one wanted, else the first trained one; None if there is none."
    good = [r for r in listed() if not r.damaged]
    return next((r.name for r in good if r.name == wanted), next((r.name for r in good if r.step), good[0].name if good else None))


def arrived(request: gr.Request = None) -> tuple:
    "What a page shows on arrival: the runs there are now, and ?run=NAME or the newest of them chosen."
    with in_words():
        found = menu()
        wanted = request.query_params.get("run", "") if request else ""
        chosen = preferred(wanted)
        if wanted and chosen != wanted:
            gr.Warning(f"Run {html.escape(wanted[:60])!r} is not here or damaged; this is {chosen!r}.", duration=8)
        if chosen is None:
            return gr.update(choices=[], value=None), shelf(), "<p class='about'>No run yet. Train one: <code>python -m cudlab.run train</code></p>", *[gr.skip()] * 17
        return gr.update(choices=found, value=chosen), shelf(), *fitted(chosen)


THEME = gr.themes.Base(
    primary_hue=gr.themes.colors.Color(*("#eef4f8 #dbe8f1 #b6d0e3 #86b1cf #4f8db6 #0f6da3 #00598c #004a75 #003a5c #002b45 #001c2e").split(), name="cudlab"),
    secondary_hue="slate", neutral_hue="zinc", radius_size="sm", spacing_size="md", text_size="md",
    font=[gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"],
    font_mono=[gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700)), "ui-monospace", "monospace"],
).set(
    body_background_fill="#fcfcfb", body_background_fill_dark="#111315", background_fill_primary="#fcfcfb", background_fill_primary_dark="#111315",
    background_fill_secondary="#f4f4f2", background_fill_secondary_dark="#181b1e", block_background_fill="transparent", block_background_fill_dark="transparent",
    block_border_width="0px", block_border_width_dark="0px", block_shadow="none", block_shadow_dark="none", block_label_background_fill="transparent", block_label_background_fill_dark="transparent",
    block_label_border_width="0px", block_label_border_width_dark="0px", block_title_text_weight="600", block_title_text_size="*text_sm", block_title_text_color="*neutral_600", block_title_text_color_dark="*neutral_400",
    block_padding="0px", layout_gap="20px", form_gap_width="0px", panel_background_fill="transparent", panel_background_fill_dark="transparent",
    input_background_fill="#ffffff", input_background_fill_dark="#181b1e", input_border_color="#d9d9d4", input_border_color_dark="#33383d", input_shadow="none", input_shadow_dark="none",
    input_border_width="1px", input_border_color_focus="*primary_500", input_border_color_focus_dark="*primary_400",
    button_primary_background_fill="*primary_500", button_primary_background_fill_hover="*primary_600", button_primary_background_fill_dark="*primary_500", button_primary_background_fill_hover_dark="*primary_400",
    button_primary_text_color="white", button_primary_text_color_dark="white", button_secondary_background_fill="transparent", button_secondary_background_fill_dark="transparent",
    button_secondary_border_color="#cfcfc9", button_secondary_border_color_dark="#3a4046", button_border_width="1px", button_border_width_dark="1px", button_large_text_weight="600",
    slider_color="*primary_500", slider_color_dark="*primary_400", body_text_color="#1d2023", body_text_color_dark="#e4e6e8", body_text_color_subdued="#63686e", body_text_color_subdued_dark="#9aa1a8",
    checkbox_label_background_fill="transparent", checkbox_label_background_fill_dark="transparent", checkbox_label_background_fill_selected="transparent", checkbox_label_background_fill_selected_dark="transparent",
    checkbox_label_border_width="0px", checkbox_label_border_width_dark="0px", checkbox_label_padding="4px 10px 4px 0", checkbox_label_shadow="none",
    border_color_primary="#e2e2dd", border_color_primary_dark="#2a2f33", link_text_color="*primary_600", link_text_color_dark="*primary_300",
)

CSS = """
.gradio-container {max-width: 100% !important; padding: 0 !important; overflow-x: clip}
.main.fillable {padding: clamp(16px, 3vw, 28px) clamp(16px, 3.1vw, 40px) 48px !important; max-width: 1480px !important; width: 100%; margin: 0 auto !important}
.main.fillable, .main .wrap, .main .contain, .main .column, .main .row, .main .block, .main .html-container, .main .prose, .main .tabs, .main .tabitem {min-width: 0 !important; max-width: 100%}
.main > .wrap {padding: 0 !important}
footer {display: none !important}
#head {display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 18px; border-bottom: 1px solid var(--border-color-primary); padding-bottom: 14px}
#head h1 {font-size: 26px; font-weight: 700; letter-spacing: -.01em; margin: 0; line-height: 1.2}
#head p {color: var(--body-text-color-subdued); margin: 0; flex: 1 1 260px}
kbd {font-family: var(--font-mono); font-size: 12px; border: 1px solid var(--border-color-primary); border-radius: 3px; padding: 0 5px; margin-right: 3px; color: var(--body-text-color)}
#head .keys {color: var(--body-text-color-subdued); font-size: 14px; white-space: nowrap}
.form, .gr-group, .styler {background: transparent !important; gap: 18px !important; border: 0 !important; box-shadow: none !important; overflow: visible !important; --block-padding: 0}
span[data-testid="block-info"], .group-name, .numbers dt, .film .name, table.plain th, table.plain caption {
  font-variant-caps: all-small-caps; letter-spacing: .07em; font-size: 15px !important; font-weight: 400; color: var(--body-text-color-subdued) !important; line-height: 1.3}
.group-name {margin: 0; border-bottom: 1px solid var(--border-color-primary); padding-bottom: 4px}
.block .wrap .info, .block .info {font-size: 13px}
.about, .caption {color: var(--body-text-color-subdued); margin: 0; line-height: 1.55; max-width: 82ch}
.about b, .caption b {color: var(--body-text-color); font-weight: 400}
.about code, .caption code {background: transparent; border: 0; padding: 0; font-size: 13px; overflow-wrap: anywhere}
.cost {margin: -10px 0 0; font-family: var(--font-mono) !important; font-size: 13px; color: var(--body-text-color-subdued); line-height: 1.5}
.cost b {color: var(--body-text-color); font-weight: 400} .cost i {font-style: normal; opacity: .6} .cost span {display: block; font-family: var(--font); color: inherit}
.cost.bad {color: #b3421f; font-family: var(--font) !important} .dark .cost.bad {color: #f0906f}
.numbers {display: flex; flex-wrap: wrap; gap: 10px 36px; margin: 0 0 4px} .numbers dd {margin: 0; font-family: var(--font-mono); font-size: 17px; color: var(--body-text-color)}
.film {display: grid; grid-template-columns: clamp(58px, 6vw, 70px) repeat(var(--n), var(--w)); grid-template-rows: auto var(--h) 20px var(--h) auto; gap: 0 6px; overflow-x: auto; padding: 0 0 12px; width: 100%; max-width: 100%}
.film .bed {grid-column: 2 / -1; background: var(--background-fill-secondary); border-radius: 2px; margin-bottom: 0}
.film img {image-rendering: pixelated; display: block; max-width: none; margin: 0; border-radius: 0; z-index: 1; width: var(--w); height: var(--h)}
.film .name {position: sticky; left: 0; z-index: 2; background: var(--body-background-fill); padding: 0 8px 0 0; grid-column: 1}
.film var {font-style: italic; font-variant-caps: normal; letter-spacing: 0; display: block; font-size: 16px; color: var(--body-text-color)} .film sub {font-size: 11px}
.film .tick {font-family: var(--font-mono); font-size: 12px; color: var(--body-text-color-subdued); text-align: center; padding: 4px 0; white-space: nowrap}
.film .name.tick {font-family: var(--font); text-align: left; padding: 2px 0}
.scroll {overflow: auto; max-height: 460px} .scroll table.plain {border-collapse: collapse; font-size: 14px; width: 100%; border: 0 !important; margin: 0} table.plain caption {text-align: left; padding-bottom: 4px}
.scroll table.plain tr {border: 0 !important; background: transparent !important}
.scroll table.plain th, .scroll table.plain td {text-align: left; padding: 5px 20px 5px 0; border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important; vertical-align: top; color: var(--body-text-color); white-space: nowrap}
.scroll table.plain td:last-child {white-space: normal; min-width: 240px} .scroll table.plain td {font-variant-numeric: tabular-nums}
.js-plotly-plot .plotly .infolayer text, .js-plotly-plot .plotly .xaxislayer-above text, .js-plotly-plot .plotly .yaxislayer-above text {fill: var(--body-text-color-subdued) !important}
.tab-container button {font-size: 16px} .dark .tab-container button.selected {color: var(--primary-300)} .dark .tab-container button.selected::after {background: var(--primary-300)}
.dark input[type=range] {--neutral-200: #3a4046} input[type=range] {height: 20px; margin: 0} .slider_input_container {min-height: 24px} .form .block {overflow: visible !important}
button.lg, button.md {white-space: nowrap; padding-left: 14px; padding-right: 14px}
#velocity, #schedule, #chart, #loss, #paths {min-height: 0}
:focus-visible {outline: 2px solid var(--primary-400) !important; outline-offset: 2px}
dialog#keys {font-family: 'IBM Plex Sans', system-ui, sans-serif; border: 1px solid var(--border-color-primary); border-radius: 6px; background: var(--body-background-fill); color: var(--body-text-color); padding: 24px 32px; max-width: 420px; margin: auto}
dialog#keys::backdrop {background: rgba(0, 0, 0, .35)} dialog#keys td {padding: 4px 18px 4px 0} dialog#keys button {text-decoration: underline; background: none; border: 0; padding: 0; margin-top: 14px; font: inherit; cursor: pointer; color: inherit} dialog#keys h2 {margin: 0 0 10px; font-size: 18px; font-weight: 700}
@media (min-width: 901px) {#line .about {padding-top: 28px} .aside {flex: 0 0 288px !important; min-width: 288px !important} .split {flex-wrap: nowrap !important; gap: 44px !important} .column .column + .column {min-width: 0} #side {position: sticky; top: 16px; align-self: flex-start}}
@media (max-width: 900px) {.split {flex-direction: column} .split > .column {width: 100% !important; min-width: 0 !important; flex: none !important} #head .keys {display: none}}
@media (prefers-reduced-motion: reduce) {* {animation: none !important; transition: none !important}}
"""

KEYS = """
() => {
  const shown = (id) => { const b = document.querySelector(id); return b && b.offsetParent !== null ? b : null };
  const sheet = document.createElement('dialog');
  sheet.id = 'keys';
  sheet.setAttribute('aria-label', 'keyboard');
  sheet.innerHTML = '<h2>Keyboard</h2><table><tr><td><kbd>s</kbd></td><td>sample</td></tr><tr><td><kbd>r</kbd></td><td>new seed and sample</td></tr>' +
    '<tr><td><kbd>Tab</kbd></td><td>next control</td></tr><tr><td><kbd>?</kbd></td><td>this sheet</td></tr><tr><td><kbd>Esc</kbd></td><td>close</td></tr></table>' +
    '<form method="dialog"><button>Close</button></form>';
  document.body.appendChild(sheet);
  document.addEventListener('click', (e) => {
    if (e.target.matches('input[role=combobox]:not([readonly])')) e.target.select();
    if (window.innerWidth <= 900 && e.target.closest('#sample, #reseed')) document.querySelector('#numbers').scrollIntoView({behavior: 'smooth', block: 'start'});
  });
  document.addEventListener('keydown', (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey || e.repeat) return;
    const el = e.target;
    const typing = el.isContentEditable || el.tagName === 'TEXTAREA' || el.tagName === 'SELECT' || (el.tagName === 'INPUT' && !['range', 'radio', 'checkbox'].includes(el.type));
    if (typing || sheet.open) return;
    if (e.key === '?') { sheet.showModal(); e.preventDefault(); }
    const button = {s: '#sample', r: '#reseed'}[e.key];
    if (button && shown(button)) { shown(button).click(); e.preventDefault(); }
  });
}
"""


def build() -> gr.Blocks:
    "The page and its wiring; nothing is launched."
    page = gr.Blocks(title="cudlab explorer", analytics_enabled=False, fill_width=True)
    solve = dict(concurrency_id="solve", concurrency_limit=1)
    quick = dict(queue=True, show_progress="hidden", concurrency_limit=8)
    with page:
        gr.HTML("<header id='head'><h1>cudlab</h1><p>Few-step sampling, one network call at a time.</p>"
                "<span class='keys'><kbd>s</kbd> sample &ensp;<kbd>r</kbd> new seed &ensp;<kbd>?</kbd> help</span></header>")
        with gr.Row(equal_height=False, elem_classes="split"):
            with gr.Column(scale=1, min_width=288, elem_classes="aside"):
                found = menu()
                run = gr.Dropdown(found, value=preferred(), label="Run", elem_id="run", filterable=len(found) > 8)
            with gr.Column(scale=3, min_width=300):
                line = gr.HTML(elem_id="line")
        with gr.Tabs():
            with gr.Tab("Sample", id="sample"):
                with gr.Row(equal_height=False, elem_classes="split"):
                    with gr.Column(scale=1, min_width=288, elem_id="side", elem_classes="aside"):
                        solver = gr.Dropdown(offered(SOLVERS), value="euler", label="Solver", elem_id="solver")
                        with gr.Group():
                            by = gr.Radio(["steps", "NFE"], value="steps", label="Count in", info="steps are moves; NFE are network calls per sample")
                            amount = gr.Slider(1, 64, value=8, step=1, label="How many")
                        price = gr.HTML(cost("euler", "steps", 8))
                        grid = gr.Dropdown([*GRIDS, NATIVE], value="uniform", label="Grid", filterable=False, elem_id="grid")
                        seed = gr.Number(settings().seed, label="Seed", precision=0, minimum=0)
                        count = gr.Slider(1, MOST["count"], value=8, step=1, label="Samples")
                        label = gr.Dropdown([ANY], value=ANY, label="Class", visible=False)
                        guidance = gr.Slider(0, 8, value=1.0, step=0.1, label="Guidance", info="1 is none", visible=False)
                        with gr.Accordion("Network and last moves", open=False):
                            weights = gr.Radio([("average (EMA)", "ema"), ("raw", "raw")], value="ema", label="Weights")
                            head = gr.Slider(1, 2, value=1, step=1, label="Head")
                            lower = gr.Radio(list(LOWER), value="auto", label="Lower order in the last moves", info="auto is as the solver's authors do")
                            denoise = gr.Checkbox(True, label="Last move to t = 0", info="off ends at the smallest noise level; NFE may change")
                        with gr.Row(elem_classes="buttons"):
                            go = gr.Button("Sample", variant="primary", elem_id="sample", scale=2, min_width=90, size="md")
                            reseed = gr.Button("New seed", elem_id="reseed", min_width=90, size="md")
                            stop = gr.Button("Stop", elem_id="stop", min_width=60, size="md")
                    with gr.Column(scale=3, min_width=300):
                        done = gr.HTML(elem_id="numbers")
                        film = gr.HTML(elem_id="film")
                        paths = gr.Plot(label="Paths", show_label=False, visible=False, elem_id="paths")
                        with gr.Row(equal_height=False, elem_classes="split"):
                            with gr.Column(min_width=300):
                                gr.HTML("<h2 class='group-name'>velocity of each move</h2>")
                                velocity = gr.Plot(label="Velocity of each move", show_label=False, elem_id="velocity")
                            with gr.Column(min_width=300):
                                gr.HTML("<h2 class='group-name'>schedule</h2>")
                                schedule = gr.Plot(label="Schedule", show_label=False, elem_id="schedule")
                        with gr.Accordion("The same in Python", open=False):
                            code = gr.Code(language="python", show_label=False, interactive=False)
            with gr.Tab("Quality", id="quality") as quality_tab:
                with gr.Row(equal_height=False, elem_classes="split"):
                    with gr.Column(scale=1, min_width=288, elem_classes="aside"):
                        q_solver = gr.Dropdown(offered(s for s in SOLVERS if SOLVERS[s].calls), value="euler", label="Solver", elem_id="q-solver")
                        q_grid = gr.Dropdown([*GRIDS, NATIVE], value="uniform", label="Grid", info="native is the one of the solver's authors", filterable=False, elem_id="q-grid")
                        q_nfe = gr.Textbox(BUDGETS, label="NFE", info="network calls per sample, with commas", max_length=200)
                        against = gr.Dropdown([], value=[], multiselect=True, label="Compare with", info="other runs on the same data, with this solver and grid", elem_id="against")
                        q_n = gr.Slider(100, 5000, value=2000, step=100, label="Samples per score")
                        q_seed = gr.Number(settings().seed, label="Seed", precision=0, minimum=0)
                        with gr.Row():
                            fill = gr.Button("Measure missing points", variant="primary", elem_id="measure", scale=2, min_width=170, size="md")
                            halt = gr.Button("Stop", elem_id="halt", min_width=60, size="md")
                        progress = gr.HTML(elem_id="progress", min_height=60)
                    with gr.Column(scale=3, min_width=300):
                        chart = gr.Plot(label="Quality against NFE", show_label=False, elem_id="chart")
                        caption = gr.HTML(elem_id="caption")
                        scores = gr.HTML(elem_id="scores")
            with gr.Tab("Run", id="about") as about_tab:
                facts = gr.HTML(elem_id="facts")
                gr.HTML("<h2 class='group-name'>training</h2>")
                loss = gr.Plot(label="Training", show_label=False, elem_id="loss")
                made = gr.Code(language="shell", lines=1, label="Command that makes this run", interactive=False)
                with gr.Accordion("Configuration", open=False):
                    config = gr.HTML()
                everything = gr.HTML(shelf(), elem_id="shelf")

        form = [run, weights, head, solver, by, amount, grid, seed, count, label, guidance, lower, denoise]
        shown = [film, paths, velocity, schedule, done, code]
        decides = [by, amount, grid, weights, lower, denoise, head, guidance]
        fits = [line, against, label, count, paths, film, solver, q_solver, q_grid, q_nfe, *decides]
        sampling = dict(fn=sampled, inputs=form, outputs=shown, preprocess=False, show_progress="hidden", **solve)
        first = page.load(arrived, None, [run, everything, *fits], api_name="runs", **quick).success(**sampling | dict(fn=greeted), api_visibility="private")
        pressed = go.click(**sampling, api_name="sample")
        fresh = reseed.click(lambda: int.from_bytes(os.urandom(4), "big") % 1_000_000, None, seed, api_name="seed", **quick).success(**sampling, api_visibility="private")
        refit = run.input(fitted, [run, solver, q_solver, q_nfe], fits, api_name="fit", preprocess=False, **quick)
        changed = refit.success(**sampling, api_visibility="private")
        solver.input(decided, [run, solver], decides, api_name="decide", preprocess=False, **quick)
        stop.click(None, None, None, cancels=[pressed, fresh, changed, first], api_name=False)
        gr.on([c.change for c in (solver, by, amount, denoise)], cost, [solver, by, amount, denoise, run], price, preprocess=False, api_name="cost", **quick)
        curves = [chart, caption, scores]
        measuring = fill.click(measured, [run, q_solver, q_nfe, q_n, q_seed, against, q_grid], curves, preprocess=False, api_name="measure", show_progress="full", show_progress_on=progress, **solve)
        halt.click(None, None, None, cancels=[measuring], api_name=False)
        drawing = dict(fn=curve, inputs=[run, against, q_solver, q_grid], outputs=curves, preprocess=False, **quick)
        q_solver.input(budgeted, [run, q_solver, q_nfe], [q_grid, q_nfe], api_name="budget", preprocess=False, **quick)
        gr.on([quality_tab.select, against.change, q_solver.input, q_grid.change], **drawing, api_name="scores")
        about_tab.select(about, [run], [facts, loss, made, config], preprocess=False, api_name="about", **quick)
        refit.success(**drawing, api_visibility="private")
        run.input(about, [run], [facts, loss, made, config], preprocess=False, api_visibility="private", **quick)
    return page.queue(max_size=32)


def free_port(host: str, port: int) -> int:
    "The first free port from `port` on."
    for candidate in range(port, min(port + 100, 65536)):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind((host, candidate))
                return candidate
            except OSError:
                continue
    raise ValueError(f"port = {port}: no port from here to {min(port + 99, 65535)} is free on {host}")


def warm() -> None:
    "Open the default run and take two steps, so that the first visitor does not pay for the first call."
    try:
        for _ in zip(range(3), opened(preferred()).walk(index=8)):
            pass
    except Exception as e:
        LOG.warning("the default run could not be warmed up: %s", sentence(e))


def main(argv: list = None) -> int:
    "Start the explorer and serve until interrupted."
    parser = argparse.ArgumentParser(prog="explorer", description="Sample runs, watch every step, measure quality.")
    parser.add_argument("--port", type=int, help="default: port in settings.ini; the next free one is taken if it is busy")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on; the default is this machine only")
    parser.add_argument("--runs", nargs="*", default=[], metavar="NAME", help="show only these runs")
    asked = parser.parse_args(argv)
    try:
        asked.port = settings().port if asked.port is None else asked.port
        names = {r.name for r in runs()}
        for name in asked.runs:
            if name not in names:
                raise ValueError(f"unknown run {name!r}{guess(name, names)}")
        if not 1 <= asked.port <= 65535:
            raise ValueError(f"port = {asked.port} is out of range: 1 to 65535")
        port = free_port(asked.host, asked.port)
    except (ValueError, OSError) as e:
        print(f"explorer: {e}", file=sys.stderr)
        return 2
    ONLY[:] = asked.runs
    use_threads()
    if port != asked.port:
        print(f"port {asked.port} is busy, using {port} instead", flush=True)
    page = build()
    _, address, _ = page.launch(server_name=asked.host, server_port=port, share=False, inbrowser=False, quiet=True, prevent_thread_lock=True, show_error=False,
                                theme=THEME, css=CSS, js=KEYS, footer_links=[], run_history=False, enable_monitoring=False, ssr_mode=False, mcp_server=False)
    threading.Thread(target=warm, daemon=True).start()
    print(f"explorer ready at {address}  (Ctrl-C stops it)", flush=True)
    try:
        page.block_thread()
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
