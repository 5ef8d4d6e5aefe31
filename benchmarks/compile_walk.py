"""Compiles the walk's kernels for Hopper (sm_90) and prints what ptxas reports, as a table; needs Triton, no GPU.

    python benchmarks/compile_walk.py [width ...]

Each width is that of chunk, head and hidden layer: 16, 32 or 64 (all three by default, some ten minutes on one core).
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nestlearn.functional.kernels.backward import walk_backward
from nestlearn.functional.kernels.forward import walk_forward

INTEGERS = ("heads", "tokens", "stream", "slots", "step")
NUMBERS = ("main_scale", "projection_scale", "largest_gate", "bound")
PTXAS = Path(triton.backends.nvidia.__file__).parent / "bin" / "ptxas"


def compile_for_hopper(kernel: Any, width: int, *, rule: int = 0, momentum: bool = False) -> Any:
    """The kernel with bf16 operands, token reads, bounded errors and memories that decay to their initial state."""
    fixed = {"C": width, "K": width, "N": width, "M": 5, "RULE": rule, "READ": 0, "MOMENTUM": momentum}
    fixed |= {"BOUNDED": True, "OPERAND": tl.bfloat16}
    names = kernel.arg_names
    if not momentum:
        fixed |= dict.fromkeys(name for name in names if "momentum" in name)
    signature = {
        name: "constexpr" if name in fixed else "i64" if name in INTEGERS else "fp32" if name in NUMBERS else "*fp32"
        for name in names
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in fixed.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name] == "*fp32"},
    )
    options = {"num_warps": 8 if width == 64 else 4, "num_stages": 1}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def ptxas_report(ptx: str) -> tuple[str, str]:
    """(registers a thread, bytes a thread spills by stores and loads in its code)."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(PTXAS), "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.search(r"Used (\d+) registers", report)
    assert spills is not None
    assert registers is not None
    return registers[1], f"{spills[1]} / {spills[2]}"


def main() -> None:
    print("| kernel | width | momentum | warps | registers | spills, bytes | shared, KiB | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for width in [int(x) for x in sys.argv[1:]] or [16, 32, 64]:
        for kernel in (walk_forward, walk_backward):
            for momentum in (False, True):
                start = time.perf_counter()
                compiled = compile_for_hopper(kernel, width, momentum=momentum)
                seconds = time.perf_counter() - start
                registers, spills = ptxas_report(compiled.asm["ptx"])
                print(
                    f"| {kernel.fn.__name__} | {width} | {'yes' if momentum else 'no'} | {compiled.metadata.num_warps} "
                    f"| {registers} | {spills} | {compiled.metadata.shared / 1024:.0f} | {seconds:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
