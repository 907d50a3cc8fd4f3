"""What a run is: a directory with metrics and checkpoints, exact resume, one-line errors.

    @command
    def main():
        settings = begin(globals())                          # settings.py: --name value, --preset NAME, --debug, -h
        checkpoint = resumed(settings, architecture)         # None: from the start; else its settings hold
        ...
        loop = Loop(dict(step=0, best=math.inf, pending=[]), scaler)
        with Run(settings, checkpoint, model=model, optimizer=opt, scaler=scaler, loop=loop) as run:
            while not run.stop and loop["step"] != max_steps:    # run.stop: SIGINT or SIGTERM came
                ...
                run.log(step=step, loss=loss)
                run.save("last.pt", step)
"""
from nanolab.settings import interrupted, surroundings  # it minds Ctrl-C while the next lines take their seconds

import contextlib
import ctypes
import errno
import functools
import importlib.metadata
import itertools
import json
import math
import os
import pickle
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt
    fcntl = None

import kernels
from nanolab import curves, optim
from nanolab.curves import is_name
from nanolab.device import (Generators, Stopwatch, as_size, fits, measure_peak_flops, mixed_precision,  # noqa: F401
                            onto, peak_memory, resolve_device, seed_everything)
from nanolab.settings import (Settings, UserError, adopt, as_typed, as_user_error, begin, check_settings,  # noqa: F401
                              columns, override)

FORMAT = "nanolab-1"
ROOMS = ("nanolab", "models", "fused", "data")  # folders of modules beside the scripts
PACKAGES = "torch numpy triton wandb tensorboard tiktoken sentencepiece matplotlib tqdm pyyaml".split()
CLOCK = "%Y-%m-%dT%H:%M:%S%z"
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of mallopt (malloc.h)
NO_SPACE = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)
BUSY = (BlockingIOError, PermissionError)  # of lock_file
NO_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EROFS)
OPTIONAL = dict(matplotlib="matplotlib", wandb="wandb", tensorboard="tensorboard", yaml="pyyaml", PIL="pillow")
HELD = dict(step=int, steps=dict, settings=dict, model=dict, models=dict, done=dict, optimizer=dict, scaler=dict,
            generators=dict, data=dict, loop=dict, metrics_lines=int, script=str, ended=dict, figures=dict,
            ema=(dict, type(None)))  # by a checkpoint, where it has them


class NonFinite(Exception):
    """The loss, or `what`, was not finite at `step`; `command` prints it with the last checkpoint, exits with status 3.
    """

    def __init__(self, step, what="loss"):
        super().__init__(f"{what} is not finite at step {step}")
        self.checkpoint, self.good = None, "good " if what == "loss" else ""     # the last one may be of this step


def check_weights(step, model):
    """NonFinite where a weight of `model` is no finite number; for a validation that asks for words and has no loss."""
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise NonFinite(step, "a weight")


def command(main):
    """Decorator for a script's main(): what went wrong becomes one line `error: ...` on stderr and an exit status.

    2: UserError, no space left, out of memory, a checkpoint that does not fit. 3: NonFinite. 130: Ctrl-C outside the
    loop. Everything else is a bug and keeps its traceback. Of several processes under torchrun, which meet most errors
    together, the first speaks; out of memory is said by each.
    """
    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        if signal.getsignal(signal.SIGINT) is interrupted:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        surroundings()
        keep_freed_memory()
        speaks = os.environ.get("RANK", "0") == "0"
        try:
            result = main(*args, **kwargs)
            sys.stdout.flush()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                end_process()
            return result
        except UserError as error:
            status, text = 2, str(error)
        except NonFinite as error:
            status = 3
            text = f"{error}; the last {error.good}checkpoint is {error.checkpoint or 'not written yet'}"
        except KeyboardInterrupt:
            status, text = 130, "interrupted"
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)     # nobody reads on: let the flush at exit go nowhere
            sys.exit(141)                                    # 128 + SIGPIPE
        except Exception as error:
            status, speaks, text = 2, True, _explained(error)
            if text is None:
                raise
        if speaks:
            print("error:", " ".join(text.split("\n")), file=sys.stderr, flush=True)
        sys.exit(status)
    return wrapper


def _explained(error):
    """What an error says of the machine or of a path rather than of a bug; None: it is a bug."""
    number, text = getattr(error, "errno", None), str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or isinstance(error, (OSError, RuntimeError)) and (
            re.search("can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED", text)):
        return "out of memory: try a smaller batch_size (and more grad_accum), block_size or model"
    if number in NO_SPACE:
        return f"cannot write {error.filename or 'a file'}: {error.strerror}"
    if number in NO_PATH and error.filename:
        return f"{str(error.filename)[:100]}: {error.strerror}"
    if isinstance(error, RuntimeError) and "home directory" in text:     # of pathlib, for ~nobody
        return f"a path begins with ~ and a name that this machine does not know: {text}"
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in OPTIONAL:
        package = OPTIONAL[error.name.partition(".")[0]]
        return f"this needs {package}: pip install {package}"
    return None


def _in_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextlib.contextmanager
def optional(what):
    """What a run can do without, a picture or a sample: where the block fails, one line says so."""
    try:
        yield
    except Exception as error:
        print(f"{what} left out: {_in_line(error)}", flush=True)


class Output:
    """A run's standard output: what cannot be printed any more is lost, and standard error says so, once."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        return self._try(self.stream.write, text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, do, *words):
        try:
            return do(*words)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())      # what follows goes nowhere
                print(f"cannot print ({error.strerror}): the run goes on in silence", file=sys.stderr, flush=True)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def keep_freed_memory():
    """Where the C library is glibc: what a tensor frees stays with the process for the next one. By itself glibc gives
    it back to the system, which hands every page out anew, zeroed, by a fault (what that costs: docs/speed.md)."""
    allocator = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if allocator is not None:
        for option, n_bytes in ((M_MMAP_THRESHOLD, 2 ** 30), (M_TRIM_THRESHOLD, 2 ** 31 - 1), (M_TOP_PAD, 2 ** 26)):
            allocator(option, n_bytes)


def end_process():
    """Ends one of several processes that did its work, with status 0, without the interpreter's own end: gloo's threads
    may still hold a tensor then, and who lets go of it at that time aborts the process (pytorch/pytorch#179291)."""
    torch.distributed.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)


# --- Files ---

def lock_file(file, shared=False, wait=False):
    """Locks an open file, or descriptor, until it is closed. BUSY: another process has it.

    shared: beside others who share it. wait: until it is free. On Windows (msvcrt) no lock is shared.
    """
    if fcntl is None:
        return _lock_on_windows(file, wait)
    fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))


def _lock_on_windows(file, wait):
    descriptor = file if isinstance(file, int) else file.fileno()
    while True:
        os.lseek(descriptor, 2 ** 30, os.SEEK_SET)           # a byte that is not there: a locked one cannot be read
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            break
        except OSError:
            if not wait:
                raise
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
        time.sleep(0.2)


def _newest(settings):
    """The directory that a bare --resume means: that of run_name, or the run that started last; None: no run yet."""
    parent, name = Path(settings["out_dir"]) / Path(settings.script).stem, settings["run_name"]
    if name is not None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,99}", name):
            raise UserError(f"--run_name {name}: only letters a-z, digits and . _ = + - may be in it, no sign first")
        return parent / name
    runs = [path for path in parent.glob("*") if is_run(path)]
    return max(runs, key=lambda path: ((path / "lock").stat().st_mtime_ns, path.name), default=None)


def is_run(directory):
    """Whether `directory` is one of ours: its file `lock` says so (empty: killed while starting)."""
    with contextlib.suppress(OSError, ValueError):
        return (directory / "lock").read_text() in ("", FORMAT)
    return False


def is_running(directory):
    """Whether a process is writing to the run in this directory."""
    try:
        with open(directory / "lock") as file:
            lock_file(file, shared=True)
    except OSError as error:
        return isinstance(error, BUSY)
    return False


def _others(path):
    return sorted(other for other in path.parent.glob("[!.]*.pt") if other.name != path.name)


def find_resume(settings, needed=False):
    """Path of the checkpoint that the setting `resume` means, or None: start at step 0. Only reads; says which.

    A run that was killed before its first save starts anew. UserError: a path that is not there, a run that has lost
    the last.pt it once had, or no checkpoint where one is `needed`.
    """
    wanted = settings["resume"]
    if wanted is False:
        return None
    directory = _newest(settings) if wanted is True else Path(wanted)
    if wanted is True and (directory is None or not any(directory.glob("*.pt"))):
        place = directory or Path(settings["out_dir"], Path(settings.script).stem)
        if reached := read_json(place / "summary.json").get("step"):
            raise UserError(f"{place} has no checkpoint, although its summary.json says step {reached}: "
                            "start again under another --run_name")
        if needed:
            raise UserError(f"no checkpoint yet in {place}: train first")
        print(f"no checkpoint yet in {place}: starting at step 0")
        return None
    path = find_checkpoint(directory)
    print(f"resuming from {path}")
    return path


def _is_alive(process):
    """Whether the process of this number, a text, runs on this machine and is another than this one."""
    if os.name == "nt":                                          # there os.kill would end it; an open file stays anyway
        return False
    with contextlib.suppress(ValueError, OSError):
        if int(process) != os.getpid():
            os.kill(int(process), 0)
            return True
    return False


def find_checkpoint(path):
    """Path of the checkpoint that a person means: a file, the last.pt of a run's directory, or a folder of weights (see
    nanolab/hf.py) itself. UserError: not there."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    if path.is_dir() and not (path / "last.pt").exists():
        if (path / "config.json").is_file():
            return path
        others = ", ".join(map(str, _others(path / "last.pt"))) or "no other checkpoint either"
        raise UserError(f"{path} has no last.pt; there is {others}")
    return path / "last.pt" if path.is_dir() else path


class Checkpoint(dict):
    """What a checkpoint's file holds, or its settings; `.path`: which file. UserError for a key that it lacks."""

    def __init__(self, values, path):
        super().__init__(values)
        self.path = path

    def __missing__(self, key):
        raise UserError(f"{self.path} lacks {key!r}: it is not whole, or of another version")

    def __reduce_ex__(self, protocol):
        return OrderedDict, (), None, None, iter(self.items())   # saved again, it may be loaded with weights_only


def load_checkpoint(path, script=None):
    """The dict that `Run.save` wrote to `path`, tensors on the CPU. Runs no code from the file (weights_only=True).

    script: the script (a file's path, or its name without .py) that must have written it. The dict's `.path` is the
    file's. The file's check sums are compared first, which torch.load does not do: about 0.2 s for 100 MB.
    UserError, naming the file: missing, truncated, damaged, foreign, another script's, or able to run code.
    """
    path = Path(path)
    hint = "".join(f"; there is also {other}" for other in _others(path)[-1:])
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":
                raise UserError(f"{path} is truncated or not a nanolab checkpoint{hint}")
            with zipfile.ZipFile(file) as archive:
                if member := archive.testzip():
                    raise zipfile.BadZipFile(f"the check sum of {member} is another")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} is refused: it holds more than plain data, which could run code{hint}") from None
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
            zipfile.BadZipFile, zlib.error, struct.error) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        raise UserError(f"{path} is truncated or damaged ({what}){hint}") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path} is not a nanolab checkpoint{hint}")
    if script is not None and checkpoint.get("script") != Path(script).stem:
        raise UserError(f"{path} is a checkpoint of {checkpoint.get('script')}, not of {Path(script).stem}")
    wrong = [name for name, kind in HELD.items() if name in checkpoint and not isinstance(checkpoint[name], kind)]
    steps = checkpoint.get("steps", {}) if not wrong else {}
    if wrong or not all(is_name(name) and isinstance(step, int) for name, step in steps.items()):
        raise UserError(f"{path} is damaged: {wrong[0] if wrong else 'steps'} is not what a run saves there{hint}")
    if "settings" in checkpoint:
        checkpoint["settings"] = Checkpoint(checkpoint["settings"], path)
    return Checkpoint(checkpoint, path)


@contextlib.contextmanager
def restoring(path):
    """Where the block puts back what the checkpoint `path` holds: what does not fit is a UserError that names it."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{path} lacks {error}: it is not whole, or of another version") from error
    except Exception as error:
        if isinstance(error, UserError) or _explained(error):
            raise
        lines = [line.strip() for line in str(error).splitlines()]
        said = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])     # the first of what differs
        raise UserError(f"{path} does not fit or is damaged: {type(error).__name__}: {said[:300]}") from error


def resumed(settings, architecture=(), readers=(), of_this_command=()):
    """The checkpoint that the setting `resume` means, whose settings then hold (see adopt); None: a new run. Operations
    go by the setting `kernels` from here on.

    architecture: names, or {part: names}: of "all" and of the stages that the checkpoint has begun. readers: settings
    with which a command only reads a checkpoint, one of them at a time. of_this_command: as for `adopt`.
    """
    asked = [f"--{name}" for name in readers if settings[name] not in (None, False)]
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)}: one of them")
    if asked and settings["resume"] is False:
        raise UserError(f"{asked[0]} goes with --resume, or --resume PATH: which model?")
    checkpoint = None
    if settings["resume"] is not False and (path := find_resume(settings, bool(asked))) is not None:
        checkpoint = load_checkpoint(path, settings.script)
        with restoring(path):
            if isinstance(architecture, dict):
                begun = {"all", checkpoint["stage"], *checkpoint["done"]}
                architecture = [name for part in begun for name in architecture[part]]
            saved = {"decay_params": "matrices"} | checkpoint["settings"]    # of a time when there was no choice
            adopt(settings, saved, architecture, (*readers, *of_this_command))
    kernels.use(settings["kernels"])
    return checkpoint


def put_back(saved, things, mesh=None):
    """What `saved`, a checkpoint or a part of one, holds goes into those of the `things` that have a load_state_dict.

    An optimiser keeps the hyperparameters that it was built with. Where None or nothing was saved of a thing, it stays
    as it is; a moving average then begins with the weights that there are. What does not fit raises whatever it raises.
    """
    things = {name: thing for name, thing in things.items() if hasattr(thing, "load_state_dict")}
    for name, thing in things.items():
        if not saved[name]:
            continue
        if mesh:
            mesh.load_into(thing, saved[name])
        elif isinstance(thing, torch.optim.Optimizer):
            optim.load_state(thing, saved[name])
        else:
            thing.load_state_dict(saved[name])
    for name, thing in things.items():
        if isinstance(thing, optim.EMA) and not saved[name]:
            thing.reset()


class Loop(dict):
    """What a training loop counts, for its checkpoints, and the losses of the last steps, which wait on the device.

        loop = Loop(dict(step=0, best=math.inf, pending=[]), scaler)
        loop.add(torch.stack([loss, grad_norm]))             # or a dict with loss and grad_norm; waits for nothing
        loop["step"] += 1
        loop.flush()                                         # to loop["pending"], as numbers

    scaler: its GradScaler, which skips a step whose gradients are not finite. whose: of which of several models.
    """

    def __init__(self, values, scaler, whose=""):
        super().__init__(values)
        self.scaler, self.whose, self._waiting = scaler, whose, []

    def add(self, row):
        """The numbers of a step, `loss` first and the gradient's norm last, as a tensor or by name in a dict."""
        self._waiting.append(row)

    def flush(self):
        """Waits for the numbers of all steps so far. NonFinite: the first step that was not finite."""
        first = self.get("start", 0) + self["step"] - len(self._waiting)
        for step, row in enumerate(self._waiting, first + 1):
            row = {name: float(value) for name, value in row.items()} if isinstance(row, dict) else row.tolist()
            loss, norm = (row["loss"], row["grad_norm"]) if isinstance(row, dict) else (row[0], row[-1])
            if not (math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled())):
                raise NonFinite(f"{step} of {self.whose}" if self.whose else step)
            self["pending"].append(row)
        self._waiting.clear()

    def lap(self, began, due):
        """Counts the seconds since `began`, a step's. Where a line of metrics is `due`, waits for the device, which is
        part of them. Returns (the numbers of every step since the line before, their seconds); else ([], 0.0)."""
        if due:
            self.flush()
        self["seconds"] += time.perf_counter() - began
        if not due:
            return [], 0.0
        rows, elapsed = self["pending"], self["seconds"] - self["logged_seconds"]
        self.update(pending=[], logged_seconds=self["seconds"])
        return rows, elapsed

    def state_dict(self):
        """A plain dict, tensors on the CPU."""
        self.flush()
        return {name: value.cpu() if torch.is_tensor(value) else list(value) if isinstance(value, list) else value
                for name, value in self.items()}

    def load_state_dict(self, saved):
        """Goes on from what `state_dict` gave. ValueError where a value is of another kind than the loop's own."""
        def alike(value, other):
            if isinstance(value, list) and value and isinstance(other, list):    # what is gathered begins empty
                return len(value) == len(other) and all(map(alike, value, other))
            return value is None or isinstance(other, (int, float) if isinstance(value, (int, float)) else type(value))
        for name, value in self.items():
            if name in saved and not alike(value, saved[name]):
                raise ValueError(f"{name} of its loop is {str(saved[name])[:50]!r}")
        self.update({name: value.to(self[name].device) if torch.is_tensor(self.get(name)) else value
                     for name, value in saved.items()})


def means(rows):
    """{name: its mean} over the dicts of a list that have it, in the order of the last one's names."""
    names = dict.fromkeys(name for row in rows[::-1] for name in row)
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(some) / len(some) for name, some in values.items()}


@contextlib.contextmanager
def replacing(path):
    """A binary file that becomes `path`, on the disk, when the block ends; after any failure `path` is what it was."""
    if not path.name:                                        # / and .
        raise UserError(f"cannot write {path}: it is a folder")
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):                   # some network folders cannot sync a directory
            directory = os.open(path.parent, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)
    except (OSError, RuntimeError) as error:                 # torch's writer hides the one behind the other
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"cannot write {path}: {cause.strerror}; what was there before is untouched") from error
    finally:
        temporary.unlink(missing_ok=True)


def _plain(value):
    """`value` as JSON can hold it: non-finite numbers become None, tuples lists, scalar tensors numbers, others str."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return _plain(value.item()) if hasattr(value, "item") else str(value)


def write_json(path, value):
    """`value` into a JSON file, at once or not at all; what JSON cannot hold becomes what it can."""
    with replacing(path) as file:
        file.write((json.dumps(_plain(value), indent=2, allow_nan=False) + "\n").encode())


def read_json(path):
    """The object in a JSON file; {} where there is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if isinstance(value := json.loads(path.read_text()), dict):
            return value
    return {}


def read_metrics(path, limit=None):
    """The first `limit` lines of a metrics.jsonl; one that a kill or a full disk has cut off is left out."""
    entries = []
    for line in path.read_bytes().splitlines()[:limit]:
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                entries.append(entry)
    return entries


def run_metrics(directory):
    """All lines of a run, in the order of their steps: the trainer's, and those of an evaluation beside it."""
    lines = []
    for name in ("metrics.jsonl", "evaluation.jsonl"):
        with contextlib.suppress(FileNotFoundError):
            lines += read_metrics(directory / name)
    return sorted(lines, key=lambda line: line["step"])


def draw_curves(directory):
    """Draws a run's curves.png: see curves.draw."""
    with replacing(directory / "curves.png") as file:
        curves.draw(run_metrics(directory), file)


def _output(*words):
    """What a program prints, or None where it fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return None


def _version(package):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        # torch's own says what it was built for, which some of its packages' names leave out
        return torch.__version__ if package == "torch" else importlib.metadata.version(package)
    return None


# --- The run ---

class Run:
    """A run on disk, out_dir/script/run_name/, for the time of a `with` block.

    settings: Settings of this command. checkpoint: what the run resumes from (load_checkpoint). mesh: a parallel.Mesh;
    of its processes rank 0 alone writes. things: see `track`.
    .dir: the directory (Path; None on other ranks). .stop: None, or the number of the signal that asked to stop: leave
    the loop, save, and let the block end, which then exits with 128 + signal. A second signal ends the process at once.
    UserError: the directory is there already, is not ours, cannot be written, or another process writes to it.
    """

    def __init__(self, settings, checkpoint=None, mesh=None, **things):
        self.settings, self.script = settings, Path(settings.script)
        self.checkpoint, self.source = checkpoint, checkpoint.path if checkpoint else None
        self.step, self._began = checkpoint["step"] if checkpoint else 0, time.monotonic()
        self._first, self._steps = self.step, checkpoint.get("steps", {}) if checkpoint else {}
        self.dir = self.stop = self._lock = self._metrics = self._bar = self._output = None
        self._handlers, self._summary, self._mirrors, self._draws = {}, {}, [], True
        self.mesh = mesh if mesh and mesh.size > 1 else None
        self.main, self.resumed, self._fails = self.mesh is None or mesh.main, False, True
        self._things = {}
        if (every := settings.get("keep_every")) and every % settings["save_interval"]:
            raise UserError(f"keep_every {every} is no multiple of save_interval {settings['save_interval']}: "
                            "checkpoints that are not written cannot be kept")
        self.track(checkpoint, **things)

    def track(self, saved=None, **things):
        """From now on checkpoints hold the `things` under their names: of what has a state_dict its state, also in
        dicts, and else the value itself. In place of others of these names, as when a stage of a run begins anew.

        saved: the checkpoint, or a dict like one, whose states they take up first (see `put_back`).
        """
        self._things |= things
        if saved is not None:
            with restoring(self.source):
                put_back(saved, things, self.mesh)

    def states(self, *names):
        """{name: what a checkpoint holds} of the things of these names (none: of all). Of several processes all call
        it; only rank 0 has the tensors."""
        def state_of(thing):
            if type(thing) is dict:
                return {name: state_of(value) for name, value in thing.items()}
            if not hasattr(thing, "state_dict"):
                return thing
            return self.mesh.state_of(thing) if self.mesh else thing.state_dict()
        return {name: state_of(self._things[name]) for name in names or self._things}

    def __enter__(self):
        try:
            if self.main:
                self._enter()
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGINT, signal.SIGTERM):
                    self._handlers[number] = signal.signal(number, self._on_signal)
        except BaseException as error:
            if self.mesh:
                self.mesh.most(1)
            self.__exit__(type(error), error, None)
            raise
        if self.mesh and self.mesh.most(0):                  # rank 0 could not, and says why
            sys.exit(2)
        self._fails = False
        return self

    def _enter(self):
        self._check_packages()
        home = _newest(self.settings)
        if self.source and is_run(self.source.parent) and (
                self.settings["run_name"] is None or self.source.parent.resolve() == home.resolve()):
            self.dir = self.source.parent
        elif self.settings["resume"] is True and not self.source and home and home.exists():
            self.dir = home                                  # killed before its first save
        self.resumed = self.dir is not None
        self._open()

    def _check_packages(self):
        """UserError where a package that was asked for is not installed; without matplotlib no curves are drawn."""
        asked = {"wandb": self.settings.get("wandb", "disabled") != "disabled",
                 "torch.utils.tensorboard": self.settings.get("tensorboard")}
        self._asked = [module for module, wanted in asked.items() if wanted and not self.settings.get("debug")]
        for module in self._asked:
            try:
                importlib.import_module(module)
            except ImportError:
                package = module.rpartition(".")[2]
                raise UserError(f"--{package} needs the package {package}: pip install {package}") from None
        try:
            importlib.import_module("matplotlib")
        except Exception as error:                           # not installed, or broken
            self._draws = False
            print(f"curves.png will not be drawn, as matplotlib cannot be imported: {_in_line(error)}")

    def _open(self):
        place = self.dir or Path(self.settings["out_dir"])
        try:
            if not self.resumed:
                self.dir = place = self._create(place / self.script.stem, self.settings["run_name"])
            elif any(place.iterdir()) and not is_run(place):
                raise UserError(f"{place} is not the directory of a run: choose another --run_name")
            self._lock = self._take_lock()
            for leftover in itertools.chain(place.glob(".*.tmp-*"), place.glob("samples/.*.tmp-*")):
                if not _is_alive(leftover.name.rpartition("-")[2]):      # one who watches the run writes there too
                    leftover.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {place}: {error.strerror}") from None
        if self.source and self.source.resolve() != (place / "last.pt").resolve():
            with open(self.source, "rb") as old, replacing(place / "last.pt") as new:
                shutil.copyfileobj(old, new)                 # before any metrics go: the two always belong together
        self._write_summary("running")
        self._write_params()
        self._copy_code()
        known = self._open_metrics()
        if "wandb" in self._asked:
            self._mirrors.append(curves.Wandb(self.dir, f"{self.script.stem}/{self.dir.name}", self.settings["wandb"],
                                              _plain(self.settings)))
        if "torch.utils.tensorboard" in self._asked:
            reached = {**self._steps, "": self._first} if self.resumed else {}
            self._mirrors.append(curves.TensorBoard(self.dir, reached))
        for mirror in self._mirrors:
            mirror.catch_up(known)
        self._output = sys.stdout = Output(sys.stdout)

    def _create(self, parent, name):
        parent.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for candidate in [name] if name else itertools.chain([stamp], (f"{stamp}-{i}" for i in itertools.count(2))):
            with contextlib.suppress(FileExistsError):       # two commands in one second: the other took it
                (parent / candidate).mkdir()
                return parent / candidate
        raise UserError(f"{parent / name} is there already: --resume --run_name {name} goes on with it, "
                        "another --run_name starts anew")

    def _take_lock(self):
        lock = os.open(self.dir / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        for trial in range(5):
            try:
                lock_file(lock)
                break
            except BUSY:
                if trial == 4:
                    os.close(lock)
                    raise UserError(f"another process is writing to {self.dir}") from None
                time.sleep(0.05)                             # `is_running` holds it for a moment
            except OSError:
                break                                        # a network folder that knows no locks: go on without one
        os.write(lock, FORMAT.encode())                      # the file's time says which run started last
        return lock

    def _open_metrics(self):
        """Drops the metrics that the checkpoint does not know of; returns the lines that are left."""
        path, entries = self.dir / "metrics.jsonl", []
        if self.checkpoint and self.resumed:
            known = self.checkpoint.get("metrics_lines")
            entries = read_metrics(path, known) if path.exists() else []
            if len(entries) < (known or 0):
                print(f"{path} has lost {known - len(entries)} of the {known} lines that the checkpoint knows of: "
                      "the curves have a gap")
            entries = [entry for entry in entries if not entry.get("final")      # by its model's step, where it has one
                       and entry["step"] <= self._steps.get(entry.get("model"), self._first)]
        with replacing(path) as file:
            file.writelines((json.dumps(entry) + "\n").encode() for entry in entries)
        self._lines, self._metrics = len(entries), open(path, "ab", buffering=0)
        return entries

    def _write_params(self):
        old, now = read_json(self.dir / "params.json") if self.resumed else {}, _plain(self.settings)
        before, words = old.get("settings", now), [self.script.name, *self.settings.command]
        changed = {name: [before.get(name), value] for name, value in now.items() if before.get(name) != value}
        entry = {"command": words, "step": self.step, "time": time.strftime(CLOCK), "changed": changed}
        git = "git", "-C", str(self.script.resolve().parent)
        commit = _output(*git, "rev-parse", "HEAD")
        write_json(self.dir / "params.json", {
            "format": FORMAT, "script": self.script.stem, "run_name": self.dir.name, "settings": now, "command": words,
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
            "device": {"system": platform.platform(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
                       "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]},
            "git": commit and {"commit": commit, "dirty": bool(_output(*git, "status", "--porcelain"))},
            "resumed_from": self.source, "history": old.get("history", []) + [entry]})

    def _copy_code(self):
        """The script and the modules of this folder, to code/; what has changed since the run began goes beside it."""
        root, code = Path(__file__).resolve().parents[1], self.dir / "code"
        loaded = [Path(getattr(module, "__dict__", {}).get("__file__") or "") for module in list(sys.modules.values())]
        ours = [path for path in loaded if path.suffix == ".py" and path.parent in (root, *map(root.joinpath, ROOMS))]
        data = [file for path in ours for file in path.parent.glob(path.stem + "*") if file.suffix in (".html", ".txt")]
        files = {path.relative_to(root): path for path in ours + data}
        files[Path(self.script.name)] = self.script
        if self.resumed and self.checkpoint and code.exists():
            files = {name: path for name, path in files.items()
                     if not (code / name).exists() or (code / name).read_bytes() != path.read_bytes()}
            code = code / f"resumed_at_{self.step:08d}"
            if files:
                names = ", ".join(sorted(map(str, files)))
                print(f"the code has changed since this run began ({names}): a copy is in {code}")
        for name, path in files.items():
            (code / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, code / name)

    def _on_signal(self, number, frame):
        if not self.main:                                    # rank 0 speaks, and ends them all
            self.stop = number
            return
        if self.stop is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.stop = number
        text = f"\n{signal.Signals(number).name}: stopping after this step, then saving; once more stops at once\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())                       # print could be what the signal interrupted

    def log(self, *, step, split="train", **values):
        """Appends a line to metrics.jsonl: `step` optimiser steps done, `split`, `values`; a number not finite is null.

        Texts among the values (model, stage, protocol, ...) name the curve that the numbers belong to. NonFinite: a
        validation's measure, by which a model may be the best, was none; once the line is written.
        """
        if self.main:
            entry = {"step": step, "split": split, **_plain(values)}
            try:
                self._metrics.write((json.dumps(entry, allow_nan=False) + "\n").encode())
            except OSError as error:
                raise UserError(f"cannot write {self.dir / 'metrics.jsonl'}: {error.strerror}") from error
            self._lines, self.step = self._lines + 1, max(self.step, step)
            for mirror in self._mirrors:
                mirror.log(entry, self._lines)
        for name in ("loss", "nats", "bpb", "score") if split != "train" else ():  # all processes end together
            if not math.isfinite(values.get(name) or 0.0):
                raise NonFinite(step, f"{name} of the validation")

    def save(self, name, step, keep=0, **more):
        """Writes a checkpoint to the run's file `name`: step, settings, the states of all that is tracked, and `more`.

        Where an optimiser keeps an average, the weights are that. A kill at any moment leaves the old file or the new
        one, whole. keep: also the numbered step_00001000.pt, and removes older ones, so that so many are left; a
        last.pt at a multiple of the setting keep_every (of the steps of a stage that began at its loop's `start`) has
        its numbered one, too, which is never removed. Killed in between, the new one is missing, and a resumed run
        saves it. UserError: no space; the old file stays.
        """
        every, start = self.settings.get("keep_every"), self._things.get("loop", {}).get("start", 0)
        with contextlib.ExitStack() as stack:
            for thing in self._things.values():
                if hasattr(thing, "averaged"):
                    stack.enter_context(thing.averaged())
            state = {"step": step, "settings": dict(self.settings), **self.states(), **more}
            if self.main:
                self._write(name, state)
            for_good = every and name == "last.pt" and (step - start) % every == 0
            if self.main and (keep or for_good):
                numbers = [int(path.stem.removeprefix("step_")) for path in self.dir.glob("step_*.pt")]
                older = sorted(number for number in numbers if number < step)
                for old in older[:max(0, len(older) - keep + 1)] if keep else ():
                    if not (every and old % every == 0):
                        (self.dir / f"step_{old:08d}.pt").unlink()
                self._write(f"step_{step:08d}.pt", state)

    def ended(self, loop):
        """Why a training loop, a Loop, goes no further: "done", by max_steps or max_seconds, "ended early", where since
        the best validation `patience` others have gone by, which the summary then says too; "": it goes on."""
        most, limit, patience, interval = map(self.settings.get, (
            "max_steps", "max_seconds", "patience", "eval_interval"))
        if limit is not None and self.mesh:                  # all processes go by one clock
            loop["seconds"] = self.mesh.most(loop["seconds"])
        if most is not None and loop["step"] >= most or limit is not None and loop["seconds"] >= limit:
            return "done"
        waited = loop["evaluated"] // interval - loop["best_step"] // interval if patience and interval else 0
        if patience and waited >= patience:
            self.summary(ended_early=loop["step"])
            return "ended early"
        return ""

    def _write(self, name, state):
        state = {**state, "format": FORMAT, "script": self.script.stem, "metrics_lines": self._lines}
        if self.settings.fingerprint is not None:
            state["fingerprint"] = self.settings.fingerprint
        os.fsync(self._metrics.fileno())                     # first: what a checkpoint knows of is on the disk
        for mirror in self._mirrors:
            mirror.flush()
        with replacing(self.dir / name) as file:
            torch.save(state, file)

    def bar(self, total, initial=0):
        """A `Bar` towards `total` steps (None, or a run that has max_seconds: no end known)."""
        self._bar = Bar(total if self.settings.get("max_seconds") is None else None, initial)
        return self._bar

    def summary(self, **values):
        """Adds `values` to summary.json, which is written when the block ends."""
        self._summary.update(values)

    def spent(self, clock):
        """Where this process's time went by a Stopwatch, and the peak of memory: in print and in summary.json."""
        shares, memory = clock.shares(), peak_memory(clock.device)
        self.summary(time=shares, peak_memory=memory)
        print("time: " + ", ".join(f"{part} {100 * share:.0f} %" for part, share in shares.items()) +
              ("" if math.isnan(memory) else f"; peak memory {as_size(memory)}"))

    def _write_summary(self, status, **more):
        memory = peak_memory("cuda" if torch.cuda.is_available() and torch.cuda.is_initialized() else "cpu")
        write_json(self.dir / "summary.json", {
            "status": status, "step": self.step, "seconds": time.monotonic() - self._began, "peak_memory": memory,
            "written": time.strftime(CLOCK), **self._summary, **more})

    def __exit__(self, kind, error, trace):
        good = error is None or isinstance(error, SystemExit) and not error.code
        status = "done" if good else "failed"
        if good and self.stop or isinstance(error, KeyboardInterrupt):
            status = "interrupted"
        if isinstance(error, NonFinite) and self.main and (self.dir / "last.pt").exists():
            error.checkpoint = self.dir / "last.pt"
        with contextlib.ExitStack() as stack:
            for number, handler in self._handlers.items():
                stack.callback(signal.signal, number, handler)
            if self._output is not None and sys.stdout is self._output:
                stack.callback(setattr, sys, "stdout", self._output.stream)
                stack.callback(self._output.flush)
            if self._lock is not None:
                stack.callback(os.close, self._lock)
            if self._fails and not self.resumed and self.dir:
                if self._lock is not None:                   # ours, made a moment ago, and it holds nothing
                    stack.callback(shutil.rmtree, self.dir, ignore_errors=True)
                else:                                        # unless another took it in that moment, and wrote
                    stack.enter_context(contextlib.suppress(OSError))
                    stack.callback(os.rmdir, self.dir)
            for writer in filter(None, (self._metrics, self._bar)):
                stack.callback(writer.close)
            for mirror in reversed(self._mirrors):
                stack.callback(mirror.close, good)
            try:
                if self._lock is not None:
                    self._write_summary(status, **({} if good else {"error": f"{kind.__name__}: {error}"}))
                if self._metrics and self._draws:
                    with optional("curves.png is"):
                        draw_curves(self.dir)
            except UserError:
                if good:
                    raise                                    # else what went wrong first is what to tell
        if good and self.stop:
            sys.exit(128 + self.stop)
        if not self.main and isinstance(error, (UserError, NonFinite)):
            sys.exit(2 if isinstance(error, UserError) else 3)   # rank 0 says what it was


class Bar:
    """Progress on standard output, made by `Run.bar`: a bar on a terminal, elsewhere a line every ten seconds."""

    def __init__(self, total, initial):
        self.total, self.initial, self.began, self.said, self.tqdm = total, initial, time.monotonic(), -math.inf, None
        if sys.stdout.isatty():
            from tqdm import tqdm
            columns = shutil.get_terminal_size().columns     # 80 where the terminal does not say
            self.tqdm = tqdm(total=total, initial=initial, file=sys.stdout, ncols=columns, unit=" steps")

    def update(self, step, text=""):
        """`step` steps are done; `text` is shown beside them."""
        now = time.monotonic()
        if self.tqdm is not None:                            # bool() of an endless one is an error
            self.tqdm.set_postfix_str(text, refresh=False)
            self.tqdm.update(step - self.tqdm.n)
        elif now - self.said >= 10 or step == self.total:
            self.said, pace = now, (now - self.began) / max(1, step - self.initial)
            left = round(pace * (self.total - step)) if self.total else 0
            goal = f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left" if self.total else ""
            self.note(f"step {step}{f'/{self.total}' if self.total else ''}: {text}, {1000 * pace:.1f} ms/step{goal}")

    def note(self, text):
        """Prints a line, above the bar where there is one."""
        print(text, flush=True) if self.tqdm is None else self.tqdm.write(text, file=sys.stdout)

    def close(self):
        """Leaves the bar as it stands; `note` goes on printing."""
        if self.tqdm is not None:
            self.tqdm.close()
        self.tqdm = None
