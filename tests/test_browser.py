"""The explorer in a real browser: filled on the first visit, by hand, by keyboard and by link; in
the long suite every view at three widths and in both themes.
"""

import http.client
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")

from small_lab import ROOT, make_lab, start_explorer, stop_explorer

pytestmark = pytest.mark.browser
SHOTS = ROOT / "screenshots"
WIDE = dict(width=1280, height=900)
NARROW = dict(width=390, height=844)
HUGE = dict(width=2560, height=1300)
FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-gpu"]
# what shows that a view is filled
READY = {
    "Trajectory": "#paths .main-svg",
    "Velocity": "#panels .main-svg",
    "Trade-off": "#caption .caption",
    "Compare": "#c-table tbody tr",
    "Runs": "#runs-table tbody tr",
    "Live": "#job",
}
AMOUNT = "number input for How many"
NAMELESS = """
() => [...document.querySelectorAll('button, input, select, textarea')]
  .filter((e) => e.offsetParent && !e.closest('.js-plotly-plot'))
  .filter((e) => !(e.ariaLabel || e.textContent.trim() || e.title || e.placeholder
    || (e.labels && e.labels.length) || e.getAttribute('aria-labelledby')))
  .map((e) => e.outerHTML.slice(0, 120))
"""
PICTURES = "(images) => images.map((image) => image.src)"
LOADED = "(images) => images.every((i) => i.alt.length > 20 && i.complete && i.naturalWidth > 0)"
FILM_IS_WHOLE = """
(n) => ['.col', '.col img[data-layer=hat]']
  .every((what) => document.querySelectorAll('#film ' + what).length === n)
"""
FILLED = """
document.querySelectorAll('#film .col').length > 1 || document.querySelector('#motion .main-svg')
"""
ANOTHER_FILM = """
(old) => {
  const now = [...document.querySelectorAll('#film .col img[data-layer=x]')].map((i) => i.src);
  return now.length === 9 && now[0] !== old;
}
"""
# resolves when the page has asked for nothing in half a second
QUIET = """
new Promise((resolve) => {
  let before = -1;
  const look = () => {
    const now = performance.getEntriesByType('resource').length;
    if (now === before) return resolve();
    before = now;
    setTimeout(look, 500);
  };
  look();
})
"""
PLACES = """
[...document.querySelectorAll('#motion .points path')].slice(0, 4)
  .map((p) => p.getAttribute('transform')).join()
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return make_lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def served(chromium, lab):
    "(address, token) of an explorer."
    process, address, printed = start_explorer(lab)
    yield address, re.search(r"\?token=(\w+)", printed[-1]).group(1)
    stop_explorer(process)


@pytest.fixture(scope="module")
def address(served):
    return served[0]


@pytest.fixture(scope="module")
def context(chromium):
    "One browser, whose pages share what they have loaded."
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser.new_context()
        browser.close()


def is_complaint(message) -> bool:
    return message.type == "error" and "favicon" not in message.location.get("url", "")


@pytest.fixture
def visit(context, address):
    """Open the page at a size and in a theme; at the end the console must be clean and no request
    may have left the machine.
    """
    pages, complaints = [], []

    def check_response(response):
        if response.status >= 400:
            complaints.append(f"{response.status}: {response.url}")

    def open_page(size=WIDE, theme="light", run="digits-run", query="", at=address):
        def check_request(request):
            if not request.url.startswith((at, "data:", "blob:")):
                complaints.append(f"left the machine: {request.url}")

        page = context.new_page()
        page.set_viewport_size(size)
        page.set_default_timeout(60_000)
        page.on("console", lambda m: complaints.append(m.text) if is_complaint(m) else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("response", check_response)
        page.on("request", check_request)
        page.goto(f"{at}?__theme={theme}&run={run}{query}")
        page.wait_for_function(FILLED)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not complaints, complaints


def wait_for_film(page, columns: int) -> None:
    "Wait until a film is whole."
    page.wait_for_function(FILM_IS_WHOLE, arg=columns)


def wait_for_points(page) -> None:
    "Wait until the points of the plane can move."
    page.wait_for_function("document.querySelector('#motion .slider-container')")


def pictures(page, layer="x") -> list:
    return page.locator(f"#film .col img[data-layer={layer}]").evaluate_all(PICTURES)


def press_button(page, name: str, exact: bool = True) -> None:
    page.get_by_role("button", name=name, exact=exact).click()


def step_words(page) -> str:
    return page.locator(".reel .words").inner_text()


def go_to(page, name: str) -> None:
    tab = page.locator("#views").get_by_role("tab", name=name, exact=True)
    if tab.count() and tab.first.is_visible():
        tab.first.click()
    else:
        page.locator("#views .overflow-menu > button").click()
        page.locator("#views .overflow-dropdown button", has_text=name).click()
    page.wait_for_function("name => document.body.dataset.view === name", arg=name.lower())


@pytest.mark.parametrize(
    "size, theme",
    [
        (WIDE, "light"),
        pytest.param(WIDE, "dark", marks=pytest.mark.long),
        *(
            pytest.param(size, theme, marks=pytest.mark.long)
            for size in (NARROW, HUGE)
            for theme in ("light", "dark")
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value["width"]),
)
def test_every_view_at_every_width_in_both_themes(visit, size, theme):
    page = visit(size, theme)
    wait_for_film(page, 9)
    assert page.evaluate("document.body.classList.contains('dark')") == (theme == "dark")
    images = page.locator("#film .col img")
    assert images.evaluate_all(LOADED)
    rendering = images.first.evaluate("image => getComputedStyle(image).imageRendering")
    assert rendering == "pixelated"
    SHOTS.mkdir(exist_ok=True)
    for name in READY:
        go_to(page, name)
        page.locator(READY[name]).first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0, name
        assert not page.evaluate(NAMELESS), name
        page.screenshot(path=SHOTS / f"{name.lower()}-{size['width']}-{theme}.png", full_page=True)


def test_sample_fills_the_film_with_what_was_asked(visit):
    page = visit()
    wait_for_film(page, 9)
    before = pictures(page)[-1]
    page.get_by_label(AMOUNT).fill("4")
    page.keyboard.press("Tab")
    page.locator(".cost", has_text="4 steps = 4 NFE").wait_for()
    press_button(page, "Sample")
    wait_for_film(page, 5)
    page.locator("#numbers dt", has_text="NFE counted").wait_for()
    assert pictures(page)[-1] != before
    page.wait_for_function("location.search.includes('amount=4')")


def test_scrubbing_playing_and_enlarging_ask_the_server_nothing(visit):
    page = visit()
    wait_for_film(page, 9)
    page.locator("#paths .main-svg").first.wait_for()
    page.evaluate(QUIET)
    asked = []
    page.on("request", lambda r: asked.append(r.url) if not r.url.startswith("data:") else None)
    page.locator(".scrub").evaluate("""(range) => {
      for (let k = 0; k <= 8; k++) { range.value = k; range.dispatchEvent(new Event('input')); }
    }""")
    assert step_words(page).startswith("step 8 of 8")
    column = page.locator("#film .col").nth(2)
    box = column.locator(".cells").bounding_box()
    page.mouse.click(box["x"] + 10, box["y"] + box["height"] * 5.5 / 8)
    assert "step 2 of 8" in step_words(page) and "sample 6" in step_words(page)
    cell = page.locator(".stage figure[data-layer=x] .cell")
    assert pictures(page)[2] in cell.evaluate("e => e.style.backgroundImage")
    page.locator(".layers button", has_text="estimate").click()
    assert column.locator("img[data-layer=hat]").is_visible()
    assert not column.locator("img[data-layer=x]").is_visible()
    page.get_by_role("button", name="play").click()
    page.wait_for_function(
        "document.querySelector('.reel .words').textContent.includes('step 8 of 8') && "
        "!cudlab.reel.timer"
    )
    page.wait_for_function("location.search.includes('pick=6')")
    assert "layer=hat" in page.url and not asked, asked


def test_errors_are_measured_when_their_layer_is_wanted(visit):
    page = visit()
    wait_for_film(page, 9)
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
    wait_for_film(page, 9)
    first = pictures(page)
    seed = page.get_by_label("Seed").first
    keys = page.locator("dialog#keys[open]")
    press = page.keyboard.press
    page.evaluate("document.activeElement.blur()")
    press("ArrowLeft")
    press("ArrowLeft")
    assert "step 6 of 8" in step_words(page)
    press("2")
    assert page.locator(".reel").get_attribute("data-layer") == "hat"
    press("1")
    press("Space")
    page.wait_for_function("cudlab.reel.timer")
    press("Space")
    page.wait_for_function("!cudlab.reel.timer")
    press("r")
    page.wait_for_function(ANOTHER_FILM, arg=first[0])
    page.locator("#numbers dt", has_text="NFE counted").wait_for()
    assert seed.input_value() != "0"
    press("Shift+?")
    keys.wait_for()
    press("s")
    press("Escape")
    keys.wait_for(state="detached")
    seed.fill("0")
    seed.press("End")
    page.keyboard.type("sr?")
    assert keys.count() == 0 and pictures(page) != first
    seed.fill("0")
    press("Tab")
    page.evaluate("document.activeElement.blur()")
    press("s")
    page.wait_for_function(
        "old => JSON.stringify([...document.querySelectorAll('#film .col img[data-layer=x]')]"
        ".map((i) => i.src)) === old",
        arg=json.dumps(first, separators=(",", ":")),
    )
    page.get_by_role("button", name="Sample", exact=True).focus()
    press("Tab")
    assert page.evaluate("document.activeElement.textContent").strip() == "New seed"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"


def test_an_error_is_a_sentence_and_loses_nothing(visit):
    page = visit()
    wait_for_film(page, 9)
    before = pictures(page)
    amount = page.get_by_label(AMOUNT)
    page.locator("#solver input").click()
    page.get_by_role("option", name="heun", exact=True).click()
    page.get_by_label("NFE", exact=True).first.check()
    amount.fill("7")
    page.keyboard.press("Tab")
    page.locator(".cost.bad", has_text="6 or 8 is").wait_for()
    press_button(page, "Sample")
    toast = page.get_by_test_id("toast-body")
    toast.wait_for()
    assert "NFE = 7 is not possible" in toast.inner_text() and "Traceback" not in page.content()
    assert pictures(page) == before and amount.input_value() == "7"


def test_points_of_the_plane_move(visit):
    page = visit(run="moons-run")
    wait_for_points(page)
    page.locator("#numbers dt", has_text="NFE counted").wait_for()
    page.wait_for_function(
        "document.querySelector('#motion .js-plotly-plot')._transitionData._frames.length === 9"
    )
    start = page.evaluate(PLACES)
    page.keyboard.press("Space")
    page.wait_for_function(f"old => {PLACES.strip()} !== old", arg=start)
    assert not page.locator("#film .col").count()


def test_changing_the_run_refits_and_locks_the_controls(visit):
    page = visit()
    wait_for_film(page, 9)
    amount = page.get_by_label(AMOUNT)
    assert page.get_by_label("Class").first.is_visible()
    page.locator("#run input").click()
    page.get_by_role("option", name=re.compile("moons-short")).click()
    page.locator("#line", has_text="one call a sample").wait_for()
    sync_api.expect(amount).to_be_disabled()
    assert amount.input_value() == "1"
    wait_for_points(page)
    page.locator("#run input").click()
    assert page.get_by_role("option", name=re.compile("damaged-run")).count() == 0
    page.get_by_role("option", name=re.compile("digits-run")).click()
    sync_api.expect(amount).to_be_enabled()
    assert amount.input_value() != "1"
    wait_for_film(page, 9)


def test_a_learned_solver_is_found_by_typing(visit):
    page = visit(run="moons-run")
    wait_for_points(page)
    menu = page.locator("#solver input")
    menu.click()
    page.keyboard.type("learned")
    page.keyboard.press("Enter")
    page.locator(".cost", has_text="fitted for 3 steps on the uniform grid").wait_for()
    assert "moons-solver" in menu.input_value()
    assert page.get_by_label(AMOUNT).input_value() == "3"
    menu.click()
    page.keyboard.type("dpmpp-2s")
    page.keyboard.press("Enter")
    page.locator(".cost", has_text="5 NFE").wait_for()
    press_button(page, "Network and last moves", exact=False)
    page.get_by_label("Last move to t = 0").uncheck()
    page.locator(".cost", has_text="6 NFE").wait_for()


def test_missing_points_are_drawn_as_they_come(visit):
    page = visit(run="moons-run", query="&view=trade-off&solvers=euler&nfe=1,2&n=100")
    page.wait_for_function("document.body.dataset.view === 'trade-off'")
    page.locator("#caption", has_text="Nothing measured yet").wait_for()
    press_button(page, "Measure missing points")
    page.locator("#caption", has_text="points").wait_for()
    page.wait_for_function("document.querySelectorAll('#chart .scatterlayer .point').length >= 2")
    page.locator("#scores summary", has_text="2 scores").wait_for()


def test_columns_are_compared_in_four_ways(visit):
    columns = {
        "a": "euler~2~uniform~ema~1",
        "b": "ab2~4~uniform~ema~1",
        "c": "heun~8~uniform~raw~1",
    }
    query = "".join(f"&{letter}=digits-run~{column}" for letter, column in columns.items())
    page = visit(query=f"&view=compare{query}&count2=9")
    page.wait_for_function("document.body.dataset.view === 'compare'")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("s")
    page.locator("#c-table tbody tr").nth(2).wait_for()
    assert page.locator("#arena figure").count() == 3
    page.keyboard.press("b")
    first = page.locator("#arena .words").inner_text()
    page.keyboard.press("b")
    assert page.locator("#arena .words").inner_text() != first and "mode=blink" in page.url
    for mode in ("slider", "difference", "side by side"):
        page.locator("#arena .layers button", has_text=mode).click()
        page.locator(f"#arena .body.{mode.split()[0]}").wait_for()


def query_of(page) -> str:
    "What a page has written into its address."
    query = page.url.partition("?")[2]
    return "&" + query.replace("__theme=light&", "").replace("run=digits-run&", "")


def test_a_link_shows_the_same(visit):
    page = visit()
    wait_for_film(page, 9)
    page.locator("#solver input").click()
    page.get_by_role("option", name="ab2", exact=True).click()
    page.get_by_label(AMOUNT).fill("5")
    page.keyboard.press("Tab")
    page.get_by_label("Seed").first.fill("12")
    page.keyboard.press("Tab")
    press_button(page, "Sample")
    wait_for_film(page, 6)
    page.locator(".layers button", has_text="velocity").click()
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(
        "['step=4', 'layer=v', 'seed=12'].every((part) => location.search.includes(part))"
    )
    assert len(page.url) < 2048
    again = page
    for _ in range(2):
        again = visit(query=query_of(again))
        wait_for_film(again, 6)
        again.wait_for_function(
            "document.querySelector('.reel').dataset.layer === 'v' && "
            "document.querySelector('.reel .words').textContent.includes('step 4 of 5')"
        )
        assert pictures(again) == pictures(page)


def test_what_is_on_screen_can_be_taken_away(visit):
    page = visit()
    wait_for_film(page, 9)
    page.locator("#paths .main-svg").first.wait_for()
    press_button(page, "Share what is on screen", exact=False)
    for kind, start in (("PNG", b"\x89PNG"), ("GIF", b"GIF8"), ("CSV", b"move,")):
        with page.expect_download() as waiting:
            press_button(page, kind)
        assert Path(waiting.value.path()).read_bytes().startswith(start)
        assert waiting.value.suggested_filename.endswith(kind.lower())
    with page.expect_download() as waiting:
        press_button(page, "SVG of the charts")
    drawn = Path(waiting.value.path()).read_text()  # the first of the charts
    assert drawn.startswith("<svg") and drawn.count("<path") > 10
    page.wait_for_function("document.querySelector('[data-link]').value.includes('run=digits-run')")


def test_a_run_is_opened_from_the_list(visit):
    page = visit()
    wait_for_film(page, 9)
    go_to(page, "Runs")
    page.locator("#runs-table tbody tr", has_text="moons-run").first.click()
    page.locator("#facts", has_text="moons-run").wait_for()
    assert page.locator("#runs-table", has_text="damaged: ").count() == 1
    go_to(page, "Trajectory")
    wait_for_points(page)
    assert "moons-run" in page.locator("#run input").input_value()


def test_jobs_need_the_token_of_the_terminal(visit, served):
    page = visit()
    go_to(page, "Live")
    page.locator("#job-text textarea").fill("--method nope")
    page.locator("#job-start").click()
    toast = page.get_by_test_id("toast-body")
    toast.wait_for()
    assert "?token=" in toast.inner_text()
    asked = []
    page = visit(query=f"&token={served[1]}")
    page.on("request", lambda request: asked.append((request.url, request.headers)))
    assert "token" not in page.url and served[1] not in page.content()
    go_to(page, "Live")
    page.locator("#job-text textarea").fill("--method nope")
    page.locator("#job-start").click()
    toast = page.get_by_test_id("toast-body")
    toast.wait_for()
    assert "unknown method 'nope'" in toast.inner_text()  # the token was right
    assert asked and served[1] not in str(asked), "neither in an address nor in a referrer"
    assert page.evaluate("sessionStorage.getItem('cudlab-token')") == served[1]


MARKUP = "<img src=x onerror=window.owned=1>"


@pytest.mark.long
def test_a_name_of_markup_is_text_in_every_view(visit, lab):
    folder = Path(lab["CUDLAB_RUNS_PATH"])
    shutil.copytree(folder / "digits-run", folder / MARKUP)
    try:
        page = visit(run="%3Cimg%20src=x%20onerror=window.owned=1%3E")
        wait_for_film(page, 9)
        press_button(page, "Share what is on screen", exact=False)
        for name in READY:
            go_to(page, name)
            page.locator(READY[name]).first.wait_for()
            page.evaluate(QUIET)
        assert page.evaluate("window.owned") is None
        page.get_by_text(MARKUP).first.wait_for(state="attached")
    finally:
        shutil.rmtree(folder / MARKUP)


class Proxy(BaseHTTPRequestHandler):
    "Serves under /lab what another server serves at its root."

    protocol_version = "HTTP/1.0"
    port = 0

    def pass_on(self):
        if not self.path.startswith("/lab"):
            self.send_error(404)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {k: v for k, v in self.headers.items() if k.lower() != "connection"}
        there = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        path = self.path.removeprefix("/lab") or "/"
        there.request(self.command, path, body, headers | {"X-Forwarded-Proto": "http"})
        answer = there.getresponse()
        self.send_response(answer.status)
        for key, value in answer.getheaders():
            if key.lower() not in ("transfer-encoding", "connection"):
                self.send_header(key, value)
        self.end_headers()
        while piece := answer.read1(65536):
            self.wfile.write(piece)
            self.wfile.flush()

    do_GET = do_POST = pass_on

    def log_message(self, *args):
        pass


class ProxyServer(ThreadingHTTPServer):
    request_queue_size = 128  # a page asks for many files at once


@pytest.mark.long
def test_the_page_works_behind_a_proxy_on_a_sub_path(visit, lab):
    process, address, _ = start_explorer(lab, "--root-path", "/lab")
    Proxy.port = int(re.search(r":(\d+)", address).group(1))
    proxy = ProxyServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        page = visit(at=f"http://127.0.0.1:{proxy.server_port}/lab/")
        wait_for_film(page, 9)
        page.locator("#paths .main-svg").first.wait_for()
        page.close()
    finally:
        proxy.shutdown()
        stop_explorer(process)


def test_a_run_that_vanishes_is_a_sentence(visit, lab):
    folder = Path(lab["CUDLAB_RUNS_PATH"])
    shutil.copytree(folder / "moons-run", folder / "vanishing")
    page = visit(run="vanishing")
    wait_for_points(page)
    shutil.rmtree(folder / "vanishing")
    press_button(page, "Sample")
    toast = page.get_by_test_id("toast-body")
    toast.wait_for()
    assert "is not here (any more)" in toast.inner_text()
