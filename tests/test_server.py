"How the page is launched: on a port of its own, and around every proxy."

import errno
import os
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from small_lab import free_port, start_explorer, stop_explorer

pytest.importorskip("gradio")
import proxies
import server

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
