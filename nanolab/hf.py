"""Weights out and in: a run as a folder that Hugging Face's classes load, and a folder of theirs as a model here.

    python -m nanolab.hf export runs/train_enwik8/my_run FOLDER             # AutoModelForCausalLM, AutoTokenizer
    python -m nanolab.hf export runs/train_enwik8/my_run/best.pt FOLDER --dtype bfloat16 --weights ema
    python -m nanolab.hf gguf runs/train_enwik8/my_run FILE.gguf            # llama.cpp; or a folder in a run's place
    python train_enwik8.py --init_from FOLDER                               # sample.py, evaluate.py take it, too

nanolab/forms.py is the table of classes. What none computes is refused in one line; docs/weights.md has the limits.
"""
import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

import kernels
from data import tokens
from data.tokenized import tokenizer_of
from model import TransformerConfig, build_model, from_checkpoint, fused_rows, variant
from models.rope_scaling import scaled
from nanolab.forms import ALSO, FORMS, GATES, LLAMA_CPP, NEIGHBOURS, PLAIN, WAYS, choose, misfits, refuse
from nanolab.run import Checkpoint, as_user_error, command, find_checkpoint, load_checkpoint, write_json
from nanolab.settings import UserError, serve

EVEN = 8  # experts' widths must be multiples of it: 16 bytes of bfloat16, for grouped_mm of transformers
LARGEST = dict(n_layer=10_000, n_expert=10_000, block_size=2 ** 24)  # in a config.json that is believed
PASSED_OVER = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$")  # buffers in old files


# --- Out ---

def folded(c, state):
    """(config, state) of the plainest model that computes the same: scales of branches, of scores, of classifiers, and
    of rope's base are multiplied into weights and base."""
    state, D, rows = dict(state), c.head_dim, c.n_head * c.head_dim
    for i in range(c.n_layer):
        for number, ends in ((1, ("mixer.out",)), (2, ("ff.down", "ff.shared.down"))):
            scale = state.pop(f"blocks.{i}.scale{number}", None)
            if scale is None:
                scale = torch.tensor([(2 * c.n_layer) ** -0.5 if c.residual_scale == "depth" else c.residual_scale])
            for name in [f"blocks.{i}.{end}.{kind}" for end in ends for kind in ("weight", "bias")]:
                if name in state and c.residual_scale != 1.0:
                    t = state[name]
                    wide = scale.expand(c.n_embd).repeat(len(t) // c.n_embd)  # experts lie one below the other
                    state[name] = t * wide.view(-1, *[1] * (t.dim() - 1))
        own = f"blocks.{i}.mixer."
        by = state.pop(own + "qk_scale", None)
        by = c.score_factor if by is None else by / D ** 0.5
        if c.qk_norm and (c.qk_scale or c.score_factor != 1):
            wide = (rows, c.n_kv_head * D) if c.qk_norm == "full" else (D, D)
            state[own + "q_gain"] = by * state.get(own + "q_gain", torch.ones(wide[0]))
            state.setdefault(own + "k_gain", torch.ones(wide[1]))
        elif c.score_factor != 1:
            for name in (own + "qkv.weight", own + "qkv.bias"):
                if name in state:
                    state[name] = torch.cat((state[name][:rows] * by, state[name][rows:]))
    if c.width_factor != 1:
        state["heads.0"] = (state["embed"] if c.tie_weights else state["heads.0"]) / c.width_factor
    changed = dict(residual_scale=1.0, qk_scale=False, parametrisation="standard", init="gpt2", dropout=0.0,
                   tie_weights=c.tie_weights and c.width_factor == 1,
                   qk_gain=c.qk_gain or c.qk_norm and (c.qk_scale or c.score_factor != 1))
    if c.rope_scaling == "ntk":
        width = c.rope_dim if "mla" in c.mixers else D
        changed |= dict(rope_scaling="none", rope_factor=1.0,
                        rope_base=c.rope_base * c.rope_factor ** (width / max(width - 2, 1)))
    return replace(c, **changed), state


def filled(c, state, full):
    """(config, state) with all that the class always has, gains 1 and biases 0, and with experts of an even width."""
    if "moe" in c.ffs:
        W = c.expert_width or max(1, c.ff_width // c.n_expert)
        full, more = {**full, "expert_width": W + -W % EVEN}, -W % EVEN
        for name in [name for name in state if re.search(r"\.ff\.(shared\.)?(up|down)\.weight$", name)]:
            t = state[name]
            if c.ffs[int(name.split(".")[1])] == "moe":  # up (experts W, C); down (experts C, W), shared (C, experts W)
                state[name] = (F.pad(t.view(-1, W, c.n_embd), (0, 0, 0, more)).flatten(0, 1) if ".up." in name else
                               F.pad(t.view(len(t), -1, W), (0, more)).flatten(1))
    c = replace(c, **full)
    with torch.device("meta"):
        skeleton = build_model(c)
    return c, skeleton, {name: state[name] if name in state else (torch.ones if name.endswith("gain") else torch.zeros)(
        t.shape) for name, t in skeleton.state_dict().items()}


def correspondence(form, model):
    """Yields (our tensor, [their tensors], rows of each or None, their way) of all tensors of a model of that class."""
    c, fused = model.config, fused_rows(model)
    for ours in model.state_dict():
        at, key, tail = re.match(r"blocks\.(\d+)\.", ours), ours, ""
        if at:
            key = "#." + ours[at.end():]
            key = key.replace("#.ff.", "#.moe.") if c.ffs[int(at[1])] == "moe" else key
        if key not in form.names:
            key, _, last = key.rpartition(".")
            tail = ".bias" if last == "bias" else ".weight"
        theirs, way = form.names[key] if isinstance(form.names[key], tuple) else (form.names[key], None)
        if c.q_rank is None:
            theirs = theirs.replace("q_b_proj", "q_proj")
        theirs = (form.layers.replace("#", at[1]) if at else "") + theirs + tail
        names = [theirs.replace("@", str(e)) for e in range(c.n_expert - c.n_shared_expert if "@" in theirs else 1)]
        if parts := re.search(r"\((.*)\)", theirs):
            names = [name.replace(parts[0], part) for name in names for part in parts[1].split("|")]
        rows = fused.get(re.sub("bias$", "weight", ours)) if len(names) > 1 else None
        yield ours, names, rows, way


def to_theirs(t, rows, way, c):
    """Our tensor as theirs, a list."""
    t = WAYS[way][0](t, c)
    return [t] if rows is None else list(t.split(rows))


def config_of(kind, c, dtype):
    """The dict of config.json. What is not there is null: a class has numbers of its own for these."""
    form, found = FORMS[kind], dict(architectures=[FORMS[kind].name], model_type=kind, dtype=dtype, torch_dtype=dtype,
                                    bos_token_id=None, eos_token_id=None, pad_token_id=None, use_cache=True)
    for theirs, ours in form.keys.items():
        value = getattr(c, ours)
        if value is None and ours in ("norm_eps", "expert_width"):
            value = (1e-6 if c.norm == "rms" else 1e-5) if ours == "norm_eps" else max(1, c.ff_width // c.n_expert)
        found[theirs] = {**GATES, **PLAIN}[value] if ours == "activation" else value
    for out, _ in form.knots:
        found |= out(c)
    if "expand" in found:
        found["expand"] = int(found["expand"])
    return found | form.fixed


def converted(model):
    """(model_type, TransformerConfig, {name: tensor}, float32) of a Transformer's last layer's first target, as its
    class has them. Raises ValueError as `choose`."""
    state = {name: t.detach().cpu().float() for name, t in model.state_dict().items()}
    choose(model.config)
    c, state = folded(model.config, state)
    kind = choose(c)
    c, skeleton, state = filled(c, state, FORMS[kind].full)
    found = {}
    for ours, theirs, rows, way in correspondence(FORMS[kind], skeleton):
        found |= zip(theirs, to_theirs(state[ours], rows, way, c))
    return kind, c, found


def as_folder(model, dtype="float32"):
    """(config.json's dict, {name: tensor}) of a Transformer. Raises ValueError as `choose`."""
    kind, c, found = converted(model)
    return config_of(kind, c, dtype), {name: t.to(getattr(torch, dtype)).contiguous().clone()
                                       for name, t in found.items()}


def load_model(path, weights):
    """(checkpoint, its Transformer on the CPU) of a script that trains one over text or tokens, or of a folder of
    weights, which is told as a checkpoint of train_facts would be.

    UserError: another script's, weights that it has not, a model of another version.
    """
    if path.is_dir():
        return as_checkpoint(path, weights)
    loaded = complete(load_checkpoint(path))
    if loaded["script"] not in ("train_enwik8", "train_facts"):
        raise UserError(f"{path} is a checkpoint of {loaded['script']}.py: here one of train_enwik8.py or "
                        "train_facts.py is needed")
    with as_user_error(f"{path}: "):
        return loaded, from_checkpoint(loaded, weights)


@contextmanager
def new_place(path):
    """A place beside the Path of what is to be written, which becomes it at the end, or leaves nothing. UserError: it
    is there already, or cannot be written."""
    if path.exists():
        raise UserError(f"{path} is there already: name another")
    place = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield place
        os.replace(place, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
        with suppress(OSError):
            place.unlink()


def export(run, folder, dtype="float32", weights="raw"):
    """Writes a run as a folder that transformers loads. UserError: no class computes the model; the folder is there.

    run: a run's directory, or a checkpoint
    folder: the folder to write, which must not be there yet
    dtype: [float32, bfloat16] of the tensors
    weights: [raw, ema] which weights
    """
    save_file = tokens.needed("safetensors.torch").save_file
    folder, path = Path(folder), find_checkpoint(run)
    loaded, model = load_model(path, weights)
    with as_user_error(f"{path}: "):
        config, found = as_folder(model.for_inference(), dtype)
    words, special = tokenizer_files(tokenizer_in(loaded), config)
    config |= special
    with new_place(folder) as place:
        place.mkdir()
        save_file(found, place / "model.safetensors", metadata={"format": "pt"})
        write_json(place / "config.json", config)
        write_json(place / "generation_config.json", {key: config[key] for key in config if key.endswith("token_id")})
        for name, content in words.items():
            (place / name).write_text(content, encoding="utf-8")
    print(f"{folder}: {config['architectures'][0]}, {sum(t.numel() for t in found.values()):,} parameters in {dtype}"
          + ("" if words else ", without a tokenizer: its task has a vocabulary of its own"))


def tokenizer_in(loaded):
    """The tokenizer of a checkpoint; None: its task has a vocabulary of its own."""
    settings = loaded["settings"]
    if loaded["script"] == "train_enwik8":
        return tokens.Bytes()
    if settings["task"] != "text":
        return None
    tokenizer = tokenizer_of(settings, loaded.get("tokenizer_json"))
    tokens.check(tokenizer, loaded["tokenizer"])
    return tokenizer


def tokenizer_files(tokenizer, config):
    """({file: its text} of a tokenizer, {} of None; the special ids of its config.json)."""
    if tokenizer is None:
        return {}, {}
    special = {"eos_token_id": tokenizer.size} if config["vocab_size"] == tokenizer.size + 1 else {}  # ends a document
    about = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False,
                 model_max_length=config.get("max_position_embeddings") or config.get("n_positions"),
                 **({"eos_token": "<|end|>"} if special else {}))
    return {"tokenizer.json": tokens.as_json(tokenizer, "<|end|>" if special else None),
            "tokenizer_config.json": json.dumps(about)}, special


# --- llama.cpp ---

def gguf(run, file, weights="raw"):
    """Writes a run as a float32 file of llama.cpp, its bytes inside. UserError: llama.cpp computes something else.

    run: a run's directory, a checkpoint, or a folder of weights
    file: the file to write, which must not be there yet
    weights: [raw, ema] which weights
    """
    writer_of, file, path = tokens.needed("gguf").GGUFWriter, Path(file), find_checkpoint(run)
    loaded, model = load_model(path, weights)
    with as_user_error(f"{path}: "):
        kind, c, found = converted(model.for_inference())
        if not isinstance(tokenizer_in(loaded), tokens.Bytes) or c.vocab_size > 257:
            raise ValueError("only a model of bytes, with one id more at most, is written for llama.cpp")
        if kind not in LLAMA_CPP:
            raise ValueError(f"llama.cpp computes no {FORMS[kind].name} as here: it does {', '.join(LLAMA_CPP)}")
        refuse(misfits(LLAMA_CPP[kind], c), "llama.cpp computes another model", LLAMA_CPP[kind].name)
    arch = LLAMA_CPP[kind].name
    with new_place(file) as place:
        writer = writer_of(place, arch)
        for name, value in gguf_fields(arch, c).items():
            getattr(writer, f"add_{name}")(value)
        for name, t in gguf_tensors(arch, c, found).items():
            writer.add_tensor(name, t.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    print(f"{file}: {arch}, {sum(t.numel() for t in found.values()):,} parameters in float32")


def gguf_fields(arch, c):
    """{what GGUFWriter adds: value} of a config. Without an end of its own a byte vocabulary has that no text has, 255:
    llama.cpp would take 11 for both ends, and never draw it."""
    letters, types, end = tokens.byte_letters(), [1] * 256, c.vocab_size - 1
    found = dict(context_length=c.block_size, embedding_length=c.n_embd, block_count=c.n_layer, vocab_size=c.vocab_size,
                 feed_forward_length=c.expert_width if "moe" in c.ffs else c.ff_width, head_count=c.n_head,
                 head_count_kv=c.n_kv_head, key_length=c.head_dim, value_length=c.head_dim, tokenizer_model="gpt2",
                 tokenizer_pre="gpt-2", token_list=letters + ["<|end|>"] * (end - 255),
                 token_types=types + [3] * (end - 255), token_merges=[f"{letters[255]} {letters[254]}"],  # not empty
                 bos_token_id=end, eos_token_id=end, add_bos_token=False)
    found["layer_norm_rms_eps" if c.norm == "rms" else "layer_norm_eps"] = c.norm_eps or (
        1e-6 if c.norm == "rms" else 1e-5)
    if c.positions == "rope" and "mamba" not in c.mixers:
        found |= dict(rope_dimension_count=c.turning or c.head_dim, rope_freq_base=c.rope_base)
    if arch == "gptneox":
        found["parallel_residual"] = bool(c.parallel_residual)
    if c.rope_scaling == "linear":
        found |= dict(rope_scaling_type=tokens.needed("gguf").RopeScalingType.LINEAR, rope_scaling_factor=c.rope_factor)
    if "moe" in c.ffs:
        found |= dict(expert_count=c.n_expert, expert_used_count=c.expert_top_k,
                      expert_feed_forward_length=c.expert_width)
    if "mamba" in c.mixers:
        found |= dict(head_count=0, head_count_kv=0, feed_forward_length=0, ssm_conv_kernel=c.conv_width,
                      ssm_inner_size=int(c.expand * c.n_embd), ssm_state_size=c.state_dim,
                      ssm_time_step_rank=-(-c.n_embd // 16))
    return found


def gguf_tensors(arch, c, found):
    """{llama.cpp's name: tensor} of {name: tensor} of transformers: experts in one, pairs that turn side by side in
    some, Conv1D's matrices turned, Mamba's A itself."""
    library = tokens.needed("gguf")
    names = library.get_tensor_name_map(next(key for key, name in library.MODEL_ARCH_NAMES.items() if name == arch),
                                        c.n_layer)
    experts, made = {}, {}
    for name, t in found.items():
        part = name.rsplit(".", 2)[-2]
        if part in ("q_proj", "k_proj") and arch in NEIGHBOURS:
            t = t.unflatten(0, (-1, 2, c.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        elif part == "query_key_value":
            t = t.unflatten(0, (c.n_head, 3, c.head_dim)).transpose(0, 1).flatten(0, 2)
        elif arch == "gpt2" and part in ("c_attn", "c_fc", "c_proj"):
            t = t.mT if t.dim() == 2 else t
        elif name.endswith("A_log"):
            t = -t.exp()
        elif name.endswith("conv1d.weight"):
            t = t.squeeze(1)
        if (at := re.sub(r"\.experts\.\d+\.", ".experts.", name)) != name:
            experts.setdefault(at, []).append(t)
        else:
            made[name] = t
    made |= {name: torch.stack(parts) for name, parts in experts.items()}
    made = {names.get_name(name, (".weight", ".bias")): t for name, t in made.items()}
    if c.rope_scaling == "llama3":
        plain, slow = (scaled(c.head_dim, c.rope_base, how, c.rope_factor, c.rope_original or max(
            1, round(c.block_size / c.rope_factor)))[0] for how in ("linear", "llama3"))
        made["rope_freqs.weight"] = (plain * c.rope_factor / slow).float()
    return made


# --- In ---

def config_in(d):
    """(kind, TransformerConfig) of a config.json's dict. UserError: a class or a setting that is not read."""
    kind = d.get("model_type")
    if kind not in FORMS:
        raise UserError(f"model_type {str(kind)[:40]!r} is not read: {', '.join(FORMS)} are")
    form = FORMS[kind]
    d = {**form.absent, **d}
    for key, wanted in form.fixed.items():
        parts = wanted.items() if isinstance(wanted, dict) else [(None, wanted)]
        for part, value in parts:
            said = (d.get(key) or {}).get(part, value) if part else d.get(key, value)
            if said != value:
                raise UserError(f"{key} {part + ' ' if part else ''}{said!r} is not read: only {value!r} is")
    found = {name: values[0] for name, values in form.takes.items() if not callable(values)} | form.full
    said = {}
    for theirs, ours in form.keys.items():
        value = d.get(theirs)
        if ours == "activation":
            words = GATES if "swiglu" in form.takes["activation"] else PLAIN
            value = d.get(theirs, "silu")
            value = {hidden: word for word, hidden in words.items()}.get(ALSO.get(value, value), value)
        if value is None and ours in ("vocab_size", "n_embd", "n_layer", "n_head", "block_size", "kv_rank"):
            raise UserError(f"it lacks {theirs}")
        if ours == "norm_eps" and value is None:
            value = 1e-6
        if ours in ("tie_weights", "bias", "parallel_residual"):
            value = bool(value)
        if ours in said and said[ours][1] != value:
            raise UserError(f"{said[ours][0]} {said[ours][1]!r} beside {theirs} {value!r} is not read: it is one "
                            "setting here")
        said[ours] = theirs, value
    found |= {ours: value for ours, (_, value) in said.items()}
    if kind in ("gpt2", "mpt") and not found.get("ff_width"):
        found["ff_width"] = 4 * found["n_embd"]
    for into in (lambda d: {}, *(into for _, into in form.knots)):
        found |= into(d)
        for name, most in LARGEST.items():
            if type(found.get(name)) is int and found[name] > most:
                raise UserError(f"{name} {found[name]:,} is more than a model has")
    return kind, TransformerConfig(**found)


def read_folder(folder):
    """(kind, TransformerConfig, config.json's dict, {name: tensor}) of a folder. UserError, naming the folder: what is
    missing, damaged, not read, or could run code."""
    folder = Path(folder)
    try:
        d = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(d, dict):
            raise UserError("it is no object")
        kind, config = config_in(d)
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json") from None
    except (UserError, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
            RecursionError) as error:
        raise UserError(f"{folder}/config.json is not read: {' '.join(str(error).split())[:300]}") from None
    return kind, config, d, read_tensors(folder)


def read_tensors(folder):
    """{name: tensor} of model.safetensors, or of the shards that its index names. UserError, as read_folder."""
    found, name = {}, "model.safetensors"
    names, index = [name], folder / "model.safetensors.index.json"
    try:
        if not (folder / name).exists() and index.exists():
            names = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                pickles = [path.name for end in ("bin", "pt", "pth", "ckpt") for path in folder.glob(f"*.{end}")]
                raise UserError(f"{folder} has no {name}" + (f"; {pickles[0]} is a pickle, which could run code: it is "
                                                             "not read, save it as safetensors" if pickles else ""))
            found |= tokens.needed("safetensors.torch").load_file(folder / name)
    except UserError:
        raise
    except Exception as error:                           # SafetensorError, or an index that is none
        raise UserError(f"{folder}: {name} is no safetensors file, or damaged: {str(error)[:200]}") from None
    return {name.removeprefix("_orig_mod."): t for name, t in found.items()}


def load(folder):
    """The Transformer of a folder, float32 on the CPU, in training mode; its `.config.block_size` is the context that
    config.json names. UserError, naming the folder: as read_folder, or a tensor that is missing, left over or of
    another shape than config.json says."""
    kind, c, d, found = read_folder(folder)
    form = FORMS[kind]
    top, embed = form.names["embed"].split(".", 1)
    if embed in found:                                   # of a model without its head, as the hub's gpt2
        found = {name if name.startswith("lm_head.") else f"{top}.{name}": t for name, t in found.items()}
    try:
        with torch.device("meta"):
            skeleton = build_model(c)
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise UserError(f"{folder}/config.json: no model can have these sizes: {str(error)[:100]}") from None
    wanted, state = skeleton.state_dict(), {}
    for ours, theirs, rows, way in correspondence(form, skeleton):
        shapes = [t.shape for t in to_theirs(wanted[ours], rows, way, c)]
        for name, shape in zip(theirs, shapes):
            if name not in found:
                raise UserError(f"{folder} lacks the tensor {name}, which its config.json asks for")
            if found[name].shape != shape:
                raise UserError(f"{folder}: {name} is {tuple(found[name].shape)}, but by config.json {tuple(shape)}")
        parts = [found.pop(name).float() for name in theirs]
        t = WAYS[way][1](parts[0] if rows is None else torch.cat(parts), c)
        state[ours] = t.clone(memory_format=torch.contiguous_format)  # the file's pages may change under it
    head = found.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head.float(), state["embed"]):
        raise UserError(f"{folder}: lm_head.weight is another than the embedding, to which config.json ties it")
    left = [name for name in found if not PASSED_OVER.search(name) and not (
        kind == "deepseek_v3" and (at := re.match(r"model\.layers\.(\d+)\.", name)) and int(at[1]) >= c.n_layer)]
    if left:
        raise UserError(f"{folder}: nothing here takes its tensor {left[0]}" + f" and {len(left) - 1} more" * (
            len(left) > 1))
    if kind == "deepseek_v3":
        deepseek_in(d, c, state)
    return build_model(c, state)


def deepseek_in(d, c, state):
    """Neighbours that turn together become halves; the factor of routed experts goes into their outputs."""
    def halves(t, first):  # of the last rope_dim rows of each (first + rope_dim)
        order = torch.arange(len(t)).view(-1, first + c.rope_dim)
        order[:, first:] = torch.cat((order[:, first::2], order[:, first + 1::2]), 1)
        return t[order.flatten()]
    scale = d.get("routed_scaling_factor", 2.5)
    for name in list(state):
        if d.get("rope_interleave", True) and name.endswith("mixer.q.weight"):
            state[name] = halves(state[name], c.head_dim)
        if d.get("rope_interleave", True) and name.endswith("mixer.kv.weight"):
            state[name] = halves(state[name], c.kv_rank)
        if re.search(r"\.ff\.down\.weight$", name) and c.ffs[int(name.split(".")[1])] == "moe" and scale != 1:
            state[name] = state[name] * scale


# --- As a run has them ---

def as_checkpoint(folder, weights="raw"):
    """(what a checkpoint would say, the model) of a folder, for sample.py and evaluate.py. UserError: as `load`, or it
    has no tokenizer.json."""
    if weights == "ema":
        raise UserError("there are no averaged weights: a folder has one set of them")
    model, path = load(folder), Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder} has no tokenizer.json")
    opened = tokens.open_tokenizer(path)
    name, text = ("bytes", None) if isinstance(opened, tokens.Bytes) else (str(path), opened.content.decode())
    settings = Checkpoint(dict(task="text", tokenizer=name, dataset=None, max_bytes=None), folder)
    return Checkpoint(dict(script="train_facts", settings=settings, step=0, tokenizer=opened.fingerprint,
                           tokenizer_json=text), folder), model


@dataclass
class Beginning:
    """What a run begins with by --init_from: a state dict, the text of a tokenizer.json (None: bytes), the rows of the
    embedding, which may be more than a tokenizer has ids, and, where its checkpoints hold adapters alone, the digest of
    these weights. On resume no weights; without --init_from nothing."""
    weights: dict = None
    text: str = None
    rows: int = None
    base: str = None

    def tokenizer(self):
        """What a Text task is told: {} or its tokenizer."""
        return {"tokenizer": tokens.Published(self.text.encode())} if self.text else {}

    def kept(self):
        """What the run's checkpoints hold beside the rest: the tokenizer's text, the base's digest, where there are."""
        return {name: value for name, value in (("tokenizer_json", self.text), ("base", self.base)) if value}

    def kept_of(self, model):
        """What they hold of the model."""
        return variant("models.low_rank:Adapters")(model) if self.base else model

    def vocab_size(self, n):
        """The rows of the embedding for n ids. UserError: it has fewer."""
        if self.rows is not None and n > self.rows:
            raise UserError(f"--init_from: its embedding has {self.rows:,} rows, but this text needs {n:,}")
        return n if self.rows is None else self.rows


def begin_from(settings, checkpoint):
    """The Beginning of a run, whose settings are then those of the folder or run that init_from names, but block_size,
    which only learned positions bound. On resume that is read only where the checkpoint holds adapters alone.
    UserError: as `load_model` or `complete`, a flag that says otherwise, adapters of nothing."""
    folder = settings["init_from"]
    if settings["lora_rank"] and settings["optimizer"] == "ivon":
        raise UserError("optimizer ivon has a posterior of all weights, lora_rank leaves most as they are: choose "
                        "another")
    if checkpoint:
        complete(checkpoint)
        kernels.use(settings["kernels"])                         # not by those of the base
        return Beginning(None, checkpoint.get("tokenizer_json"), folder and checkpoint.get("vocab_size"),
                         checkpoint.get("base"))
    if folder is None:
        if settings["lora_rank"]:
            raise UserError(f"--lora_rank {settings['lora_rank']} adapts a model that is there: which? --init_from, a "
                            "folder of weights or a run")
        return Beginning()
    if settings.get("task", "text") != "text":
        raise UserError("--init_from is for text: --task text")
    loaded, model = load_model(find_checkpoint(folder), "raw")
    kernels.use(settings["kernels"])                             # not by those of the base
    c, state, block_size = model.config, model.state_dict(), settings["block_size"]
    sizes = {name: getattr(c, name) for name in TransformerConfig.shape()
             if name not in ("block_size", "vocab_size", "lora_rank", "lora_on", "lora_alpha")}
    tokenizer, text = its_tokenizer(loaded)
    if "tokenizer" in settings:
        sizes["tokenizer"] = tokenizer
    elif text or c.vocab_size != 256:
        raise UserError(f"--init_from {folder}: its tokenizer is not bytes: train_facts.py --task text takes it")
    for name in [name for name in sizes if name not in settings and sizes[name] != getattr(TransformerConfig, name)]:
        raise UserError(f"--init_from {folder}: its {name} is {sizes[name]}, which train_enwik8.py alone trains")
    typed = [name for name in settings.flags if name in sizes and settings[name] != sizes[name]]
    if typed:
        raise UserError(f"--{typed[0]} {settings[typed[0]]}: by --init_from it is {sizes[typed[0]]}: leave it out")
    if c.rope_scaling in ("yarn", "llama3") and c.rope_original is None:
        sizes["rope_original"] = max(1, round(c.block_size / c.rope_factor))
    if c.learned_positions:
        if "block_size" in settings.flags and block_size > c.block_size:
            raise UserError(f"--block_size {block_size}: by --init_from positions end at {c.block_size}")
        block_size = min(block_size or c.block_size, c.block_size)
        state = cut(state, block_size)
    settings.put(**{name: value for name, value in sizes.items() if name in settings}, block_size=block_size)
    alone = settings["lora_rank"] and settings["lora_only"]
    if alone:
        settings.put(init_from=str(Path(folder).resolve()))      # from where it is resumed, too
    print(f"from {folder}: {model.n_params():,} parameters")
    return Beginning(state, text, c.vocab_size, digest_of(model) if alone else None)


def its_tokenizer(loaded):
    """(what train_facts' setting `tokenizer` is for a checkpoint's model, the text of its tokenizer.json, None of
    bytes). UserError: it was not trained on text."""
    found, name = tokenizer_in(loaded), loaded["settings"].get("tokenizer", "bytes")
    if found is None:
        raise UserError(f"{loaded.path} was trained on {loaded['settings']['task']}, not on text")
    return name, loaded.get("tokenizer_json") or (None if name == "bytes" else tokens.as_json(found))


def complete(loaded):
    """A checkpoint that holds adapters alone, with the weights of its base beside them; any other as it is. UserError:
    the base is gone, or another."""
    if digest := loaded.get("base"):
        path = loaded["settings"]["init_from"]
        try:
            base = load_model(find_checkpoint(path), "raw")[1]
        except UserError as error:
            raise UserError(f"{loaded.path} holds adapters alone, and without their base nothing can be made of them: "
                            f"{error}") from None
        if digest_of(base) != digest:
            raise UserError(f"{loaded.path} holds adapters alone, and {path} has other weights now than those beside "
                            "which they were trained")
        loaded["model"] = cut(base.state_dict(), loaded["settings"]["block_size"]) | loaded["model"]
    return loaded


def cut(state, block_size):
    """A state dict with learned positions no longer than block_size."""
    return {name: t[:block_size].clone() if name.endswith("position") else t for name, t in state.items()}


def digest_of(model):
    """The sha256 of a model's weights and their names, hexadecimal."""
    digest = hashlib.sha256()
    for name, t in model.state_dict().items():
        digest.update(name.encode())
        digest.update(t.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


main = command(serve(export=(export,), gguf=(gguf,)))

if __name__ == "__main__":
    main()
