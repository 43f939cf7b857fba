"""Compile the kernels for a named GPU on a machine without one, and read what the compiler made of them.

`python -m rmu_kernels.aot` prints registers, spills and access widths for every target.
"""

import re
import subprocess
import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rmu_kernels import launch
from rmu_kernels.reference import Term

TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TRITON_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Launch(NamedTuple):
    kernel: triton.JITFunction
    arguments: tuple
    options: dict


@contextmanager
def recorded_launches():
    """The list of launches that the block asks for; none of them runs."""
    launches = []

    def record(kernel, programs, *arguments, **options):
        launches.append(Launch(kernel, arguments, options))

    with patch.object(launch, "run", record):
        yield launches


def specialise(value, path: tuple, constants: dict, attributes: dict, fixed: bool):
    """The type of an argument in Triton's signature, as its launcher derives it."""
    if isinstance(value, tuple):
        types = [specialise(v, (*path, i), constants, attributes, fixed) for i, v in enumerate(value)]
        return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
    if value is None or (isinstance(value, int) and value == 1 and not fixed):
        constants[path] = value
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    number = value.data_ptr() if isinstance(value, Tensor) else value
    if number % 16 == 0 and not fixed:
        attributes[path] = [["tt.divisibility", 16]]
    if isinstance(value, Tensor):
        return TRITON_TYPES[value.dtype]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_launch(call: Launch, target: GPUTarget):
    """The compiled kernel of one launch."""
    kernel = call.kernel
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = call.options[parameter.name]
        else:
            signature[parameter.name] = specialise(
                call.arguments[i], (i,), constants, attributes, parameter.do_not_specialize
            )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options={"num_warps": call.options["num_warps"]})


@dataclass
class Resources:
    """registers: of a thread. spilled: bytes of local memory of a thread. accesses: global loads and stores, such as
    {"load 128": 2, "store 128": 1}, widths in bits (NVIDIA only)."""

    registers: int
    spilled: int
    accesses: Counter


def tool(name: str, *arguments: str, binary: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(NVIDIA_TOOLS / name), *arguments, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resources(compiled) -> Resources:
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        return Resources(
            registers, int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1]), Counter()
        )
    usage = tool("cuobjdump", "--dump-resource-usage", binary=compiled.asm["cubin"])
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    accesses = Counter()
    for operation, modifiers in re.findall(
        r"\b(LDG|STG)((?:\.\w+)*)", tool("nvdisasm", "-c", binary=compiled.asm["cubin"])
    ):
        width = re.search(r"\.(?:[US])?(128|64|16|8)\b", modifiers)
        accesses[f"{'load' if operation == 'LDG' else 'store'} {width[1] if width else 32}"] += 1
    return Resources(registers, stack, accesses)
