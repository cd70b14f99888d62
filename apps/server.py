"The server: what may be said on its command line, and how the page is launched."

import argparse
import json
import os
import socket

import gradio as gr
from markup import STATIC, read_static
from proxies import bypass_proxies

from cudlab.catalog import list_runs
from cudlab.config import did_you_mean, get_settings
from jobs import is_local

BLUES = (
    *("#eef4f8", "#dbe8f1", "#b6d0e3", "#86b1cf", "#4f8db6", "#0f6da3"),
    *("#00598c", "#004a75", "#003a5c", "#002b45", "#001c2e"),
)


def make_theme() -> gr.themes.Base:
    "Quiet: no boxes, one blue, IBM Plex where it is installed."
    sans = gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700))
    mono = gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700))
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.Color(*BLUES, name="cudlab"),
        secondary_hue="slate",
        neutral_hue="zinc",
        radius_size="sm",
        spacing_size="md",
        text_size="md",
        font=[sans, "system-ui", "sans-serif"],
        font_mono=[mono, "ui-monospace", "monospace"],
    )
    return theme.set(**json.loads(read_static("theme.json")))


def parse_arguments(argv: list = None) -> argparse.Namespace:
    "The command line, not checked yet."
    parser = argparse.ArgumentParser(
        prog="explorer", description="Watch what every network call does and measure what it buys."
    )
    parser.add_argument(
        "--port",
        type=int,
        help="default: port in settings.ini; the next free one is taken if it is busy",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to serve on; the default is this machine only, another one needs --auth",
    )
    parser.add_argument(
        "--runs", nargs="*", default=[], metavar="NAME", help="show only these runs"
    )
    parser.add_argument(
        "--root-path",
        default="",
        metavar="PATH",
        help="the path under which a proxy serves this page, for example /lab",
    )
    parser.add_argument(
        "--auth",
        default=os.environ.get("CUDLAB_AUTH", ""),
        metavar="USER:PASSWORD",
        help="ask for this name and password; CUDLAB_AUTH in the environment does the same and is "
        "not seen in the list of processes",
    )
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    "Raises a `ValueError` where a page cannot be served like this; `auth` becomes a pair or None."
    if args.port is None:
        args.port = get_settings().port
    names = {info.name for info in list_runs()}
    for name in args.runs:
        if name not in names:
            raise ValueError(f"unknown run {name!r}{did_you_mean(name, names)}")
    if not 1 <= args.port <= 65535:
        raise ValueError(f"port = {args.port} is out of range: 1 to 65535")
    user, _, password = args.auth.partition(":")
    if args.auth and not (user and password):
        raise ValueError("auth is not USER:PASSWORD with both of them given")
    args.auth = (user, password) if user else None
    if not is_local(args.host) and not args.auth:
        raise ValueError(
            f"host = {args.host!r} can be reached from other machines: give --auth "
            "USER:PASSWORD, or serve on 127.0.0.1"
        )
    if args.root_path and not args.root_path.startswith("/"):
        raise ValueError(f"root-path = {args.root_path!r} does not begin with /; for example /lab")


def is_free(host: str, port: int) -> bool:
    "Whether a port can be had at this moment; only taking it makes sure."
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError:
            return False
    return True


def read_scripts() -> str:
    "What the page does without asking the server: the files share a scope of their own."
    scripts = [path.read_text(encoding="utf-8") for path in sorted(STATIC.glob("page-*.js"))]
    return "<script>(() => {\n" + "".join(scripts) + "})();</script>"


def launch_at(page: gr.Blocks, host: str, port: int, root_path: str, auth) -> str:
    "Serve the page from threads of this process; its address. An `OSError` if the port is taken."
    _, address, _ = page.launch(
        server_name=f"[{host}]" if ":" in host else host,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        show_error=False,
        theme=make_theme(),
        css=read_static("page.css"),
        head=read_scripts(),
        js="() => cudlab.start()",
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        root_path=root_path or None,
        auth=auth,
        max_file_size="1kb",
    )
    return address


def launch_page(page: gr.Blocks, host: str, port: int, root_path: str = "", auth=None) -> str:
    "Serve the page on the first port from `port` on that can be taken; its address."
    last = min(port + 99, 65535)
    for candidate in range(port, last + 1):
        if not is_free(host, candidate):
            continue
        try:
            with bypass_proxies():
                return launch_at(page, host, candidate, root_path, auth)
        except OSError as e:  # another program was faster
            if "empty port" not in str(e):
                raise
    raise ValueError(f"port = {port}: no port from here to {last} is free on {host}")
