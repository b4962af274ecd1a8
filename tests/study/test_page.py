"""The page in a real browser: a session by keyboard, undo, reload, crash, two raters, a phone."""

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ksr_distill.study.basket import Prompt
from tests.study.studies import Server, make_study_of

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("chromium and chromedriver are not installed", allow_module_level=True)

from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

NASTY = 'a cat </p><script>document.title="stolen"</script><img src=x onerror="document.title=1">'
SHOWN = "return document.querySelector('#views.shown') ? document.getElementById('left').src : ''"
Chrome = webdriver.Chrome


@pytest.fixture(scope="module")
def open_browser() -> Iterator[Callable[[], Chrome]]:
    """Return an opener of fresh browsers; they close with the module."""
    browsers: list[Chrome] = []

    def start() -> Chrome:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1200,800"):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        browsers.append(Chrome(options=options, service=service))
        return browsers[-1]

    yield start
    for browser in browsers:
        browser.quit()


@pytest.fixture(scope="module")
def browser(open_browser) -> Chrome:
    return open_browser()


@pytest.fixture
def server(tmp_path, serve, browser) -> Server:
    prompts = [Prompt(f"p{index}", NASTY, "c") for index in range(5)]
    study = make_study_of(
        tmp_path, prompts, (400, 300), (800, 600), votes_per_pair=1, first_view="fit"
    )
    return serve(study)


def join(browser: Chrome, server: Server, name: str) -> None:
    browser.get(server.url + server.invitation)
    browser.find_element(By.ID, "name").send_keys(name, Keys.ENTER)
    wait(browser).until(lambda _: browser.execute_script(SHOWN))


def wait(browser: Chrome) -> WebDriverWait:
    return WebDriverWait(browser, 20, poll_frequency=0.05)


def press(browser: Chrome, key: str) -> None:
    ActionChains(browser).pause(0.3).send_keys(key).perform()  # a look of more than 250 ms


def shown_pair(browser: Chrome) -> int:
    return int(browser.execute_script(SHOWN).split("/")[-2])


def judge(browser: Chrome, key: str) -> int:
    """Press the key and wait for the next pair, or the end; return the judged pair."""
    source = browser.execute_script(SHOWN)
    pair = shown_pair(browser)
    press(browser, key)
    wait(browser).until(
        lambda _: is_over(browser) or browser.execute_script(SHOWN) not in ("", source)
    )
    return pair


def is_over(browser: Chrome) -> bool:
    return "Thank you" in browser.find_element(By.ID, "message").text


def all_saved(browser: Chrome) -> None:
    wait(browser).until(lambda _: browser.execute_script("return localStorage.length") == 0)


def votes_in(server: Server) -> dict[int, str]:
    with sqlite3.connect(server.study / "study.sqlite") as connection:
        return dict(connection.execute("SELECT pair, choice FROM vote"))


def screenshot(browser: Chrome, name: str) -> None:
    """Keep a picture of the page where KSR_SCREENSHOTS says, for people to look at."""
    if folder := os.environ.get("KSR_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def test_a_whole_session_by_keyboard_with_undo(browser, server):
    join(browser, server, "ann")
    screenshot(browser, "desktop")
    first = judge(browser, Keys.ARROW_LEFT)
    mistaken = judge(browser, Keys.ARROW_LEFT)
    press(browser, "z")
    wait(browser).until(lambda _: browser.execute_script(SHOWN) and shown_pair(browser) == mistaken)
    assert judge(browser, Keys.ARROW_RIGHT) == mistaken
    rest = [judge(browser, key) for key in (Keys.ARROW_UP, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)]
    wait(browser).until(lambda _: is_over(browser))
    screenshot(browser, "over")
    all_saved(browser)
    given = dict(zip(rest, ("both", "neither", "right"), strict=True))
    assert votes_in(server) == {first: "left", mistaken: "right", **given}
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert severe == []  # nothing missing, nothing against the page's own policy


def test_a_reload_in_the_middle_goes_on_where_it_stopped(browser, server):
    join(browser, server, "ann")
    first = judge(browser, Keys.ARROW_LEFT)
    all_saved(browser)
    before = browser.execute_script(SHOWN)
    browser.refresh()
    wait(browser).until(lambda _: browser.execute_script(SHOWN))
    assert browser.execute_script(SHOWN) == before
    press(browser, "z")  # undo works across the reload, too
    wait(browser).until(lambda _: browser.execute_script(SHOWN) and shown_pair(browser) == first)
    all_saved(browser)
    assert votes_in(server) == {}


def test_votes_given_while_the_server_is_down_arrive_when_it_is_back(browser, server):
    join(browser, server, "ann")
    all_saved(browser)
    wait(browser).until(
        lambda _: browser.execute_script(
            "return [...ahead.values()].flat().every((image) => image.complete)"
        )
    )
    server.kill()
    pair = shown_pair(browser)
    press(browser, Keys.ARROW_DOWN)
    wait(browser).until(lambda _: "offline" in browser.find_element(By.ID, "saving").text)
    screenshot(browser, "offline")
    server.start()
    browser.refresh()  # the tab itself may crash meanwhile
    wait(browser).until(lambda _: browser.execute_script(SHOWN))
    assert votes_in(server) == {pair: "neither"}


def test_two_raters_at_once_never_see_one_pair(browser, open_browser, server):
    other = open_browser()
    join(browser, server, "ann")
    join(other, server, "bob")
    assert shown_pair(browser) != shown_pair(other)
    turns = (rater for rater in 3 * (browser, other) if rater.execute_script(SHOWN))
    seen = [judge(rater, Keys.ARROW_LEFT) for rater in turns]
    all_saved(browser)
    all_saved(other)
    assert len(seen) == len(set(seen)) == len(votes_in(server))


def test_html_in_a_prompt_is_read_as_text(browser, server):
    join(browser, server, "ann")
    assert browser.find_element(By.ID, "prompt").text == NASTY
    assert browser.title == "Side by side"
    assert len(browser.find_elements(By.TAG_NAME, "img")) == 2


def test_both_pictures_keep_one_size_and_move_together(browser, server):
    join(browser, server, "ann")
    places = "return ['left','right'].map((id) => document.getElementById(id).style.transform)"
    boxes = (
        "return ['left', 'right'].map((id) => { const b = "
        "document.getElementById(id).getBoundingClientRect(); return [b.width, b.height]; })"
    )
    view = browser.find_element(By.CLASS_NAME, "view")
    transforms = set()
    press(browser, " ")  # the true size
    assert browser.execute_script(boxes) == [[800, 600], [800, 600]]
    for act in (
        lambda: None,
        lambda: ActionChains(browser).drag_and_drop_by_offset(view, 40, -30).perform(),
        lambda: browser.execute_script(
            "arguments[0].dispatchEvent(new WheelEvent('wheel',"
            "{deltaY: -300, clientX: 200, clientY: 300, cancelable: true}))",
            view,
        ),
    ):
        act()
        left, right = browser.execute_script(places)
        assert left == right
        transforms.add(left)
    assert len(transforms) == 3
    screenshot(browser, "zoomed")


def test_a_phone_shows_both_pictures_and_all_buttons(browser, server):
    phone = {"width": 375, "height": 700, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        browser.get(server.url + server.invitation)
        screenshot(browser, "phone-join")
        join(browser, server, "ann")
        screenshot(browser, "phone")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 375
        upper, lower = (view.rect for view in browser.find_elements(By.CLASS_NAME, "view"))
        assert upper["y"] + upper["height"] <= lower["y"]
        assert upper["width"] == lower["width"] > 350
        assert upper["height"] > 200
        for button in browser.find_elements(By.CSS_SELECTOR, "#choices button"):
            assert button.rect["height"] >= 44  # a finger's width
            assert button.rect["y"] + button.rect["height"] <= 700
        pair = shown_pair(browser)
        ActionChains(browser).pause(0.3).perform()
        browser.find_element(By.CSS_SELECTOR, "[data-choice=both]").click()
        wait(browser).until(lambda _: votes_in(server) == {pair: "both"})
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
