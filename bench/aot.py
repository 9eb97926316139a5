"""Compiles every Triton kernel, and every .cu file where nvcc is there, without a GPU: `make aot`.

Prints registers, spills (bytes a thread), shared memory and tensor-core instructions; exits with 1 where one fails.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def variants():
    """(label, kernel, signature, constants, warps, stages) of what is compiled."""
    from torch import bfloat16, float16, float32

    from headprune.kernels.attention_forward import attention_forward_kernel, padded, tiles

    pointers = ("q_ptr", "k_ptr", "v_ptr", "o_ptr")
    strides = [name for name in attention_forward_kernel.arg_names if name.startswith("stride")]
    for name, dtype in (("bf16", bfloat16), ("fp16", float16), ("fp32", float32)):
        for dim in (64, 128):
            for causal in (False, True):
                m, n, warps, stages = tiles(dtype, dim)
                signature = {
                    **dict.fromkeys(pointers, f"*{name}"), "lse_ptr": "*fp32", "kv_of_query_ptr": "*i32", "mask_ptr": "*i1",
                    "gate_ptr": "*fp32", **dict.fromkeys(strides, "i32"), "heads": "i32", "q_len": "i32", "kv_len": "i32",
                    "scale": "fp32",
                }  # fmt: skip
                constants = {
                    "HEAD_DIM": dim, "VALUE_DIM": dim, "BLOCK_D": padded(dim), "BLOCK_DV": padded(dim), "BLOCK_M": m,
                    "BLOCK_N": n, "CAUSAL": causal, "HAS_MASK": False, "HAS_GATE": False,
                }  # fmt: skip
                label = f"attention_forward {name} d{dim}{' causal' if causal else ''}"
                yield label, attention_forward_kernel, signature, constants, warps, stages


def compile_triton(label, kernel, signature, constants, warps, stages, capability) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    full = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    aligned = [name for name in kernel.arg_names if name.endswith("_ptr") or name.startswith("stride")]
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, full, {(kernel.arg_names.index(name),): value for name, value in constants.items()}, attrs)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages})
    usage = resource_usage(built.asm["cubin"])
    return {
        "kernel": label, "arch": f"sm_{capability}", **usage, "shared": built.metadata.shared,
        "tensor_core": built.asm["ptx"].count(TENSOR_CORES[capability]),
    }  # fmt: skip


def resource_usage(cubin: bytes) -> dict:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}
    # Triton's functions call nothing, so that whatever lies on the stack was spilled.
    return {"registers": found["REG"], "spills": found["STACK"] + found["LOCAL"]}


def compile_cuda(path: Path) -> None:
    arches = [("80", "80"), ("90a", "90a"), ("100", "100")]
    flags = [f"-gencode=arch=compute_{virtual},code=sm_{real}" for virtual, real in arches]
    subprocess.run(["nvcc", "-O3", "-Xptxas", "-v", *flags, "-c", str(path), "-o", "/dev/null"], check=True)


def main() -> int:
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed: no Triton kernel was compiled")
        rows = []
    else:
        rows = [compile_triton(*variant, capability) for variant in variants() for capability in TENSOR_CORES]
    columns = ("kernel", "arch", "registers", "spills", "shared", "tensor_core")
    for row in [dict(zip(columns, columns)), *rows]:
        print(f"{row['kernel']:36}" + "".join(f"{row[column]:>12}" for column in columns[1:]))
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        if shutil.which("nvcc"):
            compile_cuda(path)
        else:
            print(f"nvcc is not on the PATH: {path.name} was not compiled")
    return 0


if __name__ == "__main__":
    sys.exit(main())
