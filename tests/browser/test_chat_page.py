"""The chat page as a user has it: sending, streaming, stopping, examples, settings, trouble, several users."""

import os

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import FIGURES, KEY, PATIENT_MS, adjust, answers, bubbles, open_page, send, user
from tests.scripted_api import Api
from tests.waiting import wait_until

USERS = 32 if os.environ.get("BORG_TEST_SLOW") else 6
"""Thirty-two browsers take five minutes on two cores."""


def test_page_stop_keeps_the_text_and_leaves_the_stream(tab: Page, scripted: str, api: Api) -> None:
    gone = api.gone
    open_page(tab, scripted)
    send(tab, "endless story")
    expect(bubbles(tab)).to_contain_text("word3")
    tab.locator("#message .stop-button").click()
    wait_until("the stream is left", lambda: api.gone > gone)
    expect(bubbles(tab)).to_contain_text("word3")
    assert "word4999" not in answers(tab)[0]


def test_page_settings_reach_the_request(tab: Page, scripted: str, api: Api) -> None:
    open_page(tab, scripted)
    send(tab, "with defaults")
    expect(tab.get_by_text(FIGURES)).to_have_count(1)
    body = api.requests[-1]
    assert (body["max_tokens"], body["temperature"], body["top_p"]) == (4096, 0.7, 0.9)
    assert [message["role"] for message in body["messages"]] == ["user"]
    adjust(tab, {"maximum-new-tokens": "128", "temperature": "0.25", "top-p": "0.5"})
    # Key by key: what is put in at once while the panel still opens, Gradio may set back to its first value.
    tab.locator("#instructions textarea").press_sequentially("Speak like a sailor.")
    send(tab, "with settings")
    expect(tab.get_by_text(FIGURES)).to_have_count(2)
    body = api.requests[-1]
    assert (body["max_tokens"], body["temperature"], body["top_p"]) == (128, 0.25, 0.5)
    assert [message["content"] for message in body["messages"]] == [
        "Speak like a sailor.",
        "with defaults",
        "You said: with defaults. ",
        "with settings",
    ]
    for name, least, most, step in (
        ("maximum-new-tokens", "64", "8192", "64"),
        ("temperature", "0", "1.5", "0.05"),
        ("top-p", "0", "1", "0.05"),
    ):
        slider = tab.locator(f"#{name} input[type=range]")
        assert [slider.get_attribute(field) for field in ("min", "max", "step")] == [least, most, step]


def test_page_example_is_sent_by_a_click(tab: Page, scripted: str, api: Api) -> None:
    open_page(tab, scripted)
    examples = tab.locator("#chat .example")
    assert examples.count() == 7
    text = examples.nth(5).inner_text().strip()
    examples.nth(5).click()
    expect(tab.get_by_text(FIGURES)).to_have_count(1)
    assert api.requests[-1]["messages"][-1]["content"] == text
    assert "100 widgets" in text


def test_page_retry_undo_and_clear(tab: Page, scripted: str, api: Api) -> None:
    open_page(tab, scripted)
    send(tab, "once")
    expect(tab.get_by_text(FIGURES)).to_have_count(1)
    before = len(api.requests)
    tab.get_by_role("button", name="Retry").click()
    wait_until("it is asked again", lambda: len(api.requests) > before)
    assert api.requests[-1]["messages"] == [{"role": "user", "content": "once"}]
    expect(tab.get_by_text(FIGURES)).to_have_count(1)
    tab.get_by_role("button", name="Undo").click()
    expect(tab.locator("#message textarea")).to_have_value("once")
    expect(bubbles(tab)).to_have_count(0)
    send(tab, "twice")
    expect(tab.get_by_text(FIGURES)).to_have_count(1)
    tab.get_by_role("button", name="Clear").click()
    expect(bubbles(tab)).to_have_count(0)


def test_page_enter_sends_and_shift_enter_breaks_the_line(tab: Page, scripted: str, api: Api) -> None:
    open_page(tab, scripted)
    tab.focus("#message textarea")
    tab.keyboard.type("first")
    tab.keyboard.press("Shift+Enter")
    tab.keyboard.type("second")
    tab.keyboard.press("Enter")
    expect(tab.get_by_text(FIGURES)).to_have_count(1)
    assert api.requests[-1]["messages"][-1]["content"] == "first\nsecond"


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("cut", "Cut at 3 tokens"),
        ("deadline", "longer than the server allows"),
        ("break", "The connection broke"),
    ],
)
def test_page_says_why_an_answer_was_cut_and_keeps_it(tab: Page, scripted: str, text: str, note: str) -> None:
    open_page(tab, scripted)
    send(tab, text)
    expect(tab.get_by_text(note)).to_be_visible()
    assert f"You said: {text}." in answers(tab)[0]


def test_page_waits_for_a_full_server_and_shows_the_place(tab: Page, scripted: str, api: Api) -> None:
    open_page(tab, scripted)
    api.refusals = 2
    send(tab, "busy now")
    expect(tab.get_by_text("You are number 1 of 1 waiting here")).to_be_visible()
    expect(tab.get_by_text("You said: busy now.")).to_be_visible()


def test_page_has_a_banner_while_the_server_is_not_ready(tab: Page, scripted: str, api: Api) -> None:
    api.ready = False
    try:
        open_page(tab, scripted)
        expect(tab.locator("#banner")).to_contain_text("the server is being replaced")
    finally:
        api.ready = True
    expect(tab.locator("#banner")).to_be_hidden()


def test_page_answer_never_runs(tab: Page, scripted: str) -> None:
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    open_page(tab, scripted)
    for number, text in enumerate(("html", "picture"), 1):
        send(tab, text)
        expect(tab.get_by_text(FIGURES)).to_have_count(number)
    expect(tab.locator("#chat strong", has_text="bold")).to_be_visible()
    assert tab.title() == "Borg Merge v1"
    assert tab.locator("#chat [onerror]").count() == 0
    assert tab.locator("#chat script").count() == 0
    outside = [url for url in asked if not url.startswith((scripted, "data:"))]
    assert [url for url in outside if "leak" not in url] == []
    assert (
        tab.evaluate("[...document.images].filter(image => image.src.includes('leak') && image.naturalWidth).length")
        == 0
    )


def test_page_key_never_reaches_the_browser(tab: Page, scripted: str, api: Api) -> None:
    bodies: list[str] = []
    tab.on("response", lambda response: bodies.append(response.url))
    open_page(tab, scripted)
    send(tab, "hello")
    expect(tab.get_by_text(FIGURES)).to_have_count(1)
    assert api.headers[-1]["authorization"] == f"Bearer {KEY}"
    for url in {url for url in bodies if "queue/data" not in url and "heartbeat" not in url}:
        assert KEY not in httpx.get(url, timeout=60).text
    assert KEY not in tab.content()
    assert KEY not in str(tab.evaluate("JSON.stringify({...localStorage})"))


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/info",
        "gradio_api/upload",
        "gradio_api/call/chat",
        "gradio_api/file=/etc/passwd",
        "gradio_api/proxy=http://127.0.0.1:9",
        "v1/chat/completions",
        "docs",
        "openapi.json",
        "login",
        "monitoring",
    ],
)
def test_page_adds_no_other_route(scripted: str, path: str) -> None:
    for method in ("GET", "POST"):
        assert httpx.request(method, f"{scripted}/{path}", timeout=60).status_code == 404


def test_page_keeps_many_users_apart(browser: Browser, scripted: str) -> None:
    names = [f"user-{number:02d}-secret" for number in range(USERS)]
    tabs = []
    contexts = []
    for _ in names:
        context = browser.new_context()
        context.set_default_timeout(PATIENT_MS)
        contexts.append(context)
        tabs.append(context.new_page())
    try:
        for tab in tabs:
            tab.goto(scripted, wait_until="commit")
        for tab, name in zip(tabs, names, strict=True):
            send(tab, name)
        for tab, name in zip(tabs, names, strict=True):
            expect(tab.get_by_text(FIGURES)).to_have_count(1)
            assert f"You said: {name}." in answers(tab)[0]
            seen = tab.inner_text("body")
            assert [other for other in names if other != name and other in seen] == []
    finally:
        for context in contexts:
            context.close()


# ---------------------------------------------------------------------------------------------- on every screen


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_page_fits_and_has_no_serious_fault_of_access(
    browser: Browser, scripted: str, axe: str, scheme: str, width: int
) -> None:
    with user(browser, viewport={"width": width, "height": 844}) as tab:
        open_page(tab, f"{scripted}?__theme={scheme}")
        send(tab, "hello")
        expect(tab.get_by_text(FIGURES)).to_have_count(1)
        tab.get_by_text("Settings", exact=True).click()
        expect(tab.locator("#instructions")).to_be_visible()
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        tab.evaluate(axe)
        found = tab.evaluate("axe.run().then(result => result.violations)")
    serious = [
        f"{fault['id']}: {[node['html'][:200] for node in fault['nodes'][:3]]}"
        for fault in found
        if fault["impact"] in ("serious", "critical")
    ]
    assert serious == []
