"""A page in the browser on which a person plays a learned world model, and the pictures that a run leaves behind.

`train_worldmodel.py --play RUN` hands `serve` a Session; nothing here knows of models. The server is the standard
library's and listens on 127.0.0.1 only. It answers three requests and reads no file:

    GET  /                          the page, complete in itself
    POST /reset {"prompt": null}    a new world, or the one that a sentence asks for
    POST /step  {"action": 3}       the next frame

Both posts answer {frame, truth, cache, fps, note, step}, frames as base64 of a PNG; what is wrong is {"error": line}.
"""
import base64
import contextlib
import errno
import html
import io
import json
import queue
import re
import secrets
import sys
import threading
import traceback
import webbrowser
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Protocol

import numpy as np

from experiment import UserError, replacing

BODY_LIMIT = 64 * 1024      # bytes of a request's body that are read as JSON
DRAIN_LIMIT = 1024 * 1024   # bytes of a body that is too large that are read and dropped
ENDED = "the program has ended"
FPS_WINDOW = 32             # frames in the running mean
GAP = 4                     # pixels around the frames of a strip
TITLE_HEIGHT = 16           # pixels of the line of text above a strip's row


@dataclass
class View:
    """What a session shows after a reset or a step."""
    frame: np.ndarray               # (H, W, 3) uint8, generated
    truth: np.ndarray | None        # the true world beside it, where it exists
    cache: str                      # one line about the cache, e.g. "16 frames, 1.2 MB"
    seconds: float                  # that the frame took
    note: str = ""                  # e.g. "code 3, in the true world: left"


class Session(Protocol):
    """What `serve` plays. All its methods run one after the other, in the thread that called `serve`."""
    title: str                      # shown on the page
    actions: tuple[str, ...]        # names of the actions
    keys: dict[str, int]            # KeyboardEvent.key -> action, e.g. {"ArrowUp": 1, " ": 0}
    prompts: bool = False           # True: the page offers a field for a sentence; may be left out

    def reset(self, prompt=None) -> View:
        """A new world, from a sentence or None; ValueError says in one line what is wrong with the sentence."""

    def step(self, action: int) -> View:
        """The frame after `action`."""


# ---- the server

class Refused(Exception):
    """A request that gets `status` and one line instead of what it asked for."""

    def __init__(self, status, text, **headers):
        super().__init__(text)
        self.status, self.headers = status, headers


class Game:
    """A session, its count of steps since the last reset, and its speed."""

    def __init__(self, session):
        self.session, self.steps, self.started = session, 0, False
        self.seconds = deque(maxlen=FPS_WINDOW)

    def reset(self, request):
        prompt = request.get("prompt")
        if prompt is not None and not isinstance(prompt, str):
            raise Refused(400, "prompt must be a sentence or null")
        prompt = (prompt or "").strip() or None
        if prompt and not getattr(self.session, "prompts", False):
            raise Refused(400, "this world takes no prompt")
        try:
            view = self.session.reset(prompt)
        except (ValueError, UserError) as error:             # the old world, if any, stays on the page
            raise Refused(400, one_line(error)) from error
        self.steps, self.started = 0, True
        self.seconds.clear()                                 # a reset's own frame reads the prompt: another speed
        return self.answer(view)

    def step(self, request):
        action, n = request.get("action"), len(self.session.actions)
        if type(action) is not int or not 0 <= action < n:   # a bool is an int elsewhere, not here
            raise Refused(400, f"action must be a whole number from 0 to {n - 1}")
        if not self.started:
            raise Refused(400, "there is no world yet: start one first")
        try:
            view = self.session.step(action)
        except UserError as error:
            raise Refused(400, one_line(error)) from error
        self.steps += 1
        self.seconds.append(view.seconds)
        return self.answer(view)

    def answer(self, view):
        total = sum(self.seconds)
        return {"frame": base64.b64encode(png(view.frame)).decode(),
                "truth": None if view.truth is None else base64.b64encode(png(view.truth)).decode(),
                "cache": view.cache, "fps": len(self.seconds) / total if total > 0 else None,
                "note": view.note, "step": self.steps}


class Handler(BaseHTTPRequestHandler):
    """One request. A web page from elsewhere must not drive the world: Host, Origin and Content-Type are checked."""
    protocol_version = "HTTP/1.1"       # one connection for all steps
    timeout = 60                        # seconds that a silent connection is kept
    disable_nagle_algorithm = True      # an answer waits for nothing ...
    wbufsize = -1                       # ... and leaves in one piece

    def respond(self):
        try:
            body = self.read_body()
            answer = self.route(body)
            status, headers = 200, {}
        except Refused as refused:
            answer, status, headers = {"error": str(refused)}, refused.status, refused.headers
        if answer is not None:
            answer, headers = json.dumps(answer).encode(), {"Content-Type": "application/json"} | headers
        else:
            nonce = secrets.token_urlsafe(16)                # only our own script and style run, nothing is loaded
            answer = page(self.server.game.session, nonce).encode()
            headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy":
                       f"default-src 'none'; img-src data:; connect-src 'self'; script-src 'nonce-{nonce}'; "
                       f"style-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(answer)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    do_GET = do_POST = do_HEAD = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = respond

    def read_body(self):
        """The body, or None where it is too large. Read before any answer: one sent past unread bytes can get lost."""
        lengths = self.headers.get_all("Content-Length", ["0"])
        if "Transfer-Encoding" in self.headers or len(lengths) != 1 or not (
                lengths[0].isascii() and lengths[0].isdecimal() and len(lengths[0]) < 16):
            self.close_connection = True                     # where the next request begins is unknown
            raise Refused(400, "the body needs one Content-Length")
        length = int(lengths[0])
        if length <= BODY_LIMIT:
            return self.rfile.read(length)
        self.close_connection = True
        for _ in range(0, min(length, DRAIN_LIMIT), BODY_LIMIT):
            if not self.rfile.read(min(BODY_LIMIT, length)):
                break
            length -= BODY_LIMIT
        return None

    def route(self, body):
        """The answer to a post, None for the page."""
        port = self.server.server_port
        ours = [f"127.0.0.1:{port}", f"localhost:{port}"] + ["127.0.0.1", "localhost"] * (port == 80)
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or hosts[0].lower() not in ours:  # a foreign name that was pointed at 127.0.0.1
            raise Refused(403, "this page answers on its own address only")
        path = self.path.partition("?")[0]
        wanted = {"/": "GET", "/reset": "POST", "/step": "POST"}.get(path)
        if wanted is None:
            raise Refused(404, "there is nothing here")
        if self.command != wanted:
            raise Refused(405, f"{path} takes {wanted} only", Allow=wanted)
        if wanted == "GET":
            return None
        if any(origin.lower() not in [f"http://{host}" for host in ours]
               for origin in self.headers.get_all("Origin", [])):
            raise Refused(403, "only this page may play")
        if self.headers.get_content_type() != "application/json":             # a foreign form cannot send that
            raise Refused(415, "Content-Type must be application/json")
        if body is None:
            raise Refused(400, f"the body is larger than {BODY_LIMIT} bytes")
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict):
            raise Refused(400, "the body is not a JSON object")
        return self.server.play(path[1:], request)

    def log_message(self, *_):
        """Quiet: the terminal belongs to the person."""


class Server(ThreadingHTTPServer):
    """Threads read requests; the session runs in the one thread that calls `run`.

    That thread is the caller's: autograd mode, the current device and captured CUDA graphs belong to a thread, and so
    does Ctrl-C, which thus also stops a frame that takes long. It is what serialises the steps, too.
    """
    daemon_threads = True
    allow_reuse_port = False            # a second server on our port is an error

    def __init__(self, session, port):
        self.game, self.jobs, self.closed = Game(session), queue.SimpleQueue(), False
        super().__init__(("127.0.0.1", port), Handler)

    def play(self, name, request):
        """In a request's thread: the answer to `name`, once the session's thread has come to it."""
        future = Future()
        self.jobs.put((future, name, request))
        while True:
            with contextlib.suppress(TimeoutError):
                return future.result(timeout=0.5)
            if self.closed and not future.done():
                raise Refused(503, ENDED)

    def run(self):
        """Play until KeyboardInterrupt, which goes on to the caller."""
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        try:
            while True:
                with contextlib.suppress(queue.Empty):       # a wait without end would hold Ctrl-C up on Windows
                    self.work(*self.jobs.get(timeout=0.5))
        finally:
            self.closed = True
            self.shutdown()

    def work(self, future, name, request):
        try:
            future.set_result(getattr(self.game, name)(request))
        except Refused as refused:
            future.set_exception(refused)
        except KeyboardInterrupt:                            # in the middle of a frame
            future.set_exception(Refused(503, ENDED))
            raise
        except Exception as error:                           # a bug: all of it in the terminal, a line on the page
            traceback.print_exc()
            future.set_exception(Refused(500, one_line(error)))

    def handle_error(self, request, address):
        if not isinstance(sys.exc_info()[1], OSError):       # a browser that hung up is no news
            super().handle_error(request, address)


def serve(session, port=0, ready=None, open_browser=False):
    """Play `session` on http://127.0.0.1:port/ (0: a free port) until Ctrl-C. `ready(address)` once it listens."""
    try:
        server = Server(session, port)
    except OverflowError:
        raise UserError(f"port {port} is not one of 0 to 65535") from None
    except OSError as error:
        why = "is taken: stop what uses it, or choose another" if error.errno == errno.EADDRINUSE else error.strerror
        raise UserError(f"port {port} {why}") from None
    with server, contextlib.suppress(KeyboardInterrupt):
        address = f"http://127.0.0.1:{server.server_port}/"
        print(f"play at {address}  (Ctrl-C ends it)", flush=True)
        if ready:
            ready(address)
        if open_browser:                                     # a browser inside the terminal returns only when closed
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        server.run()


def one_line(error):
    """What an error says, in one line; of one that says nothing its kind."""
    return " ".join(str(error).split()) or type(error).__name__


def parse_actions(text, n):
    """`"0,3,3"` -> [0, 3, 3], each one of `n` actions."""
    actions = []
    for place, part in enumerate(text.split(","), 1):
        part = part.strip()
        if not (part.isascii() and part.isdecimal() and len(part) < 10 and int(part) < n):
            what = f"{part[:40]!r} is not one of" if part else "nothing stands there, instead of"
            raise UserError(f"actions, place {place}: {what} 0 to {n - 1}; write them like 0,{n - 1},{n - 1}")
        actions.append(int(part))
    return actions


# ---- pictures

def image(frame, scale=1):
    """A Pillow image of `frame` (H, W, 3) uint8, each pixel `scale` wide."""
    from PIL import Image
    frame = np.asarray(frame)
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise ValueError(f"a frame is (H, W, 3) uint8, not {frame.shape} {frame.dtype}")
    return Image.fromarray(np.ascontiguousarray(frame.repeat(scale, 0).repeat(scale, 1)))


def png(frame):
    """`frame` as the bytes of a PNG."""
    file = io.BytesIO()
    image(frame).save(file, "PNG", compress_level=1)         # small enough for one machine, and soon done
    return file.getvalue()


def save_strip(path, rows, titles=None, scale=3):
    """One PNG of `rows`, lists of frames, each row under its title."""
    from PIL import Image, ImageDraw
    rows = [[image(frame, scale) for frame in row] for row in rows]
    if not any(rows):
        raise ValueError("a strip needs a frame")
    if titles is not None and len(titles) != len(rows):
        raise ValueError(f"{len(titles)} titles for {len(rows)} rows")
    # Pillow's own font knows Latin letters only, and without FreeType refuses others
    titles = [" ".join(title.split()).encode("latin-1", "replace").decode("latin-1") for title in titles or ()]
    ink = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    width = max([GAP + sum(part.width + GAP for part in row) for row in rows] +
                [2 * GAP + int(ink.textlength(title)) for title in titles])
    above = TITLE_HEIGHT if titles else 0
    height = GAP + sum(above + max([part.height for part in row], default=0) + GAP for row in rows)
    strip = Image.new("RGB", (width, height), "white")
    ink, y = ImageDraw.Draw(strip), GAP
    for i, row in enumerate(rows):
        if titles:
            ink.text((GAP, y), titles[i], fill="black")
        x, y = GAP, y + above
        for part in row:
            strip.paste(part, (x, y))
            x += part.width + GAP
        y += max([part.height for part in row], default=0) + GAP
    with replacing(Path(path)) as file:
        strip.save(file, "PNG")


def save_gif(path, frames, fps=4, scale=4):
    """An endless GIF of `frames`. Colours are exact up to 256 a frame."""
    if not len(frames):
        raise ValueError("a GIF needs a frame")
    first, *others = [image(frame, scale) for frame in frames]
    with replacing(Path(path)) as file:
        first.save(file, "GIF", save_all=True, append_images=others, duration=round(1000 / fps), loop=0)


# ---- the page

def page(session, nonce):
    """The whole page; only text and JSON of the session go in, escaped. Only what bears `nonce` runs in it."""
    game = {"actions": list(session.actions), "keys": dict(session.keys)}
    prompts = bool(getattr(session, "prompts", False))
    field = ('<input id="prompt" maxlength="1000" autocomplete="off" spellcheck="false" '
             'aria-label="prompt" placeholder="a sentence, or nothing for any world">') if prompts else ""
    parts = {"@TITLE@": html.escape(session.title), "@FIELD@": field, "@START@": "start" if prompts else "new world",
             "@GAME@": json.dumps(game).replace("<", "\\u003c"),       # no </script> from a name
             "@NONCE@": nonce}
    return re.sub("@[A-Z]+@", lambda place: parts[place[0]], PAGE)


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<link rel="icon" href="data:,">
<style nonce="@NONCE@">
:root { color-scheme: light dark; --back: #f6f6f3; --card: #fff; --ink: #1d1f21; --soft: #666b70; --line: #d9dad5;
        --accent: #2c6bb3; --bad: #b3261e }
@media (prefers-color-scheme: dark) {
  :root { --back: #17191b; --card: #222528; --ink: #e8e8e4; --soft: #a0a5aa; --line: #3a3e42;
          --accent: #7db3ee; --bad: #ff8a80 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; background: var(--back); color: var(--ink);
       font: 1rem/1.45 system-ui, sans-serif }
h1 { margin: 0 0 .8rem; font-size: 1.2rem; font-weight: 600; text-align: center; overflow-wrap: anywhere }
[hidden] { display: none !important }
.worlds { display: flex; justify-content: center; gap: 1rem }
figure { margin: 0; flex: 0 1 min(28rem, 60vh); min-width: 0 }
figcaption { color: var(--soft); font-size: .85rem; text-align: center; margin-top: .25rem }
figure img { display: block; width: 100%; min-height: 4rem; image-rendering: pixelated; background: var(--card);
             box-shadow: 0 0 0 1px var(--line); border-radius: 3px; transition: opacity .2s }
.busy figure img { opacity: .6; transition-delay: .4s }
#note, #error { min-height: 1.45em; margin: .4rem 0 0; text-align: center; overflow-wrap: anywhere }
#error { color: var(--bad) }
#actions { display: flex; flex-wrap: wrap; justify-content: center; gap: .5rem; margin: .5rem 0 }
button, input { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
                border-radius: 6px; padding: .5rem .8rem; min-height: 2.75rem }
button { cursor: pointer; touch-action: manipulation }
button:hover, button.last { border-color: var(--accent) }
button:active { background: var(--line) }
button.last { box-shadow: inset 0 0 0 1px var(--accent) }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px }
kbd { margin-left: .45rem; padding: .05rem .35rem; border: 1px solid var(--line); border-radius: 4px;
      color: var(--soft); font: .8rem ui-monospace, monospace }
form { display: flex; justify-content: center; gap: .5rem; margin: .8rem auto 0; max-width: 36rem }
form input { flex: 1; min-width: 0 }
dl { display: flex; flex-wrap: wrap; justify-content: center; gap: .2rem 1.5rem; margin: .8rem 0 0;
     font-size: .9rem; font-variant-numeric: tabular-nums }
dl div { display: flex; gap: .4rem }
dt { color: var(--soft) }
dd { margin: 0 }
@media (max-width: 40rem) { body { padding: .6rem } .worlds { gap: .5rem } }
</style>
<h1>@TITLE@</h1>
<main>
<div class="worlds">
<figure><img id="frame" alt="the frame that the model made"><figcaption>as the model sees it</figcaption></figure>
<figure hidden><img id="truth" alt="the true world"><figcaption>the true world</figcaption></figure>
</div>
<p id="note"></p>
<div id="actions"></div>
<p id="error" role="alert"></p>
<form id="form">@FIELD@<button id="start">@START@</button></form>
<dl>
<div><dt>step</dt><dd id="step">0</dd></div>
<div><dt>frames/s</dt><dd id="fps">–</dd></div>
<div><dt>cache</dt><dd id="cache">–</dd></div>
</dl>
</main>
<script nonce="@NONCE@">
"use strict";
const GAME = @GAME@;
const get = id => document.getElementById(id);
const keys = new Map(Object.entries(GAME.keys));
const names = {" ": "space", ArrowUp: "↑", ArrowDown: "↓", ArrowLeft: "←", ArrowRight: "→", Enter: "⏎"};
let busy = false, waiting = null;       // one request under way, and at most one press remembered behind it

async function send(path, body) {
  busy = true;
  document.body.classList.add("busy");
  try {
    const answer = await fetch(path, {method: "POST", headers: {"Content-Type": "application/json"},
                                      body: JSON.stringify(body)});
    const view = await answer.json();
    get("error").textContent = answer.ok ? "" : view.error;
    if (answer.ok) show(view, path === "/step" ? body.action : null);
  } catch (error) {
    get("error").textContent = "no answer: is the program in the terminal still running?";
  }
  busy = false;
  document.body.classList.remove("busy");
  if (waiting) {
    const next = waiting;
    waiting = null;
    send(...next);
  }
}

function ask(path, body, repeat = false) {
  if (!busy) send(path, body);
  else if (!repeat && waiting?.[0] !== "/reset") waiting = [path, body];     // a held key fills no queue
}

function show(view, action) {
  get("frame").src = "data:image/png;base64," + view.frame;
  get("truth").parentElement.hidden = view.truth === null;
  if (view.truth !== null) get("truth").src = "data:image/png;base64," + view.truth;
  get("step").textContent = view.step;
  get("fps").textContent = view.fps === null ? "–" : view.fps.toFixed(view.fps < 10 ? 2 : 1);
  get("cache").textContent = view.cache;
  get("note").textContent = view.note;
  [...get("actions").children].forEach((button, i) => button.classList.toggle("last", i === action));
  if (action === null) get("prompt")?.blur();                                // from here on the keys play
}

GAME.actions.forEach((name, action) => {
  const button = document.createElement("button");
  button.textContent = name;
  for (const [key, value] of keys) {
    if (value !== action) continue;
    const hint = document.createElement("kbd");
    hint.textContent = names[key] ?? key;
    button.append(hint);
  }
  button.addEventListener("click", event => {
    if (event.detail) button.blur();    // after a click of the mouse the space bar is the game's again
    ask("/step", {action});
  });
  get("actions").append(button);
});

document.addEventListener("keydown", event => {
  const on = event.target.tagName;
  if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing) return;
  if (on === "INPUT") {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (on === "BUTTON" && (event.key === " " || event.key === "Enter")) return;   // presses that button
  const action = keys.get(event.key) ?? keys.get(event.key.toLowerCase());
  if (action === undefined) return;
  event.preventDefault();               // no scrolling
  ask("/step", {action}, event.repeat);
});

get("form").addEventListener("submit", event => {
  event.preventDefault();
  get("start").blur();
  ask("/reset", {prompt: get("prompt")?.value.trim() || null});
});

send("/reset", {prompt: null});
</script>
</html>
"""
