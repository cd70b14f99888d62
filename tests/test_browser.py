"""The explorer in a real browser: filled on the first visit, every view at three widths and in both
themes, by hand, by keyboard and by link.
"""

import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("gradio")

from test_explorer import make_lab, start_server, stop_server

pytestmark = pytest.mark.browser
SHOTS = Path(__file__).resolve().parent.parent / "screenshots"
WIDE, NARROW, HUGE = (
    dict(width=1280, height=900),
    dict(width=390, height=844),
    dict(width=2560, height=1300),
)
VIEWS = ("Trajectory", "Velocity", "Trade-off", "Compare", "Runs", "Live")


@pytest.fixture(scope="module")
def lab_env(tmp_path_factory):
    return make_lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def address(chromium, lab_env):
    process, address, *_ = start_server(lab_env)
    yield address
    stop_server(process)


@pytest.fixture(scope="module")
def browser(chromium):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-background-networking", "--disable-gpu"],
        )
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Open the page at a size and in a theme; at the end the console must be clean and no request
    may have left the machine.
    """
    pages, complaints = [], []

    def open_page(size=WIDE, theme="light", run="digits-run", query="", at=address):
        page = browser.new_page(viewport=size)
        page.set_default_timeout(60_000)
        page.on(
            "console",
            lambda m: (
                complaints.append(m.text)
                if m.type == "error" and "favicon" not in m.location.get("url", "")
                else None
            ),
        )
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.on(
            "response",
            lambda r: complaints.append(f"{r.status}: {r.url}") if r.status >= 400 else None,
        )
        page.on(
            "request",
            lambda r: (
                complaints.append(f"left the machine: {r.url}")
                if not r.url.startswith((at, "data:", "blob:"))
                else None
            ),
        )
        page.goto(f"{at}?__theme={theme}&run={run}{query}")
        page.wait_for_function(
            "document.querySelectorAll('#film .col').length > 1 || "
            "document.querySelector('#motion .main-svg') || document.querySelector('#line .about')",
            timeout=90_000,
        )
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not complaints, complaints


def columns(page, n):
    page.wait_for_function(
        "n => document.querySelectorAll('#film .col').length === n && "
        "document.querySelectorAll('#film .col img[data-layer=hat]').length === n",
        arg=n,
        timeout=90_000,
    )


def pictures(page, layer="x"):
    return page.locator(f"#film .col img[data-layer={layer}]").evaluate_all(
        "images => images.map((i) => i.src)"
    )


def go_to(page, name):
    tab = page.locator("#views").get_by_role("tab", name=name, exact=True)
    if tab.count() and tab.first.is_visible():
        tab.first.click()
    else:
        page.locator("#views .overflow-menu > button").click()
        page.locator("#views .overflow-dropdown button", has_text=name).click()
    page.wait_for_function("name => document.body.dataset.view === name", arg=name.lower())


READY = {
    "Trajectory": "#paths .main-svg",
    "Velocity": "#panels .main-svg",
    "Trade-off": "#chart .main-svg",
    "Compare": "#contest",
    "Runs": "#runs-table tbody tr",
    "Live": "#job",
}


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW, HUGE], ids=["1280", "390", "2560"])
def test_every_view_at_every_width_in_both_themes(visit, size, theme):
    page = visit(size, theme)
    columns(page, 9)
    assert page.evaluate("document.body.classList.contains('dark')") == (theme == "dark")
    assert all(
        page.locator("#film .col img").evaluate_all(
            "images => images.map(i => i.alt.length > 20 && i.complete && i.naturalWidth > 0)"
        )
    )
    assert (
        page.locator("#film .col img").first.evaluate("i => getComputedStyle(i).imageRendering")
        == "pixelated"
    )
    SHOTS.mkdir(exist_ok=True)
    for name in VIEWS:
        go_to(page, name)
        page.locator(READY[name]).first.wait_for(timeout=20_000)
        if name == "Compare":
            page.locator("#contest").click()
            page.locator("#c-table tbody tr").nth(1).wait_for()
        page.wait_for_timeout(500)
        assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0, name
        unnamed = page.evaluate("""() => [...document.querySelectorAll('button, input, select, textarea')].filter((e) => e.offsetParent && !e.closest('.js-plotly-plot')
            && !(e.ariaLabel || e.textContent.trim() || e.title || e.placeholder || (e.labels && e.labels.length) || e.getAttribute('aria-labelledby'))).map((e) => e.outerHTML.slice(0, 120))""")
        assert not unnamed, unnamed
        page.screenshot(path=SHOTS / f"{name.lower()}-{size['width']}-{theme}.png", full_page=True)


def test_sample_fills_the_film_with_what_was_asked(visit):
    page = visit()
    columns(page, 9)
    before = pictures(page)[-1]
    page.get_by_label("number input for How many").fill("4")
    page.keyboard.press("Tab")
    page.locator(".cost", has_text="4 steps = 4 NFE").wait_for()
    page.get_by_role("button", name="Sample", exact=True).click()
    columns(page, 5)
    page.locator("#numbers dt", has_text="NFE counted").wait_for()
    assert pictures(page)[-1] != before
    page.wait_for_function("location.search.includes('amount=4')")


def test_scrubbing_playing_and_enlarging_ask_the_server_nothing(visit):
    page = visit()
    columns(page, 9)
    page.locator("#paths .main-svg").first.wait_for()
    page.wait_for_timeout(500)
    asked = []
    page.on("request", lambda r: asked.append(r.url) if not r.url.startswith("data:") else None)
    spent = page.evaluate("""() => { const range = document.querySelector('.scrub'), begun = performance.now();
        for (let k = 0; k <= 8; k++) { range.value = k; range.dispatchEvent(new Event('input')); document.body.offsetHeight; } return (performance.now() - begun) / 9; }""")
    assert (
        page.locator(".reel .words").inner_text().startswith("step 8 of 8") and spent < 500
    )  # a stall, not a benchmark: bench/explorer.py measures
    cells = page.locator("#film .col").nth(2).locator(".cells")
    box = cells.bounding_box()
    page.mouse.click(box["x"] + 10, box["y"] + box["height"] * 5.5 / 8)
    words = page.locator(".reel .words").inner_text()
    assert "step 2 of 8" in words and "sample 6" in words
    background = page.locator(".stage figure[data-layer=x] .cell").evaluate(
        "e => e.style.backgroundImage"
    )
    assert pictures(page)[2] in background
    page.locator(".layers button", has_text="estimate").click()
    assert (
        page.locator("#film .col").nth(2).locator("img[data-layer=hat]").is_visible()
        and not page.locator("#film .col").nth(2).locator("img[data-layer=x]").is_visible()
    )
    page.get_by_role("button", name="play").click()
    page.wait_for_function(
        "document.querySelector('.reel .words').textContent.includes('step 8 of 8') && "
        "!cudlab.reel.timer"
    )
    page.wait_for_timeout(400)
    assert not asked, asked
    assert "layer=hat" in page.url and "pick=6" in page.url


def test_errors_are_measured_when_their_layer_is_wanted(visit):
    page = visit()
    columns(page, 9)
    before = pictures(page)
    page.locator(".layers button", has_text="local error").click()
    page.locator("#checked", has_text="Held against the flow of").wait_for()
    page.wait_for_function(
        "document.querySelectorAll('#film .col img[data-layer=error]').length === 8"
    )
    page.wait_for_function("document.querySelector('.reel').dataset.layer === 'error'")
    assert pictures(page) == before and "red is" in page.locator(".reel .note").inner_text()
    go_to(page, "Velocity")
    page.wait_for_function("document.querySelector('#panels').textContent.includes('local error')")


def test_the_keyboard_is_enough(visit):
    page = visit()
    columns(page, 9)
    first = pictures(page)
    seed = page.get_by_label("Seed").first
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert "step 6 of 8" in page.locator(".reel .words").inner_text()
    page.keyboard.press("2")
    assert page.locator(".reel").get_attribute("data-layer") == "hat"
    page.keyboard.press("1")
    page.keyboard.press("Space")
    page.wait_for_function("cudlab.reel.timer")
    page.keyboard.press("Space")
    page.wait_for_function("!cudlab.reel.timer")
    page.keyboard.press("r")
    page.wait_for_function(
        "old => { const now = [...document.querySelectorAll('#film .col "
        "img[data-layer=x]')].map((i) => i.src); return now.num_steps === 9 && now[0] !== old; }",
        arg=first[0],
    )
    page.wait_for_function(
        "document.querySelector('#numbers').textContent.toLowerCase().includes('nfe counted')"
    )
    assert seed.input_value() != "0"
    page.keyboard.press("Shift+?")
    page.locator("dialog#keys[open]").wait_for()
    page.keyboard.press("s")
    page.keyboard.press("Escape")
    page.locator("dialog#keys[open]").wait_for(state="detached")
    seed.fill("0")
    seed.press("End")
    page.keyboard.type("sr?")
    assert page.locator("dialog#keys[open]").count() == 0 and pictures(page) != first
    seed.fill("0")
    page.keyboard.press("Tab")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("s")
    page.wait_for_function(
        "old => JSON.stringify([...document.querySelectorAll('#film .col "
        "img[data-layer=x]')].map((i) => i.src)) === old",
        arg=json.dumps(first, separators=(",", ":")),
    )
    page.get_by_role("button", name="Sample", exact=True).focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent").strip() == "New seed"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"


def test_an_error_is_a_sentence_and_loses_nothing(visit):
    page = visit()
    columns(page, 9)
    film, count = pictures(page), page.get_by_label("number input for How many")
    page.locator("#solver input").click()
    page.get_by_role("option", name="heun", exact=True).click()
    page.get_by_label("NFE", exact=True).first.check()
    count.fill("7")
    page.keyboard.press("Tab")
    page.locator(".cost.bad", has_text="6 or 8 is").wait_for()
    page.get_by_role("button", name="Sample", exact=True).click()
    toast = page.get_by_test_id("toast-body")
    toast.wait_for()
    assert "NFE = 7 is not possible" in toast.inner_text() and "Traceback" not in page.content()
    assert pictures(page) == film and count.input_value() == "7"


def test_points_of_the_plane_move(visit):
    page = visit(run="moons-run")
    page.wait_for_function("document.querySelector('#motion .slider-container')")
    page.locator("#numbers dt", has_text="NFE counted").wait_for()
    place = (
        "[...document.querySelectorAll('#motion .points path')].slice(0, 4).map((p) => "
        "p.getAttribute('transform')).join()"
    )
    page.wait_for_function(
        "document.querySelector('#motion .js-plotly-plot')._transitionData._frames.length === 9"
    )
    start = page.evaluate(place)
    page.keyboard.press("Space")
    page.wait_for_function(f"old => {place} !== old", arg=start)
    assert not page.locator("#film .col").count()
    page.screenshot(path=SHOTS / "plane-1280-light.png", full_page=True)


def test_changing_the_run_refits_and_locks_the_controls(visit):
    page = visit()
    columns(page, 9)
    assert page.get_by_label("Class").first.is_visible()
    page.locator("#run input").click()
    page.get_by_role("option", name=re.compile("moons-short")).click()
    page.locator("#line", has_text="one call a sample").wait_for()
    amount = page.get_by_label("number input for How many")
    page.wait_for_function(
        "document.querySelector('[aria-label=\"number input for How many\"]').disabled"
    )
    assert amount.input_value() == "1"
    page.locator("#run input").click()
    assert page.get_by_role("option", name=re.compile("damaged-run")).count() == 0
    page.get_by_role("option", name=re.compile("digits-run")).click()
    page.wait_for_function(
        "!document.querySelector('[aria-label=\"number input for How many\"]').disabled"
    )
    assert amount.input_value() != "1"


def test_a_learned_solver_is_found_by_typing(visit):
    page = visit(run="moons-run")
    page.wait_for_function("document.querySelector('#motion .slider-container')")
    menu = page.locator("#solver input")
    menu.click()
    page.keyboard.type("learned")
    page.keyboard.press("Enter")
    page.locator(".cost", has_text="fitted for 3 steps on the uniform grid").wait_for()
    assert (
        "moons-solver" in menu.input_value()
        and page.get_by_label("number input for How many").input_value() == "3"
    )
    menu.click()
    page.keyboard.type("dpmpp-2s")
    page.keyboard.press("Enter")
    page.locator(".cost", has_text="5 NFE").wait_for()
    page.get_by_role("button", name="Network and last moves").click()
    page.get_by_label("Last move to t = 0").uncheck()
    page.locator(".cost", has_text="6 NFE").wait_for()


def test_missing_points_are_drawn_as_they_come(visit):
    page = visit(run="moons-run", query="&view=trade-off&solvers=euler&nfe=1,2&n=100")
    page.wait_for_function("document.body.dataset.view === 'trade-off'")
    page.locator("#caption", has_text="Nothing measured yet").wait_for()
    page.get_by_role("button", name="Measure missing points").click()
    page.locator("#caption", has_text="points").wait_for(timeout=120_000)
    page.wait_for_function(
        "document.querySelectorAll('#chart .scatterlayer .point').length >= 2", timeout=120_000
    )
    page.locator("#scores summary", has_text="2 scores").wait_for(timeout=60_000)
    page.screenshot(path=SHOTS / "measured-1280-light.png", full_page=True)


def test_columns_are_compared_in_four_ways(visit):
    page = visit(
        query="&view=compare&a=digits-run~euler~2~uniform~ema~1&b=digits-run~ab2~4~uniform~ema~1&c=digits-run~heun~8~uniform~raw~1&count2=9"
    )
    page.wait_for_function("document.body.dataset.view === 'compare'")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("s")
    page.locator("#c-table tbody tr").nth(2).wait_for()
    assert page.locator("#arena figure").count() == 3
    page.keyboard.press("b")
    first = page.locator("#arena .words").inner_text()
    page.keyboard.press("b")
    assert page.locator("#arena .words").inner_text() != first and "mode=blink" in page.url
    page.screenshot(path=SHOTS / "blink-1280-light.png", full_page=True)
    for mode in ("slider", "difference", "side by side"):
        page.locator("#arena .layers button", has_text=mode).click()
        page.wait_for_timeout(150)
        page.screenshot(path=SHOTS / f"{mode.split()[0]}-1280-light.png", full_page=True)


def test_a_link_shows_the_same(visit):
    page = visit()
    columns(page, 9)
    page.locator("#solver input").click()
    page.get_by_role("option", name="ab2", exact=True).click()
    page.get_by_label("number input for How many").fill("5")
    page.keyboard.press("Tab")
    page.get_by_label("Seed").first.fill("12")
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Sample", exact=True).click()
    columns(page, 6)
    page.locator(".layers button", has_text="velocity").click()
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(
        "location.search.includes('step=4') && location.search.includes('layer=v') && "
        "location.search.includes('seed=12')"
    )
    assert len(page.url) < 2048
    again = visit(
        query="&"
        + page.url.partition("?")[2].replace("__theme=light&", "").replace("run=digits-run&", "")
    )
    columns(again, 6)
    again.wait_for_function(
        "document.querySelector('.reel').dataset.layer === 'v' && document.querySelector('.reel "
        ".words').textContent.includes('step 4 of 5')"
    )
    assert pictures(again) == pictures(page)
    third = visit(
        query="&"
        + again.url.partition("?")[2].replace("__theme=light&", "").replace("run=digits-run&", "")
    )
    columns(third, 6)
    assert pictures(third) == pictures(page)


def test_what_is_on_screen_can_be_taken_away(visit):
    page = visit()
    columns(page, 9)
    page.get_by_role("button", name="Share what is on screen").click()
    for kind, start in (("PNG", b"\x89PNG"), ("GIF", b"GIF8"), ("CSV", b"move,")):
        with page.expect_download() as waiting:
            page.get_by_role("button", name=kind, exact=True).click()
        assert Path(waiting.value.path()).read_bytes().startswith(
            start
        ) and waiting.value.suggested_filename.endswith(kind.lower())
    with page.expect_download() as waiting:
        page.get_by_role("button", name="SVG of the charts").click()
    drawn = Path(waiting.value.path()).read_text()  # the first of the charts
    assert drawn.startswith("<svg") and drawn.count("<path") > 10
    page.wait_for_function("document.querySelector('[data-link]').value.includes('run=digits-run')")


def test_a_run_is_opened_from_the_list(visit):
    page = visit()
    columns(page, 9)
    go_to(page, "Runs")
    page.locator("#runs-table tbody tr", has_text="moons-run").first.click()
    page.locator("#facts", has_text="moons-run").wait_for()
    assert page.locator("#runs-table", has_text="damaged: ema.safetensors").count() == 1
    go_to(page, "Trajectory")
    page.wait_for_function("document.querySelector('#motion .slider-container')")
    assert "moons-run" in page.locator("#run input").input_value()


def test_the_page_works_behind_a_proxy_on_a_sub_path(visit, lab_env):
    import http.client
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    process, address, *_ = start_server(lab_env, "--root-path", "/lab")
    port = int(re.search(r":(\d+)", address).group(1))

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def pass_on(self):
            if not self.path.startswith("/lab"):
                self.send_error(404)
                return
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            there = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            headers = {
                k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")
            } | {"Host": self.headers["Host"], "X-Forwarded-Proto": "http"}
            there.request(self.command, self.path.removeprefix("/lab") or "/", body, headers)
            answer = there.getresponse()
            self.send_response(answer.status)
            for k, v in answer.getheaders():
                if k.lower() not in ("transfer-encoding", "connection"):
                    self.send_header(k, v)
            self.end_headers()
            while piece := answer.read1(65536):
                self.wfile.write(piece)
                self.wfile.flush()

        do_GET = do_POST = pass_on

        def log_message(self, *a):
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # a page asks for many files at once

    proxy = Server(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        page = visit(at=f"http://127.0.0.1:{proxy.server_port}/lab/")
        columns(page, 9)
        page.locator("#paths .main-svg").first.wait_for()
        page.wait_for_timeout(800)
        page.close()
    finally:
        proxy.shutdown()
        stop_server(process)


def test_a_run_that_vanishes_is_a_sentence(visit, lab_env):
    runs = Path(lab_env["CUDLAB_RUNS_PATH"])
    shutil.copytree(runs / "moons-run", runs / "vanishing")
    page = visit(run="vanishing")
    page.wait_for_function("document.querySelector('#motion .slider-container')")
    shutil.rmtree(runs / "vanishing")
    page.get_by_role("button", name="Sample", exact=True).click()
    toast = page.get_by_test_id("toast-body")
    toast.wait_for()
    assert "is not here (any more)" in toast.inner_text()
