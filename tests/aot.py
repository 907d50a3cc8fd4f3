"""Compiles kernels ahead of time for GPUs that are not there: python tests/aot.py

Goes through COMPILED of cases.py forward and backward without running a kernel, and compiles what would have been
launched: for the GPU of WHOLE all of it, for the others of CAPABILITIES each kernel once, for those of BACKWARDS as it
comes from the table's end, where types are others. Prints JSON: {"80": {name of the case: [{"kernel": its name,
"shared": bytes of shared memory, "ptx": ..., "cubin": bytes of each}, ...]}}, with "error" where it failed. A process
of its own, because TRITON_INTERPRET, which other tests need, must be off.
"""
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CAPABILITIES = {75: 64, 80: 163, 90: 227, 100: 227, 120: 99}  # and the shared memory of one program, KiB
WHOLE = 80
BACKWARDS = (90, 120)
TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int64": "i64", "int32": "i32"}


def launches(case, capability):
    """[(kernel, {argument: value}, options)] of a pass, each once."""
    from fused import attention, ground
    from interpreter import interpreted, results
    from triton.runtime import JITFunction
    found = {}

    def noted(kernel, *given, grid, warmup, **named):
        named = dict(zip(kernel.arg_names, given)) | named
        options = {name: named.pop(name) for name in set(named) - set(kernel.arg_names)}
        launch = kernel, signed(kernel, named), options
        found[kernel.__name__, str(launch[1:])] = launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", noted)
        patch.setattr(ground, "INTERPRETED", True)  # else no kernel takes tensors of a CPU
        patch.setattr(attention, "limit_of", lambda x: attention.shared_limit(divmod(capability, 10)))
        with interpreted():
            results(case.op, case.make(case.dtypes[0]), constant=case.constant)
    return found.values()


def signed(kernel, arguments):
    """{argument: its type, or (value,) where it is constant; with "!" where it is a multiple of 16, as addresses of
    torch's tensors are}: what Triton makes of a launch."""
    found = {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if hasattr(value, "data_ptr"):
            found[parameter.name] = "*" + TYPES[str(value.dtype).removeprefix("torch.")] + "!"
        elif parameter.is_constexpr or value is None or type(value) is int and value == 1:
            found[parameter.name] = (value,)
        else:
            found[parameter.name] = "fp32" if isinstance(value, float) else "i32" + "!" * (value % 16 == 0)
    return found


def build(kernel, signature, options, capability):
    """One kernel for one GPU: its sizes in bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    at = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel, signature={name: "constexpr" if type(kind) is tuple else kind.strip("!")
                              for name, kind in signature.items()},
        constexprs={at[name]: kind[0] for name, kind in signature.items() if type(kind) is tuple},
        attrs={at[name]: [["tt.divisibility", 16]] for name, kind in signature.items() if kind[-1] == "!"})
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {"shared": made.metadata.shared, "ptx": len(made.asm["ptx"]), "cubin": len(made.asm["cubin"])}


def main():
    """Prints what became of the launches."""
    from cases import COMPILED
    found = {capability: {name: [] for name in COMPILED} for capability in CAPABILITIES}
    for capability, cases in found.items():
        known = set()
        for name in [*COMPILED][::-1 if capability in BACKWARDS else 1]:
            for kernel, signature, options in launches(COMPILED[name], capability):
                if kernel in known and capability != WHOLE:
                    continue
                known.add(kernel)
                try:
                    made = build(kernel, signature, options, capability)
                except Exception as error:  # any failure of the compiler is what the test asks for
                    made = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
                cases[name].append({"kernel": kernel.__name__, **made})
    print(json.dumps(found))


def compiled():
    """What `main` prints, from a process of its own.

    Kept in the user's cache under a hash of all that it comes from, unless a build failed.
    """
    import triton
    here = Path(__file__).resolve()
    root = here.parents[1]
    sources = [here, here.with_name("cases.py"), root / "kernels.py", *sorted(root.glob("fused/*.py"))]
    digest = hashlib.sha256(triton.__version__.encode() + b"".join(path.read_bytes() for path in sources)).hexdigest()
    kept = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nanolab" / f"compiled-{digest[:32]}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": f"{root}{os.pathsep}{here.parent}"}
    done = subprocess.run([sys.executable, here], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    if '"error": ' not in done.stdout:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")  # whole or not there, whoever else writes it
        part.write_text(done.stdout)
        part.replace(kept)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
