"""Compile a Triton kernel for GPUs that are not here: ``python tests/kernels/aot_main.py KERNEL [--first] [cc ...]``.

``KERNEL`` is a folder of ``hf_accel/kernels``, or ``all``; ``--first`` compiles one case of it. A process of its own,
because one that has imported Triton's interpreter cannot compile. Prints one line per case; the exit code is 1 if a
case fails or if no case was found.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
import time

COMPUTE_CAPABILITIES = (80, 90, 100)


def kernel_modules(kernel: str) -> list[str]:
    import hf_accel.kernels

    packages = [m.name for m in pkgutil.iter_modules(hf_accel.kernels.__path__, "hf_accel.kernels.") if m.ispkg]
    chosen = [name for name in packages if kernel in ("all", name.rpartition(".")[2])]
    return sorted(f"{name}.triton" for name in chosen if importlib.util.find_spec(f"{name}.triton"))


def main(kernel: str, ccs: tuple[int, ...], first: bool = False) -> int:
    import triton

    from hf_accel.kernels.common.aot import compile_case

    print(f"triton {triton.__version__} from {triton.__path__[0]}")
    compiled, failed, start = 0, 0, time.perf_counter()
    for module in kernel_modules(kernel):
        op = module.split(".")[-2]
        for cc in ccs:
            cases = list(importlib.import_module(module).aot_cases(cc))
            for case in cases[:1] if first else cases:
                began = time.perf_counter()
                try:
                    binary = compile_case(case, cc)
                except Exception as error:  # noqa: BLE001 - a failure of any kind is reported, the rest go on
                    failed += 1
                    print(f"FAIL sm{cc} {op} {case.name}: {type(error).__name__}: {error}", flush=True)
                else:
                    compiled += 1
                    seconds = time.perf_counter() - began
                    print(
                        f"ok   sm{cc} {op} {case.name}: {binary.metadata.shared} B shared, {seconds:.1f} s",
                        flush=True,
                    )
    print(f"{compiled} compiled, {failed} failed, {time.perf_counter() - start:.0f} s")
    return 0 if compiled and not failed else 1


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    given = [word for word in sys.argv[2:] if word != "--first"]
    sys.exit(main(sys.argv[1], tuple(map(int, given)) or COMPUTE_CAPABILITIES, "--first" in sys.argv))
