"Runs: find one among a thousand, open it, read all about it, and see in what runs differ."

import json
import shlex
import time
from dataclasses import dataclass, fields
from types import SimpleNamespace

import gradio as gr
from markup import (
    bold,
    caption_html,
    code_html,
    count_noun,
    details_html,
    escape,
    figures_html,
    heading_html,
    read_static,
    table_html,
)
from offer import class_choices, listed_runs, open_run, recent_log, sound_runs
from request import LIMITS, as_one_line, error_line, parse_names

from cudlab import plot
from cudlab.catalog import RunInfo, config_diff
from cudlab.config import Config, Options, get_settings, option
from cudlab.flags import flags_of
from cudlab.methods import METHODS
from cudlab.run import Run
from cudlab.training import format_params
from views import PRIVATE, QUICK

ALL = "all"
HEADERS = ["run", "method", "data", "steps", "parameters", "fd", "NFE", "measured with"]
HEADERS += ["changed", "state"]
LIST_HTML = "<div class='runs-list' role='group' aria-label='runs' tabindex='0'></div>"
NUMERIC = [HEADERS.index(header) for header in ("steps", "parameters", "fd", "NFE")]


# The list


@dataclass
class Filter(Options):
    "Which runs are listed."

    method: str = option(ALL, "what trained them", choices=(ALL, *METHODS))
    data: str = option(ALL, "data set")
    text: str = option("", "words that must all occur in name, method, data, teacher or state")

    def passes(self, info: RunInfo) -> bool:
        "Whether a run is listed."
        words = (info.name, info.method, info.data, info.teacher, describe_state(info))
        line = " ".join(words).casefold()
        return (
            self.method in (ALL, info.method)
            and self.data in (ALL, info.data)
            and all(word in line for word in self.text.casefold().split())
        )


def describe_state(info: RunInfo) -> str:
    "What a run is doing, in a word or with the reason."
    if info.damaged:
        return f"damaged: {info.damaged.removeprefix(f'run {info.name!r} is damaged: ')}"
    state = "shipped" if info.shipped else "yours"
    if info.status == "new":
        state = "new"
    elif info.status != "done":
        state = f"{info.status} at {info.step:,} of {info.steps:,}"
    return f"{state}; {info.odd}" if info.odd else state


def describe_best(best: dict) -> str:
    "How the best score of a run was measured."
    head = "" if best["head"] == 1 else f", head {best['head']}"
    seeds = count_noun(best["seeds"], "seed")
    return f"fd@{best['extractor']}, {best['solver']}{head}, {seeds}"


def make_row(info: RunInfo) -> list:
    "A run as a row of the list, in the order of HEADERS."
    best = info.best or {}
    sizes = [None, None] if info.damaged else [info.step, info.parameters]
    score = [None, None, ""]
    if best:
        score = [float(f"{best['fd']:.4g}"), best["nfe"], describe_best(best)]
    changed = (info.changed or info.created)[:16].replace("T", " ")
    return [info.name, info.method, info.data, *sizes, *score, changed, describe_state(info)]


def browse_runs(method: str = ALL, data: str = ALL, text: str = "") -> list:
    """The runs that pass the filter: rows of run, method, data, steps, parameters, fd, NFE,
    measured with, changed, state.
    """
    with as_one_line():
        wanted = Filter(method=method or ALL, data=data or ALL, text=text or "")
        if len(wanted.text) > 200:
            raise ValueError(
                f"text = {wanted.text[:40]!r}... has {len(wanted.text):,} characters; at most "
                "200 are read"
            )
        return [make_row(info) for info in listed_runs() if wanted.passes(info)]


def update_list(method=ALL, data=ALL, text="") -> tuple:
    "What the filter does to the page: the list and the line above it."
    rows = browse_runs(method, data, text)
    line = f"{count_noun(len(rows), 'run')}. Choose a row to open it everywhere."
    value = dict(headers=HEADERS, numeric=NUMERIC, rows=rows)
    return json.dumps(value), caption_html(line, status=True)


def refresh_list(method=ALL, data=ALL, text="", beside=None) -> tuple:
    "What opening the view shows: the data sets and runs there are now, and the filtered list."
    with as_one_line():
        names = [info.name for info in sound_runs()]
        sets = sorted({info.data for info in listed_runs() if info.data})
        data = data if data in sets else ALL
        kept = [name for name in beside or [] if name in names]
    return (
        gr.update(choices=[ALL, *sets], value=data),
        gr.update(choices=names, value=kept),
        *update_list(method, data, text),
    )


def on_row(event: gr.EventData) -> tuple:
    "The run of the row that was clicked, and a sign that it was."
    with as_one_line():
        name = open_run((event._data or {}).get("name")).name
        return name, (name, time.time())


# Several runs


def show_differences(names=None) -> str:
    "The configuration keys in which up to six runs differ, as a table."
    with as_one_line():
        names = parse_names(names, "beside") if names else []
        if len(names) < 2:
            return caption_html("Choose two to six runs to see in what they differ.")
        rows = config_diff([open_run(name) for name in names])
        if not rows:
            return caption_html("These runs have the same configuration.")
        for row in rows:
            row |= {key: "–" if value is None else str(value) for key, value in row.items()}
        return table_html(rows, f"{len(rows)} keys differ")


# One run


def train_again_command(run: Run) -> str:
    "The command line that trains this run, or one like it where it ships with the lab."
    ships = run.dir.parent == get_settings().checkpoints_path
    name = f"{run.name}-own" if ships else run.name
    return shlex.join(["cudlab", "train", *flags_of(run.config), "--name", name])


def format_number(value: float, deviation: float) -> str:
    "A learned number with its spread."
    return f"{value:.3f}\u00a0±\u00a0{deviation:.3f}" if deviation else f"{value:.3f}"


def describe_numbers(run: Run) -> str:
    """What a run that holds a solver has learned, in a line each: the numbers with their spread,
    and for which network.
    """
    if run.method.trains != "solver":
        return ""
    tensors = run.tensors("ema.safetensors")
    batches = tensors["solver.by_batch"][: tensors["solver.done"]]
    words = "Nothing is learned yet."
    if len(batches):
        spread = batches.std(0) if len(batches) > 1 else 0 * batches[0]
        lines = []
        for values, deviations in zip(tensors["solver.lam"].tolist(), spread.tolist()):
            lines.append(" / ".join(map(format_number, values, deviations)))
        words = (
            f"Learned numbers, one a call, mean ± standard deviation over {len(batches)} batches: "
            f"{code_html(', '.join(lines))}."
        )
    teacher = run.info["teacher"]
    network = (
        f"A solver for the network of {bold(teacher['name'])}, step {teacher['step']:,}, "
        f"SHA-256 {code_html(teacher['network'][:12])}."
    )
    return caption_html(words) + caption_html(network)


def losses_table(run: Run) -> str:
    "The log of a training as a table, thinned to twenty rows."
    rows = []
    for line in recent_log(run):
        if "step" in line:
            loss = line.get("loss")
            losses = loss if isinstance(loss, dict) else {"loss": loss}
            rows.append({"step": line["step"]} | losses)
    if not rows:
        return ""
    rows = rows[:: max(1, -(-len(rows) // 20))]
    table = table_html(rows, "loss at every twentieth of the training")
    return details_html("the same as a table", table)


def draw_training(run: Run):
    "The training curve; where a solver was fitted, its error on held-out noise after each batch."
    chart = plot.training_chart(recent_log(run))
    if run.method.trains == "solver":
        dtick = max(1, run.num_steps // 10)
        chart.update_xaxes(title_text="calibration batch", tickformat="d", dtick=dtick)
        chart.update_yaxes(title_text="held-out error")
    return chart


def summarize_run(run: Run) -> str:
    "The figures of a run."
    unit = "fitted batches" if run.method.trains == "solver" else "trained steps"
    parameters = format_params(run.info["parameters"]).removesuffix(" parameters")
    return figures_html(
        [
            ("run", run.name),
            ("method", run.config.method),
            ("data", run.config.data),
            (unit, f"{run.step:,} of {run.num_steps:,}"),
            ("parameters", parameters),
            ("heads", run.heads),
            ("classes", len(class_choices(run)) or "none"),
        ]
    )


def describe_files(run: Run) -> str:
    "Whether the files are as they were saved, what the run was made from, when and where."
    try:
        files, numbers = f"all {run.verify()} files match their SHA-256", describe_numbers(run)
    except ValueError as e:
        files, numbers = error_line(e), ""
    parts = [f"Files: {files}."]
    if teacher := run.info.get("teacher", {}).get("name", ""):
        parts.append(f"Teacher {bold(teacher)}.")
    created = escape(run.info["created"][:16].replace("T", " "))
    parts.append(f"Created {created} UTC. Folder {code_html(run.dir)}")
    return numbers + caption_html(" ".join(parts))


def config_table(config: Config) -> str:
    "Every key of a configuration with its meaning."
    rows = [
        dict(
            key=field.name,
            value=str(getattr(config, field.name)),
            meaning=field.metadata.get("help", ""),
        )
        for field in fields(config)
    ]
    return table_html(rows, "configuration")


def show_run(name) -> tuple:
    """Everything known of a run: summary, training curve and the same as a table, command,
    configuration.
    """
    if name is None:
        return caption_html("Choose a run."), None, "", "", ""
    with as_one_line():
        run = open_run(name)
        return (
            summarize_run(run) + describe_files(run),
            draw_training(run),
            losses_table(run),
            train_again_command(run),
            config_table(run.config),
        )


# The page


def build_filter() -> list:
    "Which runs are listed."
    small = dict(value=ALL, min_width=130)
    with gr.Row(equal_height=False, elem_classes="filters"):
        method = gr.Dropdown([ALL, *METHODS], label="Method", elem_id="runs-method", **small)
        data = gr.Dropdown([ALL], label="Data", elem_id="runs-data", **small)
        text = gr.Textbox(
            label="Words",
            placeholder="name, state, ...",
            lines=1,
            max_lines=1,
            max_length=200,
            elem_id="runs-text",
            min_width=180,
        )
    return [method, data, text]


def build_run() -> list:
    "What is known of one run, in the order of `show_run`."
    gr.HTML(heading_html("this run"))
    facts = gr.HTML(elem_id="facts")
    loss = gr.Plot(label="Training", show_label=False, elem_id="loss")
    log = gr.HTML(elem_id="log")
    command = gr.Code(
        language="shell", lines=1, label="Command that makes this run", interactive=False
    )
    with gr.Accordion("Configuration", open=False):
        config = gr.HTML(elem_id="config")
    return [facts, loss, log, command, config]


def build(run: gr.Dropdown) -> SimpleNamespace:
    "The tab and its wiring; `opened` is the event after which the list has chosen a run."
    with gr.Tab("Runs", id="runs") as tab:
        gr.api(browse_runs, api_name="browse")
        filters = build_filter()
        count = gr.HTML(elem_id="runs-count")
        listed = gr.HTML(
            "",
            html_template=LIST_HTML,
            js_on_load=read_static("runs.js"),
            css_template=read_static("runs.css"),
            apply_default_css=False,
            elem_id="runs-table",
        )
        opened = gr.State()
        about = build_run()
        gr.HTML(heading_html("differences"))
        beside = gr.Dropdown(
            [],
            value=[],
            multiselect=True,
            max_choices=LIMITS["beside"],
            label="Runs beside each other",
            info="two to six",
            elem_id="runs-beside",
        )
        differences = gr.HTML(show_differences(), elem_id="differences")
    typed = [control.input for control in filters]
    latest = PRIVATE | dict(trigger_mode="always_last")
    gr.on(typed, update_list, filters, [listed, count], **latest)
    refreshed = [filters[1], beside, listed, count]
    tab.select(refresh_list, [*filters, beside], refreshed, **PRIVATE)
    beside.change(show_differences, beside, differences, api_name="differences", **QUICK)
    gr.on([tab.select, run.change], show_run, run, about, api_name="about", **QUICK)
    listed.click(on_row, None, [run, opened], **PRIVATE)
    return SimpleNamespace(opened=opened.change)
