"""Scripts as they are typed, started as forks of one warm process; what they leave, and what they say, compared."""
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
from nanolab.run import load_checkpoint

# Takes requests on a socket ({"argv", "folder", "limit", "die_at", ...}), forks a script for each, and answers with its
# pid, then its status.
SERVER = """
import atexit, functools, gc, io, itertools, json, os, resource, signal, socket, sys, types
from unittest import mock
sys.path.insert(0, sys.argv[1])
import bench, evaluate, grid, plot, sample, train_dvae, train_enwik8, train_facts, train_mult, train_worldmodel
from data import arc, text
from nanolab import probe
print("imported", {"matplotlib", "tensorboard", "wandb"} & sys.modules.keys(), flush=True)        # see test_scripts.py
import torch._inductor, torch.utils.tensorboard, matplotlib.figure                                # what takes time
from nanolab import curves, optim, settings, run as experiment
matplotlib.figure.Figure(layout="constrained").savefig(picture := io.BytesIO(), format="png")     # reads the fonts
for place, name in (experiment, "_version"), (arc, "synthetic"):                                  # pure functions
    setattr(place, name, functools.cache(getattr(place, name)))
read = functools.cache(settings._read_settings)
settings._read_settings = lambda path: dict(read(str(path)))
compiled = functools.cache(lambda path: compile(open(path).read(), path, "exec"))
for script in "enwik8 dvae mult facts worldmodel".split():
    compiled(path := f"{sys.argv[1]}/train_{script}.py")
    settings._read_settings(path)
settings._fields_of(train_enwik8.TransformerConfig)
experiment.measure_peak_flops = lambda *_: 1e9                           # a tenth of a second of every start
os.fsync = lambda descriptor: None                                       # a kill is not the end of the machine
list(map(experiment._version, experiment.PACKAGES))
for side in 3, 5:
    arc.load(max_side=side, n_train=60, n_val=5)                         # the grids of all tiny runs
gc.freeze()                                                              # forks share the memory of all that
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[2] + ".new")
listener.listen()
os.rename(sys.argv[2] + ".new", sys.argv[2])                             # who finds it can connect
listener.settimeout(5)
parent, request = os.getppid(), None
while request is None:
    try:
        connection = listener.accept()[0]
    except TimeoutError:
        if os.getppid() != parent:
            sys.exit()                                                   # the tests are gone
        continue
    if os.fork():
        connection.close()
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        continue
    connection.settimeout(None)
    words = json.loads(connection.makefile().readline())
    pid = os.fork()
    if pid:
        connection.sendall(f"{pid}\\n".encode())
        connection.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\\n".encode())
        os._exit(0)
    connection.close()
    listener.close()
    request = words
os.chdir(request["folder"])
if os.path.basename(request["argv"][0]).startswith("train_"):            # these take most of a small run:
    def savefig(figure, place, **more):                                  # test_experiment.py and test_scripts.py
        file = place if hasattr(place, "write") else open(place, "wb")   # really draw, copy the code and ask git
        file.write(picture.getvalue())
        file.flush()
    matplotlib.figure.Figure.savefig = savefig
    matplotlib.figure.Figure.subplots = matplotlib.figure.Figure.add_axes = lambda *_, **more: mock.MagicMock()
    curves.draw = lambda lines, file: file.write(picture.getvalue())
    experiment.Run._copy_code = experiment._output = lambda *_: None
for number, name in enumerate(("/dev/null", request["stdout"], request["stderr"])):
    os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
resource.setrlimit(resource.RLIMIT_CPU, (120, 120))                      # nothing runs on without us
if request["limit"]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
calls = itertools.count(1)
def dying(call):
    def wrapper(*words, **more):
        if next(calls) == request["die_at"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*words, **more)
    return wrapper
for name in ("replace", "fsync", "unlink") if request["die_at"] else ():
    setattr(os, name, dying(getattr(os, name)))
if request["stop_at"]:
    (number, at), optimise = request["stop_at"], optim._Optimizer.step
    def stopping(*words, **more):
        if next(calls) == at:
            os.kill(os.getpid(), number)
        return optimise(*words, **more)
    optim._Optimizer.step = stopping
sys.argv, code = request["argv"], 0
try:
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    main.__file__ = sys.argv[0]
    exec(compiled(sys.argv[0]), vars(main))
except SystemExit as end:
    code = end.code or 0
except BaseException:
    sys.excepthook(*sys.exc_info())
    code = 1
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)                                                           # taking all modules down would take a second
"""


def wait_for(condition, timeout=60, every=0.002):
    """Polls until condition() is true; fails after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(every)


class Forks:
    """Starts scripts as forks of one warm process; at most two should live at once."""

    def __init__(self, folder):
        self.address, self.folder, self.count = str(folder / "socket"), folder, 0
        environment = {name: value for name, value in os.environ.items() if name != "NANOLAB_DATA"}
        with open(folder / "server", "w") as said:
            self.server = subprocess.Popen([sys.executable, "-c", SERVER, str(ROOT), self.address], stdout=said,
                                           stderr=said, stdin=subprocess.DEVNULL, cwd=folder,
                                           env=environment | {"OMP_NUM_THREADS": "1"})
        wait_for(lambda: os.path.exists(self.address) or self.server.poll() is not None, timeout=600)
        assert self.server.poll() is None

    def start(self, argv, folder, limit=None, die_at=None, stop_at=None):
        """A Child that runs `python argv...` in `folder`. limit: largest file in bytes. die_at: dies by SIGKILL just
        before that call of os.replace, os.fsync or os.unlink. stop_at: (a signal that it gets, in which of its own
        optimiser steps)."""
        self.count += 1
        out, err = (self.folder / f"{self.count}.{end}" for end in ("out", "err"))
        for path in (out, err):
            path.touch()                                     # a child that is killed at once has not opened them
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(60)
        connection.connect(self.address)
        request = dict(argv=[str(ROOT / argv[0]), *map(str, argv[1:])], folder=str(folder), limit=limit, die_at=die_at,
                       stop_at=stop_at, stdout=str(out), stderr=str(err))
        connection.sendall((json.dumps(request) + "\n").encode())
        return Child(connection, out, err)

    def run(self, *args, **kwargs):
        """start() and wait()."""
        return self.start(*args, **kwargs).wait()

    def close(self):
        self.server.terminate()
        self.server.wait()


class Child:
    """A running script. After wait(): .code (negative: the signal that ended it), .out, .err."""

    def __init__(self, connection, out, err):
        self.connection, self.files = connection, (out, err)
        self.reader = connection.makefile()
        self.pid = int(self.reader.readline())

    def kill(self, number=signal.SIGKILL):
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            pass                                     # it was faster

    def over(self):
        """Whether it has ended."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def wait(self):
        self.code = int(self.reader.readline())
        self.connection.close()
        self.out, self.err = (path.read_text(errors="replace") for path in self.files)
        return self


def records(run):
    """All lines of metrics.jsonl, whole, without what the clock says."""
    content = (run / "metrics.jsonl").read_text()
    assert content.endswith("\n") or not content
    entries = [json.loads(line) for line in content.splitlines()]
    return [{key: value for key, value in entry.items() if key != "mfu" and not key.endswith(("_per_s", "seconds"))}
            for entry in entries]


def assert_equal(one, two, where=""):
    """Nested dicts, lists, tensors and numbers, bit for bit; but for clocks and settings."""
    assert type(one) is type(two), where
    if isinstance(one, dict):
        assert list(one) == list(two), where
        for key in one:
            if key not in ("seconds", "logged_seconds", "settings"):
                assert_equal(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for i, pair in enumerate(zip(one, two)):
            assert_equal(*pair, f"{where}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two), where
    else:
        assert one == two, where


def assert_done(child):
    assert (child.code, child.err) == (0, ""), child.err


def assert_error(child, *said, code=2):
    """One line `error: ...` on stderr that says all of `said`, and the exit status."""
    assert child.err.startswith("error: ") and child.err.count("\n") == 1 and child.err.endswith("\n"), child.err
    for phrase in said:
        assert str(phrase) in child.err, child.err
    assert child.code == code


def snapshot(folder):
    """Content of every file under folder."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def summary(run):
    return json.loads((run / "summary.json").read_text())


def kill_again_and_again(forks, command, folder, run, seed):
    """Runs a command to its end, killing it at four random moments: soon after its start, some steps later, and at
    calls to the file system. Returns how many kills it took."""
    rng, kills = random.Random(seed), 0
    plan = ["steps", "call", "start", "call"]
    rng.shuffle(plan)
    for moment in plan:
        metrics = run / "metrics.jsonl"
        old = metrics.stat().st_ino if metrics.exists() else None
        known = load_checkpoint(run / "last.pt")["metrics_lines"] if (run / "last.pt").exists() else 0
        child = forks.start(command, folder, die_at=rng.randint(2, 40) if moment == "call" else None)
        if moment == "start":
            time.sleep(rng.uniform(0, 0.1))                  # a whole run may take but 0.3 seconds
        elif moment == "steps":
            goal = known + rng.randint(1, 4)                 # lines of this life, in the file that it has put in place
            wait_for(lambda: child.over() or metrics.exists() and metrics.stat().st_ino != old
                     and metrics.read_bytes().count(b"\n") >= goal)
            time.sleep(rng.uniform(0, 0.02))
        if moment != "call":
            child.kill()
        if child.wait().code == 0:
            break
        assert (child.code, child.err) == (-signal.SIGKILL, "")
        kills += 1
        if (run / "last.pt").exists():
            load_checkpoint(run / "last.pt")                 # whole, whenever the kill came
        command = [word for word in command if word != "--resume"] + ["--resume"]
    else:
        assert_done(forks.run(command, folder))
    return kills
