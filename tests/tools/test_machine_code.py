"""Machine code of the GPU kernels: how it is read, and what every kernel may cost."""

import csv
import os
import subprocess
import sys

import pytest

from vizoo.backbones.ops._kernels import SHARED_BYTES
from vizoo.tools import bench
from vizoo.tools.gpu import machine_code as code

TRANSFORMERS = ["nat_tiny", "dependencyvit_small", "vit_base_patch16_224_tcpa", "litv2_s"]
CONVOLUTIONS = ["halo_h1", "overlock_t", "mobilenetv2_100_ulsam_r13_14_16_17_g4"]
DILATED = ["dinat_tiny"]  # by the kernels of nat_tiny
AGGREGATED = ["moh_vit_small_80"]
WIDE = {"aggregated_attention", "aggregated_attention_backward"}  # in float32 whatever the dtype: logits of 34 and more
EXACT = {"halo_h1", "litv2_s"}  # float32 in three products in TF32 would leave no registers
# kernels that a model's first training step may wait for: a few, and for each size of kernels in OverLoCK
COMPILATIONS = {"overlock_t": 28, "mobilenetv2_100_ulsam_r13_14_16_17_g4": 8, "litv2_s": 8, "moh_vit_small_80": 22}
# most instructions of the loop and registers, by kernel and shape of the queries, in bfloat16
LOOPS = {
    ("_halo_fwd_kernel", "128x64x64x4x16"): (320, 100),
    ("contmix_fwd_kernel", "128x128x14x14"): (350, 128),
    ("neighborhood_fwd_kernel", "128x56x56x2x32"): (400, 255),
    **{("aggregated_taps_fwd_kernel", shape): (128, 64) for shape in ("128x56x56x72", "128x14x14x288")},
    **{("aggregated_taps_bwd_kernel", shape): (200, 128) for shape in ("128x56x56x72", "128x14x14x288")},
    **{("aggregated_vectors_bwd_kernel", shape): (128, 128) for shape in ("128x56x56x72", "128x14x14x288")},
}
LISTING = """
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0020*/              @!P0 SHFL.BFLY PT, R2, R2, 0x1, 0x1f ;
.L_x_1:
        /*0030*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0040*/                   LDS.128 R4, [R4] ;
        /*0050*/              @P1  BRA `(.L_x_1) ;
        /*0060*/                   FFMA R1, R2, R3, R4 ;
        /*0070*/              @P0  BRA `(.L_x_0) ;
.L_x_2:
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*0090*/              @!P0 BRA `(.L_x_2) ;
        /*00a0*/                   EXIT ;
"""
TTIR = """
module {
  tt.func public @kernel(%x: !tt.ptr<f32> loc("x"(#loc)), %n: i32 loc("n"(#loc)), %s.0: i32, %s.1: i32) attributes {} {
    %c0 = arith.constant 0 : i32 loc(#loc1)
    %c1 = arith.constant 1 : i32 loc(#loc1)
    %c4 = arith.constant 4 : i32 loc(#loc1)
    %pid = tt.get_program_id x : i32 loc(#loc2)
    %end = arith.addi %n, %pid : i32 loc(#loc3)
    %4 = arith.addi %end, %c0 : i32 loc(#loc3)
    %m = "tt.reduce"(%x) <{axis = 0 : i32}> ({
    ^bb0(%p: f32, %q: f32):
      %5 = arith.maxnumf %p, %q : f32 loc(#loc7)
      tt.reduce.return %5 : f32 loc(#loc7)
    }) : (tensor<4xf32>) -> f32 loc(#loc7)
    %5 = arith.addi %4, %c0 : i32 loc(#loc3)
    %a:2 = scf.for %i = %c0 to %5 step %c4 iter_args(%b = %c0) -> (i32)  : i32 {
      %inner = scf.for %j = %c0 to %i step %c1 iter_args(%d = %c0) -> (i32)  : i32 {
        %wide = arith.extsi %j : i32 to i64 loc(#loc4)
        scf.yield %d : i32
      } loc(#loc5)
      %6 = arith.addi %i, %c0 : i32 loc(#loc3)
      scf.yield %b : i32
    } loc(#loc6)
    %6 = "tt.reduce"(%x) <{axis = 0 : i32}> ({
    ^bb0(%p: f32, %q: f32):
      %5 = arith.maxnumf %p, %q : f32 loc(#loc7)
      tt.reduce.return %5 : f32 loc(#loc7)
    }) : (tensor<4xf32>) -> f32 loc(#loc7)
    scf.for %k = %c1 to %s.1 step %c1  : i32 {
    } loc(#loc7)
    tt.return
  }
}
"""


def test_reads_a_listing():
    instructions, loops = code.read_listing(LISTING)
    assert instructions == 11
    assert [(x.first, x.last) for x in loops] == [(1, 7), (3, 5)]  # the wait for a barrier is none
    assert loops[0].mix == {**dict.fromkeys(code.MIX, 0), "shuffles": 1, "integer": 1, "tensor_cores": 1} | {
        "float": 1,
        "shared_memory": 1,
    }
    assert loops[1].length == 3


def test_counts_passes():
    """Two passes of the outer loop of 7 instructions, of which 3 are in an inner one that runs 5 times in all."""
    _, loops = code.read_listing(LISTING)
    assert code._executed(11, loops, [2.0, 5.0]) == (11 - 7) + (7 - 3) * 2 + 3 * 5


def test_evaluates_bounds():
    program = code._Program(TTIR)
    assert program.parameters == ["%x", "%n", "%s.0", "%s.1"]
    known = {"%n": 9, "%pid": 3, "%s.1": 6}
    assert program.passes(program.loops, known) == [3.0, 0 + 4 + 8, 5.0]
    assert len([x for x in program.lines if "arith.extsi" in x]) == 1
    with pytest.raises(KeyError):
        program.passes(program.loops, {"%pid": 3})


def run(*words, precision="none", listed=True):
    """``vizoo bench`` in a process of its own, in which kernels are compiled and not interpreted.

    Where nothing depends on the instructions, every kernel has those of ``LISTING``: to list them takes most of the
    time.
    """
    script = (
        "import sys, torch; from vizoo.tools import bench; from vizoo.tools.gpu import machine_code as code; "
        + f"code._listing = lambda cubin: {LISTING!r}; " * (not listed)
        + f"torch.backends.cuda.matmul.fp32_precision = {precision!r}; sys.exit(bench.main(sys.argv[1:]))"
    )
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run([sys.executable, "-c", script, *words], env=env, capture_output=True, text=True, check=False)


def kernels(folder, names, dtype, precision="none"):
    """Rows of the report on these models."""
    out = folder / "kernels.csv"
    listed = dtype == "bfloat16"  # the dtype of LOOPS
    done = run("--sass", *names, "--dtype", dtype, "--out", str(out), precision=precision, listed=listed)
    if "no machine code can be read here" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return list(csv.DictReader(out.read_text(encoding="utf-8").splitlines()))


def faults(row):
    """What a kernel costs more than it may."""
    half, of_tile = row["dtype"] != "float32" and row["operator"] not in WIDE, (row["kernel"], row["shape"])
    loop, registers = LOOPS.get(of_tile, (10**6, 255)) if row["dtype"] == "bfloat16" else (10**6, 255)
    limits = {
        "stack": 0 if half else 64,
        "shared": SHARED_BYTES,
        "wide": 0,
        "loop": loop,
        "registers": registers,
        **({"float_products": 0} if half else {}),
    }
    where = f"{row['model']} {row['kernel']} {row['shape']} {row['constants']}"
    return [f"{where}: {k} {row[k]} > {most}" for k, most in limits.items() if int(row[k]) > most]


@pytest.mark.parametrize(
    ("names", "dtype", "precision"),
    [
        ([*TRANSFORMERS, *CONVOLUTIONS, *DILATED, *AGGREGATED], "bfloat16", "none"),
        (
            ["overlock_t", "halo_h1", "vit_base_patch16_224_tcpa"],
            "float16",
            "none",
        ),  # with the most products of gradients
        (
            [*TRANSFORMERS, "halo_h1", "mobilenetv2_100_ulsam_r13_14_16_17_g4"],
            "float32",
            "none",
        ),  # three products in TF32
        (["dependencyvit_small", "vit_base_patch16_224_tcpa"], "float32", "ieee"),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{x[0]}-{len(x)}",
)
def test_budgets(names, dtype, precision, tmp_path):
    rows = kernels(tmp_path, names, dtype, precision)
    assert {row["model"] for row in rows} == set(names)
    if dtype == "float32":
        products = {(row["model"], row["precision"]) for row in rows if row["float_products"] != "0"}
        told = {p for model, p in products if model not in EXACT}
        assert told <= {"ieee" if precision == "ieee" else "tf32x3"}
        assert {p for model, p in products if model in EXACT} <= {"ieee"}
    assert [fault for row in rows for fault in faults(row)] == []
    for name in names:
        own = [row for row in rows if row["model"] == name]
        layers = {(row["shape"], row["constants"]) for row in own if row["kernel"] == "_halo_fwd_kernel"}
        # a HaloNet has layers of several head sizes and strides: forward, queries, keys for each
        assert len({row["hash"] for row in own}) <= (3 * len(layers) if layers else COMPILATIONS.get(name, 6)), name


def test_warm_fills_the_cache(tmp_path, monkeypatch):
    """Each kernel of a training step is compiled once, and none again."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    first, second = (run("--warm", "dependencyvit_small", "--dtype", "bfloat16") for _ in range(2))
    if "no kernel can be compiled here" in first.stderr:
        pytest.skip(first.stderr.strip())
    (_, _, kernels, compiled), again = (
        next(x for x in done.stdout.splitlines() if "dependencyvit_small" in x).split() for done in (first, second)
    )
    assert kernels == compiled != "0"
    assert again[2:] == [kernels, "0"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sass", "--warm"], "not allowed with argument --sass"),
        (["--sass", "resnet50"], "'resnet50' is not one model of the zoo"),
        (
            ["--sass", "--pass", "train"],
            "goes with names of models, --batch, --dtype, --channels-last, --capability, --out, --json; got --pass",
        ),
        (["--warm", "--out", "x.txt"], "--out 'x.txt': the ending must be .json or .csv or .md"),
        (["--sass", "--batch", "1", "2"], "--batch: --sass takes one number, got 1 2"),
        (["--sass", "--capability", "70"], "--capability"),
        (["litv2_s", "--capability", "90"], "--capability: needs --sass or --warm"),
        (["--warm", "nat_tiny"], "TRITON_INTERPRET=1"),
        (["--sass", "nat_tiny"], "TRITON_INTERPRET=1"),
        ([], "got none"),
        (["litv2_s", "halo"], "got 'litv2_s' 'halo'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_options(words, message, capsys):
    assert bench.main(words) == 2
    assert message in capsys.readouterr().err
