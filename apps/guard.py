"""What stands between the network and the page: calls that the page needs, under names that mean it
and of a length that makes sense, pass; what nobody waits for any more is forgotten.
"""

import asyncio
import ipaddress
import re
import socket
import time
from collections import Counter
from contextlib import contextmanager
from urllib.parse import parse_qs, urlsplit

import gradio as gr
import h11
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

BODY = 2**18  # bytes of a call
PATIENCE = 20.0  # seconds that a client may take to send a call
ABSENCE = 10.0  # seconds after which nobody waits for an answer any more
EVERYWHERE = ("0.0.0.0", "::", "")
ROUTES = re.compile(
    r"/(|config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|login|logout|"
    r"(static|assets|svelte)/.+|"
    r"gradio_api/(info|login_check|app_id|theme\.css|cancel|reset|queue/(join|data)|"
    r"heartbeat/[^/]+|call/[^/]+(/[^/]+)?))/?"
)
HEADERS = [(b"referrer-policy", b"no-referrer"), (b"x-content-type-options", b"nosniff")]


# Who is asked


def is_local(host) -> bool:
    "Whether a host name means this machine."
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def is_address(host: str) -> bool:
    "Whether a host name is a number, which nobody can make mean another machine."
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def host_of(authority: str) -> str:
    "The name in NAME:PORT, or '' where there is none."
    try:
        return urlsplit(f"//{authority}").hostname or ""
    except ValueError:
        return ""


class Names:
    "The names under which a page is reached."

    def __init__(self, host: str = "127.0.0.1", others: tuple = ()):
        self.is_everywhere = host in EVERYWHERE
        self.own = {host.lower(), *(name.lower() for name in others)}
        self.others = {name.lower() for name in others}

    def mean(self, host: str) -> bool:
        "Whether a name means this page."
        if is_local(host) or host in self.own:
            return True
        return self.is_everywhere and (is_address(host) or host == socket.gethostname().lower())

    def find_stranger(self, headers: list) -> str:
        "What is wrong with the names in a request's headers, (name, value) of each, or ''."
        hosts = [value for key, value in headers if key == "host"] or [""]
        for key, value in headers:
            if key == "x-forwarded-host":
                hosts += value.split(",")
        for host in hosts:
            name = host_of(host.strip())
            if not self.mean(name):
                return f"{name[:80]!r} is not a name of this page; see --hosts"
        for key, value in headers:
            there = urlsplit(value).netloc.lower() if key == "origin" else ""
            if key == "origin" and there != hosts[0].lower() and host_of(there) not in self.others:
                return f"{value[:80]!r} is another page; it may not call this one"
        return ""


# Who waits for an answer


class Listeners:
    "The sessions whose clients listen, and for how long the others have not."

    def __init__(self, page: gr.Blocks):
        self.queue = page._queue
        self.open = Counter()  # session, or event of a session without a name -> streams
        self.absent = {}  # session -> (since when, what it had asked for then)

    @contextmanager
    def listen(self, key: str):
        "Within, somebody listens to a session."
        self.open[key] += 1
        try:
            yield
        finally:
            self.open[key] -= 1
            self.open += Counter()  # without those that nobody listens to

    def asked(self, name: str) -> frozenset:
        "What a session has asked for and not heard the end of."
        return frozenset(self.queue.pending_event_ids_session.get(name, ()))

    async def forget_absent(self) -> None:
        "Drops what was asked in sessions that nobody has listened to for a while."
        queue = self.queue
        now = time.monotonic()
        known = {*queue.pending_messages_per_session, *queue.pending_event_ids_session}
        heard = {self.session_of(key) for key in self.open}
        before = self.absent
        self.absent = {}
        for name in known - heard:
            since, asked = before.get(name, (now, None))
            # who asks for more is given time to listen again
            self.absent[name] = (since if asked == self.asked(name) else now, self.asked(name))
        for name, (since, asked) in list(self.absent.items()):
            if now - since < ABSENCE or asked != self.asked(name):
                continue
            await queue.clean_events(session_hash=name)
            if self.asked(name) <= asked:  # nothing new meanwhile
                queue.pending_event_ids_session.pop(name, None)
                queue.pending_messages_per_session.pop(name, None)
                del self.absent[name]

    def session_of(self, key: str) -> str:
        "The session of an event, or the session itself."
        event = self.queue.event_ids_to_events.get(key)
        return event.session_hash if event else key

    async def watch(self) -> None:
        "Looks again and again, as long as the page is served."
        while True:
            await asyncio.sleep(min(1, ABSENCE / 4))
            await self.forget_absent()


def find_session(scope: Scope) -> str:
    "The session, or the event, whose answers a request wants to hear, or ''."
    path = scope["path"]
    if path.endswith("/queue/data"):
        return parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
    parts = path.split("/")
    return parts[-1] if scope["method"] == "GET" and "call" in parts[:-2] else ""


# The middleware


class Guard:
    "The middleware before the page."

    def __init__(self, app: ASGIApp, names: Names, listeners: Listeners, root_path: str = ""):
        self.app = app
        self.names = names
        self.listeners = listeners
        self.root_path = root_path

    def find_refusal(self, scope: Scope) -> tuple:
        "(status, sentence) where a request is not passed on, else (0, '')."
        headers = [(key.decode("latin-1"), v.decode("latin-1")) for key, v in scope["headers"]]
        if why := self.names.find_stranger(headers):
            return 421, why
        path = scope["path"].removeprefix(self.root_path)
        if not ROUTES.fullmatch(path) or scope["method"] not in ("GET", "HEAD", "POST"):
            return 404, "there is nothing here"
        return 0, ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        is_started = False

        async def send_more(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                message = message | {"headers": [*message.get("headers", ()), *HEADERS]}
            await send(message)

        status, why = self.find_refusal(scope)
        if why:
            await PlainTextResponse(f"{why}\n", status)(scope, receive, send_more)
            return
        session = find_session(scope)
        try:
            with self.listeners.listen(session):
                await self.app(scope, receive, send_more)
        except RuntimeError:
            if not (session and is_started):
                raise  # else the session is not known (any more), and its client has heard that
            await send({"type": "http.response.body", "body": b"", "more_body": False})


# The connection


class Protocol(H11Protocol):
    "HTTP with a limit on the time that a client may take to send a request."

    deadline = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.deadline = self.loop.call_later(PATIENCE, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self.forget_deadline()  # the request is here
        elif self.deadline is None:
            self.deadline = self.loop.call_later(PATIENCE, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self.forget_deadline()
        super().connection_lost(exc)

    def forget_deadline(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None
