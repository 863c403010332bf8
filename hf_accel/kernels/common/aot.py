"""Ahead-of-time compilation of the Triton kernels for GPUs that are not in this machine.

Each ``kernels/OP/triton.py`` lists, in ``aot_cases(cc)``, the kernels with the tile sizes its launcher
would really pick on compute capability ``cc`` (80, 90, 100, ...). Compiling them needs neither a GPU nor a
driver, because ptxas is in the triton wheel, and finds what the interpreter cannot: code that does not
lower, and tiles that do not fit in shared memory. It says nothing about speed or about results.

The process must not have ``TRITON_INTERPRET`` set: the interpreter replaces the language functions for good.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_accel.errors import UnsupportedByKernel

# Bytes of shared memory that one program can ask for, by compute capability (CUDA programming guide,
# "Technical specifications per compute capability").
SHARED_MEMORY_LIMIT: dict[int, int] = {
    75: 64 * 1024,
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    103: 227 * 1024,
    120: 99 * 1024,
}


@dataclass(frozen=True)
class AotCase:
    """One specialisation of one kernel.

    ``signature`` maps *every* argument to its Triton type (``"*bf16"``, ``"i32"``, ``"fp32"``,
    ``"constexpr"``); ``constexprs`` gives the values of the constexpr ones; ``aligned`` names the arguments
    divisible by 16, as pointers and most strides are in a real launch.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    aligned: tuple[str, ...] = ()


def make_case(
    name: str,
    kernel: Any,
    constexprs: Mapping[str, Any],
    types: Mapping[str, str] | None = None,
    num_warps: int = 4,
    num_stages: int = 2,
) -> AotCase:
    """A case by the naming rule of our kernels: pointers are Capitalised, other run-time arguments are not.

    ``types`` gives element types of pointers and types of scalars; what it leaves out is ``i32``. Pointers
    and the arguments named ``stride_*`` are taken to be divisible by 16.
    """
    types = types or {}
    unknown = sorted({*types, *constexprs} - set(kernel.arg_names))
    if unknown:
        raise ValueError(f"{name}: the kernel has no arguments {unknown}.")
    signature: dict[str, str] = {}
    for argument in kernel.arg_names:
        kind = types.get(argument, "i32")
        if argument in constexprs:
            kind = "constexpr"
        elif argument[0].isupper():
            kind = "*" + kind
        signature[argument] = kind
    aligned = tuple(a for a, t in signature.items() if t[0] == "*" or a.startswith("stride_"))
    return AotCase(name, kernel, signature, constexprs, num_warps, num_stages, aligned)


def shared_memory_limit(cc: int) -> int:
    """Bytes of shared memory that one program may use on compute capability ``cc``."""
    if cc not in SHARED_MEMORY_LIMIT:
        known = ", ".join(map(str, SHARED_MEMORY_LIMIT))
        raise UnsupportedByKernel(f"compute capability {cc} is not in the table of shared memory ({known}).")
    return SHARED_MEMORY_LIMIT[cc]


def compile_case(case: AotCase, cc: int) -> Any:
    """Compile ``case`` for ``cc`` down to machine code and return Triton's compiled kernel.

    ``.asm["ptx"]`` is the assembly and ``.metadata.shared`` the shared memory in bytes, which is checked
    against the device (compilation itself does not object): :class:`UnsupportedByKernel` if it is too much.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = case.kernel
    while type(function).__name__ in ("Autotuner", "Heuristics"):
        function = function.fn
    names = list(function.arg_names)
    if set(names) != set(case.signature):
        missing, surplus = set(names) - set(case.signature), set(case.signature) - set(names)
        raise ValueError(f"{case.name}: signature lacks {sorted(missing)} and has unknown {sorted(surplus)}.")
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    source = ASTSource(
        fn=function,
        signature={name: case.signature[name] for name in names},
        constexprs=dict(case.constexprs),
        attrs=attributes,
    )
    # Contraction of a*b+c is a default that Triton changes between versions: fixed here and in the launchers.
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)
    if not compiled.asm.get("cubin"):
        raise UnsupportedByKernel(f"{case.name}: no machine code came out for compute capability {cc}.")
    limit = shared_memory_limit(cc)
    if compiled.metadata.shared > limit:
        raise UnsupportedByKernel(
            f"{case.name}: needs {compiled.metadata.shared} bytes of shared memory, compute capability {cc} "
            f"has {limit}. Choose a smaller tile or fewer stages for it."
        )
    return compiled
