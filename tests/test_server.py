"How the page is served: on a port of its own, around every proxy, in bounded memory."

import contextlib
import errno
import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from http.client import HTTPConnection

import pytest
from small_lab import free_port, make_lab, start_explorer, stop_explorer

pytest.importorskip("gradio")
import proxies
import server
from request import SampleForm

DEAD = {"http": "http://127.0.0.1:1", "https": "nonsense", "all": "socks5://127.0.0.1:1"}


def test_two_explorers_of_the_same_second_each_get_a_port_though_all_proxies_are_dead():
    "Two real launches: about eight seconds."
    env = {f"{kind}_proxy": url for kind, url in DEAD.items()} | {"no_proxy": "", "NO_PROXY": ""}
    port = free_port()
    flags = env, "--runs", "digits-rf"
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(start_explorer, *flags, port=port) for _ in range(2)]
    started = [job.result() for job in jobs]
    for process, _, _ in started:
        stop_explorer(process)
    addresses = {address for _, address, _ in started}
    said = sorted(lines[0] for _, _, lines in started)
    assert len(addresses) == 2 and f"http://127.0.0.1:{port}/" in addresses
    assert said[0].startswith("explorer ready at ")
    assert said[1].startswith(f"port {port} is busy, using ")


def test_a_port_is_taken_on_the_address_that_is_served():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with server.open_socket("127.0.0.1", port) as other:
            assert other.getsockname()[1] > port
            with server.open_socket("127.0.0.1", port) as third:
                assert third.getsockname()[1] > other.getsockname()[1]
    with pytest.raises(OSError):
        server.open_socket("300.1.2.3", 65530)


def test_no_free_port_is_a_sentence(monkeypatch):
    def refuse(self, address):
        raise OSError(errno.EADDRINUSE, "Address already in use")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(ValueError, match="no port from here to 65535 is free on 127.0.0.1"):
        server.open_socket("127.0.0.1", 65530)


def test_jobs_have_the_proxies_of_the_user_again(monkeypatch):
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with proxies.bypass_proxies():
        assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "*"
    assert os.environ["no_proxy"] == "example.org" and "NO_PROXY" not in os.environ


# Memory: many visitors, each in a session of their own


def ask_page(port: int, method: str, path: str, body: dict = None) -> str:
    "The whole answer to a request."
    connection = HTTPConnection("127.0.0.1", port, timeout=300)
    text = None if body is None else json.dumps(body)
    connection.request(method, path, text, {"content-type": "application/json"})
    answer = connection.getresponse().read().decode()
    connection.close()
    return answer


def call_page(port: int, call: int, values: list, session: str) -> str:
    "All that a page says to a call that is made in a new session."
    body = dict(data=values, fn_index=call, session_hash=session)
    ask_page(port, "POST", "/gradio_api/queue/join", body)
    return ask_page(port, "GET", f"/gradio_api/queue/data?session_hash={session}")


def plan_visit(k: int) -> tuple:
    "(endpoint, its values, what the answer must hold) of the k-th of many mixed calls."
    is_digits = k % 50 < 10
    run = "digits-run" if is_digits else "moons-run"
    form = SampleForm(run=run, amount=2, count=2, seed=k)
    values = list(asdict(form).values())
    column = ["euler", 2, "uniform", "ema", 1]
    columns = [run, *column, run, *column, "none", *column, "none", *column]
    chart = [["moons-run"], ["euler"], "fd", "NFE", "uniform"]
    visits = [
        ("sample", values, "NFE counted"),
        ("errors", values, "process_completed"),
        ("compare", [k, 2, *columns], "process_completed"),
        ("fit", [run, "euler", 8], "training steps"),
        ("sample", list((asdict(form) | dict(amount="x")).values()), "whole number"),
        ("export_gif", values, "data:image/gif"),
        ("about", [run], "SHA-256"),
        ("browse", ["all", "all", "x" * 200_000], "at most 200"),
        ("job_start", ["--method rf " + "y" * 100_000, "no token"], "?token="),
        ("scores", chart, "process_completed"),
    ]
    return visits[k % 10]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_soak_of_a_thousand_visitors_leaves_the_memory_where_it_was(tmp_path):
    "Less than 50 MB for 1,000 mixed calls by HTTP, each in a session of its own."
    psutil = pytest.importorskip("psutil")
    process, address, _ = start_explorer(make_lab(tmp_path))
    try:
        port = int(address.rstrip("/").rpartition(":")[2])
        config = json.loads(ask_page(port, "GET", "/config"))
        calls = {fn["api_name"]: fn["id"] for fn in config["dependencies"]}
        server_process = psutil.Process(process.pid)

        def visit(k):
            name, values, want = plan_visit(k)
            answer = call_page(port, calls[name], values, f"visitor{k}")
            assert want in answer, (k, name, answer[-500:])
            if k % 25 == 0:  # who is gone before there is an answer, and who sends too much
                body = dict(data=values, fn_index=calls[name], session_hash=f"gone{k}")
                ask_page(port, "POST", "/gradio_api/queue/join", body)
                body["data"] = ["z" * 2**20]
                with contextlib.suppress(ConnectionError):
                    assert "Too Large" in ask_page(port, "POST", "/gradio_api/queue/join", body)

        for k in range(300):
            visit(k)
        before = server_process.memory_info().rss
        for k in range(300, 1300):
            visit(k)
        grown = server_process.memory_info().rss - before
        print(f"1,000 calls: {before / 1e6:.0f} MB before, {grown / 1e6:+.1f} MB")
        assert grown < 50 * 2**20
    finally:
        stop_explorer(process)
