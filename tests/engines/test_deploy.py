"""deploy(): one callable for every engine, chosen by measurement, kept by content."""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import small
from torch import nn

import backbones
from backbones.engines import (
    available_engines,
    deploy,
    deploy_for_throughput,
    deploying,
    requesting,
    throughput,
)
from backbones.engines.caching import _code_digest, content_key
from backbones.errors import ConfigError, InputSizeError, UnsupportedError

pytest.importorskip("onnxruntime")
SIZE = (3, 64, 64)
QUICK = ("onnxruntime", "eager")


def images(count=3, seed=4):
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(seed))


def outputs(model, x):
    with torch.no_grad():
        return model(x)


@pytest.fixture(scope="module")
def model():
    return small()


@pytest.mark.parametrize(
    "engine",
    ["onnxruntime", "openvino", "eager", pytest.param("executorch", marks=pytest.mark.slow)]
    + [pytest.param("compile", marks=pytest.mark.slow)],
)
def test_every_engine_computes_what_the_model_computes(model, engine, tmp_path):
    if engine not in available_engines():
        pytest.skip(f"{engine} is not installed")
    runner = deploy(model, engine=engine, threads=1, input_size=SIZE, cache_dir=tmp_path)
    assert (runner.engine, runner.precision, runner.threads) == (engine, "fp32", 1)
    x = images()
    expected = outputs(model, x)
    found = runner(x)
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    by_array = runner(x.numpy())
    assert isinstance(by_array, np.ndarray)
    np.testing.assert_allclose(by_array, expected.numpy(), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputSizeError):
        runner(x[0])


def test_several_threads_may_call_at_once(model, tmp_path):
    for engine in (e for e in ("onnxruntime", "openvino", "eager") if e in available_engines()):
        runner = deploy(model, engine=engine, threads=1, input_size=SIZE, cache_dir=tmp_path)
        inputs = [images(seed=seed) for seed in range(8)]
        expected = [outputs(model, x) for x in inputs]
        worst = [0.0] * len(inputs)

        def work(i, runner=runner, inputs=inputs, expected=expected, worst=worst):
            for _ in range(10):
                difference = float((runner(inputs[i]) - expected[i]).abs().max())
                worst[i] = max(worst[i], difference)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert max(worst) < 1e-4, engine


def refuse_to_make(monkeypatch):
    """Let nothing be exported or merged."""

    def refuse(*_):
        raise AssertionError("nothing is to be made again")

    monkeypatch.setattr(requesting, "export", refuse)
    monkeypatch.setattr(requesting, "reparameterized_copy", refuse)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_model_from_the_cache_is_neither_merged_nor_measured(
    model, engine, precision, tmp_path, monkeypatch
):
    if engine not in available_engines():
        pytest.skip(f"{engine} is not installed")
    options = {"engine": engine, "input_size": SIZE, "cache_dir": tmp_path, "precision": precision}
    if precision == "int8":
        options["calibration"] = images(count=32)
    first = deploy(model, **options)
    assert not first.report.remembered
    refuse_to_make(monkeypatch)
    monkeypatch.setattr(deploying, "take_turns", None)
    again = deploy(model, **options)
    assert again.report.remembered
    assert again.report.candidates == first.report.candidates
    assert again.metadata == first.metadata
    x = images()
    torch.testing.assert_close(again(x), first(x), rtol=1e-4, atol=1e-4)


def test_the_fastest_is_chosen_and_remembered(model, tmp_path, monkeypatch):
    began = []
    first = deploy(
        model, engine=QUICK, input_size=SIZE, cache_dir=tmp_path, threads=1, progress=began.append
    )
    report = first.report
    assert began == [*(f"starting {name} in fp32" for name in QUICK), "measuring 2 candidates"]
    assert not report.remembered
    assert {one.engine for one in report.candidates} == set(QUICK)
    best = min(report.candidates, key=lambda one: one.median_ms)
    assert report.engine == first.engine == best.engine
    assert all(one.agreement.relative_error < 1e-4 for one in report.candidates)
    assert f"chosen: {best.engine} fp32" in str(report)
    json.dumps(report.as_dict())

    refuse_to_make(monkeypatch)
    again = deploy(model, engine=QUICK, input_size=SIZE, cache_dir=tmp_path, threads=1)
    assert again.report.remembered
    assert again.engine == first.engine
    assert again.report.candidates == report.candidates
    x = images()
    torch.testing.assert_close(again(x), outputs(model, x), rtol=1e-4, atol=1e-4)


def test_files_are_kept_by_content(model, tmp_path):
    one = deploy(model, engine="onnxruntime", input_size=SIZE, cache_dir=tmp_path)
    same = deploy(small(), engine="onnxruntime", input_size=SIZE, cache_dir=tmp_path)
    assert one.path == same.path
    other = small()
    with torch.no_grad():
        other.get_classifier().bias[1] += 0.25
    changed = deploy(other, engine="onnxruntime", input_size=SIZE, cache_dir=tmp_path)
    assert changed.path != one.path
    x = images()
    torch.testing.assert_close(changed(x), outputs(other, x), rtol=1e-4, atol=1e-4)
    assert content_key(model, SIZE) != content_key(model, (3, 96, 96))
    assert content_key(model, SIZE, images()) != content_key(model, SIZE)


def test_files_follow_what_modules_do_not_print():
    class Scaled(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = scale

    one, same, other = Scaled(2.0), Scaled(2.0), Scaled(3.0)
    assert repr(one) == repr(other)
    assert content_key(one, SIZE) == content_key(same.train(not same.training), SIZE)
    assert content_key(one, SIZE) != content_key(other, SIZE)


def twins():
    """Two classes of one name, equal in all but what they compute."""

    def one():
        class Twin(Sensitive):
            def forward(self, x):
                return super().forward(x)

        return Twin

    def other():
        class Twin(Sensitive):
            def forward(self, x):
                return -super().forward(x)

        return Twin

    return one(), other()


def test_files_follow_the_code_that_makes_them(tmp_path):
    package = tmp_path / "backbones"
    shutil.copytree(Path(backbones.__file__).parent, package)
    model = backbones.create_model("convnext_atto", device="meta")
    before = _code_digest(model, package)
    for name in ("cli/bench.py", "weights/saving.py", "families/hornet.py"):
        (package / name).write_text("changed")
        assert _code_digest(model, package) == before, name
    makers = "engines/rewrites/norms.py engines/deploying.py families/convnext/model.py"
    for name in (*makers.split(), "ops/spectral.py"):
        (package / name).write_text("changed")
        after = _code_digest(model, package)
        assert after != before, name
        before = after


def test_files_of_other_code_are_not_taken():
    one, other = (kind() for kind in twins())
    assert repr(one) == repr(other)
    assert content_key(one, (3, 8, 8)) == content_key(type(one)(), (3, 8, 8))
    assert content_key(one, (3, 8, 8)) != content_key(other, (3, 8, 8))
    unreadable = type("Typed", (Sensitive,), {})
    assert content_key(unreadable(), (3, 8, 8)) != content_key(unreadable(), (3, 8, 8))


class Sensitive(nn.Module):
    """Its classes are a hair's breadth apart, so that half precision mistakes them."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.pretrained_cfg = {"input_size": (3, 8, 8)}

    def forward(self, x):
        mean = 100 + x.mean((1, 2, 3)) * self.scale
        return torch.stack([mean, torch.full_like(mean, 100.0)], dim=1)


def test_a_precision_that_breaks_is_not_chosen_by_itself(tmp_path):
    real = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    runner = deploy(
        Sensitive().eval(),
        engine="eager",
        precision="auto",
        input_size=(3, 8, 8),
        calibration=real,
        cache_dir=tmp_path,
    )
    assert runner.precision == "fp32"
    found = {one.precision: one for one in runner.report.candidates}
    assert found["bf16"].agreement.top1_agreement < 0.99
    assert "less than 99%" in found["bf16"].reason
    assert found["fp32"].reason is None
    assert runner.report.real_images


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close(model, precision, tmp_path):
    runner = deploy(model, engine="eager", precision=precision, input_size=SIZE, cache_dir=tmp_path)
    assert runner.precision == precision
    x = images()
    expected = outputs(model, x)
    found = runner(x)
    assert found.dtype == torch.float32
    error = float((found - expected).abs().max() / expected.abs().max())
    assert 1e-6 < error < 0.1


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_int8_is_calibrated_on_real_images(model, engine, tmp_path):
    if engine not in available_engines():
        pytest.skip(f"{engine} is not installed")
    real = images(count=32)
    runner = deploy(
        model,
        engine=engine,
        precision="int8",
        input_size=SIZE,
        calibration=real,
        cache_dir=tmp_path,
    )
    expected, found = outputs(model, real), runner(real)
    error = float((found - expected).abs().mean() / expected.std())
    assert 1e-4 < error < 0.2
    plain = deploy(model, engine=engine, input_size=SIZE, cache_dir=tmp_path)
    weights = ".onnx" if engine == "onnxruntime" else ".bin"
    sizes = [r.path.with_suffix(weights).stat().st_size for r in (runner, plain)]
    assert runner.precision == "int8"
    assert sizes[0] < sizes[1]


def test_what_cannot_be_is_said(model, tmp_path):
    place = {"cache_dir": tmp_path, "input_size": SIZE}
    with pytest.raises(UnsupportedError, match="no engine 'onnxruntme'; did you mean"):
        deploy(model, engine="onnxruntme", **place)
    with pytest.raises(ConfigError, match="no precision 'int4'"):
        deploy(model, precision="int4", **place)
    with pytest.raises(UnsupportedError, match="'eager' has no precision 'int8'; it has fp32"):
        deploy(model, engine="eager", precision="int8", calibration=images(), **place)
    with pytest.raises(ConfigError, match="'int8' needs real images"):
        deploy(model, precision="int8", **place)
    with pytest.raises(ConfigError, match="'auto' needs real images"):
        deploy(model, precision="auto", **place)
    with pytest.raises(ConfigError, match="at least one engine"):
        deploy(model, engine=[], **place)
    with pytest.raises(ConfigError, match="at least 1"):
        deploy(model, threads=0, **place)
    with pytest.raises(ConfigError, match="no such folder"):
        deploy(model, precision="int8", calibration=tmp_path / "none", **place)


def test_a_precision_the_processor_lacks_is_refused(model, tmp_path):
    from backbones.engines.openvino import runner as openvino_runner

    pytest.importorskip("openvino")
    for precision in ("bf16", "fp16"):
        options = {"engine": "openvino", "precision": precision, "input_size": SIZE}
        if openvino_runner.computes_in(precision):
            runner = deploy(model, cache_dir=tmp_path, **options)
            assert runner.precision == precision
            continue
        with pytest.raises(UnsupportedError, match=f"no {precision} instructions"):
            deploy(model, cache_dir=tmp_path, **options)


def test_no_engine_in_time_is_left_out_with_the_reason(model, tmp_path):
    report = deploy(model, engine=QUICK, input_size=SIZE, cache_dir=tmp_path, time_limit=0).report
    assert [one.engine for one in report.candidates if one.median_ms] == [QUICK[0]]
    assert "time limit" in report.candidates[-1].reason


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_other_numbers_of_images_work_beside_the_one_measured(model, engine, tmp_path):
    if engine not in available_engines():
        pytest.skip(f"{engine} is not installed")
    runner = deploy(model, engine=engine, input_size=SIZE, batch_size=2, cache_dir=tmp_path)
    for count in (2, 5, 2, 1, 5):
        x = images(count, seed=count)
        torch.testing.assert_close(runner(x), outputs(model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 5, 17])
def test_throughput_takes_any_number_of_images(model, count, streamed):
    x = images(count)
    torch.testing.assert_close(streamed(x), outputs(model, x), rtol=1e-4, atol=1e-4)
    assert isinstance(streamed(x.numpy()), np.ndarray)
    with pytest.raises(InputSizeError):
        streamed(x[0])


@pytest.fixture(scope="module")
def streamed(model, tmp_path_factory):
    return deploy(
        model,
        hint="throughput",
        engine="onnxruntime",
        batch_size=2,
        threads=2,
        input_size=SIZE,
        cache_dir=tmp_path_factory.mktemp("throughput"),
    )


def test_throughput_says_its_setting(streamed):
    setting = streamed.report
    assert (setting.engine, setting.precision, setting.batch_size) == ("onnxruntime", "fp32", 2)
    assert setting.images_per_second > 0
    assert streamed.engine == "onnxruntime" and streamed.threads == 2
    assert [*streamed.metadata["input"]["input_size"]] == [*SIZE]


def test_throughput_tries_streams_with_all_batches_and_disturbed_settings_again(
    model, tmp_path, monkeypatch
):
    figures = {(8, 1): 100.0, (8, 2): 90.0, (2, 1): 110.0, (2, 2): 130.0}
    disturbed = [(2, 2)]  # something else runs at the first of its measurements

    def measured(runner, size, setting, seconds):
        found = figures.get(key := (setting.batch_size, setting.streams), 50.0)
        if key in disturbed:
            disturbed.remove(key)
            found *= 0.8
        return found

    monkeypatch.setattr(throughput, "_measured", measured)
    options = {"engine": "onnxruntime", "threads": 2, "input_size": SIZE, "cache_dir": tmp_path}
    setting = deploy(model, hint="throughput", **options).report
    assert (setting.batch_size, setting.streams) == (2, 2)
    assert setting.images_per_second == 130.0


def test_throughput_leaves_out_calls_that_take_long(model, tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "_measured", lambda *_: 4.0)
    lines: list[str] = []
    options = {"engine": "onnxruntime", "threads": 2, "input_size": SIZE, "cache_dir": tmp_path}
    deploy_for_throughput(model, **options, progress=lines.append)
    tried = {line.split("batches of ")[1] for line in lines if "batches of " in line}
    assert tried == {f"{n}, {s} x {2 // s} threads" for n in (1, 2, 4, 8) for s in (1, 2)}


def test_throughput_of_all_maps(tmp_path):
    model = backbones.create_model(
        "convnext_atto", features_only=True, depths=[1] * 4, dims=[8, 16, 24, 32]
    ).eval()
    options = {"engine": "eager", "batch_size": 2, "threads": 1, "input_size": SIZE}
    runner = deploy(model, hint="throughput", cache_dir=tmp_path, **options)
    x = images(3)
    for found, expected in zip(runner(x), outputs(model, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_unknown_hint_is_refused(model):
    with pytest.raises(ConfigError, match="no hint 'fast'; there are latency, throughput"):
        deploy(model, hint="fast")
