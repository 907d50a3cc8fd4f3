"""nanolab/play.py: the page's requests, who may send them, the page in a real browser, and the pictures of a run."""
import base64
import contextlib
import http.client
import io
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from forks import ROOT, wait_for
from nanolab import play
from nanolab.play import View, parse_actions, save_gif, save_strip, serve
from nanolab.run import UserError

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Fake:
    """Step s after action a paints the frame (10 s, 20 a, 7); the truth is its negative."""
    title = "worlds <b>&</b> @NONCE@ </script>"
    actions = ("stay", "up", "</script><i>left</i>")
    keys = {" ": 0, "ArrowUp": 1, "a": 2}
    prompts, fair, measured, missing = True, True, "", ()
    n, truth, sleep, ending = 0, True, 0, False

    def __init__(self, **change):
        vars(self).update(change)
        self.calls, self.threads, self.inside, self.overlap = [], set(), 0, False
        self.gate = threading.Event()              # a step ends when it is set
        self.gate.set()

    def enter(self, *call):
        self.calls.append(call)
        self.threads.add(threading.get_ident())
        self.overlap |= self.inside > 0
        if self.ending:
            raise KeyboardInterrupt                # what Ctrl-C does in the thread of serve

    def view(self, a):
        frame = np.full((6, 8, 3), (10 * self.n, 20 * a, 7), np.uint8)
        return View(frame, 255 - frame if self.truth else None, f"{self.n} frames, 1.2 MB", 0.25, f"code {a}")

    def reset(self, prompt=None):
        self.enter("reset", prompt)
        if prompt and "fish" in prompt:
            raise ValueError("no word for\n 'fish'")
        if prompt == "bug":
            raise KeyError("lost")
        self.n = 0
        return self.view(5 if prompt else 0)

    def step(self, action):
        self.enter("step", action)
        self.inside += 1
        time.sleep(self.sleep)
        self.gate.wait(20)
        self.inside -= 1
        self.n += 1
        return self.view(action)


@contextlib.contextmanager
def served(session, port=0):
    """`serve` in a thread, ended as Ctrl-C ends it."""
    listens, found = threading.Event(), []
    thread = threading.Thread(target=serve, args=(session, port, lambda a: (found.append(a), listens.set())),
                              daemon=True)
    thread.start()
    assert listens.wait(10)
    try:
        yield found[0]
    finally:
        with contextlib.suppress(OSError):
            session.ending = True
            post(found[0] + "reset", {})
        thread.join(10)
        assert not thread.is_alive()


def request(url, data=None, **headers):
    """Status, headers, body; an error's too."""
    method = headers.pop("method", None)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def post(url, body, **headers):
    """Status and JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, got, text = request(url, data, **{"Content_Type": "application/json"} | headers)
    assert got["Content-Type"] == "application/json"
    return status, json.loads(text)


def check_refused(answer, status, said=""):
    """One line came with `status`."""
    assert answer[0] == status and list(answer[1]) == ["error"], answer
    error = answer[1]["error"]
    assert error and "\n" not in error and said in error
    return error


def pixels(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


@pytest.fixture
def game():
    session = Fake()
    with served(session) as address:
        yield session, address


# ---- requests

def test_page_is_complete_and_escaped(game):
    _, address = game
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
    status, headers, text = request(address)
    text = text.decode()
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    for name in "frame truth fps cache note step error prompt start".split():
        assert text.count(f'id="{name}"') == 1, name
    assert text.count("</script>") == 1 and "<b>" not in text and "<i>" not in text
    assert "worlds &lt;b&gt;&amp;&lt;/b&gt; @NONCE@" in text                   # a name is no placeholder
    assert not re.search(r"https?:|//[a-z]|@import|url\(|src=", text.replace("img.src", "")), "an outside resource"
    assert '<link rel="icon" href="data:,">' in text                           # or browsers ask for one
    policy, nonces = headers["Content-Security-Policy"], set(re.findall(r'nonce="([^"]+)"', text))
    assert len(nonces) == 1 and f"script-src 'nonce-{nonces.pop()}'" in policy and "default-src 'none'" in policy
    assert request(address)[2].decode() != text                                # another nonce each time


def test_page_without_prompts():
    with served(Fake(prompts=False, fair=False, measured="<1 %", missing=("up",))) as address:
        text = request(address)[2].decode()
        assert 'id="prompt"' not in text and 'id="start">new world' in text
        assert '<p id="measured" class="bad">&lt;1 %</p>' in text and '"missing": ["up"]' in text
        check_refused(post(address + "reset", {"prompt": "a cat"}), 400, "takes no prompt")
        assert post(address + "reset", {"prompt": " "})[0] == 200


def test_reset_steps_and_the_old_world_after_an_error(game, capsys):
    session, address = game
    check_refused(post(address + "step", {"action": 0}), 400, "start one first")
    status, view = post(address + "reset", {"prompt": None})
    assert status == 200 and set(view) == {"frame", "truth", "cache", "fps", "note", "score", "lost", "step"}
    assert view["fps"] is None and view["step"] == 0 and view["cache"] == "0 frames, 1.2 MB"
    for n, action in enumerate((2, 0, 1), 1):
        status, view = post(address + "step", {"action": action})
        assert status == 200 and view["step"] == n and view["fps"] == 4 and view["note"] == f"code {action}"
        frame = pixels(view["frame"])
        assert frame.shape == (6, 8, 3) and (frame == (10 * n, 20 * action, 7)).all()
        assert (pixels(view["truth"]) == 255 - frame).all()
    assert check_refused(post(address + "reset", {"prompt": "a fish"}), 400) == "no word for 'fish'"
    check_refused(post(address + "reset", {"prompt": "bug"}), 500, "lost")
    assert "KeyError" in capsys.readouterr().err                               # a bug of ours shows in the terminal
    assert post(address + "step", {"action": 1})[1]["step"] == 4
    session.truth = False
    status, view = post(address + "reset", {"prompt": "  a cat "})
    assert view["step"] == 0 and view["truth"] is None and view["fps"] is None
    assert session.calls[:4] == [("reset", None), ("step", 2), ("step", 0), ("step", 1)]
    assert session.calls[-1] == ("reset", "a cat")


def test_speed_is_a_running_mean():
    running, half = play.Game(Fake()), play.FPS_WINDOW // 2

    def speed(*times):
        for seconds in times:
            running.session.view = lambda a: View(np.zeros((1, 1, 3), np.uint8), None, "", seconds)
            fps = running.step({"action": 0})["fps"]
        return fps
    running.reset({})
    assert speed(100.0, *[0.5] * half, *[0.25] * half) == pytest.approx(2 / (0.5 + 0.25))    # the first has left it
    running.reset({})
    assert speed(0.0) is None


def port_of(address):
    return int(address.split(":")[2].strip("/"))


def raw(address, *lines, ends=False):
    """The status of a request written by hand; ends: also waits until the server has closed the connection."""
    with socket.create_connection(("127.0.0.1", port_of(address)), timeout=10) as line:
        line.sendall("\r\n".join([*lines, "", ""]).encode())
        answer = line.makefile("rb")
        status = int(answer.readline().split()[1])
        assert not ends or b"Connection: close" in answer.read()
        return status


def test_what_is_no_request_is_refused_in_one_line(game):
    """Bodies that are no JSON object, too long, or of no length; other actions and prompts; other paths and methods."""
    session, address = game
    room = play.BODY_LIMIT - len('{"prompt": ""}')
    for path, body, said in (
            *(("reset", body, "JSON") for body in (b"", b"[]", b"null", b"\xff{}", b'{"action": 1', b"[" * 60000)),
            *(("reset", {"prompt": "x" * (room + over)}, "larger") for over in (1, 900_000)),
            *(("step", {"action": action}, "0 to 2") for action in (-1, 3, 10 ** 30, 1.0, "1", True)),
            ("step", {}, ""), *(("reset", {"prompt": prompt}, "sentence") for prompt in (7, ["a"], True))):
        check_refused(post(address + path, body), 400, said)
    for length in ("Content-Length: x", "Content-Length: -1", "Content-Length: 2\r\nContent-Length: 3",
                   "Transfer-Encoding: chunked", "Content-Length: 2\r\nTransfer-Encoding: chunked"):
        assert raw(address, "POST /reset HTTP/1.1", f"Host: {address.split('/')[2]}", "Content-Type: application/json",
                   length, ends=True) == 400, length        # where the next request begins is unknown
    for path in ("favicon.ico", "reset/", "../play.py", "%2e%2e/play.py"):
        assert request(address + path)[0] == 404
        check_refused(post(address + path, {}), 404)
    for path, wrong, right in (("", "POST", "GET"), ("reset", "GET", "POST"), ("step", "OPTIONS", "POST")):
        status, headers, text = request(address + path, method=wrong)
        assert status == 405 and headers["Allow"] == right and json.loads(text)["error"], (path, wrong)
    assert request(address + "reset", method="HEAD")[0] == 405 and request(address + "?x=1")[0] == 200
    assert not session.calls
    assert post(address + "reset", {"prompt": "x" * room})[0] == 200


def test_foreign_pages_are_refused(game):
    session, address = game
    port = port_of(address)
    ours = [f"127.0.0.1:{port}", f"localhost:{port}"]
    for host in (f"evil.example:{port}", "127.0.0.1", "localhost:1", f"127.0.0.1.evil.example:{port}",
                 f"0.0.0.0:{port}", ""):
        assert request(address, Host=host)[0] == 403, host
        check_refused(post(address + "reset", {}, Host=host), 403)
    assert raw(address, "GET / HTTP/1.1") == 403                               # none, and two
    assert raw(address, "GET / HTTP/1.1", f"Host: {ours[0]}", "Host: evil.example") == 403
    for origin in (f"http://evil.example:{port}", "null", f"https://127.0.0.1:{port}", "http://127.0.0.1",
                   f"http://localhost:{port}.evil.example", ""):
        check_refused(post(address + "reset", {}, Origin=origin), 403)
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        check_refused(post(address + "reset", {}, Content_Type=kind), 415)
    assert not session.calls
    for host in (*ours, f"LocalHost:{port}"):
        assert post(address + "reset", {}, Host=host, Origin=f"http://{host}")[0] == 200
    assert post(address + "reset", {}, Content_Type="application/json; charset=utf-8")[0] == 200


def test_steps_at_once_are_serialised(game):
    session, address = game
    post(address + "reset", {})
    session.sleep = 0.02
    with ThreadPoolExecutor(6) as pool:
        steps = pool.map(lambda _: post(address + "step", {"action": 1})[1]["step"], range(6))
    assert sorted(steps) == [1, 2, 3, 4, 5, 6]
    assert not session.overlap and len(session.threads) == 1


def test_session_runs_in_the_callers_thread():
    """Autograd mode and CUDA graphs belong to a thread."""
    session, found = Fake(), []

    def ready(address):
        found.append(threading.get_ident())
        threading.Thread(target=lambda: (post(address + "reset", {}), setattr(session, "ending", True),
                                         post(address + "reset", {}))).start()
    serve(session, ready=ready)                             # here, in the main thread
    assert session.threads == {threading.get_ident()} == set(found)


def test_one_connection_serves_many(game, capfd):
    _, address = game
    line = http.client.HTTPConnection("127.0.0.1", port_of(address), timeout=10)
    for path, body, status in (("/reset", "{}", 200), ("/step", '{"action": 9}', 400), ("/nowhere", "{}", 404),
                               ("/step", '{"action": 1}', 200)):
        line.request("POST", path, body, {"Content-Type": "application/json"})
        answer = line.getresponse()
        assert answer.status == status and json.loads(answer.read())
        assert line.sock is not None                        # still the first one
    line.close()
    request(address)
    assert capfd.readouterr().err == ""                     # quiet, also about a line that was hung up


# ---- beginning and end

def test_port_taken(capsys):
    with served(Fake()) as address:
        assert address in capsys.readouterr().out
        port = port_of(address)
        with pytest.raises(UserError, match=f"^port {port} is taken[^\n]*$"):
            serve(Fake(), port)
        assert request(address)[0] == 200
    with served(Fake(), port) as again:                     # free at once after the end
        assert again == address
    with play.Server(Fake(), 0) as server:
        assert server.server_address[0] == "127.0.0.1"      # not for the network
    with pytest.raises(UserError, match="0 to 65535"):
        serve(Fake(), 70000)


@pytest.mark.parametrize("sleep", [0, 60], ids=["idle", "in the middle of a step"])
def test_ctrl_c_ends_cleanly(sleep, forks, tmp_path):
    (tmp_path / "game.py").write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "from test_play import Fake, serve\nFake.enter = lambda self, *call: print(*call, flush=True)\n"
        f"serve(Fake(sleep={sleep})); print('over')\n")
    child = forks.start([tmp_path / "game.py"], tmp_path)
    try:
        wait_for(lambda: child.files[0].read_text().count("\n"))
        address = re.search(r"http://\S+", child.files[0].read_text())[0]
        assert post(address + "reset", {})[0] == 200
        if sleep:
            line = http.client.HTTPConnection("127.0.0.1", port_of(address), timeout=20)
            line.request("POST", "/step", '{"action": 1}', {"Content-Type": "application/json"})
            wait_for(lambda: "step 1" in child.files[0].read_text())             # the step itself takes a minute
    finally:
        child.kill(signal.SIGINT)
    child.wait()
    assert (child.code, child.err) == (0, "") and child.out.endswith("\nover\n")


# ---- a real browser

class Browser:
    """Headless chromium, driven over a pair of pipes: JSON messages, each ended by a zero byte."""

    # dup2 in a small program of its own: what Popen offers cannot give a child just the descriptors 3 and 4
    START = ("import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
             "os.execv(sys.argv[3], sys.argv[3:])")

    def __init__(self, folder):
        import fcntl                                        # not on Windows
        there, self.write = os.pipe()
        self.read, back = os.pipe()
        high = [fcntl.fcntl(there, fcntl.F_DUPFD, 10), fcntl.fcntl(back, fcntl.F_DUPFD, 10)]
        self.log = open(folder / "browser.log", "wb")
        homes = dict.fromkeys(("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "TMPDIR"), str(folder))
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", self.START, *map(str, high), CHROMIUM, "--headless=new", "--no-sandbox",
             "--disable-gpu", "--remote-debugging-pipe", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-breakpad", "--disable-dev-shm-usage",
             f"--user-data-dir={folder / 'profile'}", "about:blank"],
            pass_fds=high, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, start_new_session=True,
            env=os.environ | homes)
        for end in (there, back, *high):
            os.close(end)
        self.buffer, self.events, self.id, self.page = b"", [], 0, None

    def close(self):
        """Kill it and all it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.read)
        os.close(self.write)
        self.log.close()

    def receive(self, until):
        while b"\0" not in self.buffer:
            assert select.select([self.read], [], [], max(0, until - time.monotonic()))[0], "the browser is silent"
            part = os.read(self.read, 1 << 16)
            assert part, "the browser has ended: see browser.log"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method, **params):
        self.id += 1
        message = {"id": self.id, "method": method, "params": params}
        data = json.dumps(message | ({"sessionId": self.page} if self.page else {})).encode() + b"\0"
        while data:
            data = data[os.write(self.write, data):]
        until = time.monotonic() + 60
        while True:
            answer = self.receive(until)
            if answer.get("id") == self.id:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self.events.append(answer)

    def open(self, address):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.page = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=address)

    def js(self, code):
        result = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, code):
        """Until `code` is true in the page."""
        until = time.monotonic() + 60
        while not self.js(code):
            assert time.monotonic() < until, f"never true: {code}; the page says: {self.js('document.body.innerText')}"
            time.sleep(0.02)

    def key(self, key, code, held=0, text=None):
        """Press a key, let the system repeat it `held` times, release it."""
        number = {"ArrowUp": 38, " ": 32, "Enter": 13}.get(key, ord(key[0].upper()))
        text = text or (key if len(key) == 1 else None)
        press = dict(key=key, code=code, windowsVirtualKeyCode=number) | ({"text": text} if text else {})
        for i in range(held + 1):
            self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", autoRepeat=i > 0, **press)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=code, windowsVirtualKeyCode=number)

    def click(self, selector):
        x, y = self.js(f"""(() => {{
            const target = document.querySelector({json.dumps(selector)});
            target.scrollIntoView({{block: "center", behavior: "instant"}});
            const box = target.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def pixels(self, name):
        """Width, height and the last pixel of an image, through a canvas."""
        return self.js(f"""(async () => {{
            const image = document.getElementById("{name}"), canvas = new OffscreenCanvas(8, 6);
            await image.decode();
            const ink = canvas.getContext("2d");
            ink.drawImage(image, 0, 0);
            return [image.naturalWidth, image.naturalHeight, [...ink.getImageData(7, 5, 1, 1).data].slice(0, 3)];
        }})()""")

    def troubles(self):
        """What a developer would see in red in the console."""
        return [event["params"] for event in self.events
                if event.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled")
                or event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] == "error"]


@pytest.fixture
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:   # a long path is none of a socket
        browser = Browser(Path(folder))
        try:
            yield browser
        finally:
            browser.close()


def test_play_in_a_browser(game, browser):
    session, address = game

    def step(n):
        browser.wait(f"document.getElementById('step').textContent === '{n}' && !busy")

    def shown(n, action):
        color = [10 * n, 20 * action, 7]
        assert browser.pixels("frame") == [8, 6, color]
        assert browser.pixels("truth") == [8, 6, [255 - value for value in color]]

    def text(name):
        return browser.js(f"document.getElementById('{name}').textContent")

    browser.open(address)
    browser.wait("typeof busy !== 'undefined' && !busy && document.getElementById('frame').complete")
    assert session.calls == [("reset", None)] and text("step") == "0" and text("fps") == "–"
    shown(0, 0)
    assert browser.js("document.title") == session.title
    assert browser.js("[...document.querySelectorAll('#actions button')].map(button => button.innerText)") == [
        "stayspace", "up↑", "</script><i>left</i>a"]
    assert browser.js("getComputedStyle(document.getElementById('frame')).imageRendering") == "pixelated"
    assert browser.js("document.getElementById('frame').clientWidth") > 280
    assert browser.js("document.getElementById('truth').checkVisibility()") is True

    # keys, a key of the keyboard's other case, and one that means nothing
    for n, (key, code, action) in enumerate((("ArrowUp", "ArrowUp", 1), ("a", "KeyA", 2), (" ", "Space", 0),
                                             ("A", "KeyA", 2)), 1):
        browser.key(key, code)
        step(n)
        shown(n, action)
        assert text("fps") == "4.00" and text("cache") == f"{n} frames, 1.2 MB" and text("note") == f"code {action}"
    browser.key("q", "KeyQ")
    browser.call("Input.dispatchKeyEvent", type="rawKeyDown", key="a", code="KeyA", windowsVirtualKeyCode=65,
                 modifiers=2)                               # with Ctrl
    assert browser.js("busy") is False and len(session.calls) == 5

    # a click; the space bar is the game's again after it
    browser.click("#actions button:nth-child(2)")
    step(5)
    browser.key(" ", "Space")
    step(6)
    shown(6, 0)

    # a held key sends one request at a time and leaves no queue behind; a press of its own is not lost
    session.gate.clear()
    browser.key("ArrowUp", "ArrowUp", held=20)
    assert browser.js("[busy, waiting]") == [True, None]
    browser.key("ArrowUp", "ArrowUp")
    browser.key("a", "KeyA")
    assert browser.js("[busy, waiting]") == [True, ["/step", {"action": 2}]]
    session.gate.set()
    step(8)
    assert session.calls[-2:] == [("step", 1), ("step", 2)] and len(session.calls) == 9 and not session.overlap
    assert browser.js("waiting") is None

    # prompts: a wrong one shows the error and leaves the world; letters typed there play nothing
    assert text("error") == "" and browser.troubles() == []
    browser.click("#prompt")
    for letter in "a fish":
        browser.key(letter, "Key" + letter.upper() if letter != " " else "Space")
    assert browser.js("document.getElementById('prompt').value") == "a fish"
    browser.click("#start")
    browser.wait("document.getElementById('error').textContent !== ''")
    assert text("error") == "no word for 'fish'" and text("step") == "8" and session.calls[-1] == ("reset", "a fish")
    shown(8, 2)
    red = browser.troubles()                                # the browser itself notes the refusal, and nothing else
    assert len(red) == 1 and red[0]["entry"]["url"] == address + "reset" and "400" in red[0]["entry"]["text"]

    # a right one, by the Enter key: the keys play at once
    browser.js("document.getElementById('prompt').value = 'a cat'; document.getElementById('prompt').focus()")
    browser.key("Enter", "Enter", text="\r")
    step(0)
    assert text("error") == "" and session.calls[-1] == ("reset", "a cat")
    shown(0, 5)
    session.truth = False
    browser.key("ArrowUp", "ArrowUp")
    step(1)
    assert browser.js("document.getElementById('truth').checkVisibility()") is False

    # at a phone's width all fits, nothing scrolls sideways
    browser.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    assert browser.js("document.documentElement.scrollWidth") <= 360 and len(browser.troubles()) == 1

    # after the end a press says so
    session.ending = True
    browser.key("ArrowUp", "ArrowUp")
    browser.wait("document.getElementById('error').textContent !== ''")
    assert "ended" in text("error")


# ---- actions and pictures

def test_parse_actions():
    assert parse_actions("0,3,3", 4) == [0, 3, 3] and parse_actions(" 1 , 0", 2) == [1, 0]
    for text, told in (("0,4", "place 2: '4'"), ("-1", "place 1: '-1'"), ("", "place 1: nothing"),
                       ("0,,1", "place 2: nothing"), ("1.0", "'1.0'"), ("1_0", "'1_0'"), ("²", "'²'"), ("１", "'１'"),
                       ("9" * 5000, "'9999")):
        with pytest.raises(UserError, match=told) as error:
            parse_actions(text, 4)
        assert "0 to 3" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 150


def frames(n, seed, height=5, width=6, colors=200):
    rng = np.random.default_rng(seed)
    palette = rng.integers(0, 256, (colors, 3), dtype=np.uint8)
    return [palette[rng.integers(0, colors, (height, width))] for _ in range(n)]


def test_png_is_exact():
    frame = frames(1, 0)[0]
    for view in (frame, frame[::-1, ::2], frame.transpose(1, 0, 2)):
        assert (np.asarray(Image.open(io.BytesIO(play.png(view)))) == view).all()
    for wrong in (frame.astype(float), frame[..., 0], frame[..., :2], frame[:, None, :3]):
        with pytest.raises(ValueError, match="uint8"):
            play.png(wrong)


def test_strip(tmp_path):
    rows, gap, above = [frames(3, 0), frames(2, 1)], play.GAP, play.TITLE_HEIGHT
    save_strip(tmp_path / "strip.png", rows, ["true", "dreamed, with a title longer than its frames 漢\nline"], 2)
    strip = np.asarray(Image.open(tmp_path / "strip.png"))
    assert len(strip) == gap + 2 * (above + 10 + gap) and strip.shape[1] > 200
    rest = np.ones(strip.shape[:2], bool)
    for i, row in enumerate(rows):
        y = gap + i * (above + 10 + gap) + above
        assert strip[y - above:y - 1].min() < 100 and strip[y - 1:y + 1, -gap:].min() == 255  # ink, and it ends within
        rest[y - above:y] = False
        for j, frame in enumerate(row):
            x = gap + j * (12 + gap)
            assert (strip[y:y + 10, x:x + 12] == frame.repeat(2, 0).repeat(2, 1)).all()
            rest[y:y + 10, x:x + 12] = False
    assert (strip[rest] == 255).all()
    save_strip(tmp_path / "short.png", rows, ["a", "b"], 2)                     # as wide as its longest row
    assert Image.open(tmp_path / "short.png").size == (gap + 3 * (12 + gap), len(strip))
    for rows, titles, said in ((rows, ["one"], "1 titles for 2 rows"), ([[]], [""], "needs a frame")):
        with pytest.raises(ValueError, match=said):
            save_strip(tmp_path / "other.png", rows, titles)


def test_gif(tmp_path):
    movie = frames(4, 0)
    save_gif(tmp_path / "movie.gif", movie, fps=5, scale=3)
    with Image.open(tmp_path / "movie.gif") as gif:
        assert gif.n_frames == 4 and gif.info["loop"] == 0 and gif.size == (18, 15)
        for i, frame in enumerate(movie):
            gif.seek(i)
            assert gif.info["duration"] == 200
            assert (np.asarray(gif.convert("RGB")) == frame.repeat(3, 0).repeat(3, 1)).all()
    with pytest.raises(ValueError, match="needs a frame"):
        save_gif(tmp_path / "other.gif", [])


def test_pictures_are_replaced_whole(tmp_path, monkeypatch):
    """A failure in the middle leaves what was there, and nothing beside it."""
    def broken(self, file, *args, **kwargs):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    for name, save in (("a.png", lambda path: save_strip(path, [frames(2, 0)], ["title"])),
                       ("a.gif", lambda path: save_gif(str(path), frames(2, 0)))):
        save(tmp_path / name)
        before = (tmp_path / name).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "save", broken)
            with pytest.raises(UserError, match="No space left"):
                save(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["a.gif", "a.png"]
    with pytest.raises(UserError, match="nowhere"):
        save_gif(tmp_path / "nowhere" / "a.gif", frames(1, 0))
