"""Live: watch a job while it trains, from any page and after any reload; start one, stop it, go on
with it.
"""

from functools import lru_cache
from types import SimpleNamespace

import gradio as gr
from markup import (
    caption_html,
    code_html,
    count_noun,
    data_url,
    escape,
    figures_html,
    heading_html,
    read_static,
)
from offer import is_planar, open_run, recent_log, solver_names
from request import Clock, as_one_line, error_line

import jobs
from cudlab import plot, tradeoff
from cudlab.catalog import get_run_info
from cudlab.evaluate import score_curve
from cudlab.run import Run
from cudlab.runfiles import run_stamp
from cudlab.scoring import why_incomparable
from cudlab.training import format_time
from jobs import JobState, busy_name, own_runs, read_job, started_name
from views import ASIDE, PRIVATE, SPLIT

EVERY = 2.0  # seconds between two looks
EXAMPLE = "--method cud --data moons\n--steps 2000 --save_every 200"
SENTENCES = {
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


# What is shown


def describe_job(job: JobState) -> str:
    "The state of a job as figures and a sentence."
    step = "–" if job.of is None else f"{job.step:,} of {job.of:,}"
    figures = [("state", job.status), ("step", step), ("last checkpoint", f"{job.saved:,}")]
    if job.pace:
        left = format_time(job.left) if job.left < 3600 else f"{job.left / 3600:.1f} h"
        figures += [("pace", f"{job.pace:,.3g} steps/s"), ("time left", left)]
    if job.pid:
        gone = "" if job.status == "running" else ", gone"
        figures.append(("process", f"{job.pid}{gone}"))
    return figures_html(figures) + caption_html(SENTENCES[job.status], status=True)


def points_svg(x) -> str:
    "Points of the plane (B, 2)."
    dots = ""
    for a, b in x.clamp(-3.2, 3.2).nan_to_num(9.0).tolist():
        dots += f"<circle cx='{a:.2f}' cy='{-b:.2f}' r='.03'/>"
    return (
        "<svg viewBox='-3.2 -3.2 6.4 6.4' width='280' height='280' role='img' "
        f"aria-label='{len(x)} samples in the plane' fill='#4f8db6'>{dots}</svg>"
    )


def pictures_html(x) -> str:
    "Pictures (B, C, H, W) in two rows."
    scale = max(1, round(48 / x.shape[-1]))
    strip = plot.film_strip(x.unflatten(0, (2, -1)).transpose(0, 1), scale, 1)
    source = data_url(plot.encode_image(strip), "image/png")
    size = f"width='{strip.width}' height='{strip.height}'"
    return f"<img class='pixels' src='{source}' {size} alt='{len(x)} samples'>"


@lru_cache(4)
def draw_samples_of(folder: str, step: int, stamp: tuple) -> str:
    "Samples of a run's newest average on fixed noise, in the run's own few steps, as HTML."
    run = Run(folder)
    own = run.sampling_defaults
    how = f"{count_noun(own['steps'], 'step')} of {own['solver']}"
    draw, count = (points_svg, 400) if is_planar(run) else (pictures_html, 16)
    shown = draw(run.pictures(run.solve(seed=0, index=count).x).cpu())
    return shown + caption_html(f"The average of step {step:,}, seed 0, {how}.")


def show_samples(run: Run) -> str:
    "Samples of a run, or a line that says why there are none."
    if not run.step:
        return caption_html("No checkpoint yet.")
    try:
        return draw_samples_of(str(run.dir), run.step, run_stamp(run.dir))
    except ValueError as e:
        return caption_html(error_line(e))


def is_newest(score, run: Run) -> bool:
    "Whether this is a usable score of the newest average."
    if not isinstance(score, dict) or score.get("step") != run.step:
        return False
    return isinstance(score.get("fd"), (int, float)) and bool(score.get("nfe"))


def draw_quality(run: Run) -> tuple:
    "Scores of the newest average that may share an axis: (chart or None, a sentence)."
    scores = [score for score in run.scores if is_newest(score, run)]
    scores = [score for score in scores if not why_incomparable(scores[-1], score)]
    if not scores:
        command = code_html(f"cudlab evaluate {run.name}")
        return None, caption_html(f"Nothing is measured at step {run.step:,} yet: {command}")
    chart = tradeoff.quality_chart(scores, height=300)
    chart.update_layout(uirevision=f"{run.name} {run.step}")
    return chart, caption_html(f"{len(scores)} scores of the average of step {run.step:,}.")


def show_quality(run: Run) -> tuple:
    "What `draw_quality` says, on the page."
    chart, caption = draw_quality(run)
    return gr.update(value=chart, visible=bool(chart)), caption


def stream_quality(name, progress=gr.Progress()):
    """Measure the newest average at 1 to 8 calls with 500 samples each: (chart, caption) after each
    point.
    """
    with as_one_line():
        read_job(name)
        run, clock = open_run(name), Clock(2)
        if not run.step:
            raise ValueError(f"run {name!r} has no checkpoint yet, so there is nothing to measure")
        offered = solver_names(run)
        wanted = dict.fromkeys((run.sampling_defaults["solver"], "euler", "ab2"))
        solvers = tuple(solver for solver in wanted if solver in offered)

        def tell(done, size):
            clock.check()
            progress((done, size), desc="one point", unit="samples")

        for score in score_curve(run, solvers, (1, 2, 4, 8), progress=tell, n=500):
            run.add_score(score)
            yield show_quality(run)
        yield show_quality(run)


def show_job(name) -> tuple:
    """Everything shown of a job: state, loss as a figure in JSON, samples, quality, its caption,
    the log.
    """
    hidden = gr.update(value=None, visible=False)
    if not name:
        return caption_html("No job yet."), "", "", hidden, "", ""
    with as_one_line():
        job = read_job(name)
        log = ""
        if job.log:
            lines = escape("\n".join(job.log))
            log = f"<pre class='log' tabindex='0' aria-label='last lines of the job'>{lines}</pre>"
        if job.of is None:
            return describe_job(job), "", "", hidden, "", log
        run = Run(get_run_info(name).dir)
        loss = ""
        if rows := recent_log(run):
            loss = plot.training_chart(rows).update_layout(uirevision=name).to_json()
        return describe_job(job), loss, show_samples(run), *show_quality(run), log


def update_buttons(job: JobState | None) -> tuple:
    "Which of stop and resume make sense now."
    can_resume = job is not None and job.is_resumable and not busy_name()
    can_stop = job is not None and job.status == "running"
    return gr.update(interactive=can_stop), gr.update(interactive=can_resume)


def watch_job(name) -> tuple:
    "One tick: the view, the buttons, and no further tick once the job is over."
    with as_one_line():
        job = read_job(name) if name else None
        goes_on = job is not None and job.is_active
        timer = gr.skip() if goes_on else gr.Timer(active=False)
        return *show_job(name), *update_buttons(job), timer


def choose_job(name=None) -> tuple:
    """What opening the view or choosing a job does: the menu, the view, the buttons, and ticks
    while the job runs.
    """
    with as_one_line():
        lines = {info.name: f"{info.name}  ·  {info.method} on {info.data}" for info in own_runs()}
        last = started_name()
        if last and last not in lines:
            lines = {last: last} | lines
        if name not in lines:
            name = busy_name() or next(iter(lines), None)
        job = read_job(name) if name else None
        menu = gr.update(choices=[(line, run) for run, line in lines.items()], value=name)
        timer = gr.Timer(active=job is not None and job.is_active)
        return menu, *show_job(name), *update_buttons(job), timer


# The page


def build_control() -> SimpleNamespace:
    "The menu of jobs, and what starts, stops and continues them."
    name = gr.Dropdown(
        [], label="Job", info="your runs; what is running comes first", elem_id="job"
    )
    with gr.Row(elem_classes="buttons"):
        small = dict(min_width=80, size="md", interactive=False)
        stop = gr.Button("Stop", elem_id="job-stop", **small)
        resume = gr.Button("Resume", elem_id="job-resume", **small)
    text = gr.Textbox(
        EXAMPLE,
        label="New job",
        info="flags as after cudlab train",
        lines=4,
        max_length=jobs.LONGEST,
        elem_id="job-text",
    )
    start = gr.Button("Start", variant="primary", elem_id="job-start", size="md")
    token = gr.Textbox(visible=False)  # filled by the page
    return SimpleNamespace(name=name, stop=stop, resume=resume, text=text, start=start, token=token)


def build_job() -> SimpleNamespace:
    "What is known of a job, in the order of `show_job`, and the button that measures."
    facts = gr.HTML(elem_id="job-facts")
    loss = gr.HTML(
        "",
        html_template="<div class='chart' role='img' aria-label='training loss'></div>",
        js_on_load=read_static("chart.js"),
        elem_id="job-loss",
    )
    gr.HTML(heading_html("samples on fixed noise"))
    samples = gr.HTML(elem_id="job-samples")
    gr.HTML(heading_html("quality of the newest average"))
    chart = gr.Plot(
        label="Quality of the newest average", show_label=False, elem_id="job-chart", visible=False
    )
    caption = gr.HTML(elem_id="job-caption")
    measure = gr.Button("Measure this average", size="sm", min_width=170, elem_id="job-measure")
    gr.HTML(heading_html("last lines of the job"))
    log = gr.HTML(elem_id="job-log")
    shown = [facts, loss, samples, chart, caption, log]
    return SimpleNamespace(shown=shown, quality=[chart, caption], measure=measure)


def build() -> None:
    "The tab and its wiring."
    with gr.Tab("Live", id="live") as tab:
        gr.api(jobs.job_state, api_name="job_state")
        gr.api(jobs.start_job, api_name="job_start")
        gr.api(jobs.resume_job, api_name="job_resume")
        gr.api(jobs.stop_job, api_name="job_stop")
        with gr.Row(**SPLIT):
            with gr.Column(**ASIDE):
                control = build_control()
            with gr.Column(scale=3, min_width=300):
                job = build_job()
        timer = gr.Timer(EVERY, active=False)
    name = control.name
    watched = [*job.shown, control.stop, control.resume, timer]
    few = dict(concurrency_limit=4)
    gr.on([tab.select, name.input], choose_job, name, [name, *watched], **PRIVATE | few)
    timer.tick(watch_job, name, watched, trigger_mode="once", **PRIVATE | few)

    def leave(event: gr.SelectData):
        return gr.skip() if event.value == tab.label else gr.Timer(active=False)

    tab.parent.select(leave, None, timer, **PRIVATE)
    job.measure.click(
        stream_quality,
        name,
        job.quality,
        api_name="job_measure",
        concurrency_id="solve",
        concurrency_limit=1,
        preprocess=False,
    )
    for action, button, given in (
        (jobs.start_job, control.start, control.text),
        (jobs.resume_job, control.resume, name),
        (jobs.stop_job, control.stop, name),
    ):

        def on_click(value, token, action=action):
            return choose_job(action(value, token))

        button.click(
            on_click,
            [given, control.token],
            [name, *watched],
            js="(value) => [value, cudlab.token()]",
            **PRIVATE,
        )
