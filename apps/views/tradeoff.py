"""Trade-off: quality against calls or time, for any runs and solvers, measured where points are
missing.
"""

import html
import shlex
from dataclasses import dataclass

import gradio as gr

from cudlab import tradeoff
from cudlab.config import Options, option
from cudlab.dode import NATIVE
from cudlab.evaluate import score_curve
from cudlab.multistep import SOLVERS
from cudlab.path import GRIDS
from cudlab.run import Run
from cudlab.scoring import PROTOCOL, why_incomparable
from views.ask import (
    MOST,
    Clock,
    as_one_line,
    csv_url,
    details_html,
    find_entry,
    listed_runs,
    names_of,
    open_run,
    solver_names,
    table_html,
)

VALUES = ("fd", "kd", "fd_inf", "precision", "recall", "density", "coverage", "sliced", "endpoint")
AXES = {"NFE": "nfe", "wall time": "ms"}
BASELINES = ("euler", "ab2", "dpmpp-2m", "unipc2-bh2")
BUDGETS = "1, 2, 4, 8, 16"


@dataclass
class Chart(Options):
    "What is drawn, and how a missing point is measured."

    value: str = option("fd", "which score", choices=VALUES)
    axis: str = option("NFE", "what it is drawn against", choices=tuple(AXES))
    grid: str = option("uniform", "time grid", choices=(*GRIDS, NATIVE))
    n: int = option(2000, "samples per score", low=16, high=MOST["n"])


def whole_numbers(text, what: str, low: int, high: int, most: int) -> list:
    "Numbers from what a person typed: 1, 2, 4."
    parts = [
        p
        for p in str("" if text is None else text).replace(";", ",").replace(" ", ",").split(",")
        if p
    ]
    for part in parts:
        if not part.isdecimal() or len(part) > 16 or not low <= int(part) <= high:
            raise ValueError(
                f"{what} = {part[:40]!r} is not a whole number from {low} to {high}; write them "
                f"as {low}, {low + 1}, {low + 2}"
            )
    if not parts or len(set(parts)) > most:
        raise ValueError(
            f"{what}: {'nothing is' if not parts else f'{len(set(parts))} numbers are'} given; "
            f"write 1 to {most} of them as {low}, {low + 1}, {low + 2}"
        )
    return sorted(set(map(int, parts)))


def beside(run: Run) -> tuple:
    """What a run is shown with unless asked otherwise: itself and its teacher; its own solver and
    the baselines.
    """
    shown = {r.name for r in listed_runs() if not r.damaged}
    kin = [
        n
        for n in (
            run.info.get("teacher", {}).get("name"),
            run.reference_run.name if run.reference_run else None,
        )
        if n in shown
    ]
    return list(dict.fromkeys([run.name, *kin])), list(
        dict.fromkeys([run.sampling_defaults["solver"], *BASELINES])
    )


def samples(run: Run) -> int:
    "Samples per score: as many as the run's scores have, so that a new point may join them."
    group = protocol(run.scores)
    return group[-1]["n"] if group and 16 <= group[-1].get("n", 0) <= MOST["n"] else Chart().n


def selected(names: list, solvers: list, grid: str) -> list:
    """The scores of these runs with these solvers on this grid; what is made for one grid or is a
    run of its own counts on it.
    """
    found = []
    for name in names:
        run = open_run(name)
        mine = {run.name, *solvers} if run.method.trains == "solver" else set(solvers)
        for score in run.scores:
            solver = score.get("solver")
            want = (run.sampling_fixed or {}).get("grid") or (
                SOLVERS[solver].grid if grid == NATIVE and solver in SOLVERS else grid
            )
            if solver in mine and (score.get("grid", "uniform") == want or solver not in SOLVERS):
                found.append(score)
    return found


def protocol(scores: list, newest: dict = None) -> list:
    """The largest set of scores that may share an axis, the newest where sizes tie; the one of a
    score that was just measured.
    """
    groups = []
    for score in scores:
        home = next((g for g in groups if not why_incomparable(g[0], score)), None)
        if home is None:
            groups.append([score])
        else:
            home.append(score)
    if newest:
        return next(g for g in groups if not why_incomparable(g[0], newest))
    return max(reversed(groups), key=len) if groups else []


def drawn(names: list, solvers: list, chart: Chart, newest: dict = None) -> tuple:
    "Chart, protocol in words, and the same as a table."
    scores = selected(names, solvers, chart.grid)
    group = protocol(scores, newest)
    have = [s for s in group if s.get(chart.value) is not None]
    if not have:
        why = (
            f"None of these scores holds {chart.value}: they are from before it was measured, or "
            "it does not exist for these runs."
            if group
            else "Nothing measured yet."
        )
        return (
            tradeoff.tradeoff_chart([], chart.value, AXES[chart.axis]),
            f"<p class='caption'>{why} Choose solvers and numbers of calls, then press <b>Measure "
            "missing points</b>.</p>",
            "",
        )
    words = ", ".join(
        f"{html.escape(k)} <b>{html.escape(str(group[0][k]))}</b>"
        for k in (*PROTOCOL, "device")
        if group[0].get(k) not in (None, "")
    )
    lines = {}
    for s in have:
        lines.setdefault(tradeoff.name_line(s), set()).add(s.get("seed", 0))
    single = sum(len(found) == 1 for found in lines.values())
    bars = (
        "Bars: 95 % intervals"
        + (
            " over the samples of the one seed"
            if single == len(lines)
            else " over the seeds"
            if not single
            else f" over the seeds; over the samples for {single} of {len(lines)} lines, which "
            "have one seed"
        )
        + "."
    )
    seeds = ", ".join(str(s) for s in sorted({s.get("seed", 0) for s in have}))
    note = next((s["note"] for s in have if s.get("note")), "")
    left = next(
        (
            f" {len(scores) - len(group)} scores are not on this axis: "
            f"{html.escape(why_incomparable(group[0], s))}."
            for s in scores
            if s not in group
        ),
        "",
    )
    timed = (
        " Times are those of the clock when each score was measured: other work on the machine "
        "lengthens them."
        if AXES[chart.axis] == "ms"
        else ""
    )
    looked = html.escape(", ".join(sorted({s["run"] for s in have if s.get("seen")})))
    caption = (
        f"<p class='caption'>Protocol: {words}, seeds <b>{seeds}</b>. "
        f"{bars}{f' {html.escape(note)}.' if note else ''}{left}"
        f"{f' Trained through features of this family, so not judged by them: <b>{looked}</b>.' if looked else ''}{timed}</p>"
    )
    columns = [
        "run",
        "solver",
        "grid",
        "head",
        "steps",
        "nfe",
        *VALUES,
        "reference",
        "seen",
        "straightness",
        "ms",
        "seconds",
        "seed",
        "n",
        "weights",
        "extractor",
        "machine",
    ]
    columns = [k for k in columns if any(s.get(k) is not None for s in have)]
    columns += [
        k
        for k in ("lower_order_final", "denoise")
        if any(s.get(k, tradeoff.USUAL_SAMPLING[k]) != tradeoff.USUAL_SAMPLING[k] for s in have)
    ]
    rows = sorted(
        have,
        key=lambda s: (
            str(s.get("run")),
            str(s.get("solver")),
            s.get("nfe") or 0,
            s.get("seed") or 0,
        ),
    )
    height = 400 + 18 * max(0, len(lines) - 4)
    return (
        tradeoff.tradeoff_chart(have, chart.value, AXES[chart.axis], height=height),
        caption,
        details_html(
            f"{len(rows)} scores as a table", table_html(rows, columns, f"{len(rows)} scores")
        ),
    )


def scores(names, solvers, value="fd", axis="NFE", grid="uniform") -> tuple:
    "What is measured of these runs and solvers: (chart, protocol in words, table)."
    with as_one_line():
        return drawn(
            names_of(names, "runs", 24),
            names_of(solvers, "solvers", 12),
            Chart(value=value, axis=axis, grid=grid),
        )


def measured(names, solvers, value, axis, grid, wanted, n, seeds, progress=gr.Progress()):
    "Measure the points that are missing, one by one: (chart, protocol, table) after each."
    with as_one_line():
        chart, clock = Chart(value=value, axis=axis, grid=grid, n=n), Clock(5)
        names, solvers = names_of(names, "runs", 24), names_of(solvers, "solvers", 12)
        budgets, seeds = (
            whole_numbers(wanted, "NFE", 1, MOST["nfe"], MOST["scores"]),
            whole_numbers(seeds, "seeds", 0, 2**53 - 1, 10),
        )
        jobs = []
        for name in names:
            run = open_run(name)
            offered = solver_names(run)
            for solver in solvers:
                if solver not in SOLVERS:
                    find_entry(solver)
                if solver in offered:
                    made = find_entry(solver, run)
                    fixed = {k: made.made_for[k] for k in ("head", "guidance")} if made.ts else {}
                    on = (
                        run.sampling_fixed["grid"]
                        if run.sampling_fixed
                        else made.grid
                        if made.ts
                        else chart.grid
                    )
                    jobs += [
                        (run, solver, dict(seed=seed, n=chart.n, grid=on, **fixed))
                        for seed in seeds
                    ]
        if not jobs:
            raise ValueError(
                f"none of these solvers goes with {', '.join(names)[:80]}; choose another solver"
            )
        made, newest = 0, None
        for at, (run, solver, how) in enumerate(jobs):

            def tell(done, size, at=at, run=run, solver=solver):
                clock.check()
                progress(
                    (at * size + done, len(jobs) * size),
                    desc=f"{run.name}, {solver}: line {at + 1} of {len(jobs)}",
                    unit="samples",
                )

            for score in score_curve(run, (solver,), tuple(budgets), progress=tell, **how):
                run.add_score(score)
                made, newest = made + 1, score
                yield drawn(names, solvers, chart, newest)
        if not made:
            gr.Info("All of these points are measured already, or not possible.", duration=4)
        yield drawn(names, solvers, chart, newest)


def exported(names, solvers, value="fd", axis="NFE", grid="uniform") -> tuple:
    "(a data address, a file name) of the scores that are drawn, as CSV with their whole protocol."
    with as_one_line():
        chart = Chart(value=value, axis=axis, grid=grid)
        rows = [
            s
            for s in protocol(
                selected(names_of(names, "runs", 24), names_of(solvers, "solvers", 12), chart.grid)
            )
            if s.get(chart.value) is not None
        ]
        if not rows:
            raise ValueError(
                "nothing is measured of these runs and solvers yet, so there is nothing to save"
            )
        return csv_url(rows), "trade-off.csv"


def job(names, solvers, grid, wanted, n, seeds, **how) -> str:
    "The command that measures the same."
    with as_one_line():
        row = lambda v: " ".join(map(str, v))
        given = (
            dict(
                run=row(names_of(names, "runs", 24)),
                solvers=row(names_of(solvers, "solvers", 12)),
                nfes=row(whole_numbers(wanted, "NFE", 1, MOST["nfe"], MOST["scores"])),
                seeds=row(whole_numbers(seeds, "seeds", 0, 2**53 - 1, 10)),
                n=Chart(n=n, grid=grid).n,
                grid=grid,
            )
            | how
        )
        return "papermill nbs/evaluate.ipynb scores.ipynb " + " ".join(
            f"-p {k} {shlex.quote(str(v))}" for k, v in given.items()
        )
