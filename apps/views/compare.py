"Compare: up to four ways of sampling on the same noise."

import json

import gradio as gr
import torch

from cudlab import plot
from cudlab.metrics import interval, keep
from cudlab.solver import solve
from cudlab.trajectory import rms
from views.ask import (
    NAMES,
    Walk,
    asked,
    data_url,
    entry,
    flat,
    in_words,
    kept,
    manifest,
    numbers,
    opened,
    possible,
    remember,
    table,
    timed,
    trajectory,
)
from views.trajectory import cloud, mosaic, reference


NONE = "none"
COLUMN = ("run", "solver", "amount", "grid", "weights", "head")
LETTERS = "ABCD"


def goal(walk: Walk) -> tuple:
    "(name of the reference, where its flow takes this noise); computed once."
    name, flow = reference(walk)
    ask, root = walk.ask, walk.run.root

    def compute():
        x = next(walk.run.walk(**walk.choices)).x.cpu()
        with torch.no_grad():
            return solve(flow, x, torch.linspace(1, 0, 65), "heun", root.noise_path).x

    return name, keep(
        (
            "goal",
            str(root.path),
            manifest(root.path),
            walk.run.config.method,
            ask.weights,
            ask.head,
            ask.guidance,
            ask.label,
            ask.seed,
            ask.count,
        ),
        compute,
    )


def paired(values: torch.Tensor) -> str:
    "Mean and 95 % interval over the samples."
    mean, low, high = interval(values.tolist())
    return f"{mean:.4f}" if len(values) < 2 else f"{mean:.4f} [{low:.4f}, {high:.4f}]"


def columns_of(seed, count, row) -> list:
    "The columns that are in use, as walks: [(letter, walk), ...]."
    found = []
    for k, letter in enumerate(LETTERS):
        values = dict(zip(COLUMN, row[k * len(COLUMN) : (k + 1) * len(COLUMN)]))
        if values.get("run") in (None, "", NONE):
            continue
        form = (
            dict(
                by="NFE",
                seed=seed,
                count=count,
                label="any",
                guidance=1.0,
                lower_order_final="auto",
                denoise=True,
            )
            | values
        )
        try:
            walk = asked([form[n] for n in NAMES])
            if why := walk.run.refuses(
                **{k: walk.choices[k] for k in ("solver", "steps", "grid", "denoise", "guidance")}
            ):
                raise ValueError(why)
            found.append((letter, walk))
        except ValueError as e:
            raise ValueError(f"column {letter}: {e}") from None
    if not found:
        raise ValueError("no column has a run; choose one in A")
    first = found[0][1].run
    for letter, walk in found[1:]:
        if walk.run.shape != first.shape:
            raise ValueError(
                f"column {letter}: {walk.run.name} makes samples of "
                f"{' x '.join(map(str, walk.run.shape))}, {first.name} of "
                f"{' x '.join(map(str, first.shape))}; their noise cannot be the same"
            )
    return found


def compared(seed, count, *row):
    "Stream the columns: (their pictures, their points, figures, table) as each is done."
    with in_words():
        columns, lines, ends, spent = columns_of(seed, count, row), [], {}, {}
        plane = flat(columns[0][1].run)
        text = ""
        for letter, walk in columns:
            states, spent[letter] = [], 0.0
            for state, took in timed(walk.states()):
                spent[letter] += took
                states.append(state)
                yield (
                    text,
                    gr.skip(),
                    numbers([("column", f"{letter}, step {state.i} of {walk.steps}")]),
                    "",
                )
            tau = trajectory(states, walk.run)
            remember(walk, tau)
            ends[letter] = tau
            if not plane:
                sheet = mosaic(tau.x)
                text = text or json.dumps(dict(w=sheet.width, h=sheet.height)) + "\n"
                text += (
                    json.dumps(
                        dict(
                            letter=letter,
                            name=name_of(walk),
                            words=f"{tau.nfe:g} NFE, {1000 * spent[letter]:.0f} ms",
                            src=data_url(plot.encoded(sheet), "image/png"),
                        )
                    )
                    + "\n"
                )
                yield text, gr.skip(), gr.skip(), gr.skip()
        figure = (
            plot.endpoints(
                {f"{letter} {name_of(walk)}": ends[letter].x for letter, walk in columns},
                cloud(columns[0][1].run.config.data),
            )
            if plane
            else None
        )
        yield text, figure, numbers([("the reference", "Heun, 64 steps")]), gr.skip()
        apart = {}
        for letter, walk in columns:
            tau = ends[letter]
            line = {
                "": letter,
                "sampled": name_of(walk),
                "steps": walk.steps,
                "NFE": f"{tau.nfe:g}",
                "solver time": f"{1000 * spent[letter]:.0f} ms",
            }
            try:
                name, x = goal(walk)
                apart[letter] = rms(tau.x - x)
                line |= {"reference": name, "distance to it": paired(apart[letter])}
            except ValueError as e:
                line |= {"reference": str(e)[:120]}
            first = columns[0][0]
            if letter != first:
                line[f"from {first}"] = paired(rms(tau.x - ends[first].x))
                if letter in apart and first in apart:
                    line[f"nearer than {first} by"] = paired(apart[first] - apart[letter])
            lines.append(line)
        names = list(dict.fromkeys(k for line in lines for k in line))
        yield (
            text,
            gr.skip(),
            numbers(
                [
                    ("samples", columns[0][1].ask.count),
                    ("seed", columns[0][1].ask.seed),
                    ("columns", len(columns)),
                ]
            ),
            table(
                lines,
                names,
                "root mean square distances, mean over the samples and 95 % interval; the same "
                "noise in every column",
            ),
        )


def name_of(walk: Walk) -> str:
    "A column in words."
    ask = walk.ask
    rest = [
        *([f"grid {ask.grid}"] if ask.grid != "uniform" else []),
        *([ask.weights] if ask.weights != "ema" else []),
        *([f"head {ask.head}"] if ask.head > 1 else []),
    ]
    return ", ".join(
        [ask.run, *([ask.solver] if ask.solver != ask.run else []), f"{ask.amount} NFE", *rest]
    )


def seated(name, solver="euler", amount=4) -> tuple:
    """Solver, NFE, grid and head of a column when its run or solver is chosen: what that leaves no
    choice about is set.
    """
    with in_words():
        if name in (None, "", NONE):
            return gr.skip(), gr.skip(), gr.skip(), gr.skip()
        run = opened(name)
        solver = solver if solver in possible(run) else kept(run, possible(run), solver)
        made = entry(solver, run)
        if run.fixed:
            return solver, made.calls(run.fixed["steps"]), run.fixed["grid"], 1
        if made.ts:
            return solver, made.calls(len(made.ts) - 1), made.grid, made.made_for["head"]
        return (
            solver,
            run.own["steps"] if amount == 1 else gr.skip(),
            gr.skip(),
            gr.skip() if run.heads > 1 else 1,
        )


def script(seed, count, *row) -> str:
    "The Python that makes the same columns."
    with in_words():
        made = {letter.lower(): walk.script() for letter, walk in columns_of(seed, count, row)}
        a, b = [*made, *made][:2]
        return "\n".join(
            [
                "from cudlab.run import Run",
                "",
                *(f"{k} = {v}" for k, v in made.items()),
                f"({a}.x - {b}.x).square().mean().sqrt()" if len(made) > 1 else f"{a}.x",
            ]
        )
