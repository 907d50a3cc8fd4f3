"""Models on several processes: every mesh gives what one process gives, and checkpoints pass from mesh to mesh.

Each mesh is started once, by torchrun's own agent with forks of this process, when a test first asks for it; rank 0
leaves what it found in a file.
"""
import io
import multiprocessing.connection
import os
import signal
import socket
import sys
from contextlib import nullcontext, redirect_stdout, suppress

import pytest
import torch

import choices
from model import TransformerConfig, build_model, fused_rows, parameter_roles
from nanolab import optim, parallel, run as experiment
from nanolab.run import Generators, NonFinite, Run, Settings, UserError, put_back

V, B, T = 17, 4, 16
SMALL = dict(vocab_size=V, n_layer=2, n_head=4, n_kv_head=2, n_embd=24, head_dim=8, block_size=32, positions="rope",
             norm="rms", activation="swiglu", bias=False, init="normal")
MESHES = ["1x2", "2x1", "2x2", "4x2"]
CASES = {  # name: (what differs from SMALL, optimiser, steps)
    "adamw": (dict(n_layer=1), "adamw", 2),
    "muon": (dict(norm_after=True, partial_rotary=0.5, nope_interval=2), "muon", 2),
    "schedule_free": (dict(n_kv_head=4, ff="none,mlp", residual_scale="rezero", parallel_residual=True),
                      "schedule_free", 4),
    "sgd": (dict(bias=True, norm="layer", activation="gelu", positions="learned_per_layer", head_bias=True,
                 n_layer=1, tie_weights=True), "sgd", 2),
    "adam": (dict(mixer="window,full", window=5, positions="alibi", ff="low_rank", mtp_depth=1, bias=True), "adam", 2),
    "orthograd": (dict(mixer="strided,fixed", sparse_stride=4, sparse_summary=2, positions="alibi", n_kv_head=4),
                  "muon", 2),
    "diff": (dict(mixer="diff", n_kv_head=4, qk_norm=True, qk_scale=True, short_conv=3, checkpoint_activations=True,
                  value_residual=True), "adamw", 2),
    "layers": (dict(intermediate_losses=True, n_targets=2, activation="relu2"), "muon", 2),
    "pyramid": (dict(n_layer=3, shorten=2), "muon", 2),
}
PASSED = ("schedule_free",)  # checkpoints of step 2 that each mesh hands to the next
OF = {"1x1": list(CASES), "1x2": list(CASES), "2x1": [case for case in CASES if case not in ("adam", "pyramid")],
      **dict.fromkeys(("2x2", "4x2"), ["adamw", "muon", *PASSED])}  # mixers and shapes matter to tp alone
WHOLE = {"layers", "adam"}  # cases whose targets all count
FIRST = torch.arange(8).view(2, 4)


def config_of(case):
    return TransformerConfig(**{**SMALL, **CASES[case][0]})


def built(case, mesh):
    """Model, optimiser and average of a case."""
    torch.manual_seed(0)
    model = mesh.parallelise(build_model(config_of(case)))
    settings = dict(optimizer=CASES[case][1], lr=0.01, weight_decay=0.1, orthograd=case == "orthograd")
    opt = optim.build(settings, model.named_parameters(), parameter_roles(model), fused_rows(model), mesh)
    return model, opt, optim.EMA(model, 0.9)


def batch(case, step):
    """The whole batch of a step; half of the rows count few targets, one none."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randint(V, (B, T), generator=generator), torch.randint(V, (B, T, config_of(case).n_labels),
                                                                        generator=generator)
    if case not in WHOLE:
        y[0, :10] = y[1, 3:] = y[2] = -1
    return x, y


def train(case, mesh, parts, steps):
    """Losses and norms of these steps, and the first one's whole gradients."""
    model, opt, ema = parts
    found, grads = [], {}
    for step in steps:
        x, y = batch(case, step)
        objective, nats = model(mesh.rows(x), targets=mesh.rows(y))
        weight = mesh.weight(y)
        (objective * weight).backward()
        norm = mesh.clip_grad_norm(model.parameters(), 0.5 if step % 2 else 100.0)  # clips, and leaves alone
        if step == steps[0]:
            grads = {name: mesh.whole(p, optim.local(p.grad)) if mesh.size > 1 else p.grad
                     for name, p in model.named_parameters() if p.grad is not None}
        opt.step()
        opt.zero_grad()
        ema.update()
        found.append([mesh.mean(nats[-1, 0] * weight).item(), norm.item()])
    return found, grads


def written(state):
    """The state as a file gives it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def state(mesh, parts):
    model, opt, ema = parts
    with opt.averaged():
        return written({name: state_of(mesh, thing) for name, thing in (("model", model), ("optimizer", opt),
                                                                        ("ema", ema))})


def state_of(mesh, thing):
    return mesh.state_of(thing) if mesh.size > 1 else thing.state_dict()


def resumed(case, mesh, folder):
    """Losses of the last two steps from the checkpoint of step 2 that another mesh left."""
    parts = built(case, mesh)
    put_back(torch.load(folder / f"{case}.pt", weights_only=True), dict(zip(("model", "optimizer", "ema"), parts)),
             mesh if mesh.size > 1 else None)
    return train(case, mesh, parts, range(2, 4))[0]


@torch.inference_mode()
def of_parts(model):
    """Logits (2, 4, V) by the parts of forward."""
    return model.predict(model.stream(FIRST, model.place(FIRST, None))[0])


@torch.inference_mode()
def heard(model, apart):
    """Logits of two rows (apart: by the parts of forward), and of ragged ones with a prefix through a cache in two
    chunks; logits of generation; the cache's size. Of few shapes, as DTensor thinks long about each."""
    model.eval()
    whole = of_parts(model) if apart else model(FIRST)
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(V, (2, 8), generator=generator)
    places = torch.stack((torch.arange(8), torch.arange(8) - 2)).clamp(min=-1)
    cache = model.new_cache(2, 16)
    chunks = [model(x[:, :4], positions=places[:, :4], cache=cache, prefix=torch.tensor([3, 2])),
              model(x[:, 4:], positions=places[:, 4:], cache=cache)]
    after = choices.followed(torch.randint(V, (2, 2), generator=generator), model, [b"\1\2\3\5", b"\4"])
    found = dict(logits=torch.cat((*chunks, whole), 1), after=after, cache=cache.bytes)
    model.train()
    return found


def work(mesh, folder):
    """All that the tests look at, of one mesh."""
    found = {}
    for case in OF[f"{mesh.dp}x{mesh.tp}" if mesh.size > 1 else "1x1"]:
        parts, steps = built(case, mesh), CASES[case][2]
        found[case] = {}
        if case in ("adamw", "diff") and mesh.size < 4:  # before training: inference must leave nothing behind
            with mesh.gathered(parts[0]) if case == "diff" else nullcontext():
                found[case]["heard"] = heard(parts[0], case == "diff")
        first = 2 if case in PASSED else steps
        losses, found[case]["grads"] = train(case, mesh, parts, range(first))
        if case in PASSED:
            found[case]["early"] = state(mesh, parts)
        found[case]["losses"] = losses + (train(case, mesh, parts, range(first, steps))[0] if steps > first else [])
        found[case].update(state(mesh, parts), flops=parts[0].flops_per_token(T), parameters=parts[0].n_params())
        held = sum(t.numel() for own in parts[1].state.values() for t in own.values() if torch.is_tensor(t))
        found[case]["held"] = held
        if case == "muon":
            with parts[2].swapped():
                found[case]["averaged"] = written(state_of(mesh, parts[0]))
        if case == "diff":  # the next step uses the present weights, whatever was gathered before
            with parts[2].swapped(), mesh.gathered(parts[0]):
                of_parts(parts[0])
            found[case]["after"], _ = train(case, mesh, parts, range(steps, steps + 1))
    for case in PASSED:
        if (folder / f"{case}.pt").exists():
            found[case]["resumed"] = resumed(case, mesh, folder)
    return found


def only_here(mesh, folder):
    """What one process has no like of."""
    found = {}
    generators = Generators()
    ranks = mesh.state_of(generators)
    drawn = torch.rand(3)
    mesh.load_into(generators, ranks)
    again = torch.rand(3)
    mesh.load_into(generators, {name: value for name, value in ranks.items() if name != "ranks"})
    gathered = [None] * mesh.size
    torch.distributed.all_gather_object(gathered, (drawn.tolist(), again.tolist(), torch.rand(3).tolist()))
    found["drawn"] = gathered

    class Broken(Run):
        def _enter(self):
            raise UserError("no place")

    settings = Settings(out_dir=f"{folder}/runs_{mesh.dp}x{mesh.tp}", run_name=None, resume=False)
    settings.script = __file__
    with Run(settings, mesh=mesh, model=torch.nn.Linear(1, 1)) as run:
        run.log(step=3, loss=1.0)
        with redirect_stdout(io.StringIO()):
            run.bar(10, initial=2).update(3, "x")
        run.save("last.pt", 3, keep=1), run.summary(step=3)
        found["written"] = len(list(run.dir.glob("*.pt"))) if mesh.main else run.dir
        found["stops"] = [mesh.stop(run)]
        if mesh.rank == mesh.size - 1:  # one process alone is asked
            os.kill(os.getpid(), signal.SIGTERM)
        found["stops"] += [mesh.stop(run), run.stop]
        run.stop = None
    ends = []
    for kind, error in ((Broken, None), (Run, UserError("x")), (Run, NonFinite(3))):
        try:
            with kind(settings, mesh=mesh):
                raise error
        except (UserError, NonFinite, SystemExit) as met:
            ends.append((type(met).__name__, getattr(met, "code", None)))
    gathered = [None] * mesh.size
    torch.distributed.all_gather_object(gathered, ends)
    return {**found, "ends": gathered}


def launch(mesh, folder):
    """The ranks of a mesh as torchrun starts them, but forked where no thread runs: beside that of torchrun's own store
    one of eight hung."""
    os.setpgid(0, 0)
    dp, tp = map(int, mesh.split("x"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        os.environ.update(WORLD_SIZE=str(dp * tp), MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]))
    ranks = {}
    for rank in range(dp * tp):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        process = multiprocessing.get_context("fork").Process(target=begin, args=(dp, tp, folder / mesh))
        process.start()
        ranks[process.sentinel] = process
    while ranks:
        for sentinel in multiprocessing.connection.wait(ranks):
            ended = ranks.pop(sentinel)
            ended.join()
            if ended.exitcode:
                os._exit(1)                                     # the others wait for it: `Meshes` ends them


def begin(dp, tp, out):
    """A rank's life."""
    sys.stdout = open(f"{out}.txt", "a")
    mesh = parallel.start(dp, tp, device="cpu")
    print("rank", mesh.rank, flush=True)
    found = work(mesh, out.parent)
    found["here"] = only_here(mesh, out.parent)
    if mesh.main:
        torch.save(found, out)


class Meshes(dict):
    """{mesh: what `work` found}; each goes on from what the one before left: 1x1, 1x2, 2x1, 2x2, 4x2, 1x1 ("last")."""

    def __init__(self, folder):
        self.folder = folder

    def __missing__(self, mesh):
        import torch._dynamo  # noqa: F401 (it and what it brings takes seconds: once for all)
        from torch.distributed import fsdp, tensor  # noqa: F401
        order, one = ("1x1", *MESHES, "last"), parallel.Alone()
        if mesh != order[0]:
            self[order[order.index(mesh) - 1]]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optim, "_iteration_dtype", lambda device: torch.float32)
            patch.setattr(experiment, "draw_curves", lambda folder: None)
            if mesh == "last":
                self[mesh] = found = {case: resumed(case, one, self.folder) for case in PASSED}
                return found
            if mesh == "1x1":
                found = work(one, self.folder)
            else:
                agent = multiprocessing.get_context("fork").Process(target=launch, args=(mesh, self.folder))
                agent.start()  # a process of its own, as it takes over signals
                agent.join(600)
                with suppress(ProcessLookupError):
                    os.killpg(agent.pid, signal.SIGKILL)        # ranks that are left wait for one that is gone
                agent.join()
                assert agent.exitcode == 0
                found = torch.load(self.folder / mesh, weights_only=True)
                found["output"] = (self.folder / f"{mesh}.txt").read_text()
        for case in PASSED:
            torch.save(found[case]["early"], self.folder / f"{case}.pt")
        self[mesh] = found
        return found


@pytest.fixture(scope="module")
def meshes(tmp_path_factory):
    return Meshes(tmp_path_factory.mktemp("meshes"))


def close(a, b, atol=1e-5):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-4, atol=atol)


@pytest.mark.parametrize("mesh, case", [(mesh, case) for mesh in MESHES for case in OF[mesh]])
def test_a_mesh_is_one_process(meshes, mesh, case):
    """Gradients, losses, weights, averages, the consolidated optimiser; generation, and training after an evaluation of
    gathered layers."""
    one, many = meshes["1x1"][case], meshes[mesh][case]
    assert one.keys() - {"heard"} == many.keys() - {"resumed", "heard"}
    assert one["grads"].keys() == many["grads"].keys()
    for name, grad in one["grads"].items():
        close(many["grads"][name], grad, 1e-6)
    close(many["losses"], one["losses"])
    close(many.get("after", 0), one.get("after", 0))
    assert list(one["model"]) == list(many["model"])
    for ours, theirs in ((many["model"], one["model"]), (many["ema"]["weights"], one["ema"]["weights"])):
        for name, weight in theirs.items():
            close(ours[name], weight, 2e-4)
    assert many["flops"] == one["flops"] and many["parameters"] == one["parameters"]
    ours, theirs = many["optimizer"], one["optimizer"]
    assert ours["param_groups"] == theirs["param_groups"] and list(ours["state"]) == list(theirs["state"])
    for i, own in theirs["state"].items():
        assert list(ours["state"][i]) == list(own)
        for name, value in own.items():
            assert type(ours["state"][i][name]) is type(value)
            close(ours["state"][i][name], value, 2e-4)
    for name in ("logits", "after") if "heard" in many else ():
        torch.testing.assert_close(many["heard"][name], one["heard"][name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mesh", MESHES)
def test_weights_and_state_are_divided_and_averages_swapped_in(meshes, mesh):
    one, many = meshes["1x1"]["adamw"]["held"], meshes[mesh]["adamw"]["held"]
    assert many < {"1x2": 0.65, "2x1": 0.55, "2x2": 0.35, "4x2": 0.2}[mesh] * one
    if mesh in ("1x2", "2x1"):
        places = 2 * 16 * 8  # bytes of every row's positions
        one, many = (meshes[m]["adamw"]["heard"]["cache"] - places for m in ("1x1", mesh))
        assert many == one // int(mesh[2])
    averaged, ema = meshes[mesh]["muon"]["averaged"], meshes[mesh]["muon"]["ema"]["weights"]
    assert list(averaged) == list(ema) and all(torch.equal(averaged[name], ema[name]) for name in ema)
    assert not torch.equal(averaged["embed"], meshes[mesh]["muon"]["model"]["embed"])


@pytest.mark.parametrize("case", PASSED)
def test_a_checkpoint_goes_on_under_any_mesh(meshes, case):
    never_stopped = meshes["1x1"][case]["losses"][2:4]
    for mesh in MESHES:
        close(meshes[mesh][case]["resumed"], never_stopped)
    close(meshes["last"][case], never_stopped)


@pytest.mark.parametrize("mesh", MESHES)
def test_dropout_differs_over_dp_and_not_over_tp_and_goes_on(meshes, mesh):
    here, (dp, tp) = meshes[mesh]["here"], map(int, mesh.split("x"))
    assert all(first == again for first, again, _ in here["drawn"])
    assert here["drawn"][0][0] == here["drawn"][0][2]
    for when in (0, 2):  # as drawn, and after a restart from the state of rank 0 alone
        drawn = [str(rank[when]) for rank in here["drawn"]]
        assert len(set(drawn)) == dp and all(len(set(drawn[r * tp:(r + 1) * tp])) == 1 for r in range(dp))


@pytest.mark.parametrize("mesh", MESHES)
def test_only_rank_0_writes_and_speaks_and_all_stop_together(meshes, mesh):
    here = meshes[mesh]["here"]
    assert here["written"] == 2
    assert here["stops"] == [None, 15, 15]
    assert here["ends"][0] == [("UserError", None), ("UserError", None), ("NonFinite", None)]
    assert set(map(tuple, here["ends"][1:])) == {(("SystemExit", 2), ("SystemExit", 2), ("SystemExit", 3))}
    assert meshes[mesh]["output"] == "rank 0\n"


@pytest.mark.parametrize("world, shape, said", [
    ("2", (1, 3), "dp 1 times tp 3 is 3, but torchrun started 2 processes"),
    (None, (1, 2), r"torchrun --nproc_per_node=2 train_facts.py --dp 1 --tp 2$"),
    (None, (2, 1), r"torchrun --nproc_per_node=2 train_facts.py --dp 2 --tp 1$"),
    ("2", (1, 2, "mps"), "must be auto, cpu, or cuda"), ("2", (1, 2, "cuda:1"), "must be auto"),
    ("2", (1, 2, "cuda"), "a process for each of 0 GPUs")])
def test_what_cannot_be_started_is_one_line(monkeypatch, world, shape, said):
    monkeypatch.setattr(os, "environ", {"WORLD_SIZE": world} if world else {})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["/somewhere/train_facts.py"])
    with pytest.raises(UserError, match=said):
        parallel.start(*shape)


@pytest.mark.parametrize("shape, changes, how, said", [
    ((1, 3), {}, {}, "tp 3 must divide n_head 4"),
    ((1, 4), {}, {}, "tp 4 must divide n_kv_head 2"),
    ((3, 1), {}, dict(batch_size=4), "batch_size 4 must be divisible by dp 3"),
    ((1, 2), dict(qk_norm="full"), {}, "qk_norm 'full' is over all heads"),
    ((1, 2), dict(mixer="full,mla", n_kv_head=4), {}, "mixer 'mla' cannot be divided over tp 2: full, window, strided"),
    ((1, 2), dict(mixer="mamba"), {}, "mixer 'mamba' cannot"),
    ((1, 2), dict(mixer="diff", n_kv_head=2), {}, "n_kv_head 1 must be even"),
    ((1, 2), dict(mixer="strided", n_kv_head=2), {}, "n_kv_head 1 must be even"),
    ((1, 2), dict(ff="mlp,moe"), {}, "ff 'moe' cannot be divided"),
    ((1, 2), dict(activation="solu"), {}, "'solu' normalises"),
    ((1, 2), dict(activation="gelu", ff_mult=27 / 24), {}, "feed-forward's width 27"),
    ((2, 1), dict(ff="moe"), {}, "expert_balance loss is no mean"),
    ((2, 1), {}, dict(optimizer="ivon"), "ivon"), ((1, 2), dict(lora_rank=2), {}, "--lora_rank 0"),
    *((shape, dict(kernels="triton"), {}, "kernels triton are tested in one process only: .*--kernels torch")
      for shape in ((2, 1), (1, 2))),
    ((1, 2), {}, dict(precision=torch.float16), "float16"),
    ((1, 1), {}, dict(optimizer="ivon", precision=torch.float16), "float16 scales: choose bfloat16 or float32"),
    ((2, 1), dict(mixer="mamba"), dict(carry=True), "--no-carry_memory"),
])
def test_what_cannot_be_divided_is_one_line(monkeypatch, shape, changes, how, said):
    monkeypatch.delenv("RANK", raising=False)
    mesh = parallel.Mesh(*shape) if shape != (1, 1) else parallel.Alone()
    with pytest.raises(UserError, match=said):
        mesh.check(TransformerConfig(**{**SMALL, **changes}), **how)


@pytest.mark.parametrize("shape, changes, how", [
    ((1, 1), dict(mixer="mla", n_kv_head=4, ff="moe", kernels="triton"),
     dict(optimizer="ivon", precision=torch.bfloat16, carry=True)),
    ((2, 1), dict(mixer="mamba", ff="moe", expert_balance="bias"), dict(batch_size=4)),
    ((1, 2), dict(ff="none", activation="solu"), dict(batch_size=3)),
    ((2, 2), dict(ff="low_rank"), dict(optimizer="muon", precision=torch.bfloat16)),
])
def test_what_can_be_divided_passes(shape, changes, how):
    mesh = parallel.Mesh(*shape) if shape != (1, 1) else parallel.Alone()
    assert mesh.check(TransformerConfig(**{**SMALL, **changes}), **how) is None


def test_an_error_of_another_rank_is_silent(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(parallel.time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit) as met:
        parallel.Mesh(2).check(TransformerConfig(**SMALL), batch_size=3)
    assert met.value.code == 2


def test_what_is_a_mistake_of_ours():
    """Targets that count in unequal shares; IVON on several processes."""
    y = torch.zeros(2, 4, 2, dtype=torch.int64)
    assert parallel.Mesh(2).weight(y) == 1 and parallel.Alone().weight(y) == 1.0
    y[0, 0] = -1
    assert parallel.Mesh(2, rank=1).weight(y) == pytest.approx(8 / 7)
    y[0, 1, 1] = -1
    with pytest.raises(ValueError, match="unequal shares"):
        parallel.Mesh(2).weight(y)
    with pytest.raises(ValueError, match="ivon"):
        optim.build(dict(optimizer="ivon", lr=0.1), [("a", torch.nn.Parameter(torch.zeros(2)))], {"a": "gain"},
                    mesh=parallel.Mesh(2))


def test_a_state_of_older_groups_is_divided_by_its_own_parameters(monkeypatch):
    """With a weight_decay of 0 what decays and what does not was one group, in the model's order."""
    monkeypatch.setattr(optim, "load_state", lambda optimizer, state: optimizer.load_state_dict(state))  # whole here
    pairs = [(name, torch.nn.Parameter(torch.full((4, 2), float(i)))) for i, name in enumerate("abc", 1)]
    old = optim.SGD([p for _, p in pairs], momentum=0.9)
    for i, (_, p) in enumerate(pairs):
        p.grad = torch.arange(8.0).view(4, 2) + 10 * i
    old.step()
    new = optim.build(dict(optimizer="sgd", lr=0.1, weight_decay=0.1), pairs, dict(a="gain", b="matrix", c="bias"))
    parallel.Mesh(2).load_into(new, written(old.state_dict()))
    assert [len(group["params"]) for group in new.param_groups] == [2, 1]
    for _, p in pairs:
        assert torch.equal(new.state[p]["momentum"], p.grad[:2])
