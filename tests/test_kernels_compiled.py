"""Every kernel compiles ahead of time, for GPUs that are not there, and fits their shared memory."""
import aot
import pytest
import torch

import kernels
from interpreter import TRITON, kernels_of

adamw, attention, codes, experts, recurrence, rows = map(kernels_of, (
    "adamw", "attention", "codes", "experts", "recurrence", "rows"))


def norm_builds():
    """Both norms at a model's width and at the widest; every pointer in use, and those of a bare one."""
    found = {}
    for name, C, kind, centred, bare in (("rms", 1024, "*bf16", False, False), ("layer", 64, "*bf16", True, True),
                                         ("layer", kernels.WIDEST_ROW, "*fp32", True, False)):
        height, columns, warps = rows.norm_blocks(C)
        sizes = dict(CENTRED=centred, ROWS=height, COLUMNS=columns)
        missing = ["residual", "s", "gain", "bias"] if bare else [] if centred else ["bias"]
        missing += [] if centred else ["means"]
        types = [kind] * (6 - len(set(missing) - {"means"})) + ["*fp32"] * (1 + centred) + ["i32"] * 4 + ["fp32"]
        found[f"{name} {C} forward"] = (rows.norm_forward, types, {**sizes, **dict.fromkeys(missing)},
                                        dict(num_warps=warps))
        missing = ["gain", "bias", "ds", "gain_sums", "bias_sums"] if bare else [] if centred else ["bias", "bias_sums"]
        missing += [] if centred else ["means"]
        types = [kind] * (1 if bare else 3 if centred else 2) + ["*fp32"] * (1 + centred) + [kind] * (2 if bare else 3)
        types += ["*fp32"] * (0 if bare else 2 if centred else 1) + ["i32"] * 5
        found[f"{name} {C} backward"] = (rows.norm_backward, types, {**sizes, **dict.fromkeys(missing)},
                                         dict(num_warps=warps))
    return found


def row_builds():
    """The other kernels at a model's sizes."""
    heads, pairs, warps = rows.rotary_blocks(64)
    gate_rows, columns, gate_warps = rows.gate_blocks(1368)
    block, entropy_warps = rows.entropy_blocks(50257)
    gate = dict(KIND="swiglu", ROWS=gate_rows, COLUMNS=columns)
    return {
        "rotary": (rows.turn_rows, ["*bf16", "*fp32", "*fp32", "*bf16", *["i32"] * 8],
                   dict(BACK=False, ROWS=heads, PAIRS=pairs), dict(num_warps=warps)),
        "rotary back": (rows.turn_rows, ["*bf16", "*fp32", "*fp32", "*bf16", *["i32"] * 8],
                        dict(BACK=True, ROWS=heads, PAIRS=pairs), dict(num_warps=warps)),
        "gate forward": (rows.gate_forward, ["*bf16", "*bf16", *["i32"] * 3], gate, dict(num_warps=gate_warps)),
        "gate backward": (rows.gate_backward, [*["*bf16"] * 3, *["i32"] * 4], {**gate, "KIND": "geglu"},
                          dict(num_warps=gate_warps)),
        "bilinear backward": (rows.gate_backward, [*["*bf16"] * 3, *["i32"] * 4], {**gate, "KIND": "bilinear"},
                              dict(num_warps=gate_warps)),
        "gelu forward": (rows.plain_forward, ["*bf16", "*bf16", "i32"], dict(KIND="gelu", BLOCK=rows.FLAT),
                         dict(num_warps=4)),
        "relu2 backward": (rows.plain_backward, ["*bf16", "*bf16", "*bf16", "i32"],
                           dict(KIND="relu2", BLOCK=rows.FLAT), dict(num_warps=4)),
        "entropy forward": (rows.entropy_forward, ["*bf16", "*i64", "*fp32", "*fp32", *["i32"] * 3],
                            dict(BLOCK=block), dict(num_warps=entropy_warps)),
        "entropy backward": (rows.entropy_backward, ["*bf16", "*i64", "*fp32", "*fp32", "*bf16", *["i32"] * 3],
                             dict(BLOCK=block), dict(num_warps=entropy_warps)),
    }


def code_builds():
    """Every kernel at sizes of a model: 256 codes wide, 1024 classes."""
    found = {}
    for dtype, word in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
        (height, several, width), warps = codes._tile(256, dtype)
        found[f"nearest {word}"] = (codes._nearest, [word, word, "*fp32", "*i64", "i32", "i32"],
                                    dict(C=256, MIXED=False, ROWS=height, CODES=several, WIDTH=width),
                                    dict(num_warps=warps))
    (height, block), warps = codes._rows(1024)
    shape, options = dict(K=1024, ROWS=height, BLOCK=block), dict(num_warps=warps)
    word, number = "*bf16", ["i32", "fp32"]
    found["gumbel forward"] = (codes._gumbel_forward, [word, word, word, "*i64", "*fp32", "*fp32", *number],
                               dict(shape, NOISE=True, HARD=False), options)
    found["gumbel backward"] = (codes._gumbel_backward, [word, word, "*fp32", "*fp32", word, word, *number],
                                dict(shape, NOISE=True), options)
    found["reinmax forward"] = (codes._reinmax_forward, [word, word, word, "*i64", *["*fp32"] * 3, *number],
                                dict(shape, NOISE=True), options)
    found["reinmax backward"] = (codes._reinmax_backward, [word, "*i64", *["*fp32"] * 3, word, word, *number],
                                 shape, options)
    return found


def step_builds():
    """The kernels with all that they can do, at the chunks of a large model."""
    shape = dict(COLUMNS=adamw.COLUMNS, CHUNK=adamw._chunk(2 ** 27), BLOCK=adamw.BLOCK)
    options, common = dict(num_warps=adamw.WARPS), ["*i64", "*i32", "*fp32", "*fp32", "*fp32", "fp32", "i32"]
    return {"norms": (adamw._sums, common, dict(shape, CLIP=False, KIND=0), options),
            "dots": (adamw._sums, common, dict(shape, CLIP=False, KIND=1), options),
            "rest": (adamw._sums, common, dict(shape, CLIP=True, KIND=2), options),
            "finish": (adamw._finish, ["*i64", "*fp32", "*fp32", "i32", "i32"], shape, options),
            "update": (adamw._update, common + ["fp32"] * 6, dict(shape, CLIP=True, ORTHOGRAD=True), options)}


def scan_builds():
    """{name: (kernel, types, constants, options)}: a layer of 512, inner width 1024, 16 states, 8 experts of 1536; and
    what becomes of kernels whose sizes are 1, which Triton takes for constants."""
    full, half, size = "*fp32", "*bf16", "i32"
    blocks, options = recurrence.STEP_BLOCKS, recurrence.STEP_OPTIONS
    made = {"min_gru_forward": (recurrence.min_gru_forward, [half, half, full, full, size, size], blocks, options),
            "min_gru_backward": (recurrence.min_gru_backward, [half, half, full, full, full, half, half, full, size,
                                                               size], blocks, options),
            "min_gru_backward of one": (recurrence.min_gru_backward, [full] * 8, {**blocks, "T": 1, "features": 1},
                                        options)}
    mixed = [half, full, full, half, half, full]  # u, dt, A, Bm, Cm, D
    grads = [half, full] + [full] * 5  # of u, dt, A, Bm, Cm, D, h
    for name, I, N, sizes in [("", 1024, 16, {}), (" of one", 1, 1, {"T": 1, "I": 1, "N": 1})]:
        (blocks, options), rest = recurrence.selective_blocks(I, N), [] if sizes else [size] * 3
        made["selective_forward" + name] = (recurrence.selective_forward, mixed + [full] * 4 + rest,
                                            {**blocks, **sizes, "KEEP": True}, options)
        made["selective_backward" + name] = (recurrence.selective_backward, mixed + [full] * 4 + grads + rest,
                                             {**blocks, **sizes}, options)
    for kind, pointer in [(torch.bfloat16, half), (torch.float32, full)]:
        types = [pointer, pointer, "*i64", pointer]
        blocks, options = experts.grouped_blocks(16384, 8, 1536, 512, kind)
        for turned in (False, True) if pointer == half else (False,):
            made[f"grouped_rows {pointer} {turned}"] = (experts.grouped_rows, types + [size] * 3,
                                                        {**blocks, "TURNED": turned}, options)
        blocks, options = experts.weight_blocks(1536, 512, kind)
        made[f"grouped_weight {pointer}"] = (experts.grouped_weight, types + [size] * 2, blocks, options)
    return made


POINTERS = {**dict.fromkeys(("q", "k", "v", "o", "do", "dq", "dk", "dv")), "lse": "*fp32", "delta": "*fp32",
            "part": "*fp32", "lengths": "*i32", "prefixes": "*i32", "positions": "*i32"}
STRIDES = {"a": 2 ** 20, "n": 2 ** 20, "b": 2 ** 20, "t": 1024, "h": 64, "d": 1}  # of (B, T, H, D) in memory


def entry(kernel, dtype, sizes, **constants):
    """A build: flags, sizes and strides are constant, and what a launch finds to be 1."""
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    names = list(kernel.arg_names)
    strides = {name: STRIDES[name[-1]] for name in names if name[-2:-1] == "_" and name[-1] in STRIDES}
    constants = {**strides, **constants, **sizes}
    types = [POINTERS[name] or f"*{dtype}" if name in POINTERS else "fp32" if name.endswith("scale") else "i32"
             for name in names if name not in constants]
    return kernel, types, constants, options


def attention_builds():
    """{name: (kernel, type, sizes by the limit of shared memory, constants)}."""
    kernels = {"forward": attention.forward_kernel, "dq": attention.dq_kernel, "dkv": attention.dkv_kernel}
    flags = dict(CAUSAL=True, WINDOWED=True, PREFIXED=False, PADDED=False, PLACED=False, N=1, rep=1)
    every = dict(CAUSAL=True, WINDOWED=True, PREFIXED=True, PADDED=True, PLACED=True)
    for D, dtype, size in ((64, "bf16", 2), (128, "bf16", 2), (64, "fp32", 4)):
        for kind, kernel in kernels.items():
            constants = dict(every if (D, kind) == (128, "dkv") else flags, D=D, DV=D)
            yield f"{kind} {D} {dtype}", (kernel, dtype, lambda limit, kind=kind, D=D, size=size:
                                          attention.blocks(kind, D, D, size, limit), constants)
    yield "one", (attention.split_kernel, "bf16", lambda limit: attention.blocks_one(4, 128, 0, 128, 2, limit, False),
                  dict(PADDED=True, SHARED=False, D=128, EXTRA=0, DV=128, T=1))
    yield "latent", (attention.split_kernel, "bf16", lambda limit: attention.blocks_one(
        16, 512, 64, 512, 2, limit, True),
                     dict(PADDED=False, SHARED=True, D=512, EXTRA=64, DV=512, T=1, G=1))
    yield "join", (attention.join_kernel, "bf16", lambda limit: dict(num_warps=1, num_stages=1),
                   dict(DV=512, BP=32, BDV=512, T=1))


BUILDS, CHOSEN = {}, []  # {name: (kernel, types, constants, options)}; which of them are compiled for which capability
for make in (norm_builds, row_builds, code_builds, step_builds, scan_builds) if TRITON else ():
    BUILDS |= (found := make())
    CHOSEN += [(name, capability) for name in found for capability in aot.CAPABILITIES]
for name, (kernel, dtype, choose, constants) in attention_builds() if TRITON else ():
    for capability, limit in aot.CAPABILITIES.items():
        made = entry(kernel, dtype, choose(limit), **constants)
        key = name if BUILDS.setdefault(name, made) == made else f"{name}, sm_{capability}"
        BUILDS[key] = made
        CHOSEN.append((key, capability))


@pytest.fixture(scope="module")
def compiled():
    """What the compiler said of every build."""
    return aot.compiled(__name__.split(".")[-1])


@pytest.mark.parametrize("name, capability", CHOSEN)
def test_kernel_compiles_and_fits(compiled, name, capability):
    sizes = compiled[name][str(capability)]
    assert "error" not in sizes, sizes["error"]
    assert sizes["ptx"] > 0 and sizes["cubin"] > 0
    assert sizes["shared"] <= aot.CAPABILITIES[capability]
