"""Live: watch a job while it trains, from any page and after any reload; start one, stop it, go on
with it. All state is on disk.
"""

import fcntl
import html
import ipaddress
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

import gradio as gr

from cudlab import plot, tradeoff
from cudlab.catalog import get_run_info
from cudlab.checkpoint import is_locked
from cudlab.cli import parse_words
from cudlab.config import did_you_mean, get_settings
from cudlab.evaluate import score_curve
from cudlab.methods import make_method
from cudlab.run import Run
from cudlab.scoring import why_incomparable
from cudlab.training import format_time, open_teacher, parse_parameters, resolve_run_dir
from views.ask import (
    Clock,
    as_one_line,
    data_url,
    error_line,
    figures_html,
    is_planar,
    listed_runs,
    manifest_stamp,
    open_run,
    solver_names,
)

# whether jobs may be started from the page; the explorer sets it where only this machine can reach
# it
ALLOWED = False
OFF = (
    "jobs cannot be started, stopped or continued from here: only a page that is served to its "
    "own machine alone may do that; use python -m cudlab.cli train"
)
EVERY = 2.0
LONGEST = 2000
EXAMPLE = "method=cud data=moons steps=2000 save_every=200"


def permitted(request: gr.Request = None) -> None:
    """A `ValueError` unless jobs may be started: no other machine, no proxy, no page of another
    origin.
    """
    headers = request.headers if request else {}
    hosts = [urlsplit(f"//{headers['host']}").hostname] if "host" in headers else []
    hosts += [urlsplit(headers["origin"]).hostname] if "origin" in headers else []
    if (
        not ALLOWED
        or not all(map(own, hosts))
        or any(h in headers for h in ("forwarded", "x-forwarded-for", "x-forwarded-host"))
    ):
        raise ValueError(OFF)


def own(host) -> bool:
    "Whether a host name means this machine."
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


# What is on disk


def jobs() -> Path:
    "Where logs of jobs are, and what the page has started last."
    return get_settings().runs_path / ".jobs"


def started() -> str:
    "The name of the run that the last job from a page trains, or ''."
    try:
        return str(json.loads((jobs() / "page.json").read_bytes())["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def busy() -> str:
    "The run of the job from a page that has not ended yet, or ''."
    name = started()
    running = any(r.name == name and r.status == "running" for r in listed_runs())
    return name if name and (running or is_locked(jobs() / "page.lock")) else ""


def mine() -> list:
    "Your runs: what is running, then what can be continued, then what is done; the newest first."
    rank = {"running": 0, "dead": 1, "failed": 1, "stopped": 2, "new": 2, "diverged": 3}
    return sorted(
        (r for r in listed_runs() if not r.shipped and not r.damaged),
        key=lambda r: rank.get(r.status, 4),
    )


def tail(name: str, lines: int = 12) -> list:
    "The last lines that the job of a run has printed."
    try:
        with open(jobs() / f"{name}.log", "rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - 8000))
            text = f.read().decode(errors="replace")
    except OSError:
        return []
    return [
        "".join(c for c in line if c.isprintable()) for line in text.splitlines() if line.strip()
    ][-lines:]


def state(name: str) -> dict:
    """What the disk says of a job: run, status, step, of, saved, pid, steps a second, seconds left,
    and the last lines of its log.
    """
    with as_one_line():
        if not isinstance(name, str) or name not in {r.name for r in mine()} | {started()} - {""}:
            raise ValueError(
                f"the job {str(name)[:60]!r} is not "
                f"here{did_you_mean(str(name)[:60], [r.name for r in mine()])}; choose one of the list"
            )
        at = dict(
            run=name, status="failed", step=0, of=None, saved=0, pid=None, pace=None, left=None
        )
        if any(r.name == name for r in mine()):
            info = get_run_info(name)
            at |= dict(status=info.status, step=info.step, of=info.steps, saved=info.step)
            try:
                beat = json.loads((info.dir / "progress.json").read_bytes())
                at |= dict(step=max(info.step, beat["step"]), pid=beat["pid"])
                if info.status == "running" and beat["seconds"]:
                    at |= dict(
                        pace=1 / beat["seconds"], left=(info.steps - at["step"]) * beat["seconds"]
                    )
            except (OSError, ValueError, KeyError, TypeError):
                pass
        if at["status"] != "running" and name == started() and is_locked(jobs() / "page.lock"):
            at["status"] = "ending" if at["status"] == "done" else "starting"
        return at | dict(log=tail(name))


# Start, stop, go on


def understood(text) -> tuple:
    "Checked (Config, Job, folder) of the parameters a person typed; nothing is made yet."
    if not isinstance(text, str) or len(text) > LONGEST:
        raise ValueError(f"the parameters are not a text of at most {LONGEST:,} characters")
    try:
        words = shlex.split(text)
    except ValueError as e:
        raise ValueError(
            f"the parameters cannot be read: {str(e).lower()}; write key=value with spaces between"
        ) from None
    config, job = parse_parameters(parse_words(words))
    for key, value in {**vars(config), **config.args, **vars(job)}.items():
        if isinstance(value, str) and (
            value.startswith((".", "~")) or "/" in value or "\\" in value or "\0" in value
        ):
            raise ValueError(
                f"{key} = {value[:60]!r} looks like a path; from a page, runs and data sets are "
                "given by name"
            )
    method = make_method(config)
    if method.teacher:
        get_run_info(method.teacher)
    open_teacher(method, config)
    return config, job, resolve_run_dir(config, job.name)


def flags(config, job, name: str) -> list:
    "The parameters as papermill takes them; text stays text whatever it looks like."
    given = {
        f.name: getattr(part, f.name)
        for part in (config, job)
        for f in fields(part)
        if f.name in ("method", "data") or getattr(part, f.name) != f.default
    }
    given |= {"args": json.dumps(config.args), "name": name}
    return [
        word
        for key, value in given.items()
        for word in (("-r", key, value) if isinstance(value, str) else ("-p", key, str(value)))
    ]


def launch(config, job, folder: Path) -> str:
    "Start the job as a process of its own and return the run's name; a `ValueError` if one runs."
    lab, where = get_settings(), jobs()
    if folder.name in {r.name for r in listed_runs() if r.damaged}:
        raise ValueError(f"run {folder.name!r} is damaged; choose another name=")
    info = next((r for r in listed_runs() if r.name == folder.name and not r.shipped), None)
    if info and info.status in ("done", "running"):
        raise ValueError(
            f"run {folder.name!r} is {'trained already' if info.status == 'done' else 'being trained'}; choose another name="
        )
    script, book = lab.root / "tools" / "job.py", lab.root / "nbs" / "train.ipynb"
    if not (script.is_file() and book.is_file()):
        raise ValueError(
            "tools/job.py and nbs/train.ipynb are not here: jobs need a checkout of the lab"
        )
    where.mkdir(parents=True, exist_ok=True)
    with open(where / "page.lock", "w") as lock:
        end = time.monotonic() + 0.3
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > end:
                    raise ValueError(
                        f"a job is running: {started() or 'another'}; stop it or wait for its end"
                    ) from None
                time.sleep(0.01)
        if name := next(
            (r.name for r in listed_runs() if r.name == started() and r.status == "running"), ""
        ):
            raise ValueError(f"a job is running: {name}; stop it or wait for its end")
        (where / "page.json").write_text(json.dumps({"name": folder.name}))
        with open(
            where / f"{folder.name}.log", "wb"
        ) as log:  # the job keeps the lock as long as it lives, and nobody longer
            process = subprocess.Popen(
                [sys.executable, str(script), str(book), *flags(config, job, folder.name)],
                cwd=lab.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock.fileno()],
            )
    threading.Thread(target=process.wait, daemon=True).start()
    return folder.name


def start(text: str, request: gr.Request = None) -> str:
    "Start a job from key=value words, checked before anything happens; the name of its run."
    with as_one_line():
        permitted(request)
        return launch(*understood(text))


def resumable(at: dict) -> bool:
    "Whether a job in this state has a run that can go on."
    return at["status"] in ("stopped", "dead", "new", "diverged", "failed") and at["of"] is not None


def resume(name: str, request: gr.Request = None) -> str:
    "Go on with a run that was stopped or killed: the same configuration under the same name."
    with as_one_line():
        permitted(request)
        at = state(name)
        if not resumable(at):
            raise ValueError(
                f"run {name!r} is {at['status']}; only a run that was stopped or killed can go on"
            )
        folder = get_run_info(name).dir
        config, job = parse_parameters({})
        return launch(Run(folder).config, job, folder)


def stop(name: str, request: gr.Request = None) -> str:
    "Ask a running job to save and end; the name of its run."
    with as_one_line():
        permitted(request)
        at = state(name)
        if at["status"] != "running":
            raise ValueError(f"run {name!r} is {at['status']}; only a running job can be stopped")
        (get_run_info(name).dir / "STOP").touch()
        return name


# What is shown

WORDS = {
    "running": "The job runs.",
    "stopped": "The job was stopped after a checkpoint and can go on.",
    "done": "The job is done.",
    "new": "The run is made and not trained yet; it can go on.",
    "dead": "The job was killed: its process is gone, its last checkpoint is whole, and it can go "
    "on from there.",
    "failed": "The job ended with an error; its last words are below.",
    "diverged": "The training diverged; the last good checkpoint is kept.",
    "starting": "The job is starting: the notebook's kernel comes up first.",
    "ending": "The run is done; the notebook draws its last cell.",
}


def told(at: dict) -> str:
    "The state of a job as figures and a sentence."
    at = at | dict(of=at["of"] or "?")
    figures = [
        ("state", at["status"]),
        ("step", f"{at['step']:,} of {at['of']:,}" if at["of"] != "?" else "–"),
        ("last checkpoint", f"{at['saved']:,}"),
    ]
    if at["pace"]:
        figures += [
            ("pace", f"{at['pace']:,.3g} steps/s"),
            (
                "time left",
                format_time(at["left"]) if at["left"] < 3600 else f"{at['left'] / 3600:.1f} h",
            ),
        ]
    if at["pid"]:
        figures.append(
            ("process", at["pid"] if at["status"] == "running" else f"{at['pid']}, gone")
        )
    return figures_html(figures) + f"<p class='caption' role='status'>{WORDS[at['status']]}</p>"


@lru_cache(4)
def samples(folder: str, step: int, changed: tuple) -> str:
    "Samples of a run's newest average on fixed noise, in the run's own few steps, as a page."
    run = Run(folder)
    own = f"{run.sampling_defaults['steps']} {'step' if run.sampling_defaults['steps'] == 1 else 'steps'} of {run.sampling_defaults['solver']}"
    if is_planar(run):
        x = run.solve(seed=0, index=400).x.cpu()
        dots = "".join(
            f"<circle cx='{a:.2f}' cy='{-b:.2f}' r='.03'/>"
            for a, b in x.clamp(-3.2, 3.2).nan_to_num(9.0).tolist()
        )
        shown = (
            "<svg viewBox='-3.2 -3.2 6.4 6.4' width='280' height='280' role='img' "
            f"aria-label='400 samples in the plane' fill='#4f8db6'>{dots}</svg>"
        )
    else:
        x = run.solve(seed=0, index=16).x.cpu()
        scale = max(1, round(48 / x.shape[-1]))
        picture = plot.film_strip(x.unflatten(0, (2, 8)).transpose(0, 1), scale, 1)
        shown = (
            f"<img src='{data_url(plot.encode_image(picture), 'image/png')}' "
            f"width='{picture.width}' height='{picture.height}' alt='16 samples' "
            "style='image-rendering: pixelated; max-width: 100%; height: auto; margin: 0 0 8px'>"
        )
    return shown + f"<p class='caption'>The average of step {step:,}, seed 0, {own}.</p>"


def measured(run: Run):
    "Scores of the newest average that may share an axis: (chart or None, a sentence)."
    mine = [
        s
        for s in run.scores
        if isinstance(s, dict)
        and s.get("step") == run.step
        and isinstance(s.get("fd"), (int, float))
        and s.get("nfe")
    ]
    mine = [s for s in mine if not why_incomparable(mine[-1], s)]
    if not mine:
        return (
            None,
            f"<p class='caption'>Nothing is measured at step {run.step:,} yet: <code>papermill "
            f"nbs/evaluate.ipynb scores.ipynb -p run {html.escape(run.name)}</code></p>",
        )
    return tradeoff.quality_chart(
        mine, height=300
    ), f"<p class='caption'>{len(mine)} scores of the average of step {run.step:,}.</p>"


def scored(name, progress=gr.Progress()):
    """Measure the newest average at 1 to 8 calls with 500 samples each: (chart, caption) after each
    point.
    """
    with as_one_line():
        state(name)
        run, clock = open_run(name), Clock(2)
        if not run.step:
            raise ValueError(f"run {name!r} has no checkpoint yet, so there is nothing to measure")
        solvers = tuple(
            s
            for s in dict.fromkeys((run.sampling_defaults["solver"], "euler", "ab2"))
            if s in solver_names(run)
        )

        def tell(done, size):
            clock.check()
            progress((done, size), desc="one point", unit="samples")

        for score in score_curve(run, solvers, (1, 2, 4, 8), progress=tell, n=500):
            run.add_score(score)
            chart, caption = measured(run)
            yield gr.update(value=chart, visible=True), caption
        chart, caption = measured(run)
        yield gr.update(value=chart, visible=bool(chart)), caption


def view(name) -> tuple:
    """Everything shown of a job: state, loss as a figure in JSON, samples, quality, its caption,
    the log.
    """
    if not name:
        return (
            "<p class='caption'>No job yet.</p>",
            "",
            "",
            gr.update(value=None, visible=False),
            "",
            "",
        )
    at = state(name)
    log = (
        "<pre class='log' tabindex='0' aria-label='last lines of the "
        f"job'>{html.escape(chr(10).join(at['log']))}</pre>"
        if at["log"]
        else ""
    )
    if at["of"] is None:
        return told(at), "", "", gr.update(value=None, visible=False), "", log
    with as_one_line():
        folder = get_run_info(name).dir
        run = Run(folder)
        loss = (
            plot.training_chart(run.metrics).update_layout(uirevision=name).to_json()
            if run.metrics
            else ""
        )
        try:
            drawn = (
                samples(str(folder), run.step, manifest_stamp(folder))
                if run.step
                else "<p class='caption'>No checkpoint yet.</p>"
            )
        except ValueError as e:
            drawn = f"<p class='caption'>{error_line(e)}</p>"
        chart, caption = measured(run)
        if chart:
            chart.update_layout(uirevision=f"{name} {run.step}")
        return told(at), loss, drawn, gr.update(value=chart, visible=bool(chart)), caption, log


def buttons(name) -> tuple:
    "Which of stop and resume make sense now."
    at = state(name) if name else {"status": ""}
    return gr.update(interactive=at["status"] == "running"), gr.update(
        interactive=bool(name) and resumable(at) and not busy()
    )


def watched(name) -> tuple:
    "One tick: the view, the buttons, and no further tick once the job is over."
    with as_one_line():
        on = bool(name) and state(name)["status"] in ("running", "starting", "ending")
        return *view(name), *buttons(name), gr.skip() if on else gr.Timer(active=False)


def chosen(name=None) -> tuple:
    """What opening the view or choosing a job does: the menu, the view, the buttons, and ticks
    while the job runs.
    """
    with as_one_line():
        found = mine()
        names, last = [r.name for r in found], started()
        if last and last not in names:
            names.insert(0, last)
        if name not in names:
            name = busy() or next(iter(names), None)
        what = {r.name: f"{r.name}  ·  {r.method} on {r.data}" for r in found}
        on = bool(name) and state(name)["status"] in ("running", "starting", "ending")
        return (
            gr.update(choices=[(what.get(n, n), n) for n in names], value=name),
            *view(name),
            *buttons(name),
            gr.Timer(active=on),
        )


# The page

# gr.Plot makes a new chart of every value, and the zoom is gone; this one changes the chart it has.
CHART = """
const box = element.querySelector('.chart');
const draw = () => {
  if (!window.Plotly) return void setTimeout(draw, 300);
  if (!props.value) return void window.Plotly.purge(box);
  const figure = JSON.parse(props.value);
  window.Plotly.react(box, figure.data, {...figure.layout, autosize: true}, {responsive: true});
};
watch('value', draw);
draw();
"""
CSS = (
    "<style>pre.log {font-family: var(--font-mono); font-size: 12px; line-height: 1.5; "
    "overflow: auto; max-height: 260px; margin: 0; color: var(--body-text-color-subdued); "
    "white-space: pre}</style>"
)


def build(
    tab: gr.Tab,  # the tab this view is in
) -> None:
    "The view and its wiring."
    quick = dict(queue=True, show_progress="hidden", concurrency_limit=4)
    with gr.Row(equal_height=False, elem_classes="split"):
        with gr.Column(scale=1, min_width=288, elem_classes="aside"):
            name = gr.Dropdown(
                [], label="Job", info="your runs; what is running comes first", elem_id="job"
            )
            with gr.Row(elem_classes="buttons", visible=ALLOWED):
                halt = gr.Button(
                    "Stop", elem_id="job-stop", min_width=80, size="md", interactive=False
                )
                again = gr.Button(
                    "Resume", elem_id="job-resume", min_width=80, size="md", interactive=False
                )
            text = gr.Textbox(
                EXAMPLE,
                label="New job",
                info="key=value words, as after python -m cudlab.cli train",
                lines=4,
                max_length=LONGEST,
                visible=ALLOWED,
                elem_id="job-text",
            )
            go = gr.Button(
                "Start", variant="primary", elem_id="job-start", size="md", visible=ALLOWED
            )
            gr.HTML(
                ""
                if ALLOWED
                else f"<p class='caption'>{html.escape(OFF[0].upper() + OFF[1:])}.</p>"
            )
        with gr.Column(scale=3, min_width=300):
            facts = gr.HTML(elem_id="job-facts")
            loss = gr.HTML(
                "",
                html_template="<div class='chart' role='img' aria-label='training loss'></div>",
                js_on_load=CHART,
                elem_id="job-loss",
            )
            gr.HTML("<h2 class='group-name'>samples on fixed noise</h2>")
            drawn = gr.HTML(elem_id="job-samples")
            gr.HTML("<h2 class='group-name'>quality of the newest average</h2>")
            chart = gr.Plot(
                label="Quality of the newest average",
                show_label=False,
                elem_id="job-chart",
                visible=False,
            )
            caption = gr.HTML(elem_id="job-caption")
            score = gr.Button(
                "Measure this average", size="sm", min_width=170, elem_id="job-measure"
            )
            gr.HTML(f"{CSS}<h2 class='group-name'>last lines of the job</h2>")
            log = gr.HTML(elem_id="job-log")
    timer = gr.Timer(EVERY, active=False)
    shown = [facts, loss, drawn, chart, caption, log, halt, again, timer]

    looking = dict(fn=chosen, inputs=name, outputs=[name, *shown], preprocess=False, **quick)
    gr.on([tab.select, name.input], **looking, api_visibility="private")
    timer.tick(
        watched,
        name,
        shown,
        preprocess=False,
        api_visibility="private",
        trigger_mode="once",
        **quick,
    )

    def left(event: gr.SelectData):
        return gr.skip() if event.value == tab.label else gr.Timer(active=False)

    tab.parent.select(left, None, timer, api_visibility="private", **quick)
    gr.api(state, api_name="job_state")
    score.click(
        scored,
        name,
        [chart, caption],
        preprocess=False,
        api_name="job_measure",
        concurrency_id="solve",
        concurrency_limit=1,
    )
    for action in (start, resume, stop):
        gr.api(action, api_name=f"job_{action.__name__}")
    for button, action, given in ((go, start, text), (again, resume, name), (halt, stop, name)):

        def pressed(value, request: gr.Request, action=action):
            return chosen(action(value, request))

        button.click(
            pressed, given, [name, *shown], preprocess=False, api_visibility="private", **quick
        )
