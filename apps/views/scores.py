"Scores that may share an axis: which a chart shows, and what is to be said of them."

from dataclasses import dataclass, replace

from markup import bold, caption_html, details_html, escape, table_html
from offer import open_run, sound_runs
from request import LIMITS, parse_names

from cudlab import tradeoff
from cudlab.config import Options, option
from cudlab.dode import NATIVE
from cudlab.path import GRIDS
from cudlab.run import Run
from cudlab.scoring import PROTOCOL, why_incomparable
from cudlab.solver import SOLVERS

VALUES = ("fd", "kd", "fd_inf", "precision", "recall", "density", "coverage", "sliced", "endpoint")
AXES = {"NFE": "nfe", "wall time": "ms"}
BASELINES = ("euler", "ab2", "dpmpp-2m", "unipc2-bh2")
COLUMNS = (
    *("run", "solver", "grid", "head", "steps", "nfe", *VALUES, "reference", "seen"),
    *("straightness", "ms", "seconds", "seed", "n", "weights", "extractor", "machine"),
)


@dataclass
class Chart(Options):
    "What is drawn, and how a missing point is measured."

    value: str = option("fd", "which score", choices=VALUES)
    axis: str = option("NFE", "what it is drawn against", choices=tuple(AXES))
    grid: str = option("uniform", "time grid", choices=(*GRIDS, NATIVE))
    n: int = option(2000, "samples per score", low=16, high=LIMITS["n"])
    runs: tuple = ()
    solvers: tuple = ()

    @property
    def cost(self) -> str:
        "The key of a score that the axis shows."
        return AXES[self.axis]


def parse_chart(runs, solvers, **choices) -> Chart:
    "A checked chart from what a client chose."
    chart = Chart(**choices)
    return replace(
        chart,
        runs=tuple(parse_names(runs, "runs")),
        solvers=tuple(parse_names(solvers, "solvers")),
    )


def default_choice(run: Run) -> tuple:
    """What a run is shown with unless asked otherwise: itself and its teacher; its own solver and
    the baselines.
    """
    names = [run.name, run.info.get("teacher", {}).get("name")]
    if run.reference_run:
        names.append(run.reference_run.name)
    shown = {info.name for info in sound_runs()}
    kin = [name for name in dict.fromkeys(names) if name in shown]
    return kin, list(dict.fromkeys([run.sampling_defaults["solver"], *BASELINES]))


def default_count(run: Run) -> int:
    "Samples per score: as many as the run's scores have, so that a new point may join them."
    group = largest_protocol(run.scores)
    n = group[-1].get("n", 0) if group else 0
    return n if 16 <= n <= LIMITS["n"] else Chart().n


def is_drawn(score: dict, run: Run, chart: Chart) -> bool:
    """Whether a chart shows this score: of its solvers, on its grid; what is made for one grid, or
    is a run of its own, counts on every one.
    """
    solver = score.get("solver")
    own = run.method.trains == "solver" and solver == run.name
    if not own and solver not in chart.solvers:
        return False
    if solver not in SOLVERS:
        return True
    grid = SOLVERS[solver].grid if chart.grid == NATIVE else chart.grid
    if run.sampling_fixed:
        grid = run.sampling_fixed["grid"]
    return score.get("grid", "uniform") == grid


def find_scores(chart: Chart) -> list:
    "The scores of the chart's runs with its solvers on its grid."
    scores = []
    for run in map(open_run, chart.runs):
        scores += [score for score in run.scores if is_drawn(score, run, chart)]
    return scores


def largest_protocol(scores: list, newest: dict = None) -> list:
    """The largest set of scores that may share an axis, the newest where sizes tie; the one of a
    score that was just measured.
    """
    groups = []
    for score in scores:
        home = next((group for group in groups if not why_incomparable(group[0], score)), None)
        if home is None:
            groups.append([score])
        else:
            home.append(score)
    if newest:
        return next(group for group in groups if not why_incomparable(group[0], newest))
    return max(reversed(groups), key=len) if groups else []


# The chart in words


def group_seeds(scores: list) -> dict:
    "The seeds each line of the chart was measured with."
    seeds = {}
    for score in scores:
        seeds.setdefault(tradeoff.name_line(score), set()).add(score.get("seed", 0))
    return seeds


def describe_bars(seeds: dict) -> str:
    "What the intervals are over, for lines with these seeds."
    single = sum(len(found) == 1 for found in seeds.values())
    over = "over the seeds"
    if single == len(seeds):
        over = "over the samples of the one seed"
    elif single:
        over += f"; over the samples for {single} of {len(seeds)} lines, which have one seed"
    return f"Bars: 95 % intervals {over}."


def describe_protocol(group: list) -> str:
    "What all scores of a group have in common."
    first = group[0]
    known = [key for key in (*PROTOCOL, "device") if first.get(key) not in (None, "")]
    seeds = sorted({score.get("seed", 0) for score in group})
    parts = [f"{escape(key)} {bold(first[key])}" for key in known]
    return f"Protocol: {', '.join(parts)}, seeds {bold(', '.join(map(str, seeds)))}."


def describe_group(chart: Chart, group: list, others: list) -> str:
    "Protocol, intervals and warnings of the scores that are drawn; `others` are not on the axis."
    parts = [describe_protocol(group), describe_bars(group_seeds(group))]
    if notes := [score["note"] for score in group if score.get("note")]:
        parts.append(f"{escape(notes[0])}.")
    if others:
        why = escape(why_incomparable(group[0], others[0]))
        parts.append(f"{len(others)} scores are not on this axis: {why}.")
    if seen := sorted({score["run"] for score in group if score.get("seen")}):
        parts.append(
            "Trained through features of this family, so not judged by them: "
            f"{bold(', '.join(seen))}."
        )
    if chart.cost == "ms":
        parts.append(
            "Times are those of the clock when each score was measured: other work on the "
            "machine lengthens them."
        )
    return caption_html(" ".join(parts))


def describe_nothing(chart: Chart, group: list) -> str:
    "Why there is no point on the chart."
    why = "Nothing measured yet."
    if group:
        why = (
            f"None of these scores holds {chart.value}: they are from before it was measured, or "
            "it does not exist for these runs."
        )
    return caption_html(
        f"{why} Choose solvers and numbers of calls, then press {bold('Measure missing points')}."
    )


def scores_table(scores: list) -> str:
    "The scores that are drawn as a table."
    columns = [key for key in COLUMNS if any(score.get(key) is not None for score in scores)]
    for key in ("lower_order_final", "denoise"):
        usual = tradeoff.USUAL_SAMPLING[key]
        if any(score.get(key, usual) != usual for score in scores):
            columns.append(key)

    def place(score: dict) -> tuple:
        names = str(score.get("run")), str(score.get("solver"))
        return *names, score.get("nfe") or 0, score.get("seed") or 0

    name = f"{len(scores)} scores"
    table = table_html(sorted(scores, key=place), name, columns)
    return details_html(f"{name} as a table", table)


def draw_chart(chart: Chart, newest: dict = None) -> tuple:
    "Chart, if there is anything to draw, protocol in words, and the same as a table."
    scores = find_scores(chart)
    group = largest_protocol(scores, newest)
    drawn = [score for score in group if score.get(chart.value) is not None]
    if not drawn:
        return None, describe_nothing(chart, group), ""
    others = [score for score in scores if score not in group]
    height = 400 + 18 * max(0, len(group_seeds(drawn)) - 4)
    figure = tradeoff.tradeoff_chart(drawn, chart.value, chart.cost, height=height)
    return figure, describe_group(chart, drawn, others), scores_table(drawn)
