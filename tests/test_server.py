"How the page is launched: on a port of its own, and around every proxy."

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
    "Two real launches, since gradio looks for its own page by HTTP: about eight seconds."
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


def test_a_port_that_another_program_takes_meanwhile_gives_way(monkeypatch):
    "The look at the port is only a hint."
    monkeypatch.setattr(server, "is_free", lambda host, port: True)
    tried = []

    def launch_at(page, host, port, *more):
        tried.append(port)
        if len(tried) < 3:
            raise OSError(f"Cannot find empty port in range: {port}-{port}.")
        return f"http://{host}:{port}/"

    monkeypatch.setattr(server, "launch_at", launch_at)
    assert server.launch_page(None, "127.0.0.1", 7860) == "http://127.0.0.1:7862/"
    assert tried == [7860, 7861, 7862]


def test_a_port_is_looked_at_on_the_address_that_is_served():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not server.is_free("127.0.0.1", port)
    assert not server.is_free("300.1.2.3", port)
    with pytest.raises(ValueError, match="no port from here to 65535 is free on 300.1.2.3"):
        server.launch_page(None, "300.1.2.3", 65530)


def test_jobs_have_the_proxies_of_the_user_again(monkeypatch):
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with proxies.bypass_proxies():
        assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "*"
    assert os.environ["no_proxy"] == "example.org" and "NO_PROXY" not in os.environ
