"""The explorer: watch what every network call does and measure what it buys, on real checkpoints.

python apps/explorer.py [--port 7860] [--host 127.0.0.1] [--runs NAME ...] [--root-path /lab]
[--auth USER:PASSWORD] [--hosts NAME ...]
"""

import os
import secrets
import sys
import threading
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "100")  # remembered, for a table nobody sees
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from proxies import bypass_proxies

with bypass_proxies():  # a SOCKS proxy would end the import
    import gradio as gr

import offer
import server
from guard import Names
from markup import read_static
from request import FORM_FIELDS, LOG, error_line
from views import QUICK, SPLIT, compare, form, live, runs, share, tradeoff, trajectory, velocity

import jobs
from cudlab.config import set_threads
from cudlab.disk import plain_streams


def build() -> gr.Blocks:
    "The page and its wiring; nothing is launched."
    page = gr.Blocks(title="cudlab explorer", analytics_enabled=False, fill_width=True)
    with page:
        gr.HTML(read_static("head.html"))
        download = [gr.Textbox(visible=False), gr.Textbox(visible=False)]  # address and file name
        with gr.Row(elem_id="work", **SPLIT):
            side = form.build()
            inputs = [getattr(side, name) for name in FORM_FIELDS]
            with gr.Column(scale=3, min_width=300):
                with gr.Tabs(elem_id="views") as views:
                    film = trajectory.build()
                    numbers = velocity.build(trajectory.HINT)
                    chart = tradeoff.build(side.run, download)
                    columns = compare.build()
                    listed = runs.build(side.run)
                    live.build()
                code = share.build(inputs, download)
        fitted = [getattr(side, name) for name in form.FITTED]
        shown = [film.plane, film.film, film.box]
        outputs = [side.run, views, *fitted, *shown, *chart.fitted, side.seed, *chart.charted]
        load = page.load(share.arrive, None, [*outputs, *columns], api_name="runs", **QUICK)
        asks = form.wire(side, listed.opened)
        asks.load = load
        trajectory.wire(side, inputs, film, numbers, code, asks)
        tradeoff.wire(chart, asks.fit)
    return page.queue(max_size=32, api_open=False)  # nothing goes past the queue


def warm_up() -> None:
    """Open the default run and take two steps, so that the first visitor does not pay for the first
    call.
    """
    try:
        states = offer.open_run(offer.default_run()).iterate(index=8)
        for _ in range(3):
            next(states)
    except Exception as e:
        LOG.warning("the default run could not be warmed up: %s", error_line(e))


@plain_streams()
def main(argv: list = None) -> int:
    "Start the explorer and serve until interrupted."
    args = server.parse_arguments(argv)
    try:
        server.check_arguments(args)
        listening = server.open_socket(args.host, args.port)
    except (ValueError, OSError) as e:
        print(f"explorer: {e}", file=sys.stderr)
        return 2
    offer.ALLOWED_RUNS[:] = args.runs
    jobs.TOKEN = secrets.token_hex(16)
    set_threads()
    port = listening.getsockname()[1]
    if port != args.port:
        print(f"port {args.port} is busy, using {port} instead", flush=True)
    page = build()
    names = Names(args.host, args.hosts)
    address = server.launch_page(page, listening, names, args.root_path, args.auth)
    threading.Thread(target=warm_up, daemon=True).start()
    print(f"explorer ready at {address}?token={jobs.TOKEN}  (Ctrl-C stops it)", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        page.close(verbose=False)  # ends the pages' heartbeats first, and waits for none of them
    return 0


if __name__ == "__main__":
    sys.exit(main())
