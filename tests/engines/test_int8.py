"""int8 counts every image of calibration, and leaves one file of any name."""

import logging

import pytest
import torch
from file_checks import INT8_SUFFIXES, skip_without_packages
from small_models import small

from backbones.engines import export, open_exported
from backbones.engines.formats import Conversion
from backbones.errors import ConfigError

SIZE = (3, 32, 32)


@pytest.fixture(params=INT8_SUFFIXES)
def suffix(request):
    skip_without_packages(request.param)
    return request.param


@pytest.mark.parametrize("count", [1, 11])
def test_few_images_suffice_with_a_warning(suffix, count, tmp_path, caplog):
    images = torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(0))
    folder = tmp_path / "a [1] *#% ü"
    folder.mkdir()
    path = folder / f"m[1] ?#%é{suffix}"
    with caplog.at_level(logging.WARNING):
        export(small(), path, input_size=SIZE, precision="int8", calibration=images)
    assert f"calibrated on {count} images only" in caplog.text
    companions = [f"m[1] ?#%é{end}" for end in ((".bin", ".xml") if suffix == ".xml" else [suffix])]
    assert sorted(p.name for p in folder.iterdir()) == companions
    assert open_exported(path)(images).shape == (count, 3)


@pytest.mark.parametrize("shape", [(8, 3, 48, 32), (8, 1, 32, 32), (0, 3, 32, 32), (3, 32, 32)])
def test_images_of_another_size_are_refused(shape, suffix, tmp_path):
    with pytest.raises(ConfigError, match=r"must be \(N, 3, 32, 32\), got .* or give input_size"):
        export(
            small(),
            tmp_path / f"m{suffix}",
            input_size=SIZE,
            precision="int8",
            calibration=torch.randn(shape),
        )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("dynamic, size", [(("batch",), 8), ((), 2)])
def test_every_image_counts(dynamic, size):
    images = torch.arange(35.0).reshape(-1, 1, 1, 1)
    conversion = Conversion(torch.nn.Identity(), images[:2], dynamic=dynamic)
    batches = list(conversion.calibration_batches(images))
    assert {len(batch) for batch in batches} == {size}
    found = torch.cat(batches).flatten().tolist()
    assert found[:35] == images.flatten().tolist()
    assert found[35:] == list(range(-35 % size))  # filled up with the first ones
