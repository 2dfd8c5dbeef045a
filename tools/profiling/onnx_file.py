"""Models in ONNX files: run by onnxruntime, counted from the shapes of their graphs.

A node is an operator of the namespace ``onnx_file`` here, which has the price of its counterpart in PyTorch.  What has
none, such as a loop or a quantised layer, is named as uncounted.  Parameters are the floating numbers that a file
holds, buffers the whole ones: an exporter may have merged norms into convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vizoo.backbones.ops.cost import Cost, find_operator, register_cost
from vizoo.tools.common import Failure, UserError, check_file, named
from vizoo.tools.profiling.prices import PRICES

MISSING = "an ONNX file needs {}: pip install 'vizoo[onnx]'"
FEW = 1024  # elements of a constant that may be a shape, and is kept for the shapes of what follows
SPACE = "onnx_file"
SCHEMA = "(Tensor[] given, int[] ranks, int[] sides, ScalarType[] dtypes, str equation, bool transposed) -> Tensor[]"
LIBRARY = torch.library.Library(SPACE, "DEF")

_LIKE = {  # counterparts in PyTorch, whose prices these have
    "_softmax": "Softmax LogSoftmax Hardmax",
    "gelu": "Gelu FastGelu QuickGelu",
    "silu": "Swish HardSwish Mish Softplus Elu Selu Celu PRelu Softsign",
    "sigmoid": "Sigmoid Tanh HardSigmoid",
    "native_layer_norm": """LayerNormalization GroupNormalization InstanceNormalization RMSNormalization
    MeanVarianceNormalization LpNormalization LRN""",
    "_native_batch_norm_legit_no_training": "BatchNormalization",
    "mean": """ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSum
    ReduceLogSumExp ArgMax ArgMin TopK MaxPool AveragePool GlobalAveragePool GlobalMaxPool LpPool""",
    "leaky_relu": """Add Sub Mul Div Pow Sqrt Reciprocal Exp Log Erf Abs Neg Relu LeakyRelu ThresholdedRelu Clip Min Max
    Sum Mean Floor Ceil Round Sign Sin Cos Tan Mod Equal Greater GreaterOrEqual Less LessOrEqual And Or Not Xor Where
    IsNaN IsInf CumSum""",
    "copy": """Reshape Transpose Flatten Squeeze Unsqueeze Identity Cast CastLike Shape Size Concat Split Slice Gather
    GatherElements GatherND ScatterElements ScatterND Expand Tile Pad ConstantOfShape Range DepthToSpace SpaceToDepth
    Dropout NonZero OneHot EyeLike Trilu Compress""",
}
_BY_NUMBERS = {"NonZero", "Unique", "NonMaxSuppression", "Compress"}  # numbers decide the shapes of what they make
_VIEWS = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Shape", "Size", "Dropout"}


def _conv(given: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=math.prod(out) * math.prod(given[1][1:]), other=math.prod(out) * (len(given) > 2))


def _conv_transpose(given: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=math.prod(given[0]) * math.prod(given[1][1:]), other=math.prod(out) * (len(given) > 2))


def _matmul(given: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
    return Cost(macs=math.prod(out) * given[0][-1])


def _gemm(given: Any, ranks: Any, sides: Any, dtypes: Any, equation: str, transposed: bool, out: Any = None) -> Cost:
    return Cost(macs=math.prod(out) * given[0][0 if transposed else -1], other=math.prod(out) * (len(given) > 2))


def _einsum(given: Any, ranks: Any, sides: Any, dtypes: Any, equation: str, transposed: bool, out: Any = None) -> Cost:
    """As ``torch.einsum`` counts on tensors of these shapes."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        torch.einsum(equation, *(torch.empty(shape, device="meta") for shape in given))
    return Cost(macs=counter.get_total_flops() // 2)


def _resize(given: Any, ranks: Any, sides: Any, dtypes: Any, equation: str, transposed: bool, out: Any = None) -> Cost:
    return Cost(other={"nearest": 0, "linear": 8, "cubic": 32}[equation] * math.prod(out))


def _like(price: Callable[..., Cost], view: bool) -> Callable[..., Cost]:
    def cost(given: Any, *args: Any, out: Any = None, **kwargs: Any) -> Cost:
        return Cost(other=price(*given, out=out).other, bytes=0 if view else None)

    return cost


def _define(name: str) -> Any:
    """The operator of a kind of node, made where there is none: it gives tensors without numbers."""
    found = find_operator(f"{SPACE}::{name}")
    if found is None:
        LIBRARY.define(f"{name}{SCHEMA}")
        LIBRARY.impl(name, _run_without_numbers, "Meta")
        LIBRARY.impl(name, _run_without_numbers, "BackendSelect")  # nodes without inputs
        found = find_operator(f"{SPACE}::{name}")
    return found


def _run_without_numbers(
    given: list[Tensor], ranks: list[int], sides: list[int], dtypes: list[torch.dtype], equation: str, transposed: bool
) -> list[Tensor]:
    left = list(sides)
    shapes = [[left.pop(0) for _ in range(rank)] for rank in ranks]
    return [torch.empty(s, dtype=d, device="meta") for s, d in zip(shapes, dtypes, strict=True)]


def _register() -> None:
    products = {"Conv": _conv, "ConvTranspose": _conv_transpose, "MatMul": _matmul, "Gemm": _gemm, "Einsum": _einsum}
    like = {
        name: _like(PRICES[f"aten::{aten}"], name in _VIEWS) for aten, names in _LIKE.items() for name in names.split()
    }
    for name, cost in {**like, **products, "Resize": _resize}.items():
        register_cost(f"{SPACE}::{name}", _define(name))(cost)


_register()


class OnnxFile(nn.Module):
    """The model in a file.

    Inputs on the meta device make it go through the graph by shapes alone; others are computed by onnxruntime, on the
    CPU, or on a GPU by a build of it that has CUDA.

    Args:
        file: Its path.

    Raises:
        UserError: If onnx is not installed, or the file is no model.
    """

    def __init__(self, file: str) -> None:
        super().__init__()
        try:
            import onnx
            from onnx.inliner import inline_local_functions
        except ImportError:
            raise UserError(f"model file {file!r}: {MISSING.format('onnx')}") from None
        check_file(file, "model file")
        try:
            model = inline_local_functions(onnx.load(file, load_external_data=False))
        except Exception as e:  # whatever the parser raises
            raise UserError(f"model file {file!r} is no ONNX model: {named(e)}") from e
        self.file, self.place = file, torch.device("cpu")
        self.session: Any = None
        self.constants: dict[str, str] = {}  # name in the graph -> parameter or buffer
        graph = model.graph
        for node in [n for n in graph.node if n.op_type == "Constant" and n.attribute[0].name == "value"]:
            graph.initializer.append(node.attribute[0].t)
            graph.initializer[-1].name = node.output[0]
            graph.node.remove(node)
        for i, constant in enumerate(graph.initializer):
            self._keep(f"constant{i}", constant)
        self.inputs = [v for v in graph.input if v.name not in self.constants]
        self.graph = model.SerializeToString()

    def _keep(self, name: str, constant: Any) -> None:
        """Keep shape and dtype of a constant, and of those that may be a shape the numbers in the graph."""
        t = torch.empty(tuple(constant.dims), dtype=_dtype(constant.data_type), device="meta")
        self.constants[constant.name] = name
        if t.is_floating_point():
            self.register_parameter(name, nn.Parameter(t))
        else:
            self.register_buffer(name, t)
        if t.numel() > FEW:
            dims, kind, label = list(constant.dims), constant.data_type, constant.name
            constant.Clear()
            constant.dims.extend(dims)
            constant.data_type, constant.name = kind, label

    def images(self, size: tuple[int, int] | None) -> list[Tensor] | None:
        """Inputs of one image as the file describes them.

        Args:
            size: Height and width where the file leaves them open; None is 224.

        Returns:
            Tensors on the meta device, zeros where they are whole numbers; None if it leaves other sides open.
        """
        found = []
        for value in self.inputs:
            shape = [d.dim_value or None for d in value.type.tensor_type.shape.dim]
            shape[:1] = [shape[0] or 1] if shape else []
            if len(shape) == 4 and None in shape[2:]:
                shape[2:] = size or (224, 224)
            if None in shape:
                return None
            dtype = _dtype(value.type.tensor_type.elem_type)
            found.append(torch.zeros(shape, dtype=dtype, device="meta" if dtype.is_floating_point else "cpu"))  # type: ignore[arg-type]
        return found

    def to(self, *args: Any, **kwargs: Any) -> OnnxFile:
        """Choose the device; the numbers stay in the file, and in its dtype.

        Raises:
            Failure: For another dtype.
        """
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype not in (None, torch.float32):
            raise Failure(f"{self.file!r} is run in the dtype of its file: give --dtype fp32")
        self.place, self.session = device or self.place, None
        return self

    def forward(self, *given: Tensor) -> Any:
        """Outputs of the graph, without numbers for inputs without numbers."""
        if len(given) != len(self.inputs):
            raise ValueError(f"{self.file} takes {len(self.inputs)} inputs, got {len(given)}")
        for value, t in zip(self.inputs, given, strict=True):
            sides = [d.dim_value or None for d in value.type.tensor_type.shape.dim]
            if len(sides) != t.dim() or any(s not in (None, n) for s, n in zip(sides, t.shape, strict=True)):
                want = "x".join("?" if s is None else str(s) for s in sides)
                raise ValueError(f"{self.file} takes {value.name} of {want}, got {'x'.join(map(str, t.shape))}")
        return self._walk(given) if all(t.is_meta for t in given) else self._run(given)

    def _run(self, given: Sequence[Tensor]) -> list[Tensor]:
        if self.session is None:
            try:
                import onnxruntime
            except ImportError:
                raise Failure(f"model file {self.file!r}: {MISSING.format('onnxruntime')}") from None
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            wanted = "CUDAExecutionProvider" if self.place.type == "cuda" else "CPUExecutionProvider"
            if wanted not in onnxruntime.get_available_providers():
                raise Failure(f"{self.file!r}: this onnxruntime has no {wanted}; pip install onnxruntime-gpu")
            self.session = onnxruntime.InferenceSession(self.file, options, providers=[wanted])
        feed = {v.name: t.cpu().numpy() for v, t in zip(self.inputs, given, strict=True)}
        return [torch.from_numpy(out) for out in self.session.run(None, feed)]

    def _ran(self, given: Sequence[Tensor]) -> dict[str, Any]:
        """Shape and dtype of every value as onnxruntime computes it from ones; none where numbers decide a shape."""
        import onnx
        from onnx.inliner import inline_local_functions

        model = inline_local_functions(onnx.load(self.file))
        names = [name for node in model.graph.node for name in node.output if name]
        try:
            import onnxruntime
        except ImportError:
            return {}
        if any(node.op_type in _BY_NUMBERS for node in model.graph.node):
            return {}
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        ones = {v.name: torch.ones(t.shape, dtype=t.dtype).numpy() for v, t in zip(self.inputs, given, strict=True)}
        found = [torch.from_numpy(out) for out in session.run(names, ones)]
        return {name: (tuple(t.shape), t.dtype) for name, t in zip(names, found, strict=True)}

    def _walk(self, given: Sequence[Tensor]) -> list[Tensor]:
        model, known = _with_shapes(
            self.graph, [(v.name, tuple(t.shape)) for v, t in zip(self.inputs, given, strict=True)]
        )
        if any(name and name not in known for node in model.graph.node for name in node.output):
            known = self._ran(given) | known
        values = {name: getattr(self, place) for name, place in self.constants.items()}
        values |= {v.name: t for v, t in zip(self.inputs, given, strict=True)}
        for node in model.graph.node:
            outputs = [name for name in node.output if name]
            unknown = [name for name in outputs if name not in known]
            if unknown:
                raise Failure(f"{self.file!r}: onnx cannot tell the shape of {unknown[0]}, which {node.op_type} makes")
            ranks = [len(known[name][0]) for name in outputs]
            sides = [side for name in outputs for side in known[name][0]]
            dtypes = [known[name][1] for name in outputs]
            read = [values[name] for name in node.input if name]
            made = _define(node.op_type)(read, ranks, sides, dtypes, *_attributes(node))
            values |= dict(zip(outputs, made, strict=True))
        return [values[v.name] for v in model.graph.output]


def _attributes(node: Any) -> tuple[str, bool]:
    """What the price of a node depends on beside shapes: an equation or a mode, and whether its input is transposed."""
    found = {a.name: a for a in node.attribute}
    text = {"Einsum": "equation", "Resize": "mode"}.get(node.op_type, "")
    default = "nearest" if text == "mode" else ""
    return found[text].s.decode() if text in found else default, "transA" in found and found["transA"].i == 1


def _dtype(kind: int) -> torch.dtype:
    """The dtype of PyTorch for one of ONNX."""
    import onnx

    name = onnx.TensorProto.DataType.Name(kind).lower()
    plain = {"float": "float32", "double": "float64", "bool": "bool"}.get(name, name)
    found = getattr(torch, plain, None)
    return found if isinstance(found, torch.dtype) else torch.uint8


def _with_shapes(graph: bytes, inputs: list[tuple[str, tuple[int, ...]]]) -> tuple[Any, dict[str, Any]]:
    """The model for inputs of some shapes, and the shape and dtype of every value in it that onnx can tell."""
    import onnx

    model = onnx.ModelProto.FromString(graph)
    shapes = dict(inputs)
    for value in model.graph.input:
        for dim, side in zip(value.type.tensor_type.shape.dim, shapes.get(value.name, ()), strict=False):
            dim.dim_value = side
    del model.graph.value_info[:]
    for value in model.graph.output:  # of the batch that was exported
        value.type.tensor_type.ClearField("shape")
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    found = {}
    for value in (*model.graph.value_info, *model.graph.output):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            found[value.name] = tuple(d.dim_value for d in kind.shape.dim), _dtype(kind.elem_type)
    return model, found
