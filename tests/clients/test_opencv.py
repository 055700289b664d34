"""OpenCV's own engine reads our ONNX files; it is a reader that we do not write for."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from damping import damp
from randomized import randomize
from tiers import shallow, smallest_of_each_family

import backbones

QUICK = {"convnext_atto", "cpubone_nano", "spartan_t"}
# In a process of its own: files that OpenCV cannot take have ended it.
READ = """
import sys, cv2, numpy as np
net = cv2.dnn.readNetFromONNX(sys.argv[1])
net.setInput(np.load(sys.argv[2]))
np.save(sys.argv[3], net.forward())
"""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in smallest_of_each_family()
    ],
)
def test_opencv_computes_the_same(name, tmp_path):
    pytest.importorskip("cv2")
    model = backbones.create_model(name, num_classes=7, **shallow(name, blocks=1)).eval()
    model = damp(randomize(model), name)
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    model_file, given, found = (tmp_path / file for file in ("m.onnx", "x.npy", "y.npy"))
    backbones.export(model, model_file, input_size=(3, 64, 64), batch_size=1)
    opset = onnx.load(model_file, load_external_data=False).opset_import[0].version
    assert opset >= 20  # of older ones OpenCV 5.0 crashes
    np.save(given, images.numpy())
    files = [str(file) for file in (model_file, given, found)]
    done = subprocess.run([sys.executable, "-c", READ, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        expected = model(images).numpy()
    assert np.abs(np.load(found) - expected).max() <= 1e-4 * np.abs(expected).max()
