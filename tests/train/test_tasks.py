"""Distillation and auxiliary heads."""

import pytest
import torch
from train_runs import losses_of, weights_of

import backbones
from backbones.errors import ConfigError
from backbones.train import TrainConfig
from backbones.train.setup import AuxiliaryHeadTask, create_task

CPU = torch.device("cpu")


@pytest.fixture
def teacher(fit):
    return str(fit(epochs=1, experiment="teacher").folder / "model_best.safetensors")


def test_a_student_of_itself_has_nothing_to_learn(fit, teacher):
    itself = {"kd_model_name": "convnext_atto", "kd_checkpoint": teacher, "epochs": 1}
    itself |= {"initial_checkpoint": teacher, "task_loss_weight": 0.0, "lr": 1e-30}
    assert losses_of(fit(**itself))[0] == pytest.approx(0, abs=1e-6)
    fresh = {key: value for key, value in itself.items() if key != "initial_checkpoint"}
    assert losses_of(fit(**fresh))[0] > 1e-4


def test_features_of_a_teacher_of_other_classes(fit, teacher, tmp_path):
    options = {"kd_model_name": "convnext_atto", "kd_distill_type": "feature", "epochs": 1}
    report = fit(**options, kd_checkpoint=teacher)
    assert not any("student" in key or "projection" in key for key in weights_of(report.model))
    assert losses_of(report) != losses_of(fit(epochs=1))


def test_a_teacher_must_know_the_same_classes(fit, tmp_path):
    stranger = backbones.create_model("convnext_atto", num_classes=7, depths=[1] * 4)
    backbones.save_checkpoint(stranger, tmp_path / "seven.safetensors")
    with pytest.raises(ConfigError, match="knows 7 classes, the data 4; fine-tune it"):
        fit(kd_model_name="convnext_atto", kd_checkpoint=str(tmp_path / "seven.safetensors"))
    stranger = backbones.create_model("convnext_atto", num_classes=4, depths=[1] * 4)
    backbones.save_checkpoint(stranger, tmp_path / "four.safetensors", classes=list("abcd"))
    with pytest.raises(ConfigError, match="other classes"):
        fit(kd_model_name="convnext_atto", kd_checkpoint=str(tmp_path / "four.safetensors"))


def test_token_distillation_needs_a_second_head(fit, teacher):
    options = {"kd_model_name": "convnext_atto", "kd_checkpoint": teacher, "epochs": 1}
    options |= {"kd_distill_type": "token", "img_size": 64}
    with pytest.raises(ConfigError, match="cannot be trained in this way"):
        fit(**options)
    report = fit(**options, model="lsnet_t_distill", model_kwargs={})
    assert report.epochs[0].train_loss > 0


def test_an_auxiliary_head_adds_its_loss():
    torch.manual_seed(0)
    model = backbones.create_model("overlock_xt", num_classes=4, aux_head=True).eval()
    images, targets = torch.randn(2, 3, 64, 64), torch.tensor([1, 2])

    def loss(weight):
        config = TrainConfig(model="overlock_xt", aux_loss_weight=weight)
        task = create_task(model, config, CPU, num_classes=4)
        assert isinstance(task, AuxiliaryHeadTask)
        # Eval mode all over but for the switch, so that nothing is random.
        model.training = True
        found = task(images, targets)
        return float(found["loss"]), float(found["auxiliary_loss"])

    (one, auxiliary), (three, _) = loss(1.0), loss(3.0)
    assert three - one == pytest.approx(2 * auxiliary, rel=1e-4)
