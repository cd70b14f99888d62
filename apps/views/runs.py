"Runs: find one among a thousand, open it, read all about it, and see in what runs differ."

import html
import json
import shlex
import time
from dataclasses import MISSING, dataclass, fields

import gradio as gr

from cudlab import plot
from cudlab.catalog import RunInfo, config_diff
from cudlab.config import Options, option
from cudlab.methods import METHODS
from cudlab.run import Run
from cudlab.training import format_params
from views.ask import (
    as_one_line,
    class_choices,
    details_html,
    error_line,
    figures_html,
    listed_runs,
    names_of,
    open_run,
    table_html,
)

ALL = "all"
MOST_BESIDE = 6
HEADERS = [
    "run",
    "method",
    "data",
    "steps",
    "parameters",
    "fd",
    "NFE",
    "measured with",
    "changed",
    "state",
]
NUMERIC = [HEADERS.index(h) for h in ("steps", "parameters", "fd", "NFE")]

# A thousand rows at once: the grid that comes with Gradio holds the page for seconds, a plain table
# does not.
LIST = """
const numeric = new Set(NUMERIC), order = {by: -1, up: true};
const box = element.querySelector('.runs-list'), make = (tag, text) => { const e = document.createElement(tag); if (text !== undefined) e.textContent = text; return e; };
let rows = [], now = null;
const shown = (v, k) => v === null ? '' : numeric.has(k) ? v.toLocaleString('en-US', Number.isInteger(v) ? {} : {maximumSignificantDigits: 4}) : v;
const sorted = () => order.by < 0 ? rows : [...rows].sort((a, b) => {
  const [x, y] = [a[order.by], b[order.by]], none = (v) => v === null || v === '';
  if (none(x) || none(y)) return none(x) - none(y);
  return (numeric.has(order.by) ? x - y : String(x).localeCompare(String(y), 'en', {numeric: true})) * (order.up ? 1 : -1);
});
const draw = () => {
  const table = make('table'), head = table.createTHead().insertRow(), body = table.createTBody();
  HEADERS.forEach((name, k) => {
    const cell = make('th'), button = make('button', name + (order.by === k ? (order.up ? ' ↑' : ' ↓') : ''));
    cell.scope = 'col';
    if (numeric.has(k)) cell.className = 'number';
    cell.ariaSort = order.by !== k ? 'none' : order.up ? 'ascending' : 'descending';
    button.onclick = () => { order.up = order.by === k ? !order.up : k !== 8; order.by = k; draw(); box.querySelectorAll('th button')[k].focus(); };
    cell.append(button);
    head.append(cell);
  });
  for (const row of sorted()) {
    const line = body.insertRow();
    if (row[0] === now) line.ariaCurrent = 'true';
    line.onclick = () => { now = row[0]; body.querySelectorAll('[aria-current]').forEach((e) => { e.ariaCurrent = null; }); line.ariaCurrent = 'true'; trigger('click', {name: row[0]}); };
    row.forEach((value, k) => {
      const cell = line.insertCell();
      if (numeric.has(k)) cell.className = 'number';
      cell.title = k === 0 || k === 9 ? value : '';
      cell.append(k ? shown(value, k) : make('button', value));
    });
  }
  box.replaceChildren(table);
};
const read = () => { try { rows = JSON.parse(props.value || '[]'); } catch { rows = []; } draw(); };
watch('value', read);
read();
""".replace("NUMERIC", json.dumps(NUMERIC)).replace("HEADERS", json.dumps(HEADERS))
LIST_CSS = """
.runs-list {overflow: auto; max-height: 420px; border-bottom: 1px solid var(--border-color-primary)}
table {border-collapse: separate; border-spacing: 0; width: 100%; font-size: 14px; margin: 0; border: 0}
tr {border: 0; background: transparent}
th, td {text-align: left; padding: 5px 20px 5px 0; border: 0; border-bottom: 1px solid var(--border-color-primary); color: var(--body-text-color); white-space: nowrap; font-variant-numeric: tabular-nums;
  max-width: 300px; overflow: hidden; text-overflow: ellipsis; vertical-align: baseline}
th {position: sticky; top: 0; z-index: 1; background: var(--body-background-fill)}
th.number, td.number {text-align: right}
button {font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; text-align: inherit; white-space: nowrap}
th button {font-variant-caps: all-small-caps; letter-spacing: .07em; font-size: 15px; font-weight: 400; color: var(--body-text-color-subdued)}
th[aria-sort=ascending] button, th[aria-sort=descending] button {color: var(--body-text-color)}
tbody tr {cursor: pointer}
tbody tr:hover td, tbody tr[aria-current] td {background: var(--background-fill-secondary)}
tbody tr[aria-current] td:first-child {font-weight: 600}
"""


# The list


@dataclass
class Filter(Options):
    "Which runs are listed."

    method: str = option(ALL, "what trained them", choices=(ALL, *METHODS))
    data: str = option(ALL, "data set")
    text: str = option("", "words that must all occur in name, method, data, teacher or state")


def state(r: RunInfo) -> str:
    "What a run is doing, in a word or with the reason."
    if r.damaged:
        return f"damaged: {r.damaged.removeprefix(f'run {r.name!r} is damaged: ')}"
    at = "" if r.status in ("done", "new") else f" at {r.step:,} of {r.steps:,}"
    word = (
        "shipped"
        if r.shipped and r.status == "done"
        else "yours"
        if r.status == "done"
        else r.status
    )
    return word + at


def row(r: RunInfo) -> list:
    "A run as a row of the table, in the order of HEADERS."
    best = r.best or {}
    head = f", head {best['head']}" if best and best["head"] != 1 else ""
    space = (
        f"fd@{best['extractor']}, {best['solver']}{head}, {best['seeds']} "
        f"{'seed' if best['seeds'] == 1 else 'seeds'}"
        if best
        else ""
    )
    fine = not r.damaged
    return [
        r.name,
        r.method,
        r.data,
        r.step if fine else None,
        r.parameters if fine else None,
        best and float(f"{best['fd']:.4g}") or None,
        best.get("nfe"),
        space,
        (r.changed or r.created)[:16].replace("T", " "),
        state(r),
    ]


def browse(method: str = ALL, data: str = ALL, text: str = "") -> list:
    """The runs that pass the filter: rows of run, method, data, steps, parameters, fd, NFE,
    measured with, changed, state.
    """
    with as_one_line():
        asked = Filter(method=method or ALL, data=data or ALL, text=text or "")
        if len(asked.text) > 200:
            raise ValueError(
                f"text = {asked.text[:40]!r}... has {len(asked.text):,} characters; at most "
                "200 are read"
            )
        words = asked.text.casefold().split()
        told = lambda r: " ".join((r.name, r.method, r.data, r.teacher, state(r))).casefold()
        return [
            row(r)
            for r in listed_runs()
            if asked.method in (ALL, r.method)
            and asked.data in (ALL, r.data)
            and all(w in told(r) for w in words)
        ]


def counted(rows: list) -> str:
    "How many runs there are in a table."
    return (
        f"<p class='caption' role='status'>{len(rows):,} "
        f"{'run' if len(rows) == 1 else 'runs'}. Choose a row to open it everywhere.</p>"
    )


def shown(method=ALL, data=ALL, text="") -> tuple:
    "What the filter does to the page: the table and the line above it."
    rows = browse(method, data, text)
    return json.dumps(rows), counted(rows)


def refreshed(method=ALL, data=ALL, text="", beside=None) -> tuple:
    "What opening the view shows: the data sets and runs there are now, and the filtered table."
    with as_one_line():
        good = [r.name for r in listed_runs() if not r.damaged]
        sets = sorted({r.data for r in listed_runs() if r.data})
        data = data if data in sets else ALL
        kept = [n for n in beside or [] if n in good]
    return (
        gr.update(choices=[ALL, *sets], value=data),
        gr.update(choices=good, value=kept),
        *shown(method, data, text),
    )


def chosen(event: gr.EventData) -> tuple:
    "The run of the row that was clicked, and a sign that it was."
    with as_one_line():
        name = open_run((event._data or {}).get("name")).name
        return name, (name, time.time())


# Several runs


def apart(names=None) -> str:
    "The configuration keys in which up to six runs differ, as a table."
    with as_one_line():
        names = names_of(names, "runs", MOST_BESIDE) if names else []
        if len(names) < 2:
            return "<p class='caption'>Choose two to six runs to see in what they differ.</p>"
        found = [open_run(n) for n in names]
        rows = [{k: "–" if v is None else str(v) for k, v in r.items()} for r in config_diff(found)]
        return (
            table_html(rows, ["key", *names], f"{len(rows)} keys differ")
            if rows
            else "<p class='caption'>These runs have the same configuration.</p>"
        )


# One run


def command(config) -> str:
    "The command line that trains this run again."
    parts = ["python", "-m", "cudlab.cli", "train"]
    for f in fields(config):
        value, usual = (
            getattr(config, f.name),
            f.default if f.default is not MISSING else f.default_factory(),
        )
        if f.name == "args":
            parts += [f"args.{k}={v}" for k, v in value.items()]
        elif value != usual:
            parts.append(f"{f.name}={value}")
    return shlex.join(parts)


def numbers_of(run: Run) -> str:
    """What a run that holds a solver has learned, in a line each: for which network, and the
    numbers with their spread.
    """
    if run.method.trains != "solver":
        return ""
    teacher, held = run.info["teacher"], run.tensors("ema.safetensors")
    batches = held["solver.by_batch"][: held["solver.done"]]
    spread = batches.std(0) if len(batches) > 1 else None
    values = [
        " / ".join(
            f"{v:.3f}"
            if spread is None or not spread[i, k]
            else f"{v:.3f}\u00a0±\u00a0{spread[i, k]:.3f}"
            for k, v in enumerate(line)
        )
        for i, line in enumerate(held["solver.lam"].tolist())
    ]
    told = (
        f"Learned numbers, one a call, mean ± standard deviation over {len(batches)} batches: "
        f"<code>{', '.join(values)}</code>."
        if len(batches)
        else "Nothing is learned yet."
    )
    return (
        f"<p class='caption'>{told}</p><p class='caption'>A solver for the network of "
        f"<b>{html.escape(teacher['name'])}</b>, step {teacher['step']:,}, "
        f"SHA-256 <code>{html.escape(teacher['network'][:12])}</code>.</p>"
    )


def logged(run: Run) -> str:
    "The log of a training as a table, thinned to twenty rows."
    rows = [
        {
            "step": m["step"],
            **(m["loss"] if isinstance(m.get("loss"), dict) else {"loss": m.get("loss")}),
        }
        for m in run.metrics
        if "step" in m
    ]
    rows = rows[:: max(1, -(-len(rows) // 20))]
    return (
        details_html(
            "the same as a table",
            table_html(
                rows,
                list(dict.fromkeys(k for r in rows for k in r)),
                "loss at every twentieth of the training",
            ),
        )
        if rows
        else ""
    )


def training(run: Run):
    "The training curve; where a solver was fitted, its error on held-out noise after each batch."
    chart = plot.training_chart(run.metrics)
    if run.method.trains == "solver":
        chart.update_xaxes(
            title_text="calibration batch", tickformat="d", dtick=max(1, run.num_steps // 10)
        ).update_yaxes(title_text="held-out error")
    return chart


def about(name) -> tuple:
    """Everything known of a run: summary, training curve and the same as a table, command,
    configuration.
    """
    with as_one_line():
        run = open_run(name)
        try:
            files, held = f"all {run.verify()} files match their SHA-256", numbers_of(run)
        except ValueError as e:
            files, held = error_line(e), ""
        unit = "fitted batches" if run.method.trains == "solver" else "trained steps"
        facts = figures_html(
            [
                ("run", run.name),
                ("method", run.config.method),
                ("data", run.config.data),
                (unit, f"{run.step:,} of {run.num_steps:,}"),
                ("parameters", format_params(run.info["parameters"]).removesuffix(" parameters")),
                ("heads", run.heads),
                ("classes", len(class_choices(run)) or "none"),
            ]
        )
        taught = run.info.get("teacher", {}).get("name", "")
        taught = f" Teacher <b>{html.escape(taught)}</b>." if taught else ""
        rows = [
            dict(
                key=f.name,
                value=str(getattr(run.config, f.name)),
                meaning=f.metadata.get("help", ""),
            )
            for f in fields(run.config)
        ]
        return (
            facts + held + f"<p class='caption'>Manifest: {files}.{taught} Created "
            f"{html.escape(run.info['created'][:16].replace('T', ' '))} UTC. Folder "
            f"<code>{html.escape(str(run.dir))}</code></p>",
            training(run),
            logged(run),
            command(run.config),
            table_html(rows, ["key", "value", "meaning"], "configuration"),
        )


# The page


def build(
    run: gr.Dropdown,  # the run of the whole explorer
    tab: gr.Tab,  # the tab this view is in
):
    "The view and its wiring; returns the event after which another run is chosen."
    quick = dict(queue=True, show_progress="hidden", concurrency_limit=8)
    with gr.Row(equal_height=False, elem_classes="filters"):
        method = gr.Dropdown(
            [ALL, *METHODS], value=ALL, label="Method", elem_id="runs-method", min_width=130
        )
        data = gr.Dropdown([ALL], value=ALL, label="Data", elem_id="runs-data", min_width=130)
        text = gr.Textbox(
            "",
            label="Words",
            placeholder="name, state, ...",
            lines=1,
            max_lines=1,
            max_length=200,
            elem_id="runs-text",
            min_width=180,
        )
    count = gr.HTML(elem_id="runs-count")
    frame = gr.HTML(
        "[]",
        html_template="<div class='runs-list' role='group' aria-label='runs' tabindex='0'></div>",
        js_on_load=LIST,
        css_template=LIST_CSS,
        apply_default_css=False,
        elem_id="runs-table",
    )
    opening = gr.State()
    gr.HTML("<h2 class='group-name'>this run</h2>")
    facts = gr.HTML(elem_id="facts")
    loss = gr.Plot(label="Training", show_label=False, elem_id="loss")
    log = gr.HTML(elem_id="log")
    made = gr.Code(
        language="shell", lines=1, label="Command that makes this run", interactive=False
    )
    with gr.Accordion("Configuration", open=False):
        config = gr.HTML(elem_id="config")
    gr.HTML("<h2 class='group-name'>differences</h2>")
    beside = gr.Dropdown(
        [],
        value=[],
        multiselect=True,
        max_choices=MOST_BESIDE,
        label="Runs beside each other",
        info="two to six",
        elem_id="runs-beside",
    )
    rows = gr.HTML(apart(), elem_id="differences")

    filters, told = [method, data, text], [facts, loss, log, made, config]
    gr.on(
        [method.input, data.input, text.input],
        shown,
        filters,
        [frame, count],
        preprocess=False,
        trigger_mode="always_last",
        api_visibility="private",
        **quick,
    )
    tab.select(
        refreshed,
        [*filters, beside],
        [data, beside, frame, count],
        preprocess=False,
        api_visibility="private",
        **quick,
    )
    gr.api(browse, api_name="browse")
    beside.change(apart, beside, rows, preprocess=False, api_name="differences", **quick)
    gr.on([tab.select, run.change], about, run, told, preprocess=False, api_name="about", **quick)
    frame.click(chosen, None, [run, opening], api_visibility="private", **quick)
    return opening.change
