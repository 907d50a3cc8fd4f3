"""What a run meets, and what it shows: other systems, closed outputs, devices, randomness, clocks; curves, progress."""
import ast
import importlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

from choices import refused
from forks import summary
from nanolab import run as experiment
from nanolab.run import (Generators, Run, Stopwatch, draw_curves, measure_peak_flops, mixed_precision, peak_memory,
                         resolve_device, seed_everything)
from test_experiment import fork, read_lines, settings_for, status_of

ROOT = Path(__file__).parent.parent


@pytest.fixture
def script(tmp_path):
    (tmp_path / "toy.py").write_text("print('toy')\n")


# --- Systems and outputs ---

SURROUNDED = """
import resource, sys
from nanolab.run import *
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(10_000_000)  # 40 MB: more than 32 the allocator would always give back
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
@command
def main():
    faults()
    write_json(Path("faults.json"), [faults(), before])
    for name, out in (("closed", sys.stdout), ("full", open("/dev/full", "w")),
                      ("ascii", open("out", "w", encoding="ascii"))):
        sys.stdout = out
        surroundings()
        settings = Settings(out_dir="runs", run_name=name, resume=False)
        settings.script = __file__
        with Run(settings) as run:
            print("x" * 10 ** 5 if name == "full" else "", end="")           # more than a buffer
            run.bar(1).update(1, "é → ü")
            run.log(step=1, loss=1.0)
        print("ß")
before = faults()
main()
"""


def test_a_finished_run_is_done_whatever_surrounds_it(tmp_path):
    """A notebook's backend that is not there; a standard output that is closed, full, or a terminal of ASCII. And a
    command keeps the memory that tensors free."""
    (tmp_path / "toy.py").write_text(SURROUNDED)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
           "MPLBACKEND": "module://nowhere.backend_inline", "PYTHONIOENCODING": "ascii"}
    found = subprocess.run(["bash", "-c", f"{sys.executable} toy.py >&-"], cwd=tmp_path, env=env,
                           stderr=subprocess.PIPE, text=True)
    assert (found.returncode, found.stderr) == (
        0, "cannot print (No space left on device): the run goes on in silence\n")
    for name in ("closed", "full", "ascii"):
        directory = tmp_path / "runs" / "toy" / name
        assert summary(directory)["status"] == "done"
        assert (directory / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert read_lines(directory / "metrics.jsonl") == [{"step": 1, "split": "train", "loss": 1.0}]
    assert (tmp_path / "out").read_text().startswith("step 1/1: ? ? ?,")
    inside, before = json.loads((tmp_path / "faults.json").read_text())
    assert inside <= before / 10 or platform.libc_ver()[0] != "glibc"


def commands():
    """Every file that is run as a command."""
    files = [*ROOT.glob("*.py"), *(ROOT / "data").glob("*.py")]
    return sorted(file for file in files if 'if __name__ == "__main__":\n    main()' in file.read_text())


def test_ctrl_c_while_the_imports_run(tmp_path):
    """Status 130 and one line: nanolab.settings, which minds it, comes before all that takes long."""
    assert len(commands()) > 15
    for path in commands():
        tree = ast.parse(path.read_text())
        names = [node.names[0].name if isinstance(node, ast.Import) else node.module
                 for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert set(names[:names.index("nanolab.settings")]) <= {"sys", "pathlib"}, path
    hang = tmp_path / "torch.py"                             # the import that takes long
    hang.write_text("import time\nprint('imports', flush=True)\ntime.sleep(60)\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONSAFEPATH": ""}
    for path in (ROOT / "data" / "mqar.py", ROOT / "nanolab" / "runs.py"):
        code = f"import runpy, sys\nsys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n" \
               f"sys.modules['__main__'].__file__ = path = {str(path)!r}\nrunpy.run_path(path, {{}}, '__main__')"
        process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "imports\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (130, "error: interrupted\n")


def windows():
    """A run, twice, by a nanolab.run that is imported anew where fcntl and resource are missing and msvcrt is there."""
    held = set()

    def locking(descriptor, how, n):
        key = os.fstat(descriptor).st_ino
        if key in held:
            raise PermissionError(13, "locked")
        held.add(key)

    for name in [name for name in sys.modules if name.partition(".")[0] == "nanolab"]:
        del sys.modules[name]
    sys.modules |= dict(fcntl=None, resource=None, msvcrt=types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    new = importlib.import_module("nanolab.run")
    assert new.fcntl is None and new.Run is not Run
    settings = new.Settings(out_dir="runs", run_name="a", resume=False)
    settings.script = "toy.py"
    with new.Run(settings) as run:
        run.log(step=1, loss=1.0)
        run.save("last.pt", 1)
        assert new.is_running(run.dir)
        try:
            settings["resume"] = True
            new.Run(settings, new.load_checkpoint(run.dir / "last.pt")).__enter__()
        except new.UserError as error:
            print(error)
    print((run.dir / "lock").read_text())


def test_where_the_modules_of_unix_are_missing(tmp_path, script, monkeypatch):
    """A run locks its directory by msvcrt; what else differs on Windows is not tried."""
    asking = {path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.py"), *ROOT.glob("[dfmn]*/*.py")]
              if re.search(r"^\s*(import|from) (fcntl|resource|termios|pwd|grp)\b", path.read_text(), re.M)}
    assert asking == {"nanolab/run.py", "nanolab/device.py"}
    monkeypatch.chdir(tmp_path)
    assert status_of(fork(windows, tmp_path / "out")) == 0, (tmp_path / "out.err").read_text()
    assert (tmp_path / "out").read_text() == "another process is writing to runs/toy/a\nnanolab-1\n"


# --- Device, randomness, pictures ---

@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_float32_is_rounded_to_tf32_only_beside_halves():
    before = torch.get_float32_matmul_precision()
    try:
        for precision, found in ((torch.bfloat16, "high"), (torch.float32, "highest")):
            mixed_precision(torch.device("cuda"), precision)
            mixed_precision(torch.device("cpu"), torch.bfloat16)                # which changes nothing
            assert torch.get_float32_matmul_precision() == found
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("count, bf16, device, dtype, found", [  # of CUDA devices; whether a device computes bfloat16
    (0, True, "auto", "auto", ("cpu", torch.float32)), (0, True, "cpu", "bfloat16", ("cpu", torch.bfloat16)),
    (0, False, "cpu", "bfloat16", ("cpu", torch.bfloat16)), (0, False, "cpu", "float32", ("cpu", torch.float32)),
    (0, None, "cuda", "auto", "sees 0 such devices"), (0, None, "cuda:x", "auto", "must be one of auto, cpu, cuda"),
    (0, None, "cpu", "int8", "--dtype int8: must be one of"), (2, False, "auto", "auto", ("cuda", torch.float16)),
    (2, True, "cuda:1", "auto", ("cuda:1", torch.bfloat16)), (2, True, "cuda:2", "auto", "sees 2 such devices")])
def test_resolve_device(monkeypatch, capsys, count, bf16, device, dtype, found):
    """A processor without bfloat16 is told."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bf16)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: bf16, raising=False)
    if isinstance(found, str):
        refused(found, resolve_device, device, dtype)
        return
    assert resolve_device(device, dtype) == (torch.device(found[0]), found[1])
    assert ("try --dtype float32" in capsys.readouterr().out) == ((device, dtype, bf16) == ("cpu", "bfloat16", False))


def test_generators_go_on_where_they_were(tmp_path, capsys):
    """But one of another kind of device from the seed: of CUDA they have 16 bytes of state, of the CPU 5,056."""
    torch.manual_seed(1)
    data, noise = (torch.Generator().manual_seed(seed) for seed in (2, 3))
    torch.save(Generators(data=data, noise=noise).state_dict(), tmp_path / "g.pt")
    expected = torch.rand(5), torch.rand(5, generator=data)
    states = torch.load(tmp_path / "g.pt", weights_only=True)
    other = torch.Generator()
    Generators(data=other).load_state_dict(states)
    assert torch.equal(torch.rand(5), expected[0]) and torch.equal(torch.rand(5, generator=other), expected[1])
    assert capsys.readouterr().out == ""
    refused("no state of the generator eval", Generators(eval=other).load_state_dict, states)
    states["named"]["noise"] = torch.zeros(16, dtype=torch.uint8)
    seeded = torch.Generator().manual_seed(9)
    Generators(data=other, noise=seeded).load_state_dict(states)
    assert torch.equal(torch.rand(5, generator=other), expected[1])
    assert torch.equal(torch.rand(5, generator=seeded), torch.rand(5, generator=torch.Generator().manual_seed(9)))
    assert capsys.readouterr().out == "the checkpoint is of another device: the noise of noise goes on from the seed\n"


def test_seed_everything():
    before = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    try:
        seed_everything(5, deterministic=True)
        first = torch.rand(3)
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"]
        assert not torch.utils.deterministic.fill_uninitialized_memory
        seed_everything(5, deterministic=False)
        assert torch.equal(torch.rand(3), first) and not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_deterministic_debug_mode(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def test_peaks():
    assert 1e7 < measure_peak_flops("cpu", torch.float32) < 1e14  # of whatever share of a core is left
    before = peak_memory("cpu")
    held = torch.ones(30_000_000)
    assert peak_memory("cpu") >= before and peak_memory("cpu") > held.numel() * 4


@pytest.fixture
def hand(monkeypatch):
    """A host's clock that only moves by hand: hand[0] seconds."""
    now = [100.0]
    monkeypatch.setattr(experiment.time, "perf_counter", lambda: now[0])
    return now


def pass_time(clock, now, *laps):
    for part, seconds in laps:
        now[0] += seconds
        clock.start() if part == "other" else clock.lap(part)


LAPS = (("other", 1.0), ("data", 2.0), ("forward", 30.0), ("backward", 50.0), ("optimiser", 7.0), ("other", 3.0),
        ("evaluation", 5.0), ("data", 1.0), ("other", 1.0))
SHARES = {"data": 0.03, "forward": 0.3, "backward": 0.5, "optimiser": 0.07, "evaluation": 0.05, "other": 0.05}


def test_where_the_time_goes(hand, tmp_path, script, capsys):
    """Each part has the time before its marks, the rest is other; in the summary and in one line."""
    clock = Stopwatch("cpu")
    pass_time(clock, hand, *LAPS[:-1])
    hand[0] += LAPS[-1][1]                                   # not marked: since the last mark
    with Run(settings_for(tmp_path)) as run:
        assert "time" not in summary(run.dir)
        run.spent(clock)
    end = summary(run.dir)
    assert list(end["time"]) == list(SHARES) and end["time"] == pytest.approx(SHARES)
    memory = re.fullmatch(r"time: data 3 %, forward 30 %, backward 50 %, optimiser 7 %, evaluation 5 %, other 5 %; "
                          r"peak memory ([\d.]+) (MB|GB)\n", capsys.readouterr().out)
    assert end["peak_memory"] > 1e7 and memory
    assert 0.9 < end["peak_memory"] / {"MB": 1e6, "GB": 1e9}[memory[2]] / float(memory[1]) < 1.1
    with pytest.raises(KeyError):
        clock.lap("foward")
    assert Stopwatch("cpu").shares().keys() == SHARES.keys()     # before any time has passed


class Event:
    """A CUDA event of a device that lags behind the host: it passes an event when told to."""

    queue, waits = [], 0

    def __init__(self, enable_timing):
        self.passed = not enable_timing

    def record(self, stream):
        assert stream == "stream of cuda:0"
        self.at = experiment.time.perf_counter()
        self.queue.append(self)

    def query(self):
        return self.passed

    def synchronize(self):
        Event.waits += 1
        while not self.passed:
            self.queue.pop(0).passed = True

    def elapsed_time(self, end):
        assert self.passed and end.passed
        return 1000 * (end.at - self.at)


@pytest.mark.parametrize("lag", [0, 3])
def test_where_the_time_of_a_device_goes(hand, monkeypatch, lag):
    """On CUDA marks are events: none waits, and they are read when the device has passed them."""
    monkeypatch.setattr(Event, "queue", [])
    monkeypatch.setattr(Event, "waits", 0)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    clock = Stopwatch("cuda:0")
    for lap in LAPS * 20:
        pass_time(clock, hand, lap)
        while len(Event.queue) > lag:
            Event.queue.pop(0).passed = True
    assert Event.waits == 0 and len(clock._coming) <= lag + 1, "marks are read on the way"
    assert clock.shares() == pytest.approx(SHARES) and Event.waits == 1 and not clock._coming


@pytest.mark.parametrize("count", [0, 70])
def test_curves_without_warnings(tmp_path, count):
    lines = [{"step": i, "split": split, "model": model, "loss": 1.0 / (i + 1), "bpb": None if i % 2 else 2.0}
             for i in range(count) for split in ("train", "val") for model in ("plain", "latent")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_show_values_as_they_are(tmp_path, monkeypatch):
    """A loss below zero is drawn below zero, on a linear axis; accuracy and each digit have panels of their own."""
    from matplotlib.figure import Figure
    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, format: seen.extend(figure.axes))
    lines = [{"step": i, "split": "val", "model": "latent", "loss": 1.0 - i, "accuracy": 0.1 * i,
              "digit_accuracy_0": 1.0, "digit_accuracy_11": 0.2} for i in range(5)]
    lines += [{"step": 1, "split": "val", "model": "simple", "digit_accuracy_0": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curves(tmp_path)
    assert [axes.get_ylabel() for axes in seen] == ["loss (nats per target)", "accuracy", "accuracy of a digit"]
    assert seen[0].get_yscale() == "linear" and list(seen[0].lines[0].get_ydata()) == [1, 0, -1, -2, -3]
    assert seen[0].get_ylim()[0] < -3
    one, eleven, other = seen[2].lines                       # a colour for each digit, a line style for each model
    assert [line.get_label() for line in seen[2].lines] == ["latent/val 10^0", "latent/val 10^11", "simple/val 10^0"]
    assert one.get_color() == other.get_color() != eleven.get_color()
    assert one.get_linestyle() == eleven.get_linestyle() != other.get_linestyle()


@pytest.mark.parametrize("total", [4, None])
def test_progress_on_a_terminal(capsys, monkeypatch, total):
    """Also where no end is known."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    bar = experiment.Bar(total, 1)
    bar.update(4, "loss 2.5")
    bar.note("val 3.1")
    bar.close()
    out = capsys.readouterr().out
    assert ("4/4" if total else "4 steps") in out and "loss 2.5" in out and "\nval 3.1\n" in out.replace("\r", "\n")


def test_progress_without_a_terminal(capsys):
    bar = experiment.Bar(100, 10)
    for said in ((11, "loss 2.5"), (12, "loss 2.4"), "val 3.1", (100, "loss 2.0")):
        bar.note(said) if isinstance(said, str) else bar.update(*said)
    bar.close()
    bar.note("end")
    experiment.Bar(None, 0).update(5, "loss 1")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "step 11/100: loss 2.5", "val 3.1", "step 100/100: loss 2.0", "end", "step 5: loss 1"]
    assert lines[2].endswith("0:00:00 left") and not lines[-1].endswith("left")


@pytest.mark.gpu
def test_cuda_generators_and_peaks():
    states = Generators().state_dict()
    expected = torch.rand(5, device="cuda")
    Generators().load_state_dict(states)
    assert torch.equal(torch.rand(5, device="cuda"), expected)
    assert measure_peak_flops("cuda", torch.bfloat16) > measure_peak_flops("cpu", torch.float32)
    assert peak_memory("cuda") > 0


@pytest.mark.gpu
def test_time_of_a_gpu():
    """The device's time counts, not that of the host, which is far ahead of it."""
    clock, x = Stopwatch("cuda"), torch.randn(4096, 4096, device="cuda")
    x @ x
    torch.cuda.synchronize()
    clock.start()
    clock.lap("data")
    for _ in range(50):
        x @ x
    clock.lap("forward")
    torch.cuda.synchronize()
    shares = clock.shares()
    assert shares["forward"] > 10 * shares["data"] and sum(shares.values()) == pytest.approx(1)
