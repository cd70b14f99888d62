"""What stands before the page, in front of a small page: which names, routes and lengths pass, and
that absent and half-silent clients are forgotten.
"""

import asyncio
import json
import socket
import threading
from http.client import HTTPConnection
from types import SimpleNamespace

import pytest

gr = pytest.importorskip("gradio")

import guard
import server
from guard import Names
from small_lab import wait_for

JSON = {"content-type": "application/json"}
FOREIGN = ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "localhost.", "[::2]", ""]


@pytest.fixture(scope="module")
def site():
    "A page whose one call waits for a permit before each of its ten answers."
    here = SimpleNamespace(permits=threading.Semaphore(0), answers=[])

    def count(name: str):
        for k in range(10):
            here.answers.append((name, k))
            here.permits.acquire(timeout=300)
            yield name, k

    def repeat(text: str) -> str:
        return text

    with gr.Blocks() as page:
        with gr.Tab("one"):
            words = [gr.Textbox(), gr.Number()]
        words[0].submit(count, words[0], words, api_name="count", concurrency_limit=1)
        words[0].input(repeat, words[0], words[0], api_name="repeat")
    page.queue(max_size=32, api_open=False)
    listening = server.open_socket("127.0.0.1", 0)
    here.port = listening.getsockname()[1]
    here.address = server.launch_page(page, listening)
    here.page = page
    here.calls = {fn.api_name: k for k, fn in page.fns.items()}
    yield here
    here.permits.release(10_000)
    page.close(verbose=False)


def ask(site, method, path, body=None, headers=None, **more):
    "(status, headers, text) of a request."
    connection = HTTPConnection("127.0.0.1", site.port, timeout=60)
    connection.request(method, path, body, headers or {}, **more)
    answer = connection.getresponse()
    text = answer.read().decode(errors="replace")
    connection.close()
    return answer.status, answer.headers, text


def join(site, session: str, call: str = "count", text: str = "x") -> int:
    "Ask for a call in a session and hear no answer; the status."
    body = dict(data=[text], fn_index=site.calls[call], session_hash=session)
    return ask(site, "POST", "/gradio_api/queue/join", json.dumps(body), JSON)[0]


def connect(site, text: str) -> socket.socket:
    "A connection on which so much was sent."
    s = socket.create_connection(("127.0.0.1", site.port), timeout=60)
    s.sendall(text.encode())
    return s


def queue_length(site) -> int:
    "Requests that wait or are worked on."
    return len(site.page._queue.event_ids_to_events)


# Names


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize("header", ["Host", "X-Forwarded-Host"])
def test_a_foreign_name_is_refused_for_every_call(site, host, header):
    for method, path in (
        ("GET", "/"),
        ("GET", "/config"),
        ("HEAD", "/"),
        ("POST", "/gradio_api/queue/join"),
        ("GET", "/gradio_api/queue/data?session_hash=x"),
    ):
        status, _, text = ask(site, method, path, headers={header: host})
        assert status == 421 and text.count("\n") <= 1, (method, path)


def test_the_names_of_this_machine_pass(site):
    for host in (f"127.0.0.1:{site.port}", "localhost", "LOCALHOST:1", "[::1]:7860", "127.5.5.5"):
        assert ask(site, "GET", "/config", headers={"Host": host})[0] == 200, host


def test_a_page_for_others_knows_its_names():
    named = Names("192.168.1.2", ["Lab.example"])
    assert named.mean("192.168.1.2") and named.mean("lab.example") and named.mean("localhost")
    assert not named.mean("192.168.1.3") and not named.mean("evil.example")
    everywhere = Names("0.0.0.0")
    assert everywhere.mean("10.0.0.7") and everywhere.mean(socket.gethostname().lower())
    assert not everywhere.mean("evil.example")
    proxied = [("host", "127.0.0.1:7860"), ("x-forwarded-host", "lab.example")]
    assert not named.find_stranger([*proxied, ("origin", "https://lab.example")])
    assert "evil.example" in named.find_stranger([*proxied, ("origin", "https://evil.example")])
    assert "lab.example" in everywhere.find_stranger(proxied)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "x", ""])
def test_another_origin_may_neither_read_nor_ask(site, origin):
    asking = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    for method in ("GET", "POST", "OPTIONS"):
        status, headers, _ = ask(site, method, "/config", headers=asking)
        assert status == 421
        assert not [key for key in headers if key.lower().startswith("access-control")]


def test_the_own_origin_passes_and_no_address_is_told_to_others(site):
    status, headers, _ = ask(site, "GET", "/config", headers={"Origin": site.address[:-1]})
    assert status == 200 and headers["Referrer-Policy"] == "no-referrer"
    assert not [key for key in headers if key.lower().startswith("access-control")]


# Routes and lengths


@pytest.mark.parametrize(
    "path",
    [
        *("upload", "upload_progress?upload_id=x", "process_recording", "component_server"),
        *("run/repeat", "api/repeat", "startup-events", "file=/etc/passwd", "proxy=http://x"),
        *("deep_link", "runs", "run-history/buckets", "queue/status", "vibe-code", "stream/x"),
        *("../monitoring", "../monitoring/summary", "../docs", "../openapi.json"),
    ],
)
def test_what_the_page_does_not_need_is_off(site, path):
    path = f"/gradio_api/{path}".replace("/gradio_api/../", "/")
    for method in ("GET", "POST"):
        assert ask(site, method, path, "{}", JSON)[0] == 404, (method, path)


def test_a_file_is_not_taken(site):
    form = "--b\r\nContent-Disposition: form-data; name=files; filename=a\r\n\r\nx\r\n--b--\r\n"
    kind = {"content-type": "multipart/form-data; boundary=b"}
    assert ask(site, "POST", "/gradio_api/upload", form, kind)[0] == 404


@pytest.mark.parametrize("chunked", [False, True])
def test_a_long_call_is_refused_before_anything_is_kept(site, chunked):
    body = json.dumps(dict(data=["x" * guard.BODY], fn_index=0, session_hash="long")).encode()
    pieces = [body[:1000], body[1000:]] if chunked else body
    path = "/gradio_api/queue/join"
    try:
        status, _, _ = ask(site, "POST", path, pieces, JSON, encode_chunked=chunked)
        assert status == 413
    except ConnectionError:  # it did not even listen to the end
        pass
    assert "long" not in site.page._queue.pending_messages_per_session
    assert ask(site, "POST", "/gradio_api/call/repeat", '{"data": ["x"]}', JSON)[0] == 200


# Clients that are gone


@pytest.mark.parametrize("listens", [False, True], ids=["never listened", "hung up"])
def test_requests_whose_client_is_gone_leave_the_queue(site, monkeypatch, listens):
    monkeypatch.setattr(guard, "ABSENCE", 0.1 if not listens else 300)
    queue = site.page._queue
    wait_for(lambda: not queue_length(site))
    site.answers.clear()
    data = "GET /gradio_api/queue/data?session_hash={} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    sessions = [f"gone{k}" for k in range(33)]
    opened = []
    for session in sessions:
        status = join(site, session)
        assert status == 200 or (status == 503 and session != sessions[0])
        opened += [connect(site, data.format(session))] if listens else []
    wait_for(lambda: site.answers)
    for s in opened:
        s.recv(100)
        s.close()
    wait_for(lambda: queue_length(site) == 1)  # what is at work waits for its permit
    site.permits.release()
    wait_for(lambda: queue_length(site) == 0)
    assert len(site.answers) <= 2
    assert not {*sessions} & {*queue.pending_messages_per_session} or listens
    monkeypatch.setattr(guard, "ABSENCE", 300)
    from gradio_client import Client

    client = Client(site.address, verbose=False, analytics_enabled=False)
    assert client.predict("still here", api_name="/repeat") == "still here"


def test_who_comes_back_and_asks_is_given_time_to_listen(monkeypatch):
    cleaned = []

    async def clean_events(session_hash):
        cleaned.append(session_hash)

    queue = SimpleNamespace(
        pending_messages_per_session={"page": []},
        pending_event_ids_session={"page": set()},
        event_ids_to_events={},
        clean_events=clean_events,
    )
    listeners = guard.Listeners(SimpleNamespace(_queue=queue))

    def look(at: float) -> bool:
        monkeypatch.setattr(guard.time, "monotonic", lambda: at)
        asyncio.run(listeners.forget_absent())
        return "page" in queue.pending_messages_per_session

    patience = guard.ABSENCE
    assert look(0) and look(patience - 1)
    queue.pending_event_ids_session["page"].add("asked just now")
    assert look(patience + 1) and not cleaned
    with listeners.listen("page"):
        assert look(3 * patience)
    assert look(3 * patience + 1) and look(4 * patience) and not cleaned
    assert not look(4 * patience + 1) and cleaned == ["page"]
    assert not queue.pending_event_ids_session and not listeners.absent


def test_sessions_are_few(site):
    sessions = site.page.app.state_holder.session_data
    for k in range(server.SESSIONS + 8):
        assert join(site, f"visitor{k}", "repeat") == 200
    wait_for(lambda: f"visitor{server.SESSIONS + 7}" in sessions)
    wait_for(lambda: not queue_length(site))
    assert len(sessions) <= server.SESSIONS


@pytest.mark.parametrize(
    "sent",
    [
        "",
        "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n",
        "POST /gradio_api/queue/join HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\n{",
    ],
    ids=["nothing", "half a head", "half a body"],
)
def test_who_sends_half_a_request_is_hung_up_on(site, monkeypatch, sent):
    monkeypatch.setattr(guard, "PATIENCE", 0.1)
    with connect(site, sent) as s:
        while s.recv(10_000):  # until the other side ends
            pass
    data = "GET /gradio_api/heartbeat/patient HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with connect(site, data) as waiting, connect(site, "GET") as silent:
        assert waiting.recv(10_000).startswith(b"HTTP/1.1 200")
        assert silent.recv(10) == b""
        waiting.setblocking(False)
        with pytest.raises(BlockingIOError):  # who waits for an answer is not hung up on
            while waiting.recv(10_000):
                pass
