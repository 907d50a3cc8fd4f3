"""The machine: which device and numbers, its generators, how fast it is, where time goes, how much memory there is."""
import math
import os
import re
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

from nanolab.settings import UserError

PARTS = "data forward backward optimiser evaluation other".split()  # of a loop's time, for a Stopwatch


def resolve_device(device, dtype):
    """(torch.device, torch.dtype) for the settings `device` (auto, cpu, cuda, cuda:N, mps) and `dtype`.

    auto: cuda where there is one and bfloat16, on cards without it float16; else cpu and float32. Says so where the
    processor only emulates bfloat16.
    UserError: a device that is not there.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise UserError(f"--device {device}: must be one of auto, cpu, cuda, cuda:N, mps")
    kind, _, index = device.partition(":")
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if int(index or 0) >= count:
        raise UserError(f"--device {device}: torch {torch.__version__} sees {count} such devices on this machine")
    if dtype == "auto":
        bfloat16 = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if bfloat16 else "float16" if kind == "cuda" else "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {dtype}: must be one of auto, float32, bfloat16, float16")
    if (kind, dtype) == ("cpu", "bfloat16") and torch.backends.mkldnn.is_available() and not (
            torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        print("this processor has no bfloat16, so it takes many times as long: try --dtype float32", flush=True)
    return torch.device(device), getattr(torch, dtype)


def mixed_precision(where, precision):
    """(autocast, GradScaler) of a training loop on the device `where` with numbers of type `precision`. Where these are
    of half size, a GPU rounds the factors of the other products, those in float32, to TF32's 10 bits."""
    if where.type == "cuda":
        torch.set_float32_matmul_precision("highest" if precision == torch.float32 else "high")
    return (torch.autocast(where.type, precision, enabled=precision != torch.float32),
            torch.amp.GradScaler(where.type, enabled=precision == torch.float16))


def seed_everything(seed, deterministic=True):
    """Seeds torch's global generators (CPU, CUDA). deterministic: the same bits every time on the same machine."""
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")      # read when cuBLAS starts
    torch.utils.deterministic.fill_uninitialized_memory = False      # finds bugs, costs time
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = deterministic
    # What torch.use_deterministic_algorithms does, without its second of importing the compiler.
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = str(int(deterministic))
    torch.set_deterministic_debug_mode("error" if deterministic else "default")


def onto(device, tensor):
    """A tensor on a torch.device; from the CPU to CUDA out of pinned memory, in the order of the device's own work, for
    which else the host would wait first."""
    if tensor.device.type != "cpu" or device.type in ("cpu", "mps"):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Generators:
    """torch's global generators (CPU, every CUDA device) and the named torch.Generators, for a checkpoint."""

    def __init__(self, **named):
        self.named = named

    def state_dict(self):
        """Their states: uint8 tensors."""
        return {"cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
                "named": {name: generator.get_state() for name, generator in self.named.items()}}

    def load_state_dict(self, states):
        """Puts them back, but the state of a generator of another kind of device: one line says that its noise goes on
        from the seed. UserError: a named generator that the checkpoint does not know."""
        if missing := sorted(set(self.named) - set(states["named"])):
            raise UserError(f"the checkpoint has no state of the generator {', '.join(missing)}")
        torch.set_rng_state(states["cpu"])
        for i, state in enumerate(states["cuda"][:torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, i)
        foreign = [] if bool(states["cuda"]) == torch.cuda.is_available() else ["dropout"]
        for name, generator in self.named.items():
            if states["named"][name].numel() == generator.get_state().numel():
                generator.set_state(states["named"][name])
            else:
                foreign.append(name)
        if foreign:
            print(f"the checkpoint is of another device: the noise of {', '.join(foreign)} goes on from the seed")


def measure_peak_flops(device, dtype):
    """FLOP/s of this device: the best of several square matmuls in `dtype`, in less than half a second."""
    on_gpu = torch.device(device).type != "cpu"
    size, best, began = 8192 if on_gpu else 1024, math.inf, time.perf_counter()
    generator = torch.Generator(device).manual_seed(0)       # random numbers: a chip may be faster on constant ones
    a, b = torch.randn(2, size, size, device=device, generator=generator).to(dtype)
    while best == math.inf or time.perf_counter() - began < (0.4 if on_gpu else 0.1):
        start = time.perf_counter()
        product = a @ b
        if on_gpu:
            product[0, 0].item()                             # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size ** 3 / best


def peak_memory(device):
    """Bytes: the most that torch held on a CUDA `device`, else the most that this process held (Windows: NaN)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Profile:
    """torch's profiler over a process's third to fifth optimiser step, or what there is of these: the ten dearest
    operations in print, and trace.json in the folder of the `run`."""

    def __init__(self, run):
        self.run, self.steps, self.profiler = run, 0, None

    def stepped(self):
        """A step is done."""
        self.steps += 1
        if self.steps == 2:
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")       # else its library writes to stderr
            self.profiler = torch.profiler.profile(acc_events=True)  # of one cycle: 2.11 warns where that is not said
            self.profiler.start()
        elif self.steps == 5:
            self.end()

    def end(self):
        """Tells what was seen, if that was not done."""
        if self.profiler:
            self.profiler.stop()
            path, profiler, self.profiler = self.run.dir / "trace.json", self.profiler, None
            profiler.export_chrome_trace(str(path))
            print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=10))
            print(f"profile of {self.steps - 2} steps: {path}")


class Stopwatch:
    """Where the time of a training loop on `device` goes, by marks in the loop that are cheap enough to stay there.

        clock.start()                                        # what came before is "other"
        x, y = batches.next()
        clock.lap("data")                                    # the time since the mark before was this part's

    Nothing waits for the device: on CUDA a mark is an event in the queue of its work, read once the device has passed
    it, so that a part's time is the device's own, with what it waited for. Elsewhere a mark is a look at the clock.
    run: a Run, whose setting `profile` says whether optimiser steps are looked at, too.
    """

    def __init__(self, device, run=None):
        self.device = torch.device(device)
        self.profile = Profile(run) if run and run.main and run.settings["profile"] else None
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._coming = deque()                               # CUDA: (event, part that it ends) in order, not yet read
        self._last = self._event() if self.device.type == "cuda" else time.perf_counter()

    def _event(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def start(self):
        """A mark: the time since the one before belongs to no part."""
        self.lap("other")

    def lap(self, part):
        """A mark: the time since the one before was `part`, one of PARTS; "optimiser" ends a step."""
        if self.profile and part == "optimiser":
            self.profile.stepped()
        if self.device.type != "cuda":
            now = time.perf_counter()
            self.seconds[part] += now - self._last
            self._last = now
            return
        self._coming.append((self._event(), part))
        while self._coming and self._coming[0][0].query():
            self._read()

    def _read(self):
        """Adds the oldest mark, which the device has passed."""
        event, part = self._coming.popleft()
        self.seconds[part] += self._last.elapsed_time(event) / 1000
        self._last = event

    def shares(self):
        """{part: its share of the time since the stopwatch was made}, together 1. Waits for the device."""
        self.start()
        if self.profile:
            self.profile.end()
        if self._coming:
            self._coming[-1][0].synchronize()
        while self._coming:
            self._read()
        total = sum(self.seconds.values()) or 1.0            # two marks may be too near for the device's clock
        return {part: seconds / total for part, seconds in self.seconds.items()}


def memory(device):
    """Bytes that a device has in all; of the CPU what the container may take, where that is less. inf: not known."""
    if device != "cpu" and device != "mps" and torch.cuda.is_available():
        return max(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    found = math.inf
    with suppress(AttributeError, ValueError, OSError):      # no such call on Windows
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(ValueError, OSError):                  # the first may say "max"
            found = min(found, int(Path(path).read_text()))
    return found


def fits(n_bytes, what, device="cpu"):
    """UserError where `what` needs `n_bytes`, the least that it can do with, and the device has less in all."""
    if n_bytes > memory(device):
        raise UserError(f"{what} cannot be held: {as_size(float(n_bytes))} at the least, and there are "
                        f"{as_size(memory(device))} of memory")


def as_size(n):
    """Bytes in words."""
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:.1f} GB"
