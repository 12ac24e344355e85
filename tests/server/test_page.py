#!/usr/bin/env python3
"""The page in a browser, over a server that repeats its users (serve_fake). test_page.py SERVE_FAKE STORED_MODEL

Skipped (77) where there is no playwright or no chromium. Whatever the browser complains about is a failure: errors of scripts,
violations of the content security policy, requests to anywhere else.
"""
import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request

try:
    from playwright.sync_api import expect, sync_playwright
except ImportError:
    print("playwright is not installed")
    sys.exit(77)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if not CHROMIUM:
    print("chromium is not installed")
    sys.exit(77)

expect.set_options(timeout=15000)
WIDE = {"width": 1360, "height": 860}
TALES = "document.addEventListener('securitypolicyviolation', (e) => console.error('CSP ' + e.violatedDirective + ' ' + e.blockedURI));"


class Server:
    def __init__(self, program, model, *arguments):
        self.folder = tempfile.TemporaryDirectory()
        self.process = subprocess.Popen([program, model, self.folder.name, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True)
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://"), "the server did not start"

    def ask(self, path, method="GET", body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        return json.load(urllib.request.urlopen(request, timeout=20))

    def end(self):
        self.process.stdin.close()
        assert self.process.wait(20) == 0
        self.folder.cleanup()


class Page:
    """A tab, and what it complained about."""

    def __init__(self, browser, url, allowed=None, script="", **options):
        self.url = url
        self.context = browser.new_context(**{"viewport": WIDE, "reduced_motion": "reduce", **options})
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.context.add_init_script(TALES + script)
        self.tab = self.context.new_page()
        self.complaints, self.allowed, self.bodies = [], allowed, []
        self.tab.on("console", self.heard)
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("request", self.requested)
        self.tab.goto(url + "/")

    def heard(self, message):
        if message.type in ("error", "warning") and not (self.allowed and re.search(self.allowed, message.text)):
            self.complaints.append(message.text + " " + message.location.get("url", ""))

    def requested(self, request):
        if not request.url.startswith(self.url + "/"):
            self.complaints.append("a request to " + request.url)
        if request.method == "POST" and request.url.endswith("/chat/completions"):
            self.bodies.append(json.loads(request.post_data))

    @contextlib.contextmanager
    def may_complain(self, pattern):
        self.allowed = pattern
        yield
        self.tab.wait_for_timeout(50)
        self.allowed = None

    def say(self, text, wait=True):
        self.tab.fill("#message", text)
        self.tab.press("#message", "Enter")
        if wait:
            self.rest()

    def rest(self):
        expect(self.tab.locator("#send")).to_have_attribute("aria-label", "Send")

    def name(self):
        return self.tab.evaluate("location.hash.slice(2)")

    def answers(self):
        return self.tab.locator(".answer .markdown")

    def menu(self, title, item):
        row = self.tab.locator(".session", has_text=title).first
        row.hover()
        row.locator(".session-more").click()
        self.tab.get_by_role("menuitem", name=item).click()

    def close(self):
        self.context.close()
        assert not self.complaints, self.complaints


def test_answers_arrive_as_they_are_made(page, server):
    page.say("!slow 40 25", wait=False)
    expect(page.tab.locator(".answer.live .markdown")).to_contain_text("word")
    expect(page.tab.locator("#send")).to_have_attribute("aria-label", "Stop")
    assert page.answers().inner_text().count("word") < 40
    page.rest()
    assert page.answers().inner_text().split() == ["word"] * 40
    note = page.tab.locator(".answer .note").inner_text()
    assert re.search(r"^40 tokens\s+·\s+[\d.,]+ tokens/s\s+·\s+first after \d+ ms\s+·\s+prompt: \d+ reused, \d+ computed", note), note
    body = page.bodies[-1]
    assert body["stream"] and body["stream_options"] == {"include_usage": True} and body["session"] == page.name()
    assert [m["role"] for m in body["messages"]] == ["user"]
    kept = server.ask("/v1/sessions/" + page.name())
    assert [m["role"] for m in kept["messages"]] == ["user", "assistant"]
    expect(page.tab.locator("#title")).to_have_text(kept["title"])


def test_stopping(page, server):
    page.tab.click("#new-session")
    page.say("!slow 1000 20", wait=False)
    expect(page.answers().last).to_contain_text("word")
    page.tab.click("#send")
    page.rest()
    expect(page.tab.locator(".answer .note").last).to_have_text("stopped")
    page.say("!slow 1000 20", wait=False)
    expect(page.tab.locator(".answer.live .markdown")).to_contain_text("word")
    page.tab.keyboard.press("Escape")
    page.rest()
    for _ in range(100):
        if server.ask("/v1/cache")["requests"]["running"] == 0:
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the server goes on with what was stopped")
    assert not page.tab.locator(".failure").count()
    page.say("after it")
    expect(page.answers().last).to_have_text("after it")
    assert [m["role"] for m in page.bodies[-1]["messages"]] == ["user", "assistant"] * 2 + ["user"]


def test_editing_and_asking_again(page, server):
    page.tab.click("#new-session")
    page.say("first")
    page.say("second")
    question = page.tab.locator(".question").first
    question.hover()
    question.get_by_label("Edit and send again").click()
    area = page.tab.get_by_label("Edit the message")
    expect(area).to_have_value("first")
    area.press("Escape")
    expect(page.tab.locator(".question")).to_have_count(2)
    question.hover()
    question.get_by_label("Edit and send again").click()
    area.fill("another first")
    area.press("Enter")
    page.rest()
    expect(page.tab.locator(".bubble")).to_have_text(["another first"])
    expect(page.answers()).to_have_text(["another first"])
    assert page.bodies[-1]["messages"] == [{"role": "user", "content": "another first"}]
    page.say("second")
    page.tab.locator(".answer").last.get_by_label("Answer again").click()
    page.rest()
    assert page.bodies[-1]["messages"] == page.bodies[-2]["messages"]
    expect(page.answers()).to_have_text(["another first", "second"])
    page.tab.locator(".answer").last.get_by_label("Copy the answer").click()
    expect(page.tab.locator("#announce")).to_have_text("Copied")
    assert page.tab.evaluate("navigator.clipboard.readText()") == "second"


def test_options(page, server):
    page.tab.click("#new-session")
    page.tab.click("#toggle-options")
    for name, value in (("system", "Be brief."), ("temperature", "0.5"), ("top_p", "0.9"), ("max_tokens", "3"), ("seed", "7")):
        page.tab.fill("#" + name, value)
    page.say("a text of many more words than three")
    body = page.bodies[-1]
    assert (body["temperature"], body["top_p"], body["max_tokens"], body["seed"]) == (0.5, 0.9, 3, 7)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    expect(page.tab.locator(".answer .note")).to_contain_text("cut off at the limit of tokens")
    with page.may_complain("400"):
        page.tab.fill("#top_p", "9")
        page.say("too much")
        expect(page.tab.locator(".failure")).to_contain_text("top_p")
    page.tab.reload()
    expect(page.tab.locator("#temperature")).to_have_value("0.5")
    expect(page.tab.locator("#system")).to_have_value("Be brief.")
    page.tab.click("#toggle-options")
    page.tab.fill("#system", "Be long.")  # of this session alone
    page.tab.click("#new-session")
    expect(page.tab.locator("#system")).to_have_value("Be brief.")
    for name in ("system", "temperature", "top_p", "max_tokens", "seed"):
        page.tab.fill("#" + name, "")
    page.say("plain")
    assert set(page.bodies[-1]) == {"messages", "stream", "stream_options", "session"}
    assert page.bodies[-1]["messages"] == [{"role": "user", "content": "plain"}]
    page.tab.click("#toggle-options")


def test_thoughts(page, server):
    page.tab.click("#new-session")
    page.say("!think hm, 2 and 2|It is 4.")
    expect(page.answers()).to_have_text("It is 4.")
    thoughts = page.tab.locator(".thoughts")
    expect(thoughts).not_to_have_attribute("open", "")
    thoughts.locator("summary").click()
    expect(thoughts).to_contain_text("hm, 2 and 2")
    page.tab.reload()
    expect(page.answers()).to_have_text("It is 4.")
    expect(page.tab.locator(".thoughts .plain-text")).to_have_text("hm, 2 and 2")


def test_errors_are_the_servers(page, server):
    page.tab.click("#new-session")
    with page.may_complain("429"):
        page.say("!full")
        expect(page.tab.locator(".failure")).to_contain_text("256 requests wait already")
        expect(page.tab.locator(".failure code")).to_have_text("queue_full")
        count = len(page.bodies)
        page.tab.locator(".failure").get_by_text("Try again").click()
        page.rest()
        assert len(page.bodies) == count + 1 and page.bodies[-1] == page.bodies[-2]
    page.say("!error")
    expect(page.tab.locator(".failure")).to_contain_text("no logit is finite")
    page.say("and on")
    expect(page.tab.locator(".failure")).to_have_count(0)
    expect(page.answers().last).to_have_text("and on")


def test_sessions(page, server):
    page.tab.click("#new-session")
    page.say("a session about lakes")
    lakes = page.name()
    row = page.tab.locator(".session", has_text="lakes")
    expect(row.locator(".tier")).to_have_text("device")
    expect(row.locator(".session-size")).to_contain_text("tokens, ")
    expect(row.locator(".session-open")).to_have_attribute("aria-current", "true")
    page.tab.reload()
    expect(page.answers()).to_have_text(["a session about lakes"])

    page.menu("about lakes", "Fork")
    expect(page.tab.locator("#title")).to_have_text("a session about lakes (fork)")
    fork = page.name()
    assert fork != lakes and server.ask("/v1/sessions/" + fork)["messages"] == server.ask("/v1/sessions/" + lakes)["messages"]
    page.say("in the fork")
    assert len(server.ask("/v1/sessions/" + lakes)["messages"]) == 2
    assert len(server.ask("/v1/sessions/" + fork)["messages"]) == 4

    page.menu("(fork)", "Rename")
    page.tab.fill("#new-title", "Rivers")
    page.tab.fill("#new-name", "rivers.1")
    page.tab.locator("#rename-dialog").get_by_text("Rename", exact=True).click()
    expect(page.tab.locator("#title")).to_have_text("Rivers")
    assert page.name() == "rivers.1" and server.ask("/v1/sessions/rivers.1")["title"] == "Rivers"
    page.say("under the new name")
    assert page.bodies[-1]["session"] == "rivers.1" and len(server.ask("/v1/sessions/rivers.1")["messages"]) == 6

    page.menu("Rivers", "Save to disk")
    expect(page.tab.locator(".toast")).to_have_text("“Rivers” is on disk.")
    assert server.ask("/v1/sessions/rivers.1")["on_disk"]
    page.menu("Rivers", "Bring to the device")
    expect(page.tab.locator(".toast").last).to_have_text("“Rivers” is on the device.")
    page.menu("Rivers", "Reload messages")
    expect(page.answers()).to_have_count(3)

    page.menu("Rivers", "Delete")
    page.tab.get_by_text("Keep it").click()
    assert server.ask("/v1/sessions/rivers.1")
    page.menu("Rivers", "Delete")
    page.tab.locator("#delete-dialog").get_by_text("Delete", exact=True).click()
    expect(page.tab.locator(".session", has_text="Rivers")).to_have_count(0)
    expect(page.tab.locator(".greeting")).to_be_visible()
    assert "rivers.1" not in [s["id"] for s in server.ask("/v1/sessions")["data"]]

    page.tab.fill("#filter", "LAKES")
    expect(page.tab.locator(".session")).to_have_count(1)
    page.tab.fill("#filter", "")
    with page.may_complain("404"):
        page.tab.goto(page.url + "/#/nobody")
        page.tab.reload()
        expect(page.tab.locator(".greeting")).to_be_visible()
    # What another client does is seen.
    server.ask("/v1/chat/completions", "POST", {"messages": [{"role": "user", "content": "from elsewhere"}], "session": "other"})
    expect(page.tab.locator(".session", has_text="from elsewhere")).to_be_visible()


def test_two_sessions_at_once(page, server):
    page.tab.click("#new-session")
    page.say("!slow 60 20", wait=False)
    expect(page.tab.locator(".answer.live .markdown")).to_contain_text("word")
    slow = page.name()
    page.tab.click("#new-session")
    page.say("meanwhile")
    expect(page.answers()).to_have_text(["meanwhile"])
    page.tab.go_back()
    expect(page.tab.locator(".bubble")).to_have_text(["!slow 60 20"])
    assert page.name() == slow
    page.rest()
    assert page.answers().inner_text().split() == ["word"] * 60


def test_the_last_click_counts(page, server):
    names = []
    for text in ("slow to come", "quick to come"):
        page.tab.click("#new-session")
        page.say(text)
        names.append(page.name())
    held = []
    page.tab.route("**/v1/sessions/" + names[0], lambda route: held.append(route))
    page.tab.locator(".session-open", has_text="slow to come").click()
    page.tab.locator(".session-open", has_text="quick to come").click()
    expect(page.answers()).to_have_text(["quick to come"])
    held[0].continue_()
    page.tab.wait_for_timeout(200)
    expect(page.answers()).to_have_text(["quick to come"])
    assert page.name() == names[1]
    page.tab.unroute_all()


def test_picture_of_the_cache(page, server):
    page.tab.click("#new-session")
    page.say("!long 300")
    told = server.ask("/v1/cache")
    exact, coded = page.tab.locator("#cache .legend dd").nth(0), page.tab.locator("#cache .legend dd").nth(1)
    expect(exact).to_have_text(re.compile("^%d, " % told["pages"]["exact"]))
    expect(coded).to_have_text(re.compile("^%d, " % told["pages"]["coded"]))
    widths = page.tab.evaluate("[...document.querySelectorAll('#cache .stack')[0].children].map((e) => parseFloat(e.style.width))")
    assert abs(sum(widths) - 100 * told["bytes"]["held"] / told["bytes"]["budget"]) < 0.5, (widths, told["bytes"])
    unit = 2176
    assert abs(widths[1] - 100 * told["pages"]["coded"] * unit / told["bytes"]["budget"]) < 0.2, (widths, told)
    picture = page.tab.locator("#cache").inner_text()
    assert "2.125" in picture and "Reused" in picture and "Refilled" in picture and "Computed" in picture
    assert page.tab.locator(".session-bars li").count() == min(10, len([s for s in told["sessions"] if s["coded_pages"] + s["exact_pages"]]))
    page.say("!slow 60 30", wait=False)
    expect(page.tab.locator("#cache")).to_contain_text("1 running")
    page.rest()
    expect(page.tab.locator("#cache")).to_contain_text("0 running")
    assert page.tab.locator(".spark .line").get_attribute("d").startswith("M")

    # Nobody looks: nothing is asked.
    asked = []
    page.tab.on("request", lambda r: asked.append(r.url))
    page.tab.evaluate("""Object.defineProperty(document, 'hidden', {configurable: true, get: () => true});
                         document.dispatchEvent(new Event('visibilitychange'))""")
    page.tab.wait_for_timeout(300)
    del asked[:]
    page.tab.wait_for_timeout(1300)
    assert not asked, asked
    page.tab.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    page.tab.wait_for_timeout(300)
    assert [u for u in asked if u.endswith("/v1/cache")], asked


def focused(page):
    return page.tab.evaluate("document.activeElement.id || document.activeElement.className")


def test_keyboard(page, server):
    page.tab.click("#new-session")
    assert focused(page) == "message"
    page.tab.keyboard.type("one")
    page.tab.keyboard.press("Shift+Enter")
    page.tab.keyboard.type("two")
    expect(page.tab.locator("#message")).to_have_value("one\ntwo")
    page.tab.keyboard.press("Enter")
    page.rest()
    expect(page.tab.locator(".bubble")).to_have_text(["one\ntwo"])
    page.tab.keyboard.press("Control+k")
    assert focused(page) == "filter"
    page.tab.keyboard.press("ArrowDown")
    assert "session-open" in focused(page)
    titles = page.tab.locator(".session-title").all_inner_texts()
    assert len(titles) > 2
    page.tab.keyboard.press("ArrowDown")
    assert page.tab.evaluate("document.activeElement.querySelector('.session-title').textContent") == titles[1]
    page.tab.keyboard.press("End")
    assert page.tab.evaluate("document.activeElement.querySelector('.session-title').textContent") == titles[-1]
    page.tab.keyboard.press("Home")
    page.tab.keyboard.press("ArrowRight")
    page.tab.keyboard.press("Enter")
    expect(page.tab.get_by_role("menuitem", name="Rename")).to_be_focused()
    page.tab.keyboard.press("ArrowDown")
    expect(page.tab.get_by_role("menuitem", name="Fork")).to_be_focused()
    page.tab.keyboard.press("Escape")
    expect(page.tab.locator("#session-menu")).to_be_hidden()
    assert "session-more" in focused(page)
    page.tab.keyboard.press("ArrowLeft")
    page.tab.keyboard.press("F2")
    expect(page.tab.locator("#rename-dialog")).to_be_visible()
    page.tab.keyboard.press("Escape")
    page.tab.keyboard.press("/")
    assert focused(page) == "message"
    page.tab.reload()
    expect(page.tab.locator("#model")).to_have_text("fake")
    page.tab.evaluate("document.activeElement.blur()")
    page.tab.keyboard.press("Tab")
    assert focused(page) == "skip"
    page.tab.keyboard.press("Enter")
    expect(page.tab.locator("#message")).to_be_focused()
    outline = page.tab.evaluate("(() => { const b = document.getElementById('toggle-theme'); b.focus({focusVisible: true});"
                                "return getComputedStyle(b).outlineStyle; })()")
    assert outline == "solid"
    nameless = page.tab.evaluate("""[...document.querySelectorAll('button, input, textarea, nav, aside, dialog')].filter((e) =>
        !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.textContent.trim() || e.closest('label'))).map((e) => e.outerHTML)""")
    assert not nameless, nameless


HOSTILE = """<script>document.title = 'taken'</script>
<img src=x onerror="document.title = 'taken'"> <b onclick="x()">bold</b> <iframe src="https://example.com"></iframe>

[one](javascript:alert(1)) [two](JaVaScRiPt:alert(1)) [three](data:text/html,<script>x</script>) [four](  javascript:alert(1) )
[five](&#106;avascript:alert(1)) [six](java\nscript:alert(1)) <javascript:alert(1)> ![seven](javascript:alert(1))
[eight](vbscript:x) [nine](//example.com/x) ![ten](https://example.com/picture.png "t")
[eleven](https://example.com/" onmouseover="alert(1)) **[twelve](https://example.com/<b>)**

```html" onclick="x
<script>alert(1)</script>
```

| <script>x</script> | b |
|---|---|
| <img src=x onerror=y> | [z](javascript:z) |
"""


def test_hostile_text_stays_text(page, server):
    page.tab.click("#new-session")
    page.say(HOSTILE.strip())
    answer = page.answers()
    assert answer.locator("script, img, iframe, b, style, object, embed, form").count() == 0
    assert not page.tab.evaluate("[...document.querySelectorAll('.markdown *')].flatMap((e) => [...e.attributes]).filter("
                                 "(a) => a.name.startsWith('on') || a.name === 'style' || a.name === 'src').map((a) => a.name)")
    links = page.tab.evaluate("[...document.querySelectorAll('.markdown a')].map((a) => [a.protocol, a.rel, a.target])")
    assert links and all(link == ["https:", "noopener noreferrer", "_blank"] for link in links), links
    text = answer.inner_text()
    for words in ("<script>document.title = 'taken'</script>", "onerror", "[one](javascript:alert(1))", "<script>alert(1)</script>"):
        assert words in text, words
    assert "taken" not in page.tab.title().split("–")[-1]
    page.tab.reload()
    expect(page.answers()).to_contain_text("onerror")


CASES = [
    ("a *b* **c** ***d*** _e_ __f__ ~~g~~ `h`", "<p>a <em>b</em> <strong>c</strong> <em><strong>d</strong></em> <em>e</em> <strong>f</strong> <del>g</del> <code>h</code></p>"),
    ("snake_case_name 2*3*4 a * b", "<p>snake_case_name 2<em>3</em>4 a * b</p>"),
    ("**a *b* c** and **open", "<p><strong>a <em>b</em> c</strong> and **open</p>"),
    ("\\*not\\* `` a`b ``", "<p>*not* <code>a`b</code></p>"),
    ("# One\n### Three #\n####### no", '<h3 class="h1">One</h3><h5 class="h3">Three</h5><p>####### no</p>'),
    ("- a\n- b\n  - c\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"),
    ("3. a\n4. b\n\n   more", '<ol start="3"><li>a</li><li><p>b</p><p>more</p></li></ol>'),
    ("   - a\n   - b", "<ul><li>a</li><li>b</li></ul>"),
    ("1. a\n\n2. b", "<ol><li><p>a</p></li><li><p>b</p></li></ol>"),
    ("- [x] done\n- [ ] open", '<ul><li class="task"><input type="checkbox" disabled="" checked="">done</li>'
                               '<li class="task"><input type="checkbox" disabled="">open</li></ul>'),
    ("> a\n> > b\n\nc", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>"),
    ("a\n---\nb", "<p>a</p><hr><p>b</p>"),
    ("line one\nline two", "<p>line one<br>line two</p>"),
    ("[a (b)](https://e.org/x_(y) \"t\") <https://e.org/z> https://e.org/w.", '<p><a href="https://e.org/x_(y)" rel="noopener noreferrer" target="_blank">a (b)</a> '
     '<a href="https://e.org/z" rel="noopener noreferrer" target="_blank">https://e.org/z</a> <a href="https://e.org/w" rel="noopener noreferrer" target="_blank">https://e.org/w</a>.</p>'),
    ("<b>x</b> &amp; [c](ftp://x) [d]", "<p>&lt;b&gt;x&lt;/b&gt; &amp;amp; [c](ftp://x) [d]</p>"),
]
# Long, and made to take long: each must be shown in the time that its length asks for.
LONG = ["*a " * 30000, "**" * 30000, "[" * 60000, "[a](" * 20000, "`" + "a`" * 1 + "``x " * 20000, "> " * 30000, "- " * 30000, "_a *b " * 15000,
        "# " + " " * 60000 + "x", "|" * 60000 + "\n" + "|-" * 30000, "```" + " " * 60000 + "`", "1. a\n" * 15000, "~~a " * 20000, "- a\n" + "  - b\n" * 15000]


def test_markdown(page, server):
    shown = page.tab.evaluate("""async (texts) => {
      const {show} = await import('./page/markdown.js');
      return texts.map((text) => { const d = document.createElement('div'); show(d, text); return d.innerHTML; });
    }""", [text for text, _ in CASES])
    for (text, wanted), got in zip(CASES, shown):
        assert got == wanted, "%r\n  is   %s\n  not  %s" % (text, got, wanted)
    code, table = page.tab.evaluate("""async () => {
      const {show} = await import('./page/markdown.js');
      const d = document.createElement('div');
      show(d, 'x\\n~~~py extra\\na\\n  b\\n```\\n~~~\\n\\n| a | b |\\n|:--|--:|\\n| `x|y` | 1 \\\\| 2 |');
      return [[d.querySelector('.code-head').textContent, d.querySelector('pre').textContent],
              [...d.querySelectorAll('th, td')].map((e) => e.textContent + (e.className ? '>' : ''))];
    }""")
    assert code == ["py", "a\n  b\n```"] and table == ["a", "b>", "x|y", "1 | 2>"], (code, table)
    # A text that grows gives what the whole gives, and keeps the elements of what does not change.
    grown = page.tab.evaluate("""async (text) => {
      const {show} = await import('./page/markdown.js');
      const a = document.createElement('div'), b = document.createElement('div');
      let first = null, kept = true;
      for (let i = 1; i <= text.length; i++) {
        show(a, text.slice(0, i));
        if (i > 40) kept = kept && (first = first || a.firstChild) === a.firstChild;
      }
      show(b, text);
      return [a.innerHTML === b.innerHTML, kept];
    }""", "A first paragraph, complete.\n\n- a\n- b\n\n```c\nint x;\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\nthe *end*")
    assert grown == [True, True], grown
    for text in LONG:
        ms = page.tab.evaluate("""async (text) => {
          const {show} = await import('./page/markdown.js');
          show(document.createElement('div'), text.slice(0, 100));
          const start = performance.now();
          show(document.createElement('div'), text);
          return performance.now() - start;
        }""", text)
        assert ms < 4000, "%r... takes %.0f ms" % (text[:12], ms)


def test_code_is_copied(page, server):
    page.tab.click("#new-session")
    page.say("```c\nint a;\n```")
    page.tab.get_by_label("Copy the code").click()
    expect(page.tab.locator("#announce")).to_have_text("Copied")
    assert page.tab.evaluate("navigator.clipboard.readText()") == "int a;"


def test_connection_lost_and_found(page, server):
    page.tab.click("#new-session")
    with page.may_complain("ERR_INTERNET_DISCONNECTED|Failed to load"):
        page.context.set_offline(True)
        expect(page.tab.locator("#banner")).to_contain_text("cannot be reached")
        page.say("into nothing")
        expect(page.tab.locator(".failure")).to_contain_text("cannot be reached")
        page.context.set_offline(False)
        expect(page.tab.locator("#banner")).to_be_hidden()
    page.tab.locator(".failure").get_by_text("Try again").click()
    expect(page.answers()).to_have_text(["into nothing"])


def brightness(page):
    color = page.tab.evaluate("getComputedStyle(document.querySelector('.chat')).backgroundColor")
    return sum(int(n) for n in re.findall(r"\d+", color)[:3]) / 3


def luminance(color):
    parts = [int(n) / 255 for n in re.findall(r"\d+", color)[:3]]
    parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def check_contrast(page):
    """4.5 : 1, what WCAG 2 asks for (success criterion 1.4.3)."""
    pairs = page.tab.evaluate("""['.title', '.model', '.session-title', '.session-about', '.legend dt', '.legend dd', '.keys', '.bubble', '.note'].map((s) => {
      const e = document.querySelector(s);
      let ground = e;
      while (getComputedStyle(ground).backgroundColor === 'rgba(0, 0, 0, 0)') ground = ground.parentElement;
      return [s, getComputedStyle(e).color, getComputedStyle(ground).backgroundColor];
    })""")
    for what, text, ground in pairs:
        lights = sorted((luminance(text), luminance(ground)))
        assert (lights[1] + 0.05) / (lights[0] + 0.05) >= 4.5, (what, text, ground)


def test_light_and_dark(browser, server):
    page = Page(browser, server.url, color_scheme="dark")
    expect(page.tab.locator("#model")).to_have_text("fake")
    page.say("in the dark")
    assert brightness(page) < 60
    check_contrast(page)
    page.tab.click("#toggle-theme")
    assert brightness(page) > 200
    page.tab.reload()
    expect(page.tab.locator("#model")).to_have_text("fake")
    assert brightness(page) > 200
    page.say("in the light")
    check_contrast(page)
    page.tab.click("#toggle-theme")
    assert brightness(page) < 60
    page.tab.emulate_media(color_scheme="light")
    assert brightness(page) > 200, "what the system says is followed again"
    page.close()


def test_without_storage(browser, server):
    page = Page(browser, server.url, script="""for (const name of ['localStorage', 'sessionStorage'])
        Object.defineProperty(window, name, {get() { throw new DOMException('no', 'SecurityError'); }});""")
    page.say("nothing is remembered")
    expect(page.answers()).to_have_text(["nothing is remembered"])
    light = brightness(page)
    page.tab.click("#toggle-theme")
    assert brightness(page) < light - 100
    page.close()


def test_narrow(browser, server):
    page = Page(browser, server.url, viewport={"width": 360, "height": 640}, has_touch=True)
    page.say("| a long heading | another heading | a third heading |\n|---|---|---|\n| 1 | 2 | 3 |\n\n`" + "x" * 200 + "`\n\n```\n" + "y" * 200 + "\n```")
    assert page.tab.evaluate("document.documentElement.scrollWidth <= 360 && document.querySelector('#scroll').scrollWidth <= 360")
    expect(page.tab.locator("#sidebar")).to_be_hidden()
    expect(page.tab.locator("#cache")).to_be_hidden()
    page.tab.tap("#open-sessions")
    expect(page.tab.locator("#sidebar")).to_be_visible()
    assert page.tab.locator("#open-sessions").get_attribute("aria-expanded") == "true"
    assert focused(page) == "close-sessions"
    page.tab.keyboard.press("Escape")
    expect(page.tab.locator("#sidebar")).to_be_hidden()
    assert focused(page) == "open-sessions"
    page.tab.tap("#open-sessions")
    page.tab.locator(".session-open").last.tap()
    expect(page.tab.locator("#sidebar")).to_be_hidden()
    page.tab.tap("#toggle-cache")
    expect(page.tab.locator("#cache")).to_be_visible()
    page.tab.tap("#close-cache")
    page.tab.tap("#toggle-options")
    box = page.tab.locator("#message").bounding_box()
    assert box["y"] + box["height"] <= 640 and box["width"] > 200
    small = page.tab.evaluate("""[...document.querySelectorAll('.chat button, .chat textarea')].filter((e) => e.offsetParent).map((e) => [e.id, e.getBoundingClientRect()])
        .filter(([, r]) => r.left < 0 || r.right > 360 || r.width < 24 || r.height < 24).map(([id]) => id)""")
    assert not small, small
    page.close()


def test_key(browser, program, model):
    server = Server(program, model, "secret")
    page = Page(browser, server.url, allowed="401")
    with page.may_complain("401"):
        expect(page.tab.locator("#key-dialog")).to_contain_text("an API key is needed")
        page.tab.fill("#key", "wrong")
        page.tab.press("#key", "Enter")
        expect(page.tab.locator("#key-dialog")).to_contain_text("this API key is not known here")
        page.tab.keyboard.press("Escape")
        expect(page.tab.locator("#banner")).to_contain_text("wants an API key")
        page.tab.click("#banner-action")
        page.tab.fill("#key", "secret")
        page.tab.press("#key", "Enter")
        expect(page.tab.locator("#model")).to_have_text("fake")
    expect(page.tab.locator("#banner")).to_be_hidden()
    page.say("let in")
    expect(page.answers()).to_have_text(["let in"])
    page.tab.reload()
    expect(page.answers()).to_have_text(["let in"])
    assert page.tab.evaluate("JSON.stringify(localStorage)").find("secret") < 0
    page.close()
    server.end()


def main():
    program, model = sys.argv[1:3]
    only = sys.argv[3:]
    tests = [(name, test) for name, test in globals().items() if name.startswith("test_") and (not only or name in only)]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        server = Server(program, model)
        page = Page(browser, server.url)
        expect(page.tab.locator("#model")).to_have_text("fake")
        for name, test in tests:
            start = time.monotonic()
            given = {"page": page, "server": server, "browser": browser, "program": program, "model": model}
            test(*[given[a] for a in test.__code__.co_varnames[:test.__code__.co_argcount]])
            print("%-40s %5.1f s" % (name, time.monotonic() - start), flush=True)
            assert not page.complaints, page.complaints
        page.close()
        browser.close()
        server.end()


if __name__ == "__main__":
    main()
