"""Compiles kernels ahead of time for GPUs that are not there: python tests/aot.py test_kernels_compiled

Reads BUILDS of the named test module, {name: (kernel, argument types, constants, options)}, compiles each for sm_80 and
sm_90 (where the module has CHOSEN: only for its pairs of name and capability), and prints JSON: {name: {"80":
{"shared": bytes of shared memory, "ptx": ..., "cubin": bytes of each}, ...}}, or {"error": ...} where it failed. A
process of its own, because TRITON_INTERPRET, which other tests need, must be off.

argument types: what is not constant, in order: "*bf16" (a pointer), "i32", "fp32". constants: {name: value}. options:
num_warps, num_stages.
"""
import hashlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

CAPABILITIES = {80: 163 * 1024, 90: 227 * 1024}  # and the shared memory that one program may take, bytes


def build(kernel, types, constants, options, capability):
    """One kernel for one GPU: its sizes in bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    kernel = getattr(kernel, "fn", kernel) if type(kernel).__name__ in ("Autotuner", "Heuristics") else kernel
    rest = iter(types)
    signature = {name: "constexpr" if name in constants else next(rest) for name in kernel.arg_names}
    if (left := list(rest)) or (unknown := set(constants) - set(kernel.arg_names)):
        raise ValueError(f"{kernel.__name__}: {left or unknown} are no arguments")
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if signature[name].startswith("*")}  # as torch allocates: without it nothing would be pipelined
    made = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned),
                          target=GPUTarget("cuda", capability, 32), options=options)
    return {"shared": made.metadata.shared, "ptx": len(made.asm["ptx"]), "cubin": len(made.asm["cubin"])}


def main(module):
    """Prints what became of every build of the test module."""
    module, found = importlib.import_module(module), {}
    chosen = getattr(module, "CHOSEN", None)
    for name, (kernel, types, constants, options) in module.BUILDS.items():
        found[name] = {}
        for capability in CAPABILITIES:
            if chosen is not None and (name, capability) not in chosen:
                continue
            try:
                found[name][capability] = build(kernel, types, constants, options, capability)
            except Exception as error:  # any failure of the compiler is what the test asks for
                found[name][capability] = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    print(json.dumps(found))


def compiled(module):
    """What `main` prints, from a process of its own: {name: {capability as a word: sizes, or {"error": ...}}}.

    Kept in the user's cache under a hash of all that it comes from, unless a build failed.
    """
    import triton
    here = Path(__file__).resolve()
    root = here.parents[1]
    sources = [here, here.with_name(f"{module}.py"), root / "kernels.py", *sorted(root.glob("fused/*.py"))]
    digest = hashlib.sha256(triton.__version__.encode() + b"".join(path.read_bytes() for path in sources)).hexdigest()
    kept = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nanolab" / f"{module}-{digest[:32]}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": f"{root}{os.pathsep}{here.parent}"}
    done = subprocess.run([sys.executable, here, module], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found = json.loads(done.stdout)
    if not any("error" in sizes for build in found.values() for sizes in build.values()):
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")  # whole or not there, whoever else writes it
        part.write_text(done.stdout)
        part.replace(kept)
    return found


if __name__ == "__main__":
    main(sys.argv[1])
