"""Compiles kernels ahead of time for GPUs that are not there: python tests/aot.py test_kernels

Reads BUILDS of the named test module, {name: (kernel, argument types, constants, options)}, compiles each for sm_80 and
sm_90 (where the module has CHOSEN: only for its pairs of name and capability), and prints JSON: {name: {"80":
{"shared": bytes of shared memory, "ptx": ..., "cubin": bytes of each}, ...}}, or {"error": ...} where it failed. A
process of its own, because TRITON_INTERPRET, which other tests need, must be off.

argument types: what is not constant, in order: "*bf16" (a pointer), "i32", "fp32". constants: {name: value}. options:
num_warps, num_stages.
"""
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
    """What `main` prints, from a process of its own: {name: {capability as a word: sizes, or {"error": ...}}}."""
    here = Path(__file__).resolve()
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": f"{here.parents[1]}{os.pathsep}{here.parent}"}
    done = subprocess.run([sys.executable, here, module], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout)


def check(found, capability):
    """Asserts that one build gave PTX and machine code and that its shared memory fits the GPU."""
    sizes = found[str(capability)]
    assert "error" not in sizes, sizes["error"]
    assert sizes["ptx"] > 0 and sizes["cubin"] > 0
    assert sizes["shared"] <= CAPABILITIES[capability]


if __name__ == "__main__":
    main(sys.argv[1])
