"""The forward kernel compiles for Hopper (sm_90) down to machine code, which needs no GPU.

`benchmarks/compile_walk.py` does the same for both kernels in all sizes, which takes too long for a test.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from house import ROOT

SCRIPT = """
from compile_walk import compile_for_hopper
from nestlearn.functional.kernels.forward import walk_forward

compiled = compile_for_hopper(walk_forward, 16)
assert len(compiled.asm["cubin"]) > 0
assert "f32.bf16.bf16.f32" in compiled.asm["ptx"], "no product runs on the tensor cores with sums in fp32"
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason='needs Triton: pip install "nestlearn[kernels]"')
def test_the_forward_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    paths = [str(ROOT / "benchmarks"), str(ROOT / "src"), environ.get("PYTHONPATH", "")]
    environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    # Triton reads a kernel's source from its file, so the script may come from a string and the kernels may not.
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=550
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
