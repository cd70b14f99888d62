"Share: the whole view in the query of the address, checked when it comes back; code and files."

from dataclasses import dataclass, fields
from functools import partial

import gradio as gr
from markup import caption_html, code_html, escape
from offer import class_choices, default_run, open_run, run_choices, solver_names
from request import ANY, FORM_FIELDS, SampleForm, as_one_line, parse_form

from cudlab.config import Options, get_settings, option
from cudlab.disk import printable
from cudlab.dode import NATIVE
from cudlab.path import GRIDS
from views import QUICK, remember_fields, run_script, save_file
from views import form as sample_form
from views.compare import EMPTY, FIELDS, LETTERS, update_columns
from views.film import export_file
from views.scores import Chart, default_count
from views.tradeoff import BUDGETS, score_command, update_choice
from views.trajectory import update_visible

LONGEST = 2048
VIEWS = ("trajectory", "velocity", "trade-off", "compare", "runs", "live")
CHARTED = ("value", "axis", "grid2", "nfe", "seeds")
COLUMN_HELP = "column of the comparison: run~solver~NFE~grid~weights~head"


@dataclass
class View(Options):
    "What the address may say beside the form: which view, and what Trade-off and Compare show."

    view: str = option("trajectory", "the open view", choices=VIEWS)
    runs: str = option("", "runs of the trade-off, with spaces")
    solvers: str = option("", "solvers of the trade-off, with spaces")
    value: str = option("fd", "see Chart")
    axis: str = option("NFE", "see Chart")
    grid2: str = option("uniform", "grid of the trade-off")
    nfe: str = option(BUDGETS, "budgets of the trade-off")
    n: int = option(2000, "samples of a score")
    seeds: str = option("0", "seeds of the trade-off")
    a: str = option("", COLUMN_HELP)
    b: str = option("", COLUMN_HELP)
    c: str = option("", COLUMN_HELP)
    d: str = option("", COLUMN_HELP)
    seed2: int = option(0, "seed of the comparison")
    count2: int = option(16, "samples of the comparison")


def parse_text(text: str, kind: type):
    """A value of the address as the type a field wants; what cannot be read stays text, for the
    check to name.
    """
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text


def parse_column(text: str) -> dict:
    "A column of the comparison from the address: {} if it is not one."
    parts = text.split("~")
    if len(parts) != len(FIELDS):
        return {}
    column = dict(zip(FIELDS, parts))
    for key in ("amount", "head"):
        if not column[key].isdecimal() or len(column[key]) > 8:
            return {}
        column[key] = int(column[key])
    fits = column["grid"] in (*GRIDS, NATIVE) and column["weights"] in ("ema", "raw")
    return column if fits else {}


def check_field(kind: type, name: str, value) -> None:
    "Raises a `ValueError` where a field of the address cannot be used."
    kind(**{name: value})
    if name in ("value", "axis", "n"):
        Chart(**{name: value})
    if name in "abcd" and not parse_column(value):
        raise ValueError(f"{name} = {value[:60]!r} is not run~solver~NFE~grid~weights~head")


def parse_address(query: dict) -> tuple:
    "What an address asks for: ({field: value}, [complaints]); unknown keys are let pass."
    if sum(len(str(key)) + len(str(value)) + 2 for key, value in query.items()) > LONGEST:
        return {}, [f"the address is longer than {LONGEST} characters and was not read"]
    found = {}
    wrong = []
    for kind in (SampleForm, View):
        for field in fields(kind):
            if field.name not in query:
                continue
            value = parse_text(str(query[field.name]), field.type)
            try:
                check_field(kind, field.name, value)
                found[field.name] = value
            except ValueError as e:
                wrong.append(str(e))
    return found, wrong


def parse_shared_columns(found: dict) -> list:
    "The four columns an address asks for, empty where it does not; [] if it asks for none."
    texts = [found.get(letter.lower(), "") for letter in LETTERS]
    return [parse_column(text) or EMPTY for text in texts] if any(texts) else []


# Arrival

# a page has so many controls that an address sets
ARRIVAL = len(sample_form.FITTED) + 2 + 3 + 3 + 1 + len(CHARTED) + 2 + len(LETTERS) * len(FIELDS)


def choose_run(found: dict, wrong: list) -> tuple:
    """The run that the menus are filled for, and whether it is the one to open: not where another
    one is asked for. What does not go with it is dropped, and said.
    """
    wanted = found.get("run", "")
    chosen = default_run(wanted)
    if wanted and chosen != wanted:
        wrong.insert(0, f"run {wanted[:60]!r} is not here or damaged; choose another one")
        for name in FORM_FIELDS:
            found.pop(name, None)
        return chosen, False
    if chosen is None:
        return None, False
    run = open_run(chosen)
    if "solver" in found and found["solver"] not in solver_names(run):
        wrong.append(f"{found.pop('solver')[:60]!r} is not a solver for {chosen}")
    if "label" in found and found["label"] not in (ANY, *class_choices(run)):
        wrong.append(f"class = {found.pop('label')[:40]!r} is not one of {chosen}")
    return chosen, True


def describe_wrong(wrong: list) -> str:
    "What of an address cannot be shown, in place; '' if it all can."
    lines = [escape(f"In the address: {printable(why)}"[:200]) for why in wrong[:3]]
    return "".join(f"<p class='cost bad' role='status'>{line}</p>" for line in lines)


def arrive(request: gr.Request = None) -> tuple:
    "What a page shows on arrival: the runs there are now, and what the address asks for."
    with as_one_line():
        found, wrong = parse_address(dict(request.query_params) if request else {})
        chosen, opens = choose_run(found, wrong)
        said = describe_wrong(wrong)
        if chosen is None:
            line = said or caption_html(f"No run yet. Train one: {code_html('cudlab train')}")
            empty = gr.update(choices=[], value=None)
            return empty, gr.skip(), line, *[gr.skip()] * (ARRIVAL - 3)
        usual = {field.name: field.default for field in fields(View)}
        line, *fitted = sample_form.on_run(chosen, wanted=found)
        return (
            gr.update(choices=run_choices(), value=chosen if opens else None),
            gr.update(selected=found.get("view", "trajectory")),
            line + said if opens else said,
            *fitted,
            *update_visible(chosen),
            *update_choice(chosen, found),
            found.get("seed", get_settings().seed),
            *(found.get(key, usual[key]) for key in CHARTED),
            *update_columns(chosen, found, parse_shared_columns(found)),
        )


def point_command(*values) -> str:
    "The command that scores what is on screen; '' where there is none."
    try:
        request = parse_form(values)
        form = request.form
        nfe = request.solver.nfe(request.steps, form.denoise) if request.solver.nfe else 1
        how = form.changed(("weights", "head", "guidance", "lower_order_final", "denoise"))
        n = default_count(request.run)
        return score_command(
            [form.run], [form.solver], form.grid, str(nfe), n, str(form.seed), **how
        )
    except (ValueError, gr.Error):
        return ""


# The page


def build(inputs: list, download: list) -> gr.Code:
    "Link, code and files of what is on screen, for the `inputs` of the form; returns the code."
    with gr.Accordion("Share what is on screen", open=False, elem_id="share"):
        gr.HTML(
            "<label class='link'><span class='group-name'>link</span>"
            "<input data-link readonly aria-label='link to this view'></label>"
        )
        code = gr.Code(language="python", label="The same in Python", interactive=False)
        job = gr.Code(
            language="shell", lines=1, label="The score of this point as a job", interactive=False
        )
        with gr.Row(elem_classes="buttons"):
            for kind in ("png", "gif", "csv"):
                button = gr.Button(kind.upper(), size="sm", min_width=60, scale=0)
                export = partial(export_file, kind)
                save_file(
                    button.click(export, inputs, download, api_name=f"export_{kind}", **QUICK),
                    download,
                )
            svg = gr.Button("SVG of the charts", size="sm", min_width=140, scale=0)
    run_script([svg.click], "() => cudlab.saveCharts()")
    code.change(point_command, inputs, job, api_name="point", **QUICK)
    usual = [field.default for field in fields(SampleForm)]
    remember_fields([code.change], FORM_FIELDS, usual, inputs)
    return code
