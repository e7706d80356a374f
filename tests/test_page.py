"""The page at /, in a real browser, as a person would use it. A stand-in for the server says what the tests want to
see."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai_server import LIMIT, Error, OpenAI

from llama import Llama
from llama.server import page as served

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("needs a browser: apt-get install chromium chromium-driver", allow_module_level=True)

Keys = webdriver.Keys
ENTER, ESCAPE, TAB = Keys.ENTER, Keys.ESCAPE, Keys.TAB
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-extensions --mute-audio"
)


class Page:
    """A browser that has the page open, and what a person does there."""

    def __init__(self, server: OpenAI, downloads: Path) -> None:
        self.server, self.downloads = server, downloads
        options = webdriver.ChromeOptions()
        for flag in FLAGS.split():
            options.add_argument(flag)
        options.binary_location = CHROMIUM
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        self.browser.execute_cdp_cmd(
            "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)}
        )
        server.pages["/"] = (served.HEADERS, served.PAGE.encode())

    def open(self, width: int = 1280, height: int = 800, colors: str = "light") -> None:
        """The page, as at a first visit."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.colors(colors)
        if self.browser.current_url.startswith(self.server.address):
            self.run("localStorage.clear(); sessionStorage.clear(); history.replaceState(null, '', '/')")
            self.reload()
        else:
            self.browser.get(self.server.address + "/")

    def reload(self) -> None:
        self.browser.refresh()
        self.until(lambda: self.text("#model") or self.all("#notice span"))

    def colors(self, scheme: str) -> None:
        features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
        told = [{"name": name, "value": value} for name, value in features.items()]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": told})

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def type(self, *keys: str) -> None:
        self.browser.switch_to.active_element.send_keys(*keys)

    def click(self, selector: str) -> None:
        self.one(selector).click()

    def until(self, holds: Callable[[], Any], seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, self.text("body")
            time.sleep(0.01)

    def say(self, text: str) -> None:
        """Type a message and send it."""
        self.one("#message").send_keys(text, ENTER)

    def ask(self, text: str, *pieces: str) -> str:
        """Say something, and let the model answer; the answer as it is shown."""
        if pieces:
            self.server.answers.append(pieces)
        said = len(self.said)
        self.say(text)
        self.until(lambda: len(self.said) >= said + 2)
        self.done()
        return self.said[-1]

    def done(self) -> None:
        self.until(lambda: not self.all("#thread.busy"))

    @property
    def said(self) -> list[str]:
        return self.run("return [...document.querySelectorAll('.said .body')].map((body) => body.innerText)")

    @property
    def kept(self) -> list[dict[str, Any]]:
        """The conversations that the browser keeps."""
        entries = self.run("return Object.entries(localStorage)")
        return [json.loads(value) for key, value in entries if key.startswith("llama.chat.")]

    def act(self, told: str, at: int = -1) -> None:
        """Press a button of a message."""
        self.run("arguments[0].click()", self.all(f".said [title='{told}']")[at])


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    server = OpenAI()
    page = Page(server, tmp_path_factory.mktemp("downloads"))
    yield page
    page.browser.quit()
    server.close()


@pytest.fixture
def page(browser: Page) -> Iterator[Page]:
    server = browser.server
    server.reset()
    browser.open()
    browser.browser.get_log("browser")
    yield browser
    wrong = [entry["message"] for entry in browser.browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [line for line in wrong if "the server responded with a status of" not in line and "ERR_" not in line] == []


def test_an_answer_streams(page: Page) -> None:
    gate = threading.Event()
    page.server.answers = [["Once ", "upon **a", gate, " time** 🦙", "."]]
    page.say("A story, please")
    page.until(lambda: page.said == ["A story, please", "Once upon **a"])  # a mark that is still open is shown as it is
    assert page.all("#thread.busy")
    assert page.text("#status") == "The model is answering"
    page.run("window.first = document.querySelector('.assistant .body p')")
    gate.set()
    page.done()
    assert page.said[1] == "Once upon a time 🦙."
    assert page.text(".assistant strong") == "a time"
    assert page.text("#status") == "The answer is complete"
    assert page.text("#context") == f"16 of {LIMIT} tokens"
    assert page.run("return document.querySelector('#meter').ariaValueNow") == "16"
    assert page.text(".assistant .note").startswith("4 tokens")
    assert page.server.last == {
        "model": "stand-in", "messages": [{"role": "user", "content": "A story, please"}], "temperature": 0.6,
        "top_p": 0.9,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    page.ask("And then?", "The end.")
    assert [message["role"] for message in page.server.last["messages"]] == ["user", "assistant", "user"]
    page.reload()
    assert page.said == ["A story, please", "Once upon a time 🦙.", "And then?", "The end."]


@pytest.mark.parametrize("way", ["escape", "button"])
def test_an_answer_is_stopped_and_goes_on(page: Page, way: str) -> None:
    page.server.answers = [["One, ", "two,", threading.Event()], [" three."]]
    page.say("Count")
    page.until(lambda: page.said[1:] == ["One, two,"])
    page.type(ENTER)  # sends nothing meanwhile
    page.type(ESCAPE) if way == "escape" else page.click("#send")
    page.done()
    assert page.server.left.wait(5)
    assert page.text(".assistant .note") == "Stopped"
    page.act("Let the answer go on")
    page.until(lambda: page.said == ["Count", "One, two, three."])
    page.done()
    assert page.server.last["messages"][-1] == {"role": "assistant", "content": "One, two,"}
    assert page.server.last["continue_final_message"] is True
    assert page.server.last["add_generation_prompt"] is False
    assert not page.all("[title='Let the answer go on']")
    assert len(page.server.asked) == len([path for path, _ in page.server.asked if path != "/v1/chat/completions"]) + 2


def test_a_message_is_edited_and_an_answer_retried(page: Page) -> None:
    page.ask("Who are yu?", "A fish.")
    page.ask("Really?", "No.")
    page.act("Edit and send again", 0)
    page.type(Keys.BACKSPACE * 3, "something else", ESCAPE)
    assert page.said == ["Who are yu?", "A fish.", "Really?", "No."]
    page.act("Edit and send again", 0)
    page.server.answers = [["A llama."], ["An alpaca."], Error(500, "it is broken")]
    page.type(Keys.BACKSPACE * 3, "you?", ENTER)
    page.until(lambda: page.said == ["Who are you?", "A llama."])
    page.done()
    page.act("Ask for another answer")
    page.until(lambda: page.said == ["Who are you?", "An alpaca."])
    page.done()
    assert page.server.last["messages"] == [{"role": "user", "content": "Who are you?"}]
    page.act("Ask for another answer")  # none comes: the one before stays
    page.until(lambda: "it is broken" in page.text("#notice"))
    assert page.said == ["Who are you?", "An alpaca."]
    assert [message["content"] for message in page.kept[0]["messages"]] == ["Who are you?", "An alpaca."]


HOSTILE = r"""<script>window.pwned = 1</script><img src=x onerror="window.pwned = 2">

**<b onmouseover=alert(1)>bold</b>** <iframe src="javascript:alert(1)"></iframe> &lt;script&gt;

[click](javascript:window.pwned=3) [click](JaVaScRiPt:alert(1)) [data](data:text/html,<script>alert(1)</script>)
[x](//evil.example)

![pixel](https://evil.example/pixel.png) [a"onclick="b](https://evil.example/"onmouseover="window.pwned=4)

```"><script>window.pwned = 5</script>
</code></pre><script>window.pwned = 6</script>
```

| <svg onload=alert(1)> | b |
|---|---|
| <style>*{display:none}</style> | `<script>` |

- <a href="javascript:alert(1)">x</a>
> <form action="https://evil.example"><input name=key>

# <meta http-equiv=refresh content="0;url=https://evil.example">
https://evil.example/<script>window.pwned=7</script> \<b> \[x](https://a.example)"""
TAGS = set("P STRONG EM DEL CODE PRE UL OL LI A H3 H4 H5 H6 BLOCKQUOTE HR TABLE THEAD TBODY TR TH TD DIV SPAN".split())


def test_nothing_that_is_said_becomes_markup(page: Page) -> None:
    page.server.answers = [[HOSTILE[i : i + 7] for i in range(0, len(HOSTILE), 7)]]
    page.say("<img src=x onerror='window.pwned = 8'>")
    page.done()
    page.until(lambda: "http-equiv" in page.said[-1])
    page.reload()
    nodes = page.run(
        "return [...document.querySelectorAll('.body *:not(.tool, .tool *)')].map((e) => [e.tagName, "
        "e.getAttributeNames()])"
    )
    assert {tag for tag, _ in nodes} <= TAGS
    names = {name for _, attributes in nodes for name in attributes}
    assert names <= {"class", "tabindex", "start", "href", "target", "rel", "title"}
    links = page.run("return [...document.querySelectorAll('.body a')].map((a) => [a.protocol, a.target, a.rel])")
    assert links
    assert {tuple(link) for link in links} == {("https:", "_blank", "noopener noreferrer nofollow")}
    assert page.run("return window.pwned") is None
    fetched = page.run("return performance.getEntriesByType('resource').map((entry) => new URL(entry.name).origin)")
    assert set(fetched) == {page.server.address}
    shown = page.text(".assistant .body")
    for text in (
        "<script>window.pwned = 1</script>",
        "</code></pre>",
        "[click](javascript:window.pwned=3)",
        "<style>*{dis",
    ):
        assert text in shown
    assert page.said[0] == page.text("#title") == page.text("#list .on") == "<img src=x onerror='window.pwned = 8'>"


@pytest.mark.parametrize(
    ("text", "markup"),
    [
        ("a *b* **c *d*** ~~e~~ `f`", "<p>a <em>b</em> <strong>c <em>d</em></strong> <del>e</del> <code>f</code></p>"),
        ("2 * 3 * 4, a_b_c, __init__, \\*a\\*", "<p>2 * 3 * 4, a_b_c, <strong>init</strong>, *a*</p>"),
        ("**open `*a*` and ``a`b``", "<p>**open <code>*a*</code> and <code>a`b</code></p>"),
        ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
        ("# A *b* #\ntext\n***", "<h3>A <em>b</em></h3><p>text</p><hr>"),
        ("- a\n- b\n  - c\n\n  d\n- e",
         "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul><p>d</p></li><li><p>e</p></li></ul>"),
        ("3. a\n4. b\n\nc", '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol><p>c</p>'),
        ("> a\n> > b\nc", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>"),
        ("a | b\n-|-\n1 | `2`\n\nc",
         "<thead><tr><th>a</th><th>b</th></tr></thead>"
         "<tbody><tr><td>1</td><td><code>2</code></td></tr></tbody></table><p>c</p>"),
        ("```py\na = 1\n\n  b\n```\nc", "<pre><code>a = 1\n\n  b</code></pre><p>c</p>"),
        ("~~~\n```\nx", "<pre><code>```\nx</code></pre>"),
        ("```\na\n```js", "<pre><code>a\n```js</code></pre>"),
        ("```a``` b", "<p><code>a</code> b</p>"),
        ("(https://a.example/b_(c)_d.) [e](https://f.example/g_(h))",
         ('(<a href="https://a.example/b_(c)_d">https://a.example/b_(c)_d</a>.) <a '
         'href="https://f.example/g_(h)">e</a>')),
        ("[a](b) [c] (d) ![e](https://f.example)", '<p>[a](b) [c] (d) <a href="https://f.example">e</a></p>'),
        (">" * 50 + " a\n" + "- " * 50 + "b", ""),
    ],
)  # fmt: skip
def test_markdown(browser: Page, text: str, markup: str) -> None:
    """As a whole, and as it grows by a character at a time."""
    if not browser.browser.current_url.startswith(browser.server.address):
        browser.open()
    whole, grown = browser.run(
        "const a = document.createElement('div'), b = document.createElement('div'), text = arguments[0]; show(a, "
        "text);"
        "for (let i = 1; i <= text.length; i++) show(b, text.slice(0, i)); return [a.innerHTML, b.innerHTML]",
        text,
    )
    assert whole == grown
    plain = re.sub(r' (target|rel|title|class|tabindex)="[^"]*"|<div>(<span>.*?</div>)?|</div>', "", whole)
    assert markup in plain


def test_no_answer_is_slow_to_show(page: Page) -> None:
    """Each of these is 30,000 characters that ask for as many looks ahead."""
    units = ["*a ", "`", "` ``", "``` `` ", "[", "[a](", "**a", "_a_ *", "> ", "- ", "  - a\n", "|", "\\", "https://",
      "~~",
             "a*b", "#", "1. a\n", " ", "a\n\n", "* * ", "[a](https://b(", "-\n\n", "| -"]  # fmt: skip
    script = (
        "const t = performance.now(); show(document.createElement('div'), arguments[0]); return performance.now() - t"
    )
    texts = {unit: unit * (30_000 // len(unit)) for unit in units}
    texts |= {
        "dashes": "|\n" + "-" * 100_000 + "x",
        "spaces": "- -" + " " * 100_000 + "x",
        "hashes": "# a" + " #" * 50_000 + "x",
    }
    slow = {unit: page.run(script, text) for unit, text in texts.items()}
    assert {unit: ms for unit, ms in slow.items() if ms > 1000} == {}


def test_what_goes_wrong_is_told(page: Page) -> None:
    for answer, told, said in (
        (Error(429, "full", {"Retry-After": "3"}), "The server is busy. Try again in 3 s.", ["Hi"]),
        (Error(400, "temperature=9 must be less"), "The server refused this: temperature=9 must be less", ["Hi"]),
        (Error(500, "no memory"), "Something went wrong in the server: no memory", ["Hi"]),
        (Error(503, "it is ending"), "The server takes no more requests now: it is ending", ["Hi"]),
        (["Half an ", None], "The connection was lost before the answer ended.", ["Hi", "Half an"]),
        (
            ["Half", {"error": {"message": "no memory"}}],
            "Something went wrong in the server: no memory",
            ["Hi", "Half"],
        ),
    ):
        page.server.answers = [answer]
        page.click("#new")
        page.say("Hi")
        page.until(lambda told=told: page.text("#notice span") == told)
        assert [text.strip() for text in page.said] == said
    page.click("#notice .plain")
    page.until(lambda: page.said == ["Hi", "Hello."])
    page.done()
    assert page.text("#notice") == ""


def test_what_was_not_answered_is_said_again(page: Page) -> None:
    """Llama 2's users and answers take turns: a second message behind one without an answer would be refused for
    ever."""
    page.server.answers = [Error(429, "full")]
    page.say("Hi")
    page.until(lambda: page.text("#notice"))
    page.say("Are you there?")
    page.until(lambda: page.said == ["Hi\n\nAre you there?", "Hello."])


def test_a_server_with_a_key(page: Page) -> None:
    page.server.key = "s3cret"
    page.reload()
    assert page.text("#notice span") == "The server wants an API key."
    page.type("wrong", ENTER)
    page.until(lambda: page.all("#notice input") and not page.one("#notice input").get_attribute("value"))
    page.type("s3cret", ENTER)
    page.until(lambda: page.text("#model") == "stand-in")
    assert page.ask("Hi") == "Hello."
    assert "s3cret" not in page.run("return JSON.stringify(localStorage)")


def test_settings(page: Page) -> None:
    page.click("[popovertarget=settings]")
    page.one("#system").send_keys("Be brief.")
    for name, keys in {"temperature": Keys.HOME, "max_tokens": Keys.ARROW_RIGHT * 2, "top_k": Keys.END}.items():
        page.one(f"#{name}").send_keys(keys)
    outputs = page.run("return [...document.querySelectorAll('#options output')].map((output) => output.innerText)")
    assert outputs == ["0", "0.9", "32", "200", "0", "1", "0", "0"]
    page.type(ESCAPE)
    page.ask("Hi")
    sent = page.server.last
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {name: sent.get(name) for name in ("temperature", "top_p", "max_tokens", "top_k", "min_p")} == {
        "temperature": 0, "top_p": 0.9, "max_tokens": 32, "top_k": 200, "min_p": None,
    }  # fmt: skip
    page.reload()
    assert page.run("return document.querySelector('#top_k').value") == "200"
    page.click("[popovertarget=settings]")
    page.run("document.querySelector('#reset').click()")
    page.type(ESCAPE)
    page.click("#new")
    page.ask("Hi")
    assert page.server.last["messages"] == [{"role": "user", "content": "Hi"}]  # a system prompt is one conversation's
    assert "top_k" not in page.server.last


def test_conversations(page: Page) -> None:
    page.ask("The first", "One.")
    page.click("#new")
    page.ask("The second", "```py\nprint(2)\n```")
    shown = "return [...document.querySelectorAll('#list .open')].map((b) => b.innerText)"
    names = lambda: page.run(shown)  # noqa: E731
    assert names() == ["The second", "The first"]
    page.click("#export")
    path = page.downloads / "The-second.json"
    page.until(path.exists)
    assert json.loads(path.read_text(encoding="utf-8")) == [
        {"role": "user", "content": "The second"}, {"role": "assistant", "content": "```py\nprint(2)\n```"},
    ]  # fmt: skip
    page.run("navigator.clipboard.writeText = async () => { throw 1 }")  # as where the page came without https
    page.click(".code .tool")
    page.one("#message").send_keys(Keys.CONTROL, "v")
    page.until(lambda: page.run("return document.querySelector('#message').value") == "print(2)")
    page.all("#list .open")[1].click()
    assert page.said == ["The first", "One."]
    page.run("document.querySelector('#list .on .tool').click()")
    page.type("A new name", ENTER)
    assert names() == ["The second", "A new name"]
    page.reload()
    assert names()[0] == "A new name"
    assert page.said == ["The first", "One."]
    page.run("document.querySelector('#list .on .tool:last-child').click()")
    assert names() == ["The second"]
    assert page.said == []
    page.click("#notice .plain")
    assert page.said == ["The first", "One."]
    assert len(page.kept) == 2


def test_an_answer_comes_while_another_conversation_is_read(page: Page) -> None:
    gate = threading.Event()
    page.server.answers = [["Slowly", gate, "."]]
    page.say("Take your time")
    page.until(lambda: page.said[1:] == ["Slowly"])
    page.click("#new")
    assert page.ask("Hi") == "Hello."
    gate.set()
    page.until(lambda: [len(chat["messages"]) for chat in page.kept] == [2, 2])
    assert page.said == ["Hi", "Hello."]
    page.all("#list .open")[1].click()
    assert page.said == ["Take your time", "Slowly."]


def test_another_tab_writes(page: Page) -> None:
    """What it wrote is seen; what is shown here stays in use."""

    def write(id: str, title: str) -> None:
        told = {
            "id": id,
            "title": title,
            "system": "",
            "messages": [{"role": "user", "content": "x"}],
            "used": 0,
            "changed": 1,
        }
        script = (
            "localStorage[arguments[0]] = arguments[1]; dispatchEvent(new StorageEvent('storage', { key: "
            "arguments[0] }))"
        )
        page.run(script, f"llama.chat.{id}", json.dumps(told))

    page.ask("Here", "One.")
    [mine] = page.kept
    page.run("localStorage['llama.chat.broken'] = '{'; localStorage['llama.chat.other'] = '[]'")
    write("there", "There")
    page.run("delete localStorage['llama.chat.broken']; delete localStorage['llama.chat.other']")
    assert page.text("#list").split("\n") == ["Here", "There"]
    page.act("Ask for another answer")
    page.until(lambda: page.said == ["Here", "Hello."])
    page.done()
    assert {chat["title"]: len(chat["messages"]) for chat in page.kept} == {"Here": 2, "There": 1}
    write(mine["id"], "Changed there")
    assert page.said == ["x"]
    assert page.text("#title") == "Changed there"


def test_a_tab_that_is_closed_keeps_what_came(page: Page) -> None:
    page.server.answers = [["Half of it", threading.Event()], [" and the rest."]]
    page.say("Go")
    page.until(lambda: page.said[1:] == ["Half of it"])
    page.reload()
    assert page.said == ["Go", "Half of it"]
    page.act("Let the answer go on")
    page.until(lambda: page.said == ["Go", "Half of it and the rest."])


def test_a_browser_that_keeps_nothing(page: Page) -> None:
    script = (
        "for (const name of ['localStorage', 'sessionStorage']) Object.defineProperty(window, name, { get() { "
        "throw 1 } })"
    )
    added = page.browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
    try:
        page.reload()
        assert page.ask("Hi") == "Hello."
        assert page.text("#notice span").startswith("The browser has no room to keep this.")
        page.run("document.querySelector('#list .on .tool:last-child').click()")
        assert page.said == []
    finally:
        page.browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
        page.browser.refresh()


def test_light_and_dark(page: Page) -> None:
    color = lambda: page.run("return getComputedStyle(document.body).backgroundColor")  # noqa: E731
    light = color()
    page.colors("dark")
    dark = color()
    assert light != dark
    page.click("#theme")
    assert color() == light
    page.click("#theme")
    page.colors("light")
    page.reload()
    assert color() == dark
    page.click("#theme")
    assert color() == light


def test_on_a_phone(page: Page) -> None:
    page.open(width=390, height=700)
    answer = ("w" * 300, "\n\n```\n", "code " * 60, "\n```\n\n|", "a|" * 40, "\n|", "-|" * 40)
    page.ask("Something that is very wide", *answer)
    wide = "return [document.documentElement.scrollWidth, document.querySelector('#thread').scrollWidth, innerWidth]"
    document, thread, window = page.run(wide)
    assert document <= window
    assert thread <= window
    assert page.run("return document.querySelector('#send').getBoundingClientRect().bottom <= innerHeight")
    assert not page.one("#list").is_displayed()
    page.click("[popovertarget=chats]")
    assert page.one("#list").is_displayed()
    page.click("#new")
    assert not page.one("#list").is_displayed()
    assert page.said == []


def test_with_the_keyboard_alone(page: Page) -> None:
    focused = "return document.activeElement.ariaLabel ?? document.activeElement.innerText"
    page.type("a", Keys.SHIFT + ENTER, Keys.NULL, "b", ENTER)  # the message has the focus
    page.until(lambda: page.said == ["a\nb", "Hello."])
    page.done()
    seen = []
    for _ in range(14):
        page.type(TAB)
        seen.append(page.run(focused))
        if seen[-1] != "Messages":
            outline = page.run("return getComputedStyle(document.activeElement).outlineStyle")
            assert outline == "solid" or page.run("return document.activeElement.id") in ("message", "")
    for name in ("Send (Enter)", "New conversation", "a b", "Rename a b", "Delete a b", "Settings", "Messages", "Copy"):
        assert name in seen or name == "Send (Enter)", seen  # nothing to send: it is off
    page.run("document.querySelector('.assistant [title=\"Ask for another answer\"]').focus()")
    page.server.answers = [["Again", threading.Event()]]
    page.type(ENTER)
    page.until(lambda: page.said == ["a\nb", "Again"])
    page.run("document.querySelector('[popovertarget=settings]').focus()")
    page.type(ENTER)
    page.type(ESCAPE)  # closes the settings
    assert page.all("#thread.busy")
    page.type(ESCAPE)
    page.done()
    assert page.run("return [...document.querySelectorAll('button, input, textarea')].filter((e) => !e.labels?.length "
                    "&& "
                    "!e.ariaLabel && !e.innerText.trim() && e.checkVisibility()).length") == 0  # fmt: skip


def test_with_our_own_server(page: Page) -> None:
    """An answer at temperature 0 is what the library gives; it goes on behind its cut; the server's errors are told."""
    pytest.importorskip("starlette")
    serving = pytest.importorskip("serving")
    llama = Llama.build(device="cpu")
    asked = "Tell me a story about a dog."
    dialog: Any = [{"role": "user", "content": asked}]
    whole, cut = (
        llama.chat_completion([dialog], temperature=0, max_gen_len=n)[0]["generation"]["content"] for n in (24, 8)
    )
    with serving.served(llama) as it:
        page.browser.get(it.url + "/")
        page.until(lambda: page.text("#model") == "demo")
        page.run("localStorage['llama.options'] = JSON.stringify({ temperature: 0, max_tokens: 8 })")
        page.reload()
        assert page.ask(asked) == cut.strip()
        assert " of 512 tokens" in page.text("#context")
        assert page.text(".assistant .note").startswith("Cut at its longest · 8 tokens")
        page.run("chosen.max_tokens = 16")
        page.act("Let the answer go on")
        page.until(lambda: "16 tokens" in page.text(".assistant .note"))
        assert page.said[1] == whole.strip()
        page.click("#new")
        page.run("say('x '.repeat(600))")
        page.until(lambda: page.text("#notice span").startswith("The server refused this: "))
        page.run("chosen.max_tokens = 0; chosen.temperature = 1; chosen.frequency_penalty = 1")
        page.click("#new")
        page.say("Tell me a story")
        page.until(lambda: page.all(".assistant p"))
        page.type(ESCAPE)
        page.done()
        page.until(lambda: not it.stepper.rows)
    page.browser.get(page.server.address)


def test_the_policy_lets_nothing_else_run(page: Page) -> None:
    assert "unsafe" not in served.POLICY
    assert served.POLICY.count("'sha256-") == 2
    page.run(
        "window.broken = 0; addEventListener('securitypolicyviolation', () => window.broken++);"
        "const s = document.createElement('script'); s.textContent = 'window.pwned = 1'; document.body.append(s);"
        "document.body.insertAdjacentHTML('beforeend', '<img src=/v1/models onerror=\"window.pwned = 2\">');"
    )
    page.until(lambda: page.run("return window.broken") >= 2)
    assert page.run("return window.pwned") is None
    page.browser.get_log("browser")  # which tells of both


def test_the_page_asks_nobody_else() -> None:
    """Links in it go nowhere but to addresses that the model wrote."""
    assert set(re.findall(r"https?://[\w.]+", served.PAGE)) == {"http://www.w3.org"}  # the name space of its icon
    assert "innerHTML" not in served.PAGE
