"""The operators under torch.compile, torch.export, ONNX, tracing and on the meta device."""

import pytest
import torch
from torch import nn

from backbones import ops


class Attentive(nn.Module):
    def forward(self, x, kernels):
        return ops.attentive_convolution(x, kernels)


class SmallKernel(nn.Module):
    def forward(self, x, weight):
        return ops.small_kernel_aggregation(x, weight)


class Involution(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x, weight):
        return ops.involution(x, weight, self.stride)


class Correlation(nn.Module):
    def forward(self, query, key):
        return ops.small_kernel_correlation(query, key, 3)


class Neighborhood(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.k = k
        self.table = nn.Parameter(torch.randn(2, 2 * k - 1, 2 * k - 1))

    def forward(self, value, logits):
        bias = ops.neighborhood_bias(self.table, value.shape[-2:])
        return ops.neighborhood_aggregation(value, (logits + bias).softmax(-1), self.k)


class Spectral(nn.Module):
    def __init__(self, rows, cols):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, rows, cols, 2))

    def forward(self, x):
        return ops.spectral_filter(x, self.weight)


class LowFrequencies(nn.Module):
    def forward(self, x):
        return ops.amplify_low_frequencies(x, 2, ((2, 1.25, 0.5), (2, 7.0, 2.5)))


class AdaptiveSpectral(nn.Module):
    def __init__(self):
        super().__init__()
        shapes = [(8, 4, 1, 1), (8,)] * 2
        self.layers = nn.ParameterList(torch.randn(shape) / 2 for shape in shapes)

    def forward(self, x):
        return ops.adaptive_spectral_filter(x, *self.layers)


class Means(nn.Module):
    def forward(self, x):
        return ops.adaptive_mean(x, (7, 4))


def neighborhood_inputs(batch, height, width, k):
    return torch.randn(batch, 2, 3, height, width), torch.randn(batch, 2, height, width, k * k)


# name: module, inputs for a batch size
CASES = {
    "attentive": (Attentive, lambda b: (torch.randn(b, 16, 9, 11), torch.randn(b, 16, 3, 3))),
    "small_kernel": (
        SmallKernel,
        lambda b: (torch.randn(b, 16, 9, 11), torch.randn(b, 4, 9, 9, 11)),
    ),
    "small_kernel_for_all": (
        SmallKernel,
        lambda b: (torch.randn(b, 16, 9, 11), torch.randn(b, 9, 9, 11)),
    ),
    "involution": (
        lambda: Involution(1),
        lambda b: (torch.randn(b, 16, 9, 11), torch.randn(b, 4, 49, 9, 11)),
    ),
    "involution_strided": (
        lambda: Involution(2),
        lambda b: (torch.randn(b, 16, 9, 12), torch.randn(b, 4, 9, 5, 6)),
    ),
    "correlation": (Correlation, lambda b: tuple(torch.randn(2, b, 16, 9, 11))),
    "neighborhood": (lambda: Neighborhood(5), lambda b: neighborhood_inputs(b, 14, 9, 5)),
    "one_window": (lambda: Neighborhood(7), lambda b: neighborhood_inputs(b, 7, 7, 7)),
    "tiles": (lambda: Neighborhood(4), lambda b: neighborhood_inputs(b, 17, 20, 4)),
    "means": (Means, lambda b: (torch.randn(b, 4, 12, 15),)),
    "low_frequencies": (LowFrequencies, lambda b: (torch.randn(b, 4, 12, 15),)),
    "spectral_dense": (lambda: Spectral(7, 4), lambda b: (torch.randn(b, 4, 7, 7),)),
    "spectral_resized": (lambda: Spectral(14, 8), lambda b: (torch.randn(b, 4, 13, 16),)),
    "spectral_large": (lambda: Spectral(34, 18), lambda b: (torch.randn(b, 4, 34, 34),)),
    "adaptive_dense": (AdaptiveSpectral, lambda b: (torch.randn(b, 4, 7, 7),)),
    "adaptive_large": (AdaptiveSpectral, lambda b: (torch.randn(b, 4, 13, 16),)),
}
SHORT = [
    "attentive",
    "small_kernel",
    "correlation",
    "involution_strided",
    "neighborhood",
    "spectral_resized",
]


@pytest.fixture(params=CASES)
def case(request):
    make, inputs = CASES[request.param]
    return make(), inputs


def assert_same(found, expected):
    assert expected.std() > 0.01
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_as_one_graph(case, dynamic):
    module, inputs = case
    arguments = [x.requires_grad_() for x in inputs(3)]
    expected = module(*arguments)
    gradients = torch.autograd.grad(expected.square().sum(), arguments)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager", dynamic=dynamic)
    found = compiled(*arguments)
    assert_same(found, expected)
    for a, b in zip(torch.autograd.grad(found.square().sum(), arguments), gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_a_dynamic_batch(case, strict):
    module, inputs = case
    example = inputs(3)
    shapes = tuple({0: torch.export.Dim("batch", min=1)} for _ in example)
    program = torch.export.export(module, example, dynamic_shapes=shapes, strict=strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("fft" in name or "complex" in name for name in targets)
    for batch in (1, 2):
        other = inputs(batch)
        assert_same(program.module()(*other), module(*other))


SIZES = {
    "attentive": lambda h, w: (torch.randn(1, 8, h, w), torch.randn(1, 8, 3, 3)),
    "small_kernel": lambda h, w: (torch.randn(1, 8, h, w), torch.randn(1, 2, 9, h, w)),
    "involution": lambda h, w: (torch.randn(1, 8, h, w), torch.randn(1, 2, 49, h, w)),
    "correlation": lambda h, w: tuple(torch.randn(2, 1, 8, h, w)),
    "neighborhood": lambda h, w: neighborhood_inputs(1, h, w, 5),
}


@pytest.mark.parametrize("name", SIZES)
def test_exports_with_dynamic_height_and_width(name):
    module, inputs = CASES[name][0](), SIZES[name]
    height, width = (torch.export.Dim(side, min=6, max=64) for side in ("height", "width"))
    example = inputs(14, 17)
    shapes = tuple(
        {d: {14: height, 17: width}.get(n) for d, n in enumerate(x.shape)} for x in example
    )
    program = torch.export.export(module, example, dynamic_shapes=shapes)
    for other in (inputs(14, 14), inputs(9, 31)):
        assert_same(program.module()(*other), module(*other))


def test_meta_device_gives_shapes(case):
    module, inputs = case
    arguments = inputs(2)
    expected = module(*arguments)
    found = module.to("meta")(*(x.to("meta") for x in arguments))
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traces(case):
    module, inputs = case
    arguments = inputs(2)
    traced = torch.jit.trace(module, arguments, check_trace=False)
    assert_same(traced(*arguments), module(*arguments))


@pytest.mark.parametrize(
    "name",
    [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_runs_in_onnxruntime(name):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    make, inputs = CASES[name]
    module, example = make().eval(), inputs(2)
    shapes = tuple({0: torch.export.Dim("batch", min=1)} for _ in example)
    exported = torch.onnx.export(module, example, dynamo=True, dynamic_shapes=shapes, verbose=False)
    model = exported.model_proto
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert "DFT" not in {node.op_type for node in model.graph.node}
    session = onnxruntime.InferenceSession(model.SerializeToString())
    names = [x.name for x in session.get_inputs()]
    for arguments in (example, inputs(3)):
        feed = {key: x.numpy() for key, x in zip(names, arguments, strict=True)}
        assert_same(torch.from_numpy(session.run(None, feed)[0]), module(*arguments).detach())
