"""int8 keeps the classes of float32: ranges, shares of the error, and layers left in float32."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from damping import damp
from digit_models import convolutions, digits, trained
from file_checks import INT8_SUFFIXES, skip_without_packages
from randomized import randomize
from tiers import shallow, smallest_of_each_family, smallest_size
from torch import nn

import backbones
from backbones.cli import main
from backbones.engines import ENGINES, deploy, export, open_exported
from backbones.engines.formats import Conversion
from backbones.engines.quantization import layers_of, to_target
from backbones.engines.quantization.ranges import Statistics, least_squares, quantized_activation
from backbones.engines.quantization.shares import margin_of, shares_of, statistics_of
from backbones.engines.runners import Deployment
from backbones.errors import ConfigError, UnsupportedError
from backbones.weights import save_checkpoint

SIZE = (3, 32, 32)
needs_litert = pytest.mark.skipif(not ENGINES["litert"].installed, reason="needs LiteRT")


@pytest.fixture(
    params=[*INT8_SUFFIXES, pytest.param(".tflite", marks=[pytest.mark.litert, needs_litert])]
)
def suffix(request):
    skip_without_packages(request.param)
    return request.param


@pytest.fixture(scope="module")
def told():
    """A model that tells digits, with images to calibrate on and others, all of them unseen."""
    images, classes, unseen, _ = digits(32)
    model = trained(convolutions(nn.ReLU), images, classes, steps=150)
    return model, unseen[::2].contiguous(), unseen[1::2]


@pytest.fixture
def uneven(told):
    """The same function with one channel 300 times as large, so that 256 values tell no others."""
    model, images, unseen = told
    model = nn.Sequential(*convolutions(nn.ReLU)).eval()
    model.load_state_dict(told[0].state_dict())
    with torch.no_grad():
        model[2].weight[3] *= 300
        model[2].bias[3] *= 300
        model[5].weight.view(10, 32, -1)[:, 3] /= 300
    return model, images, unseen


def same_class(model, runner, images):
    with torch.no_grad():
        return float((model(images).argmax(1) == runner(images).argmax(1)).double().mean())


def error(model, runner, images):
    """The root mean square of differences of logits."""
    with torch.no_grad():
        return float((model(images) - runner(images)).square().mean().sqrt())


def test_the_worst_layers_stay_in_float32(uneven, suffix, tmp_path):
    model, images, unseen = uneven
    path = tmp_path / f"m{suffix}"
    options = {"input_size": SIZE, "precision": "int8", "calibration": images}
    export(model, path, agreement=0, **options)
    before = error(model, open_exported(path), unseen)
    report = export(model, path, **options)
    assert error(model, open_exported(path), unseen) < before / 2
    assert same_class(model, open_exported(path), unseen) >= 0.96
    notes = report.notes
    assert notes["agreement"] >= 0.99 and notes["expected_agreement"] >= 0.99
    assert notes["layers"] == 3 and 1 <= len(notes["layers_in_float32"]) < 3
    assert "5 (linear)" in notes["layers_in_float32"]  # which reads the uneven channels
    assert 0 < notes["work_in_float32"] <= 0.5
    assert "layers stay in float32" in str(report)


def test_what_holds_leaves_every_layer_in_int8(told, suffix, tmp_path):
    model, images, unseen = told
    path = tmp_path / f"m{suffix}"
    report = export(model, path, input_size=SIZE, precision="int8", calibration=images)
    assert report.notes["layers_in_float32"] == []
    assert same_class(model, open_exported(path), unseen) >= 0.98


def test_what_cannot_hold_is_told(uneven, tmp_path, caplog, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("backbones.engines.quantization.search.MOST_WORK", 0.0)
    model, images, _ = uneven
    with caplog.at_level(logging.WARNING):
        report = export(
            model, tmp_path / "m.onnx", input_size=SIZE, precision="int8", calibration=images
        )
    assert report.notes["layers_in_float32"] == [] and report.notes["expected_agreement"] < 0.99
    assert "not for the 99.0 % asked for, with 0 of 3 layers in float32" in caplog.text


def test_nothing_is_rounded_but_layers(tmp_path, monkeypatch):
    """With every layer kept an OpenVINO file is one of float32: norms and sums are not rounded."""
    pytest.importorskip("nncf")
    from backbones.engines.openvino.quantization import Quantizer

    quantized = Quantizer.quantized

    def keeping_all(self, plan):
        layers = frozenset(layer for _, layer in self._layers())
        assert len(layers) > 20
        return quantized(self, dataclasses.replace(plan, kept=layers))

    monkeypatch.setattr(Quantizer, "quantized", keeping_all)
    torch.manual_seed(0)
    model = backbones.create_model("lsnet_t", num_classes=7, **shallow("lsnet_t")).eval()
    damp(randomize(model), "lsnet_t")
    images = torch.randn(40, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "m.xml"
    export(
        model,
        path,
        input_size=(3, 64, 64),
        precision="int8",
        calibration=images,
        agreement=0,
    )
    assert 'type="FakeQuantize"' not in path.read_text(encoding="utf-8")


def scales_of_weights(path):
    """Yield the shapes of scales and weights of every convolution of an OpenVINO file, each of
    which reads a value of one range."""
    import openvino

    for operation in openvino.Core().read_model(str(path)).get_ops():
        if operation.get_type_name() in ("Convolution", "GroupConvolution"):
            weights = operation.input_value(1)
            read = operation.input_value(0).get_node()
            assert read.get_type_name() == "FakeQuantize"
            assert all(read.input_value(i).get_shape() == [] for i in range(1, 5))
            scaled = weights.get_node()  # a product with the scales, or a rounding to them
            scales = scaled.input_value(scaled.get_input_size() - 1)
            yield tuple(scales.get_shape()), tuple(weights.get_shape())


def test_weights_of_every_kind_of_convolution_have_a_scale_per_channel(tmp_path):
    """OpenVINO computes a layer in float32 whose weights have other scales."""
    pytest.importorskip("nncf")
    torch.manual_seed(0)
    kinds = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8)]
    last = [nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*(part for kind in kinds for part in (kind, nn.GELU())), *last).eval()
    path = tmp_path / "m.xml"
    options = {"precision": "int8", "calibration": torch.randn(8, *SIZE), "agreement": 0}
    export(model, path, input_size=SIZE, **options)
    channels = {4: 1, 5: 2}  # leading axes, by the number of axes
    found = list(scales_of_weights(path))
    assert {weights[0] for _, weights in found if len(weights) == 5} == {2, 8}
    assert len(found) == 4
    for scales, weights in found:
        leading = channels[len(weights)]
        assert scales == (*weights[:leading], *[1] * (len(weights) - leading))


class Interleaved(nn.Module):
    """Two values joined group by group, as real and imaginary parts are, for a grouped layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 104, 3)
        self.pool = nn.AdaptiveAvgPool2d(10)
        self.parts = nn.ModuleList(nn.Linear(100, 60) for _ in range(2))
        self.mix = nn.Conv2d(208, 208, 1, groups=8)
        self.mix2 = nn.Conv2d(208, 208, 1, groups=8)
        self.head = nn.Linear(208, 10)

    def forward(self, x):
        x = self.pool(self.conv(x)).flatten(2)  # B 104 100
        parts = [part(x).unsqueeze(2).reshape(-1, 8, 13, 1, 60) for part in self.parts]
        x = torch.cat(parts, 2).reshape(-1, 208, 1, 60)
        return self.head(self.mix2(self.mix(x).relu()).mean((2, 3)))


def test_parts_are_joined_before_they_are_rounded(tmp_path):
    """OpenVINO computes something else of rounded parts that are joined group by group."""
    pytest.importorskip("nncf")
    import openvino

    torch.manual_seed(0)
    model, path = Interleaved().eval(), tmp_path / "m.xml"
    images = torch.rand(32, *SIZE)
    report = export(model, path, input_size=SIZE, precision="int8", calibration=images, agreement=0)
    assert report.checks[-1].agreement.relative_error < 0.1
    operations = openvino.Core().read_model(str(path)).get_ops()
    (joined,) = [one for one in operations if one.get_type_name() == "Concat"]
    before = [value.get_node() for value in joined.input_values()]
    while before:
        node = before.pop()
        assert node.get_type_name() != "FakeQuantize"
        if node.get_type_name() in ("Reshape", "Unsqueeze"):
            before.append(node.input_value(0).get_node())


class LeftWeighed(nn.Module):
    """Tokens (taps, channels) times maps, and a bias for each tap."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.tokens = nn.Parameter(torch.randn(2, 9, 8))
        self.bias = nn.Parameter(torch.rand(2, 9, 1) + 5)
        self.head = nn.Linear(18, 5)

    def forward(self, x):
        x = self.conv(x).relu().reshape(-1, 2, 8, 32 * 32)
        return self.head((self.tokens @ x + self.bias).relu().mean(3).flatten(1))


def test_weights_may_stand_left_of_what_they_weigh(tmp_path):
    """NNCF takes a bias for each row of the product for one of its columns."""
    pytest.importorskip("nncf")
    torch.manual_seed(0)
    model, images = LeftWeighed().eval(), torch.rand(32, *SIZE)
    options = {"input_size": SIZE, "precision": "int8", "calibration": images, "agreement": 0}
    report = export(model, tmp_path / "m.xml", **options)
    assert report.checks[-1].agreement.relative_error < 0.05


@pytest.mark.parametrize("best", [0, 2])
def test_the_best_file_is_left_where_none_holds(best, told):
    model, images, _ = told
    conversion = Conversion(model, images[:8], dynamic=(), calibration=images[:16], agreement=0.999)
    plans = []

    def opened():
        noise = 5.0 if len(plans[-1].kept) == best else 50.0
        generator = torch.Generator().manual_seed(0)
        return lambda x: model(x) + noise * torch.randn(len(x), 10, generator=generator)

    with torch.no_grad():
        notes = to_target(conversion, recorded(model, images[:8]), plans.append, opened)
    assert {len(plan.kept) for plan in plans} == {0, 2}  # none, and the two that may be kept
    assert len(plans[-1].kept) == len(notes["layers_in_float32"]) == best


@pytest.mark.slow
@pytest.mark.parametrize("name", smallest_of_each_family())
def test_every_family_is_searched(name, tmp_path):
    """Each operation of our models has the gradient that the shares are taken from."""
    torch.manual_seed(0)
    model = backbones.create_model(name, num_classes=7, **shallow(name, 1)).eval()
    damp(randomize(model), name)
    size = (3, *[max(64, smallest_size(model))] * 2)
    report = export(
        model,
        tmp_path / "m.onnx",
        input_size=size,
        precision="int8",
        calibration=torch.randn(64, *size, generator=torch.Generator().manual_seed(0)),
    )
    assert report.notes["layers"] > 10
    assert report.checks[-1].agreement.relative_error < 0.2


@pytest.mark.parametrize("agreement", [-0.1, 1.5, float("nan")])
def test_a_share_is_between_none_and_all(agreement, told, tmp_path):
    model, images, _ = told
    with pytest.raises(ConfigError, match="agreement is a share of images, 0 to 1"):
        export(
            model,
            tmp_path / "m.onnx",
            input_size=SIZE,
            precision="int8",
            calibration=images,
            agreement=agreement,
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("needed", [0, 1, 7, 12])
def test_no_more_layers_stay_than_it_takes(needed):
    """The search goes back halfway where errors that no gradient tells made it go far."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), *[nn.Linear(27, 27) for _ in range(30)]).eval()
    images, plans = torch.randn(64, 3, 3, 3), []
    conversion = Conversion(model, images[:8], dynamic=(), calibration=images, agreement=0.99)

    def opened():
        holds = len(plans[-1].kept) >= needed
        return lambda x: model(x) + (0 if holds else 5) * torch.randn(len(x), 27)

    with torch.no_grad():
        notes = to_target(conversion, recorded(model, images[:8]), plans.append, opened)
    found = len(notes["layers_in_float32"])
    assert needed <= found <= needed + 5  # of 30; that is FINE of the work
    assert len(plans) <= 7 and len(plans[-1].kept) == found


def test_feature_maps_have_no_classes_to_keep(tmp_path):
    pytest.importorskip("onnxruntime")
    from small_models import small

    images = torch.randn(40, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    report = export(
        small(),
        tmp_path / "m.onnx",
        input_size=(3, 64, 64),
        precision="int8",
        features=True,
        calibration=images,
    )
    assert "layers_in_float32" not in report.notes


def test_deploy_tells_the_layers_and_keeps_files_apart(uneven, tmp_path):
    pytest.importorskip("onnxruntime")
    model, images, unseen = uneven
    options = {"engine": "onnxruntime", "precision": "int8", "input_size": SIZE}
    found = {}
    for agreement in (0.99, 0.0, 0.99):
        runner = deploy(
            model, calibration=images, agreement=agreement, cache_dir=tmp_path, **options
        )
        (candidate,) = runner.report.candidates
        found[agreement] = error(model, runner, unseen)
        assert ("layers_in_float32" in candidate.notes) == bool(agreement)
        assert ("layers in float32" in str(runner.report)) == bool(agreement)
    assert found[0.99] < found[0.0]


@pytest.fixture
def mixing():
    pytest.importorskip("nncf")
    from backbones.engines.openvino import mixing, runner

    if not runner.computes_in("bf16"):
        pytest.skip("this processor has no bf16")
    return mixing


@pytest.mark.parametrize("faster", ["fp32", "bf16"])
def test_the_rest_of_int8_computes_in_what_is_faster_here(
    uneven, mixing, faster, tmp_path, monkeypatch
):
    model, images, unseen = uneven
    options = {"engine": "openvino", "precision": "int8", "input_size": SIZE}
    options |= {"calibration": images, "cache_dir": tmp_path}
    tried = []

    def turns(runners, *_, **__):
        tried.extend(runners)
        assert runners["bf16"](images).ne(runners["fp32"](images)).any()
        return {rest: [[1.0 if rest == faster else 2.0]] * 2 for rest in runners}

    monkeypatch.setattr(mixing, "take_turns", turns)
    runner = deploy(model, **options)
    assert (runner.precision, runner.rest) == ("int8", faster)
    assert f"layers in {'bf16' if faster == 'bf16' else 'float32'}" in str(runner.report)
    assert same_class(model, runner, unseen) >= 0.96
    assert deploy(model, **options).rest == faster and tried == ["fp32", "bf16"]  # remembered


def test_bf16_beside_int8_keeps_the_classes_asked_for(uneven, mixing, tmp_path, monkeypatch):
    model, images, _ = uneven

    class Wrong(nn.Module):
        def forward(self, x):
            return -model(x)

    def open(rest):
        return model if rest == "fp32" else Wrong()

    def turns(runners, *_, **__):
        return {"fp32": [[2.0]], "bf16": [[1.0]]}

    monkeypatch.setattr(mixing, "take_turns", turns)
    for agreement, rest in ((0.99, "fp32"), (0.0, "bf16")):
        deployment = Deployment(
            lambda: model, SIZE, 1, "int8", 1, tmp_path, export, images, agreement=agreement
        )
        with torch.no_grad():
            assert mixing.rest_for(deployment, open) == rest


def test_without_bf16_the_rest_of_int8_stays_in_float32(uneven, tmp_path, monkeypatch):
    pytest.importorskip("nncf")
    from backbones.engines.openvino import OpenVinoRunner, runner

    monkeypatch.setattr(runner, "computes_in", lambda precision: precision in ("fp32", "int8"))
    model, images, _ = uneven
    found = deploy(
        model,
        engine="openvino",
        precision="int8",
        input_size=SIZE,
        calibration=images,
        cache_dir=tmp_path,
    )
    assert found.rest == "fp32"
    with pytest.raises(UnsupportedError, match="no bf16 instructions"):
        OpenVinoRunner(found.path, rest="bf16")


def test_the_command(uneven, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    from small_models import small

    saved = str(save_checkpoint(small(), tmp_path / "m.safetensors"))
    words = ["export", saved, str(tmp_path / "m.onnx"), "--agreement", "2"]
    assert main(words) == 2
    assert "agreement is a share of images, 0 to 1, got 2.0" in capsys.readouterr().err


def recorded(model, images):
    return torch.export.export(model, (images,)).module()


def test_shares_predict_the_error_of_rounding(told):
    """The sum of shares is the squared error of a file in which all of it is rounded."""
    model, images, _ = told
    program = recorded(model, images[:8])
    batches = images[:160].split(8)
    layers = layers_of(program)
    statistics = statistics_of(program, layers, batches)
    shares, kinds = shares_of(program, layers, batches, statistics, rounded=("conv2d", "linear"))
    assert [share.layer.place for share in shares] == ["0", "2", "5"]
    layers = layers_of(program)
    assert kinds.keys() == {*layers} | {
        v for one in layers.values() for v in one.activations.values()
    }
    work = [share.work for share in shares]
    assert work == [16 * 64 * 48, 32 * 16 * 64, 5120]
    ranges = statistics.ranges(kinds)

    class Rounding(torch.fx.Interpreter):
        def run_node(self, node):
            result = super().run_node(node)
            return (
                quantized_activation(result, ranges[node.name]) if node.name in ranges else result
            )

    with torch.no_grad():
        expected = torch.cat([model(one) for one in batches])
        found = torch.cat([Rounding(program).run(one) for one in batches])
    classes = expected.topk(2).indices
    errors = margin_of(found, classes) - margin_of(expected)
    predicted = sum(share.variance for share in shares)
    assert 0.4 < float(errors.square().mean()) / predicted < 2.0


def test_ranges_cut_off_what_is_rare():
    generator = np.random.default_rng(0)
    values = np.abs(generator.normal(size=100_000))
    counts, _ = np.histogram(values, bins=2048, range=(0, 50))
    counts = 100.0 * counts
    counts[-1] = 1
    low, high = least_squares(counts, (0.0, 50.0))
    assert low == 0.0 and 3.0 < high < 15.0
    uniform = np.ones(2048)
    assert least_squares(uniform, (-1.0, 2.0)) == pytest.approx((-1.0, 2.0), abs=0.2)


def test_statistics_hold_zero_and_all_batches():
    statistics = Statistics()
    for x in (torch.tensor([2.0, 3.0]), torch.tensor([1.0, 5.0])):
        statistics.add_ends("x", x)
    assert statistics.ranges() == {"x": (0.0, 5.0)}
    x = torch.linspace(0, 5, 7)
    rounded = quantized_activation(x, (0.0, 5.0))
    assert (rounded - x).abs().max() <= 5 / 255 / 2 + 1e-6
    assert quantized_activation(torch.zeros(3), (1.0, 5.0)).eq(0).all()
