"The server: what may be said on its command line, and how the page is served."

import argparse
import asyncio
import errno
import json
import os
import socket
import threading
import time
from contextlib import asynccontextmanager

import gradio as gr
import uvicorn
from fastapi import FastAPI
from guard import BODY, EVERYWHERE, Guard, Listeners, Names, Protocol, is_local
from markup import STATIC, read_static
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from cudlab.catalog import list_runs
from cudlab.config import did_you_mean, get_settings

SESSIONS = 32  # whose state is kept

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
        "--hosts",
        nargs="*",
        default=os.environ.get("CUDLAB_HOSTS", "").split(),
        metavar="NAME",
        help="further names under which the page is reached, for example the one of a proxy; "
        "CUDLAB_HOSTS in the environment does the same",
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


def open_socket(host: str, port: int) -> socket.socket:
    "A socket that listens at the first free port from `port` on."
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    last = min(port + 99, 65535)
    for candidate in range(port, last + 1):
        s = socket.socket(family)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, candidate))
            s.listen(100)
            return s
        except OSError as e:
            s.close()
            if e.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
    raise ValueError(f"port = {port}: no port from here to {last} is free on {host}")


def read_scripts() -> str:
    "What the page does without asking the server: the files share a scope of their own."
    scripts = [path.read_text(encoding="utf-8") for path in sorted(STATIC.glob("page-*.js"))]
    return "<script>(() => {\n" + "".join(scripts) + "})();</script>"


class Server(uvicorn.Server):
    "A server in a thread of this process."

    def start(self, s: socket.socket) -> None:
        "Answers what comes to a socket."
        self.thread = threading.Thread(target=self.run, kwargs=dict(sockets=[s]), daemon=True)
        self.thread.start()
        while not self.started and self.thread.is_alive():
            time.sleep(0.001)

    def close(self) -> None:
        "Ends, once what is under way has ended or two seconds have passed."
        self.should_exit = True
        self.thread.join(5)


def make_app(page: gr.Blocks, names: Names, root_path: str, auth: tuple | None) -> FastAPI:
    "The page as an application, behind the guard; no other origin may read what it says."
    page.state_session_capacity = SESSIONS
    listeners = Listeners(page)

    @asynccontextmanager
    async def watched(app: FastAPI):
        watch = asyncio.create_task(listeners.watch())
        yield
        watch.cancel()

    before = [
        Middleware(Guard, names=names, listeners=listeners, root_path=root_path),
        Middleware(CORSMiddleware, allow_origins=()),  # else Gradio has one of its own
    ]
    return gr.mount_gradio_app(
        FastAPI(lifespan=watched, middleware=before, openapi_url=None, max_body_size=BODY),
        page,
        path="/",
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
        max_file_size="1b",
    )


def launch_page(
    page: gr.Blocks, s: socket.socket, names: Names = None, root_path: str = "", auth: tuple = None
) -> str:
    "Serve the page from a thread of this process; its address. `page.close` ends it."
    app = make_app(page, names or Names(), root_path, auth)
    page.app = app.routes[-1].app
    page.has_launched = True  # else no file is checked
    page.server = Server(
        uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            log_level="warning",
            use_colors=False,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=2,
        )
    )
    page.server.start(s)
    host, port = s.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    return f"http://{'localhost' if host in EVERYWHERE else host}:{port}/"
