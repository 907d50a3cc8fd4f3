"""A learned world that a person plays, the page in the browser on which they do, and pictures of it.

`train_worldmodel.py --play RUN` hands `serve` a `Session`; the server knows of no model. It is the standard library's
and listens on 127.0.0.1 only. It answers three requests and reads no file but its page, play.html:

    GET  /                          the page, complete in itself
    POST /reset {"prompt": null}    a new world, or the one that a sentence asks for
    POST /step  {"action": 3}       the next frame

Both posts answer {frame, truth, cache, fps, note, score, lost, step}, frames as base64 of a PNG; what is wrong is
{"error": line}.
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
import time
import traceback
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch

from data.video import ACTIONS, AGENT, World, caption_length, paint, plain, unknown_words
from models.world_words import as_characters
from nanolab.run import UserError, as_user_error, replacing
from nanolab.world import Referee, as_bytes, opening

BODY_LIMIT = 64 * 1024      # bytes of a request's body that are read as JSON
DRAIN_LIMIT = 1024 * 1024   # bytes of a body that is too large that are read and dropped
ENDED = "the program has ended"
FPS_WINDOW = 32             # frames in the running mean
GAP = 4                     # pixels around the frames of a strip
TITLE_HEIGHT = 16           # pixels of the line of text above a strip's row
PAGE = Path(__file__).with_name("play.html")


@dataclass
class View:
    """What a player is shown after a reset or a step."""
    frame: np.ndarray               # (H, W, 3) uint8, generated
    truth: np.ndarray | None        # the true world beside it, where it exists
    cache: str                      # one line about the cache, e.g. "16 frames, 1.2 MB"
    seconds: float                  # that the frame took
    note: str = ""                  # e.g. "left (code 3); in the true world: left"
    score: str = ""                 # e.g. "right so far: 57 of 58 presses"
    lost: str = ""                  # why the world cannot be played any more


class Session:
    """One world: frames generated after the actions that a person chooses, the true world beside it where there is one.

    The grid world begins at a random state with `context` - 1 true frames after "stay", and counts which presses had
    their effect; other data begin at a clip that was never trained on. A latent action of the grid world is a button of
    each true action, with the commonest code that means it behind; elsewhere each code is one, shown with the true
    action that most often goes with it.

    reader: a nanolab.world.Reader of held-out clips, whose models have "dynamics". video: their data.video.Video.
    settings: those of train_worldmodel.py. meanings, codes: of models.world_measures.meanings_of. measured: one line of
    what this model scores when it is played. fair: that is enough to play.
    """

    def __init__(self, reader, video, settings, meanings=None, codes=None, measured="", fair=True):
        self.reader, self.models, self.model = reader, reader.models, reader.models["dynamics"]
        self.video, self.settings, self.measured, self.fair = video, settings, measured, fair
        self.ours = video.action_names == ACTIONS             # a world that goes on by itself
        self.prompts = "frame" in self.models and self.ours
        self.actions, true = tuple(video.action_names), reader.source == "true"
        self.codes = list(range(len(self.actions))) if true else codes if self.ours else list(
            range(self.model.n_actions))
        if not true and not self.ours:
            self.actions = tuple(f"code {k}" + ("" if meanings is None else f" ({self.actions[meanings[k]]})")
                                 for k in self.codes)
        self.missing = [name for name, code in zip(self.actions, self.codes) if code is None]
        keys = {str(i): i for i in range(min(10, len(self.actions)))}
        if self.ours:
            keys |= {key: k for k, key in enumerate((" ", "ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight"))}
        self.keys = {key: k for key, k in keys.items() if self.codes[k] is not None}
        self.title = f"{settings['dataset']}, {reader.source} actions"
        self.how = dict(steps=settings["decode_steps"], temperature=settings["temperature"])
        self.began, self.generator = 0, torch.Generator().manual_seed(settings["seed"])

    @torch.no_grad()
    def reset(self, prompt=None):
        """A new world, or one that begins with the frame that a sentence describes ("write": a sentence of the text
        model). ValueError: no sentence of this model's."""
        began = time.perf_counter()
        if prompt is not None:
            prompt, tokens = self.first_frame(prompt)
            frame = self.draw(tokens)
            try:                                              # the true world begins as it was drawn, if that is one
                self.world = World.from_cells(self.reader.cells(frame)[None].numpy(),
                                              np.random.default_rng(self.settings["seed"]), self.settings["push"])
            except ValueError:
                self.world = None
            return self.begin(tokens, torch.full_like(tokens[:, :, 0], self.model.n_actions), frame, began, prompt)
        reader, T = self.reader, self.settings["context"] - 1
        index = torch.tensor([self.began * 7919 % reader.clips.count(T)])
        self.began, self.world = self.began + 1, None
        if self.ours:
            rng = np.random.default_rng(self.settings["seed"] + self.began)
            self.world = World(1, rng, *(self.settings[name] for name in ("side", "walls", "ball", "facing",
                                                                           "push")))
            reader, index = opening(reader, self.world, T)
        tokens, actions = reader.tokens_and_actions(index, T)
        self.draw(tokens)
        return self.begin(tokens, actions, reader.frames(index, T)[0, -1], began)

    def begin(self, tokens, actions, frame, began, note=""):
        """The model reads the world's first frames, tokens (1, T, N), and the actions (1, T) that led to them."""
        self.cache = self.model.new_cache(1, max(1024, tokens.size(1)), self.settings["window"] or 64)
        self.model(tokens, actions, self.cache)
        self.referee, self.right, self.presses = self.world and Referee(self.world), 0, 0
        return self.view(frame, began, note)

    def first_frame(self, prompt):
        """(sentence, tokens (1, 1, N) of the frame drawn from it); how its ball flies only the next frames show."""
        written = prompt == "write"
        if written:
            if "text" not in self.models:
                raise ValueError("write needs the stage text: --resume --stage text trains it")
            prompt = self.models["text"].write(1, generator=self.generator)[0]
            if not prompt:
                raise ValueError("the text model wrote an empty sentence: ask again, or with another seed")
        elif not prompt.strip(" ,.;:"):
            raise ValueError("a sentence of at least one word is needed")
        text = as_characters([prompt], caption_length(self.reader.side)).to(self.reader.device)
        if not written and (strange := unknown_words(prompt, self.reader.side, self.reader.clips.facing)):
            raise ValueError(f"no caption has the word {strange[0]!r}, so no stage has seen it; captions are such as "
                             "'agent at c4, ball at f2, walls a1 b3 c7.'")
        return prompt, self.models["frame"].draw(text[:, :len(prompt)], generator=self.generator, **self.how)[:, None]

    @torch.no_grad()
    def step(self, action):
        """The frame after `action`. ValueError: no code means it."""
        began, code, note = time.perf_counter(), self.codes[action], self.actions[action]
        if code is None:
            raise ValueError(f"no code means {note}: train the actions longer")
        tokens = self.model.next_frame(torch.tensor([code], device=self.reader.device), self.cache,
                                       generator=self.generator, **self.how)
        frame, lost = self.draw(tokens[:, None], first=False), ""
        if self.world is not None:
            cells = self.reader.cells(frame)[None].numpy()
            self.right += int(self.referee.judge(np.array([action]), cells)["effect"][0])
            self.presses += 1
            if (agents := int((plain(cells) == AGENT).sum())) != 1:
                lost = f"the world is lost: {agents or 'no'} agent{'s' * (agents > 1)} left"
            happened = int(self.world.step([action])[0])
            note += f" (code {code})" * (self.reader.source == "latent")
            note += f"; in the true world: {ACTIONS[happened]}" + " (blocked)" * (happened != action)
        return self.view(frame, began, note, lost)

    def draw(self, tokens, first=True):
        """Tokens (1, T, N) -> the last frame's pixels (H, W, 3). first: of a new world, else after those drawn."""
        if first:
            self.drawn = self.reader.canvas(1, 1024)
        return self.reader.paint(tokens, self.drawn)[0, -1]

    def view(self, frame, began, note="", lost=""):
        """What the page shows."""
        truth = None if self.world is None else paint(self.world.cells(), self.video.cell_px)[0]
        size = f"{self.cache.length} frames seen, {self.cache.bytes / 1e6:.2f} MB"
        score = f"right so far: {self.right} of {self.presses} presses" if self.presses else ""
        return View(as_bytes(frame).numpy(), truth, size, time.perf_counter() - began, note, score, lost)


def write_rollout(played, plan, prompt, folder):
    """One world after the actions `plan` as samples/rollout.png in `folder`, a row of generated and a row of true
    frames, and rollout.gif. Returns their paths. UserError: no sentence of this model's, or no model of sentences."""
    if prompt is not None and not played.prompts:
        raise UserError("--prompt needs a run with the stage frame: --resume --stage frame trains it")
    with as_user_error("--prompt: "):
        views = [played.reset(prompt)]
    if prompt is not None:
        print(views[0].note)
    with as_user_error():                                    # no code means it
        views += [played.step(action) for action in plan]
    rows, titles = [[view.frame for view in views]], ["generated after " + ", ".join(played.actions[a] for a in plan)]
    if views[0].truth is not None:
        rows, titles = [*rows, [view.truth for view in views]], [*titles, "the true world"]
    (folder / "samples").mkdir(exist_ok=True)
    paths = folder / "samples" / "rollout.png", folder / "samples" / "rollout.gif"
    save_strip(paths[0], rows, titles)
    save_gif(paths[1], rows[0])
    return paths


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
        if prompt and not self.session.prompts:
            raise Refused(400, "this world takes no prompt")
        try:
            view = self.session.reset(prompt)
        except ValueError as error:                          # the old world, if any, stays on the page
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
        except ValueError as error:
            raise Refused(400, one_line(error)) from error
        self.steps += 1
        self.seconds.append(view.seconds)
        return self.answer(view)

    def answer(self, view):
        total = sum(self.seconds)
        return {"frame": base64.b64encode(png(view.frame)).decode(),
                "truth": None if view.truth is None else base64.b64encode(png(view.truth)).decode(),
                "cache": view.cache, "fps": len(self.seconds) / total if total > 0 else None,
                "note": view.note, "score": view.score, "lost": view.lost, "step": self.steps}


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
    """Threads read requests; the session runs in the one thread that calls `run`, the caller's: autograd mode, the
    current device and captured CUDA graphs belong to a thread, and so does Ctrl-C, which thus also stops a frame that
    takes long."""
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
        except UserError as error:
            future.set_exception(Refused(400, one_line(error)))
        except KeyboardInterrupt:                            # in the middle of a frame
            future.set_exception(Refused(503, ENDED))
            raise
        except Exception as error:                           # a bug: all of it in the terminal, a line on the page
            traceback.print_exc()
            future.set_exception(Refused(500, one_line(error)))

    def handle_error(self, request, address):
        if not isinstance(sys.exc_info()[1], OSError):       # a browser that hung up is no news
            super().handle_error(request, address)


def serve(session, port=0, ready=None):
    """Play `session` on http://127.0.0.1:port/ (0: a free port) until Ctrl-C. `ready(address)` once it listens.

    session, as `Session` is one: title and measured (str), actions (their names), missing (those without a button),
    keys {KeyboardEvent.key: action}, prompts and fair (bool), reset(prompt=None) and step(action) -> View. ValueError
    of reset says in one line what is wrong with the sentence.
    """
    try:
        server = Server(session, port)
    except OSError as error:
        why = "is taken: stop what uses it, or choose another" if error.errno == errno.EADDRINUSE else error.strerror
        raise UserError(f"port {port} {why}") from None
    with server, contextlib.suppress(KeyboardInterrupt):
        address = f"http://127.0.0.1:{server.server_port}/"
        print(f"play at {address}  (Ctrl-C ends it)", flush=True)
        if ready:
            ready(address)
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
    return Image.fromarray(np.ascontiguousarray(frame.repeat(scale, 0).repeat(scale, 1)))


def png(frame):
    """`frame` as the bytes of a PNG."""
    file = io.BytesIO()
    image(frame).save(file, "PNG", compress_level=1)         # small enough for one machine, and soon done
    return file.getvalue()


def save_strip(path, rows, titles, scale=3):
    """One PNG of `rows`, lists of frames of one size, each row under its title."""
    from PIL import Image, ImageDraw
    rows = [[image(frame, scale) for frame in row] for row in rows]
    # Pillow's own font knows Latin letters only, and without FreeType refuses others
    titles = [" ".join(title.split()).encode("latin-1", "replace").decode("latin-1") for title in titles]
    ink = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    width = max([GAP + sum(part.width + GAP for part in row) for row in rows] +
                [2 * GAP + int(ink.textlength(title)) for title in titles])
    height = GAP + sum(TITLE_HEIGHT + row[0].height + GAP for row in rows)
    strip = Image.new("RGB", (width, height), "white")
    ink, y = ImageDraw.Draw(strip), GAP
    for title, row in zip(titles, rows):
        ink.text((GAP, y), title, fill="black")
        x, y = GAP, y + TITLE_HEIGHT
        for part in row:
            strip.paste(part, (x, y))
            x += part.width + GAP
        y += row[0].height + GAP
    with replacing(Path(path)) as file:
        strip.save(file, "PNG")


def save_samples(path, made):
    """What a model made of held-out clips: {title: frames in 0..1} as `path`.png, a list of texts as `path`.txt."""
    path.parent.mkdir(exist_ok=True)
    if isinstance(made, dict):
        save_strip(path.with_suffix(".png"), [as_bytes(frames).numpy() for frames in made.values()], list(made))
    else:
        with replacing(path.with_suffix(".txt")) as file:
            file.write("".join(text + "\n" for text in made).encode())


def save_gif(path, frames, fps=4, scale=4):
    """An endless GIF of `frames`. Colours are exact up to 256 a frame."""
    first, *others = [image(frame, scale) for frame in frames]
    with replacing(Path(path)) as file:
        first.save(file, "GIF", save_all=True, append_images=others, duration=round(1000 / fps), loop=0)


# ---- the page

def page(session, nonce):
    """The whole page; only text and JSON of the session go in, escaped. Only what bears `nonce` runs in it."""
    game = {"actions": session.actions, "keys": session.keys, "missing": session.missing}
    field = ('<input id="prompt" maxlength="1000" autocomplete="off" spellcheck="false" '
             'aria-label="prompt" placeholder="a sentence, or nothing for any world">') if session.prompts else ""
    parts = {"@TITLE@": html.escape(session.title), "@MEASURED@": html.escape(session.measured),
             "@CLASS@": "" if session.fair else "bad",
             "@FIELD@": field, "@START@": "start" if session.prompts else "new world",
             "@GAME@": json.dumps(game).replace("<", "\\u003c"),       # no </script> from a name
             "@NONCE@": nonce}
    return re.sub("@[A-Z]+@", lambda place: parts[place[0]], PAGE.read_text(encoding="utf-8"))
