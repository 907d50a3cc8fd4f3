"""Every kernel compiles ahead of time, for GPUs that are not there, and fits their shared memory."""
import ast
from pathlib import Path

import aot
import pytest

import kernels
from cases import COMPILED
from interpreter import TRITON

pytestmark = pytest.mark.skipif(not TRITON, reason="needs Triton")


@pytest.fixture(scope="module")
def compiled():
    """What the compiler said of every launch."""
    return aot.compiled()


def check(launches, capability):
    for made in launches:
        assert "error" not in made, made
        assert made["ptx"] > 0 and made["cubin"] > 0
        assert made["shared"] <= aot.CAPABILITIES[capability] * 1024, made


@pytest.mark.parametrize("name", COMPILED)
def test_launches_compile_and_fit(compiled, name):
    launches = compiled[str(aot.WHOLE)][name]
    assert launches
    check(launches, aot.WHOLE)


@pytest.mark.parametrize("capability", aot.CAPABILITIES)
def test_every_kernel_compiles_and_fits(compiled, capability):
    """All that fused/ launches."""
    launched = {node.value.id for file in Path(kernels.__file__).parent.glob("fused/*.py")
                for call in ast.walk(ast.parse(file.read_text())) if isinstance(call, ast.Call)
                and isinstance(node := call.func, ast.Subscript)}
    found = [made for launches in compiled[str(capability)].values() for made in launches]
    assert {made["kernel"] for made in found} == launched and len(launched) > 20
    check(found, capability)
