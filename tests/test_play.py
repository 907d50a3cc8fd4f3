"""nanolab/play.py: the page's requests, who may send them, the page in a real browser, and the pictures of a run."""
import base64
import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

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
    n, sleep, ending = 0, 0, False

    def __init__(self, **change):
        vars(self).update(change)
        self.calls, self.threads, self.inside, self.overlap = [], set(), 0, False

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
        self.n, self.truth = 0, prompt != "dark"
        return self.view(5 if prompt else 0)

    def step(self, action):
        self.enter("step", action)
        self.inside += 1
        time.sleep(self.sleep)
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
    status, view = post(address + "reset", {"prompt": "  dark "})
    assert view["step"] == 0 and view["truth"] is None and view["fps"] is None
    assert session.calls[:4] == [("reset", None), ("step", 2), ("step", 0), ("step", 1)]
    assert session.calls[-1] == ("reset", "dark")


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
    """Autograd mode and CUDA graphs belong to a thread. What comes after the end is told so."""
    session, found = Fake(), []

    def play_on(address):
        post(address + "reset", {})
        session.ending = True
        found.append(post(address + "reset", {}))
    serve(session, ready=lambda address: threading.Thread(target=play_on, args=(address,)).start())   # the main thread
    wait_for(lambda: found)
    check_refused(found[0], 503, "has ended")
    assert session.threads == {threading.get_ident()}


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
        server.closed = True                                # and a request that comes too late is told so
        with pytest.raises(play.Refused, match="has ended"):
            server.play("reset", {})


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

def browse(home, *words, stdout=subprocess.DEVNULL):
    """A browser without a window, whose files all lie in `home`, as a Popen."""
    return subprocess.Popen(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
         "--disable-background-networking", "--disable-component-update", "--disable-breakpad",
         f"--user-data-dir={home}", *words], stdout=stdout, stderr=subprocess.DEVNULL, start_new_session=True,
        env=os.environ | dict.fromkeys(("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "TMPDIR"), home))


# Runs in the page behind its own script, whose names it sees; what it finds is the last prompt.
DRIVER = """
async function color(name) {
  const image = get(name), ink = new OffscreenCanvas(8, 6).getContext("2d");
  await image.decode();
  ink.drawImage(image, 0, 0);
  return [image.naturalWidth, image.naturalHeight, ...[...ink.getImageData(7, 5, 1, 1).data].slice(0, 3)];
}
async function idle() {                                      // nothing under way, nothing remembered
  do await new Promise(go => setTimeout(go, 5)); while (busy || waiting);
}
function press(key, more = {}) {
  const target = document.activeElement;                     // as the browser chooses it
  return target.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true, ...more}));
}
function mouse(button) {
  button.focus();
  button.dispatchEvent(new MouseEvent("click", {bubbles: true, cancelable: true, detail: 1}));
}
(async () => {
  const report = {errors: []}, texts = (...names) => names.map(name => get(name).textContent);
  addEventListener("error", event => report.errors.push(event.message));
  addEventListener("unhandledrejection", event => report.errors.push(String(event.reason)));
  const seen = async () => [...texts("step", "note", "error"), await color("frame"), await color("truth")];
  await idle();
  report.first = [...await seen(), ...texts("fps"), document.title];
  report.buttons = [...document.querySelectorAll("#actions button")].map(button => button.innerText);
  report.look = [getComputedStyle(get("frame")).imageRendering, get("truth").checkVisibility(),
                 document.documentElement.scrollWidth <= innerWidth];
  report.keys = [];
  for (const key of ["ArrowUp", "a", " ", "A"]) {            // of the keyboard's other case, too
    const free = press(key);
    await idle();
    report.keys.push([free, ...await seen(), ...texts("fps", "cache")]);
  }
  report.nothing = [press("q"), press("a", {ctrlKey: true}), busy];
  mouse(document.querySelectorAll("#actions button")[1]);    // the space bar is the game's again after it
  await idle();
  press(" ");
  await idle();
  report.clicked = texts("step", "note");
  for (let i = 0; i < 20; i++) press("ArrowUp", {repeat: i > 0});      // held: one request, and no queue behind it
  report.held = [busy, waiting];
  press("ArrowUp"), press("a");                              // presses of their own: the last is not lost
  report.pressed = [busy, waiting];
  await idle();
  get("prompt").focus();
  report.typed = [press("a"), press(" "), busy];             // letters typed there play nothing
  get("prompt").value = " a fish ";
  mouse(get("start"));
  await idle();
  report.wrong = await seen();                               // the error shows, the world stays
  get("prompt").value = "a cat", get("prompt").focus();
  get("form").requestSubmit();
  await idle();
  report.right = [...await seen(), document.activeElement.tagName];
  get("prompt").value = "dark";
  get("form").requestSubmit();
  await idle();
  report.dark = get("truth").checkVisibility();
  send("/reset", {prompt: JSON.stringify(report)});
})();
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome")
def test_play_in_a_browser(monkeypatch):
    session, real = Fake(), play.page
    monkeypatch.setattr(play, "page", lambda session, nonce: real(session, nonce).replace(
        "</html>", f'<script nonce="{nonce}">{DRIVER}</script></html>'))
    with served(session) as address, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        browser = browse(home, "--remote-debugging-port=0", "--window-size=500,900", address)
        try:
            wait_for(lambda: session.calls and str(session.calls[-1][1]).startswith("{"), every=0.02)
            *calls, (_, found) = session.calls
        finally:                                             # it and all that it started
            os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()

    def shown(n, action, note=None, error=""):
        color = [10 * n, 20 * action, 7]
        return [str(n), note or f"code {action}", error, [8, 6, *color], [8, 6, *(255 - value for value in color)]]
    assert json.loads(found) == dict(
        errors=[], first=[*shown(0, 0), "–", session.title], look=["pixelated", True, True],
        buttons=["stayspace", "up↑", "</script><i>left</i>a"],
        keys=[[False, *shown(n, action), "4.00", f"{n} frames, 1.2 MB"] for n, action in enumerate((1, 2, 0, 2), 1)],
        nothing=[True, True, False], clicked=["6", "code 0"], held=[True, None],
        pressed=[True, ["/step", {"action": 2}]], typed=[True, True, False],
        wrong=shown(8, 2, error="no word for 'fish'"), right=[*shown(0, 5), "BODY"], dark=False)
    assert calls == [("reset", None), *(("step", action) for action in (1, 2, 0, 2, 1, 0, 1, 2)), ("reset", "a fish"),
                     ("reset", "a cat"), ("reset", "dark")]


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


def test_gif(tmp_path):
    movie = frames(4, 0)
    save_gif(tmp_path / "movie.gif", movie, fps=5, scale=3)
    with Image.open(tmp_path / "movie.gif") as gif:
        assert gif.n_frames == 4 and gif.info["loop"] == 0 and gif.size == (18, 15)
        for i, frame in enumerate(movie):
            gif.seek(i)
            assert gif.info["duration"] == 200
            assert (np.asarray(gif.convert("RGB")) == frame.repeat(3, 0).repeat(3, 1)).all()


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
