"""What the zoo's Triton kernels cost in machine code: compiled for a GPU that need not be there, and read.

A model is run on the meta device, so that every operator gets the arguments of a real training step.  A driver that
knows only a compute capability takes the place of the CUDA driver: Triton's own launch compiles each kernel as it would
there, into its own cache, and nothing is run.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from vizoo.tools.common import Failure, Table, UserError, build_model

# an H100, for the estimates: instructions that all schedulers issue in a second, bytes/s and FLOP/s that are reached
ISSUE_RATE, BYTES_RATE, FLOP_RATES = 132 * 4 * 1.755e9, 3.0e12, {"float32": 5.0e13}
HALF_RATE = 6.0e14
REGISTERS, SHARED, THREADS, BLOCKS = 65536, 227 << 10, 2048, 32  # of a multiprocessor of compute capability 9.0
SAMPLES = 256  # programs of a launch whose passes through loops are counted
MIX = {  # kinds of instructions by the start of their name, the first that fits
    "shuffles": "SHFL",
    "async_copies": "LDGSTS|UTMA",
    "global_memory": "LDG|STG|ATOM|RED",
    "shared_memory": "LDS|STS",
    "spills": "LDL|STL",
    "tensor_cores": "HMMA|HGMMA",
    "float": "FFMA|FMUL|FADD|FSEL|FSETP|FMNMX|MUFU|F2F|HADD|HMUL|HFMA",
    "integer": "U?(?:IMAD|IADD|LEA|LOP3|ISETP|SEL|PRMT|SHF|IABS|IMNMX)|VIMNMX|VIADD|I2F|F2I",
}
_KINDS = {kind: re.compile(names) for kind, names in MIX.items()}
_NAME = re.compile(r"\*/\s+(?:@!?U?P\w+\s+)?(\w+)")


class Loop(NamedTuple):
    """A loop of a kernel's machine code.

    Attributes:
        first: Index of its first instruction.
        last: Index of its branch back.
        mix: Instructions by kind (keys of ``MIX``).
    """

    first: int
    last: int
    mix: dict[str, int]

    @property
    def length(self) -> int:
        """Instructions."""
        return self.last + 1 - self.first


class Code(NamedTuple):
    """One compiled kernel.

    Attributes:
        model: Model whose training step launches it.
        operator: Operator that launches it.
        shape: Shape of that operator's first tensor.
        kernel: Its name.
        hash: What tells it from every other compilation.
        dtype: Dtype of the model's products.
        precision: How it multiplies float32 tiles; empty where it does not.
        constants: Compile-time arguments, warps and stages.
        registers: Of a thread.
        stack: Bytes of a thread in local memory: spilled registers.
        shared: Bytes of a program in shared memory.
        occupancy: Share of the threads that a multiprocessor can hold.
        instructions: All.
        loops: In the order of their first instruction.
        products: Products of tiles in its loops by the dtype of their inputs; all where it has no loop.
        wide: Operations on tiles of 64-bit integers in its loops.
        programs: Of the launch.
        issue_ms: Time that issuing its instructions takes at least; None where loops could not be counted.
        floor_ms: Time that the whole operator takes at least, by its bytes and its products.
    """

    model: str
    operator: str
    shape: tuple[int, ...]
    kernel: str
    hash: str
    dtype: str
    precision: str
    constants: dict[str, Any]
    registers: int
    stack: int
    shared: int
    occupancy: float
    instructions: int
    loops: list[Loop]
    products: dict[str, int]
    wide: int
    programs: int
    issue_ms: float | None
    floor_ms: float

    @property
    def longest(self) -> Loop:
        """The longest loop with none inside; of a kernel without loops, one that holds no instruction."""
        inner = [
            x for x in self.loops if not any(x.first <= y.first and y.last <= x.last for y in self.loops if y != x)
        ]
        return max(inner, key=lambda loop: loop.length, default=Loop(0, -1, dict.fromkeys(MIX, 0)))


def missing(disassembler: bool = True) -> str:
    """Why no machine code can be made here, or read where the ``disassembler`` is asked for; empty when it can."""
    from vizoo.backbones.ops.backend import HAS_TRITON, INTERPRETED

    if not HAS_TRITON:
        return "the package triton is not installed"
    if INTERPRETED:
        return "TRITON_INTERPRET=1 runs kernels in Python and compiles none"
    if not disassembler:
        return ""
    from triton import knobs

    try:
        for tool in (knobs.nvidia.cuobjdump, knobs.nvidia.nvdisasm):
            subprocess.run([tool.path, "--version"], capture_output=True, check=True)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as e:
        return f"the disassembler that comes with triton cannot be used: {e}"
    return ""


class _Driver:
    """As much of Triton's driver as compilation asks for: a GPU of some compute capability."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("meta")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return "void"

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def once(call: Callable[[], Any], *args: Any, **kwargs: Any) -> list[float]:
            call()  # compiles; an autotuner meets every configuration
            return [0.0, 0.0, 0.0]

        return once

    def get_empty_cache_for_benchmark(self) -> None:
        return None

    def clear_cache(self, cache: Any) -> None:
        return None


class Launch(NamedTuple):
    """A kernel that was compiled, with the arguments of its launch."""

    function: Any
    kernel: Any
    arguments: dict[str, Any]
    grid: tuple[int, ...]


@contextlib.contextmanager
def compiling(capability: int) -> Iterator[list[Launch]]:
    """Context in which launches on meta tensors compile for a GPU of this capability (90 for 9.0) and run nothing.

    Yields:
        What was launched, one entry a launch, added to as it happens.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        names = self.signature.parameters
        bound = self.signature.bind_partial(*args, **{k: v for k, v in kwargs.items() if k in names}).arguments
        size = grid(dict(bound)) if callable(grid) else grid
        launches.append(Launch(self, kernel, dict(bound), tuple(size)))
        return kernel

    before = driver._active  # None where no driver was needed yet; to ask for the default fails without a GPU
    driver.set_active(_Driver(capability))
    JITFunction.run = compile_only
    try:
        yield launches
    finally:
        JITFunction.run = run
        driver.set_active(before)


def _as_on_gpu(dtype: Any) -> Any:
    """What layers do on a GPU but not on the meta device, which neither autocast nor cuDNN knows.

    Products are in half precision with weights in float32, and convolutions keep channels-last maps.
    """
    import torch
    import torch.nn.functional as F
    from torch._prims_common import suggest_memory_format
    from torch.overrides import TorchFunctionMode

    products = {F.linear, F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention, torch.bmm, torch.addmm}
    products |= {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__, torch.einsum}

    class Gpu(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in products and dtype != torch.float32:
                args, kwargs = torch.utils._pytree.tree_map_only(
                    torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (args, kwargs)
                )
            out = func(*args, **(kwargs or {}))
            if func is F.conv2d and any(suggest_memory_format(t) == torch.channels_last for t in args[:2]):
                out = out.contiguous(memory_format=torch.channels_last)
            return out

    return Gpu()


def _operator_calls(model: Any, x: Any, dtype: Any) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Distinct calls of the zoo's operators in one training step on the meta device: operator and arguments."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from vizoo.backbones.ops.backend import kernels_on

    calls: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def key(x: Any) -> str:
        return f"{x.dtype}{list(x.shape)}{x.stride()}" if isinstance(x, torch.Tensor) else repr(x)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "vizoo":
                calls.setdefault(f"{func}{[key(x) for x in args]}", (func, args))
            return func(*args, **(kwargs or {}))

    with kernels_on("meta"), Watch():
        with _as_on_gpu(dtype):
            out = model(x)
        while not isinstance(out, torch.Tensor):
            out = next(iter(out.values() if isinstance(out, dict) else out))
        if out.requires_grad:
            out.float().square().mean().backward()
    yield from calls.values()


def launches(
    name: str, dtype: str, batch: int, capability: int, channels_last: bool = False
) -> Iterator[tuple[Any, tuple[Any, ...], list[Launch]]]:
    """Compile every kernel of a model's training step.

    Args:
        name: Model of the zoo.
        dtype: Dtype of its products; with half precision as by autocast, weights are float32.
        batch: Images.
        capability: Compute capability of the GPU, 90 for 9.0.
        channels_last: Whether images and model are in that memory format.

    Yields:
        An operator, the arguments of a call, and what it launches.
    """
    import torch

    from vizoo.backbones.ops.operators import BODIES

    kind = getattr(torch, dtype)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model = build_model(name, device="meta").train()
    x = torch.empty(batch, *model.pretrained_cfg["input_size"], device="meta").contiguous(memory_format=memory_format)
    if channels_last:
        model = model.to(memory_format=memory_format)
    for operator, args in _operator_calls(model, x, kind):
        body = BODIES[operator._schema.name]  # on meta tensors the operator itself only answers with shapes
        with compiling(capability) as found, torch.no_grad():
            body(*(x.detach() if isinstance(x, torch.Tensor) else x for x in args))
        if found:
            yield operator, args, found


def _floor_ms(operator: Any, args: Sequence[Any], dtype: str) -> float:
    """Least time of an operator by its bytes and products, on the GPU that the constants above describe."""
    import torch

    from vizoo.backbones.ops.cost import COSTS, first_shape

    out = operator(*args)
    tensors = [x for x in (*args, *(out if isinstance(out, tuple) else (out,))) if isinstance(x, torch.Tensor)]
    shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in args]
    first = first_shape([tuple(x.shape) for x in out] if isinstance(out, tuple) else tuple(out.shape))
    cost = COSTS[operator._schema.name](*shapes, out=first)
    size = sum(x.numel() * x.element_size() for x in tensors) if cost.bytes is None else cost.bytes
    return 1e3 * max(size / BYTES_RATE, 2 * cost.macs / FLOP_RATES.get(dtype, HALF_RATE))


def _told(cubin: bytes, *command: str) -> str:
    """What a tool says about a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        return subprocess.run([*command, f.name], capture_output=True, text=True, check=True).stdout


@functools.lru_cache(maxsize=256)
def _usage(cubin: bytes) -> str:
    """Resource usage of a compiled kernel."""
    from triton import knobs

    return _told(cubin, knobs.nvidia.cuobjdump.path, "--dump-resource-usage")


@functools.lru_cache(maxsize=256)
def _listing(cubin: bytes) -> str:
    """Instructions of a compiled kernel; an analysis of their data flow would change nothing but the time it takes."""
    from triton import knobs

    return _told(cubin, knobs.nvidia.nvdisasm.path, "--print-code", "--no-dataflow")


def _mix(lines: Sequence[str]) -> dict[str, int]:
    mix = dict.fromkeys(MIX, 0)
    for line in lines:
        name = _NAME.search(line)
        kind = next((k for k, starts in _KINDS.items() if name and starts.match(name[1])), None)
        if kind:
            mix[kind] += 1
    return mix


def read_listing(listing: str) -> tuple[int, list[Loop]]:
    """Instructions, and loops in the order of their start, of a listing by ``nvdisasm -c``.

    A loop is what a branch back jumps over; those that only wait for a barrier are left out.
    """
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(lines)
        elif re.search(r"/\*[0-9a-f]{4,}\*/", line):
            lines.append(line)
    ends: dict[int, int] = {}
    for i, line in enumerate(lines):
        target = re.search(r"\bBRA\b.*`\((\.L\w+)\)", line)
        if target and labels.get(target[1], i) < i:
            ends[labels[target[1]]] = i
    found = [Loop(first, last, _mix(lines[first : last + 1])) for first, last in sorted(ends.items())]
    waits = [not any(loop.mix.values()) or "SYNCS" in "".join(lines[loop.first : loop.last + 1]) for loop in found]
    return len(lines), [loop for loop, wait in zip(found, waits, strict=True) if not (wait and loop.length < 16)]


class _Nest(NamedTuple):
    """A loop of a kernel's intermediate code: its variable, bounds, the loops inside, and the values it can see."""

    variable: str
    bounds: tuple[str, str, str]  # first, end, step
    inner: list[_Nest]
    defined: dict[str, str]


class _Program:
    """Integers of a kernel's intermediate code (TTIR), as far as the bounds of its loops depend on them."""

    def __init__(self, ttir: str):
        self.parameters = re.findall(r"(%[\w.#-]+): ", next(x for x in ttir.splitlines() if "tt.func public" in x))
        scopes: list[dict[str, str]] = [{}]  # a name may mean something else in another region
        self.loops: list[_Nest] = []
        self.lines: list[str] = []  # inside loops
        open_regions: list[list[_Nest] | None] = []
        for line in ttir.split("tt.func public", 1)[1].split("tt.func private", 1)[0].splitlines()[1:]:
            inside = [r for r in open_regions if r is not None]
            if inside:
                self.lines.append(line)
            if value := re.match(r"\s*(%[\w.#-]+) = (.*)", line):
                scopes[-1][value[1]] = value[2]
            loop = re.search(r"scf\.for (%[\w.#-]+) = (%[\w.#-]+) to (%[\w.#-]+) step (%[\w.#-]+)", line)
            code = re.sub(r"loc\(.*", "", line)
            closed = code.strip().startswith("}")
            if closed and open_regions:
                open_regions.pop()
                scopes.pop()
            if code.rstrip().endswith("{"):
                nest = _Nest(loop[1], (loop[2], loop[3], loop[4]), [], dict(scopes[-1])) if loop else None
                if nest:
                    (inside[-1] if inside else self.loops).append(nest)
                open_regions.append(nest.inner if nest else None)
                scopes.append(dict(scopes[-1]))

    def value(self, name: str, known: dict[str, int], defined: dict[str, str]) -> int:
        """An integer of the code, from those that are known; KeyError if it depends on something else."""
        if name in known:
            return known[name]
        if not name.startswith("%"):
            raise KeyError(name)
        operation, _, rest = defined[name].partition(" ")
        if operation in ("tt.get_program_id", "tt.get_num_programs"):
            return known[f"{operation} {rest[0]}"]
        if operation == "arith.constant":
            found = {"true": 1, "false": 0}.get(rest.split()[0])
            return int(rest.split()[0]) if found is None else found
        a = [self.value(x, known, defined) for x in re.findall(r"%[\w.#-]+", rest.split(" : ")[0])]
        known[name] = _ARITHMETIC[operation](*a, rest)
        return known[name]

    def passes(self, loops: list[_Nest], known: dict[str, int]) -> list[float]:
        """How often the body of each loop runs in one program, in the order of the code."""
        counts: list[float] = []
        for loop in loops:
            seen = dict(known)
            first, end, step = (self.value(x, seen, loop.defined) for x in loop.bounds)
            number = max(0, -(-(end - first) // step))
            counts.append(float(number))
            if loop.inner:
                some = sorted({0, number // 2, number - 1} - {-1})
                parts = [self.passes(loop.inner, {**seen, loop.variable: first + i * step}) for i in some]
                empty = [0.0] * sum(1 for _ in _flat(loop.inner))
                counts += [number * sum(p) / len(some) for p in zip(*parts, strict=True)] if number else empty
        return counts


def _flat(loops: list[_Nest]) -> Iterator[_Nest]:
    for loop in loops:
        yield loop
        yield from _flat(loop.inner)


def _compare(a: int, b: int, text: str) -> int:
    kind = text.split(",")[0].strip()
    return int({"slt": a < b, "sle": a <= b, "sgt": a > b, "sge": a >= b, "eq": a == b, "ne": a != b}[kind])


_ARITHMETIC: dict[str, Callable[..., int]] = {
    "arith.addi": lambda a, b, _: a + b,
    "arith.subi": lambda a, b, _: a - b,
    "arith.muli": lambda a, b, _: a * b,
    "arith.divsi": lambda a, b, _: int(a / b) if b else 0,
    "arith.remsi": lambda a, b, _: int(math.fmod(a, b)) if b else 0,
    "arith.minsi": lambda a, b, _: min(a, b),
    "arith.maxsi": lambda a, b, _: max(a, b),
    "arith.extsi": lambda a, _: a,
    "arith.extui": lambda a, _: a,
    "arith.trunci": lambda a, _: a,
    "arith.select": lambda c, a, b, _: a if c else b,
    "arith.cmpi": _compare,
    "arith.andi": lambda a, b, _: a & b,
    "arith.ori": lambda a, b, _: a | b,
}


def _leaves(kind: Any, value: Any) -> Iterator[Any]:
    """Arguments that the compiled kernel takes: neither constants nor what was specialised to one."""
    if isinstance(kind, (tuple, list)):
        for k, v in zip(kind, value, strict=True):
            yield from _leaves(k, v)
    elif kind != "constexpr":
        yield value


def _passes(program: _Program, launch: Launch) -> list[float]:
    """Mean number of passes through each loop over some programs of a launch."""
    kinds = launch.kernel.src.signature
    values = [x for name, kind in kinds.items() for x in _leaves(kind, launch.arguments.get(name))]
    known = {n: v for n, v in zip(program.parameters, values, strict=True) if type(v) is int}
    axes = dict(zip("xyz", itertools.chain(launch.grid, (1, 1)), strict=False))
    total = math.prod(launch.grid)
    samples = []
    for i in range(min(SAMPLES, total)):
        # spread by the golden ratio: equal steps would meet the same place of every map
        pid = i if total <= SAMPLES else int(total * (i * 0.6180339887498949 % 1))
        here = {f"tt.get_program_id {axis}": pid if axis == "x" else 0 for axis in axes}
        here |= {f"tt.get_num_programs {axis}": number for axis, number in axes.items()}
        samples.append(program.passes(program.loops, known | here))
    return [sum(x) / len(samples) for x in zip(*samples, strict=True)]


def _executed(instructions: int, loops: list[Loop], passes: list[float]) -> float:
    """Instructions that a warp executes: each as often as the innermost loop around it."""
    total = float(instructions)
    last: list[tuple[Loop, float]] = []
    for loop, n in zip(loops, passes, strict=True):
        while last and last[-1][0].last < loop.first:
            last.pop()
        outer = last[-1][1] if last else 1.0
        total += loop.length * (n - outer)
        last.append((loop, n))
    return total


def _occupancy(registers: int, shared: int, threads: int) -> float:
    """Share of the threads that a multiprocessor can hold, with programs of so many threads."""
    blocks = min(REGISTERS // (-(-registers // 8) * 8 * threads), SHARED // (shared + 1024), THREADS // threads, BLOCKS)
    return blocks * threads / THREADS


def _issue_ms(launch: Launch, program: _Program, instructions: int, loops: list[Loop]) -> float | None:
    """Least time of issuing a launch's instructions; None where its loops cannot be counted."""
    try:
        passes = _passes(program, launch)
    except KeyError:  # bounds that depend on what a kernel reads
        return None
    if len(passes) != len(loops):  # the compiler unrolled or split one
        return None
    warps = launch.kernel.metadata.num_warps * math.prod(launch.grid)
    return 1e3 * _executed(instructions, loops, passes) * warps / ISSUE_RATE


def read(launch: Launch, model: str, operator: Any, args: Sequence[Any], dtype: str, floor_ms: float) -> Code:
    """What one launch costs.

    Args:
        launch: Compiled kernel and its arguments.
        model: Model that launches it.
        operator: Operator that launches it.
        args: Arguments of the operator.
        dtype: Dtype of the model's products.
        floor_ms: Least time of the operator.

    Returns:
        The figures.

    Raises:
        Failure: If the listing has another form than expected.
    """
    import torch

    kernel, meta = launch.kernel, launch.kernel.metadata
    cubin = kernel.asm["cubin"]
    resources = re.search(r"REG:(\d+) STACK:(\d+)", _usage(cubin))
    instructions, loops = read_listing(_listing(cubin))
    if resources is None or instructions == 0:
        raise Failure(f"cannot read what the disassembler says about {kernel.name}")
    registers, stack = int(resources[1]), int(resources[2])
    ttir = kernel.asm["ttir"]
    program = _Program(ttir)
    looped = "\n".join(program.lines)
    constants = {k: v for k, v in launch.arguments.items() if kernel.src.signature.get(k) == "constexpr"}
    return Code(
        model=model,
        operator=operator._schema.name.partition("::")[2],
        shape=next(tuple(x.shape) for x in args if isinstance(x, torch.Tensor)),
        kernel=kernel.name,
        hash=kernel.hash[:12],
        dtype=dtype,
        precision=constants.get("PRECISION", ""),
        constants={**constants, "num_warps": meta.num_warps, "num_stages": getattr(meta, "num_stages", None)},
        registers=registers,
        stack=stack,
        shared=meta.shared,
        occupancy=_occupancy(registers, meta.shared, 32 * meta.num_warps),
        instructions=instructions,
        loops=loops,
        products=dict(collections.Counter(re.findall(r"tt\.dot [^\n]*? : tensor<[\dx]*x(\w+)", looped or ttir))),
        wide=len(re.findall(r"= arith\.\w+ .*xi64>", looped)),
        programs=math.prod(launch.grid),
        issue_ms=_issue_ms(launch, program, instructions, loops),
        floor_ms=floor_ms,
    )


def report(
    names: Sequence[str], dtypes: Sequence[str], batch: int, capability: int = 90, channels_last: bool = False
) -> Iterator[Code]:
    """Figures of every kernel that training steps of these models launch.

    Args:
        names: Models of the zoo.
        dtypes: Dtypes of their products; with half precision as by autocast, weights are float32.
        batch: Images.
        capability: Compute capability of the GPU, 90 for 9.0.
        channels_last: Whether images and model are in that memory format.

    Yields:
        One entry for each kernel and call of an operator; an autotuned kernel has one for each configuration.

    Raises:
        UserError: If no machine code can be read here.
    """
    if reason := missing():
        raise UserError(f"--sass: no machine code can be read here: {reason}")
    for dtype, name in itertools.product(dtypes, names):
        for operator, args, found in launches(name, dtype, batch, capability, channels_last):
            floor_ms = _floor_ms(operator, args, dtype)
            seen = set()
            for launch in found:
                if launch.kernel.hash not in seen:  # an autotuner launches its choice once more
                    seen.add(launch.kernel.hash)
                    yield read(launch, name, operator, args, dtype, floor_ms)


COLUMNS = [
    "model",
    "operator",
    "shape",
    "kernel",
    "hash",
    "dtype",
    "precision",
    "constants",
    "registers",
    "stack",
    "shared",
    "occupancy",
    "instructions",
    "loop",
    *MIX,
    "half_products",
    "float_products",
    "wide",
    "programs",
    "issue_ms",
    "floor_ms",
    "capability",
    "torch",
    "triton",
    "vizoo",
    "commit",
]


def row(code: Code) -> dict[str, Any]:
    """Figures of a kernel by the names of ``COLUMNS``; its longest inner loop's for the kinds of instructions."""
    return {
        **{name: getattr(code, name) for name in COLUMNS if name in Code._fields},
        "shape": "x".join(map(str, code.shape)),
        "constants": " ".join(f"{k}={v}".replace(" ", "") for k, v in code.constants.items()),
        "occupancy": code.occupancy,
        "loop": code.longest.length,
        **code.longest.mix,
        "half_products": sum(n for kind, n in code.products.items() if kind in ("bf16", "f16")),
        "float_products": sum(n for kind, n in code.products.items() if kind == "f32"),
        "issue_ms": code.issue_ms,
        "floor_ms": code.floor_ms,
    }


def versions() -> dict[str, str]:
    """Versions of what compiles the kernels."""
    import torch
    import triton

    import vizoo

    return {"torch": torch.__version__, "triton": triton.__version__, "vizoo": vizoo.__version__}


def report_table(rows: Sequence[dict[str, str]]) -> Table:
    """The rows of a report for people, a line a kernel; ``rows`` as they are written in files."""
    shown = {
        "model": "model",
        "kernel": "kernel",
        "shape": "shape",
        "dtype": "dtype",
        "tiles": "tiles",
        "registers": "registers",
        "stack": "stack bytes",
        "shared": "shared bytes",
        "occupancy": "occu- pancy",
        "loop": "loop instructions",
        "shuffles": "shuffles",
        "integer": "integer",
        "half_products": "half products",
        "float_products": "float products",
        "issue_ms": "issue ms",
        "floor_ms": "floor ms",
    }
    tiles = re.compile(r"(?:BLOCK_\w+|T[HW]|BLOCK|num_\w+)=\d+")
    cells = [{**r, "tiles": " ".join(tiles.findall(r["constants"])).replace("num_", "")} for r in rows]
    return Table(list(shown.values()), [[r[k] for k in shown] for r in cells], range(5, len(shown)))


WARM_COLUMNS = ["model", "dtype", "kernels", "compiled", "capability", "torch", "triton", "vizoo", "commit"]


def warm(
    names: Sequence[str], dtypes: Sequence[str], batch: int, capability: int, channels_last: bool = False
) -> Iterator[tuple[str, str, int, int]]:
    """Compile every kernel of the models' training steps into Triton's cache.

    Args:
        names: Models of the zoo.
        dtypes: Dtypes of their products; with half precision as by autocast, weights are float32.
        batch: Images.
        capability: Compute capability of the GPU, 90 for 9.0.
        channels_last: Whether images and model are in that memory format.

    Yields:
        Model, dtype, kernels that it launches, and how many of them had to be compiled.

    Raises:
        UserError: If nothing can be compiled here.
    """
    if reason := missing(disassembler=False):
        raise UserError(f"--warm: no kernel can be compiled here: {reason}")
    from triton import knobs

    compiled: list[str] = []

    def listen(*args: Any, metadata: Any, cache_hit: bool, **kwargs: Any) -> None:
        if not cache_hit:
            compiled.append(metadata["hash"])

    for dtype, name in itertools.product(dtypes, names):
        compiled.clear()
        with knobs.compilation.scope():
            knobs.compilation.listener = listen
            calls = launches(name, dtype, batch, capability, channels_last)
            kernels = {launch.kernel.hash for _, _, found in calls for launch in found}
        yield name, dtype, len(kernels), len(compiled)
