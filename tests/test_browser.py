"""The explorer in a real browser: fills on the first visit, samples, keeps still, works by keyboard, in both themes and widths."""
import re
from pathlib import Path

import pytest

pytest.importorskip("gradio")

from test_explorer import make_lab
from test_explorer import start_server
from test_explorer import stop_server

pytestmark = pytest.mark.browser
SHOTS = Path(__file__).resolve().parent.parent / "screenshots"
WIDE, NARROW = dict(width=1280, height=900), dict(width=390, height=844)


@pytest.fixture(scope="module")
def address(chromium, tmp_path_factory):
    process, address, *_ = start_server(make_lab(tmp_path_factory.mktemp("lab")))
    yield address
    stop_server(process)


@pytest.fixture(scope="module")
def browser(chromium):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-background-networking", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    "Open the page at a size and in a theme; at the end the console must be clean and no request may have left the machine."
    pages, complaints = [], []

    def open_page(size=WIDE, theme="light", run="digits-run"):
        page = browser.new_page(viewport=size)
        page.set_default_timeout(60_000)
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.on("request", lambda r: complaints.append(f"left the machine: {r.url}") if not r.url.startswith((address, "data:", "blob:")) else None)
        page.goto(f"{address}?__theme={theme}&run={run}")
        page.wait_for_selector("#velocity .main-svg", timeout=90_000)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not complaints, complaints


def filled(page, columns):
    page.wait_for_function("n => document.querySelectorAll('.film img').length === n", arg=2 * columns, timeout=90_000)


def numbers(page):
    return dict(zip(page.locator("#numbers dt").all_inner_texts(), page.locator("#numbers dd").all_inner_texts()))


def no_overflow(page):
    assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["1280", "390"])
def test_the_first_visit_shows_a_filled_page(visit, size, theme):
    page = visit(size, theme)
    filled(page, 9)
    assert page.evaluate("document.body.classList.contains('dark')") == (theme == "dark")
    assert all(page.locator(".film img").evaluate_all("images => images.map(i => i.alt.length > 20 && i.complete && i.naturalWidth > 0)"))
    assert page.locator(".film img").first.evaluate("i => getComputedStyle(i).imageRendering") == "pixelated"
    SHOTS.mkdir(exist_ok=True)
    tag = f"{size['width']}-{theme}"
    page.wait_for_timeout(400)
    for tab in ("Sample", "Quality", "Run"):
        page.get_by_role("tab", name=tab, exact=True).click()
        page.locator({"Sample": "#velocity .main-svg", "Quality": "#chart .main-svg", "Run": "#loss .main-svg"}[tab]).first.wait_for(timeout=15_000)
        page.wait_for_timeout(500)
        no_overflow(page)
        page.screenshot(path=SHOTS / f"{tab.lower()}-{tag}.png", full_page=True)


def test_sample_fills_the_strip_with_what_was_asked(visit):
    page = visit()
    filled(page, 9)
    before = page.locator(".film img").last.get_attribute("src")
    page.get_by_label("number input for How many").fill("4")
    page.keyboard.press("Tab")
    page.locator(".cost", has_text="4 steps = 4 NFE").wait_for()
    page.get_by_role("button", name="Sample", exact=True).click()
    filled(page, 5)
    page.locator("#numbers dt", has_text="NFE counted").wait_for()
    assert page.locator("#numbers").inner_text().lower().count("nfe counted") == 1
    assert page.locator(".film img").last.get_attribute("src") != before


def test_the_keyboard_is_enough(visit):
    page = visit()
    filled(page, 9)
    first = page.locator(".film").inner_html()
    seed = page.get_by_label("Seed").first
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("r")
    page.wait_for_function("old => document.querySelector('.film') && document.querySelector('.film').innerHTML !== old && document.querySelectorAll('.film img').length === 18", arg=first)
    assert seed.input_value() != "0"
    page.keyboard.press("Shift+?")
    page.locator("dialog#keys[open]").wait_for()
    page.keyboard.press("s")
    page.keyboard.press("Escape")
    page.locator("dialog#keys[open]").wait_for(state="detached")

    seed.fill("0")
    seed.press("End")
    page.keyboard.type("sr?")
    assert page.locator("dialog#keys[open]").count() == 0 and page.locator(".film").inner_html() != first
    seed.fill("0")
    page.keyboard.press("Tab")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("s")
    page.wait_for_function("old => document.querySelector('.film').innerHTML === old", arg=first)

    page.get_by_role("button", name="Sample", exact=True).focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent").strip() == "New seed"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"


def test_an_error_is_a_sentence_and_loses_nothing(visit):
    page = visit()
    filled(page, 9)
    film, count = page.locator(".film").inner_html(), page.get_by_label("number input for How many")
    page.get_by_label("Solver").first.click()
    page.get_by_role("option", name="heun", exact=True).click()
    page.get_by_label("NFE", exact=True).first.check()
    count.fill("7")
    page.keyboard.press("Tab")
    page.locator(".cost.bad", has_text="6 or 8 is").wait_for()
    page.get_by_role("button", name="Sample", exact=True).click()
    toast = page.get_by_test_id("toast-body")
    toast.wait_for()
    assert "NFE = 7 is not possible" in toast.inner_text() and "Traceback" not in page.content()
    assert page.locator(".film").inner_html() == film and count.input_value() == "7"


def test_points_of_the_plane(visit):
    page = visit(run="moons-run")
    page.locator("#paths .main-svg").first.wait_for()
    page.locator("#numbers dt", has_text="NFE counted").wait_for()
    assert not page.locator(".film img").count() and page.locator("#paths .scatterlayer .trace").count() == 4
    page.wait_for_timeout(300)
    page.screenshot(path=SHOTS / "plane-1280-light.png", full_page=True)


def test_changing_the_run_refits_the_controls(visit):
    page = visit()
    filled(page, 9)
    assert page.get_by_label("Class").first.is_visible()
    page.get_by_label("Run", exact=True).first.click()
    page.get_by_role("option", name=re.compile("moons-run")).click()
    page.locator("#paths .main-svg").first.wait_for()
    page.locator("#line", has_text="moons").wait_for()
    assert page.get_by_label("Class").count() == 0 or not page.get_by_label("Class").first.is_visible()
    page.get_by_label("Run", exact=True).first.click()
    assert page.get_by_role("option", name=re.compile("damaged-run")).count() == 0
    page.keyboard.press("Escape")


def test_missing_points_are_drawn_as_they_come(visit):
    page = visit(run="moons-run")
    page.get_by_role("tab", name="Quality", exact=True).click()
    page.locator("#caption", has_text="Nothing measured yet").wait_for()
    page.get_by_label("NFE").last.fill("1, 2")
    page.get_by_label("number input for Samples per score").fill("100")
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Measure missing points").click()
    page.locator("#scores tbody tr").nth(1).wait_for(timeout=120_000)
    page.locator("#caption", has_text="points").wait_for()
    page.wait_for_function("document.querySelectorAll('#chart .scatterlayer .point').length === 2")
    page.wait_for_timeout(400)
    page.screenshot(path=SHOTS / "measured-1280-light.png", full_page=True)


def test_a_learned_solver_is_found_by_typing_and_sets_the_controls(visit):
    page = visit(run="moons-run")
    page.locator("#paths .main-svg").first.wait_for()
    menu, amount = page.locator("#solver input"), page.get_by_label("number input for How many")
    menu.click()
    page.keyboard.type("learned")
    page.keyboard.press("Enter")
    page.locator(".cost", has_text="fitted for 3 steps on the uniform grid").wait_for()
    assert "moons-solver" in menu.input_value() and amount.input_value() == "3"
    amount.fill("5")
    page.keyboard.press("Tab")
    page.locator(".cost.bad", has_text="fitted for 3 steps, not for 5").wait_for()
    menu.click()
    page.keyboard.type("dpmpp-2s")
    page.keyboard.press("Enter")
    page.locator(".cost", has_text="9 NFE").wait_for()
    page.get_by_role("button", name="Network and last moves").click()
    page.get_by_label("Last move to t = 0").uncheck()
    page.locator(".cost", has_text="10 NFE").wait_for()
    page.get_by_label("Run", exact=True).first.click()
    page.get_by_role("option", name=re.compile("moons-solver")).click()
    page.locator(".cost", has_text="3 steps = 3 NFE").wait_for()
    assert page.get_by_label("Last move to t = 0").is_checked()
    page.get_by_role("tab", name="Quality", exact=True).click()
    assert "moons-solver" in page.locator("#q-solver input").input_value() and page.get_by_label("NFE").last.input_value() == "3"
