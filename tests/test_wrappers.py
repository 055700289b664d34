"""Models in wrappers (compiled, data parallel, averaged) are taken for what they hold."""

import copy

import pytest
import torch
from randomized import randomize
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import backbones
from backbones.bench.model_spec import specify_model
from backbones.errors import UnsupportedError
from backbones.wrappers import unwrapped

SIZE = (3, 32, 32)
WRAPPERS = {
    "compiled": torch.compile,
    "averaged": AveragedModel,
    "timm's average": ModelEma,
    "timm's average, v2": ModelEmaV2,
    "timm's average, v3": ModelEmaV3,
    "data parallel": nn.DataParallel,
    "distributed": DistributedDataParallel,
    "compiled, distributed": lambda model: torch.compile(DistributedDataParallel(model)),
    "averaged, compiled": lambda model: AveragedModel(torch.compile(model)),
}


@pytest.fixture(scope="module", autouse=True)
def one_process():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def model():
    shape = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
    return randomize(backbones.create_model("convnext_atto", num_classes=3, **shape)).eval()


@pytest.fixture(params=WRAPPERS)
def wrapped(request, model):
    return WRAPPERS[request.param](copy.deepcopy(model))


def images():
    return torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(1))


def same(found, model):
    with torch.no_grad():
        torch.testing.assert_close(found(images()), model(images()), rtol=1e-4, atol=1e-4)


def test_wrapped_models_are_reparameterized(wrapped, model):
    found = backbones.reparameterize(wrapped)
    assert type(found) is type(model) and found.deployed
    same(found, model)
    assert not unwrapped(wrapped).deployed
    with pytest.raises(UnsupportedError, match="cannot be merged in place"):
        backbones.reparameterize(wrapped, inplace=True)
    assert not unwrapped(wrapped).deployed


@pytest.mark.parametrize("wrapper", ["compiled", "timm's average, v3"])
def test_wrapped_models_are_exported_and_deployed(wrapper, model, tmp_path):
    wrapped = WRAPPERS[wrapper](copy.deepcopy(model))
    report = backbones.export(wrapped, tmp_path / "m.pt2", input_size=SIZE)
    assert len(report.checks) == 2
    runner = backbones.deploy(wrapped, engine="eager", input_size=SIZE, cache_dir=tmp_path)
    same(runner, model)


def test_wrapped_models_are_saved_and_loaded(wrapped, model, tmp_path):
    file = backbones.save_checkpoint(wrapped, tmp_path / "m.safetensors")
    same(backbones.load_model(file), model)
    for tensor in unwrapped(wrapped).state_dict().values():
        tensor.zero_()
    backbones.load_checkpoint(wrapped, file)
    same(unwrapped(wrapped), model)


def test_wrapped_models_are_measured(wrapped, model, tmp_path):
    spec = specify_model(wrapped, tmp_path)
    assert spec.name == "convnext_atto"
    same(spec.build(), model)


def test_a_model_that_compiles_itself_is_exported(model, tmp_path):
    compiled = copy.deepcopy(model)
    compiled.compile()
    assert backbones.export(compiled, tmp_path / "m.pt2", input_size=SIZE).checks


class Own(nn.Module):
    """A user's model around another, which does more than that."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return -self.module(x)


def test_models_of_users_are_no_wrappers(model):
    own = Own(model).eval()
    assert unwrapped(own) is own
    found = backbones.reparameterize(own)
    assert found.module.deployed
    same(found, own)


class FullyShardedDataParallel(Own):
    """Stands for PyTorch's class of this name, which needs several processes with accelerators."""


@pytest.mark.parametrize(
    "given, words",
    [
        ("lsnet_t", "got str; create_model or load_model makes one of 'lsnet_t'"),
        (torch.compile(lambda x: x), "got function"),
        (FullyShardedDataParallel(nn.Identity()), "FullyShardedDataParallel are spread over"),
    ],
)
@pytest.mark.parametrize("use", ["export", "deploy", "reparameterize", "save", "load", "measure"])
def test_what_is_no_whole_model_is_refused_by_name(use, given, words, tmp_path):
    uses = {
        "export": lambda: backbones.export(given, tmp_path / "m.pt2"),
        "deploy": lambda: backbones.deploy(given, engine="eager", cache_dir=tmp_path),
        "reparameterize": lambda: backbones.reparameterize(given),
        "save": lambda: backbones.save_checkpoint(given, tmp_path / "m.safetensors"),
        "load": lambda: backbones.load_checkpoint(given, {"weight": torch.ones(1)}),
        "measure": lambda: specify_model(given, tmp_path),
    }
    if use == "measure" and isinstance(given, str):
        return  # a name
    with pytest.raises(UnsupportedError, match=words):
        uses[use]()
    assert not list(tmp_path.iterdir())
