"""What the compiler makes of the warp-specialised kernel: the overlap that it is written for is in the machine code."""

import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper", reason="Triton is not installed")

import triton
from triton.backends.nvidia.compiler import get_ptxas

from headprune.kernels import hopper_launch
from headprune.kernels.launch import compile_ahead

DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
DIMS = (64, 128)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """{head_dim: (ptx, what ptxas says, machine code)} of the causal kernel with its default tiles."""
    folder, found = tmp_path_factory.mktemp("hopper"), {}
    variants = list(hopper_launch.aot_variants(90))
    for dim in DIMS:
        variant = next(variant for variant in variants if f"bf16 d{dim} causal" in variant.label)
        built = compile_ahead(variant.launch, 90)
        (folder / "kernel.ptx").write_text(built.asm["ptx"])
        (folder / "kernel.cubin").write_bytes(built.asm["cubin"])
        assemble = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", folder / "kernel.ptx", "-o", folder / "again.cubin"]
        said = subprocess.run(assemble, capture_output=True, text=True, check=True).stderr
        code = subprocess.run([DISASSEMBLER, folder / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
        found[dim] = built.asm["ptx"], said, code
    return found


@pytest.mark.parametrize("dim", DIMS)
def test_tiles_come_by_bulk_copies_and_warpgroups_change_their_registers(compiled, dim):
    ptx, _, _ = compiled[dim]
    # q of each consumer, k and v, and the output of each consumer; a copy is at most 64 columns wide.
    assert ptx.count("cp.async.bulk.tensor.4d") - ptx.count("cp.async.bulk.tensor.4d.shared") == 2
    assert ptx.count("cp.async.bulk.tensor.4d.shared") >= 4 * dim // 64
    assert {"24", "240"} <= set(re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", ptx))


@pytest.mark.parametrize("dim", DIMS)
def test_products_run_asynchronously_and_nothing_of_a_tile_is_spilled(compiled, dim):
    ptx, said, _ = compiled[dim]
    # Per consumer: q k^T (dim / 16 steps) of the first block and in two loops; p v (128 / 16 steps) in two loops and at the end.
    assert ptx.count("wgmma.mma_async") == 2 * 3 * (dim // 16 + 128 // 16)
    # C7510 to C7518: "wgmma.mma_async instructions are serialized due to ...".
    assert "(C75" not in said
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert spilled is None or int(spilled[1]) <= 64


@pytest.mark.parametrize("dim", DIMS)
def test_the_exponentials_of_a_block_run_before_the_wait_for_the_output_of_the_one_before(compiled, dim):
    """The compiler may move arithmetic across the wait; then softmax and tensor cores would take turns within a consumer."""
    _, _, code = compiled[dim]
    events = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([01])|(MUFU\.EX2)", code)
    between, counts = None, []
    for wait, _ in events:
        if wait == "1":
            between = 0
        elif wait == "0" and between is not None:
            counts.append(between)
            between = None
        elif between is not None:
            between += 1
    # 64 rows of 128 scores are 64 exponentials for each of a warpgroup's 128 threads.
    assert len(counts) == 4  # two consumers, a masked and an unmasked loop
    assert min(counts) >= 60
