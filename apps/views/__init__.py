"""The views of the explorer, one a module: functions of what a client asks for, and `build`, which
makes the view's part of the page and wires it.
"""

import json

import gradio as gr

# events that answer at once, those that only the page itself calls, and those that sample: one at
# a time, for all visitors together
QUICK = dict(queue=True, show_progress="hidden", concurrency_limit=8, preprocess=False)
PRIVATE = QUICK | dict(api_visibility="private")
SOLVE = dict(concurrency_id="solve", concurrency_limit=1, preprocess=False, show_progress="hidden")
SPLIT = dict(equal_height=False, elem_classes="split")
ASIDE = dict(scale=1, min_width=288, elem_classes="aside")


def run_script(triggers: list, script: str, inputs: list = None) -> None:
    "Events that the page answers by itself."
    gr.on(triggers, None, inputs, None, js=script, api_name=False)


def cancel_on(triggers: list, events: list) -> None:
    "Triggers that end what these events have begun."
    gr.on(triggers, None, None, None, cancels=events, api_name=False)


def save_file(event, download: list) -> None:
    "After an event whose outputs are the address and the name of a file, the page saves it."
    script = "(url, name) => { cudlab.save(url, name); }"
    event.success(None, download, None, js=script, api_name=False)


def remember_fields(triggers: list, names: list, usual: list, inputs: list) -> None:
    "The page writes the values of these inputs into its address, where they are not the usual."
    script = f"(...values) => cudlab.form({json.dumps(names)}, {json.dumps(usual)}, values)"
    run_script(triggers, script, inputs)
