"""The training loop and validation."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import backbones
from backbones.errors import ConfigError
from backbones.train import DataError, TrainConfig, TrainingError, evaluate, fit


def patterns(count=48):
    """Four classes told apart by which quarter of the image is bright."""
    generator = torch.Generator().manual_seed(0)
    images = 0.3 * torch.randn(count, 3, 32, 32, generator=generator)
    labels = torch.arange(count) % 4
    for image, label in zip(images, labels.tolist()):
        row, column = divmod(label, 2)
        image[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] += 2
    return TensorDataset(images, labels)


def loader(shuffle=False, batch_size=16):
    return DataLoader(patterns(), batch_size=batch_size, shuffle=shuffle)


def small(**arguments):
    torch.manual_seed(0)
    return backbones.create_model(
        "convnext_atto", num_classes=4, depths=[1, 1, 1, 1], dims=[8, 16, 24, 32], **arguments
    )


def test_fit_learns_and_reports():
    model, updates = small(), []
    config = TrainConfig(epochs=8, lr=6e-3, warmup_epochs=1)
    report = fit(model, loader(shuffle=True), loader(), config, updates.append)
    assert report.epochs[-1].train_loss < 0.6 * report.epochs[0].train_loss
    assert report.evaluation.top1 == report.epochs[-1].val_top1 == 100
    assert not model.training
    assert [u.step for u in updates] == list(range(1, 25))
    assert updates[-1].steps == 24
    assert updates[-1].epoch == 8
    rates = [u.lr for u in updates]
    assert rates[0] < 1e-4  # warm-up
    assert max(rates) > 3e-3
    assert rates[-1] < 1e-4  # cosine


def test_a_seed_decides_a_run():
    def losses(seed):
        torch.manual_seed(seed + 100)
        model = small(drop_path_rate=0.5)
        report = fit(model, loader(True), None, TrainConfig(epochs=2, seed=seed))
        return [epoch.train_loss for epoch in report.epochs]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_weight_decay_and_smoothing_take_effect():
    def weights(**options):
        model = small()
        fit(model, loader(), None, TrainConfig(epochs=1, **options))
        return model.state_dict()["stages.3.blocks.0.mlp.fc1.weight"]

    plain = weights(weight_decay=0.0, smoothing=0.0)
    assert weights(weight_decay=5.0, smoothing=0.0).norm() < plain.norm()
    assert not torch.equal(weights(weight_decay=0.0, smoothing=0.3), plain)


def test_a_loss_that_is_not_finite_stops_before_it_spoils_the_model():
    images, labels = torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)
    bad = torch.full_like(images, math.nan)
    model = small()
    with pytest.raises(TrainingError, match="nan at step 2"):
        fit(model, [(images, labels), (bad, labels)], None, TrainConfig(epochs=1))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_nothing_to_train_on_or_to_evaluate():
    with pytest.raises(DataError, match="nothing to train on"):
        fit(small(), [], None, TrainConfig())
    with pytest.raises(DataError, match="nothing to evaluate"):
        evaluate(small(), [])


def test_evaluate_counts_right_and_keeps_the_mode():
    class Fixed(nn.Module):
        """Names the class in the first pixel, and is wrong in training mode."""

        def forward(self, x):
            scores = nn.functional.one_hot(x[:, 0, 0, 0].long(), 10).float()
            return -scores if self.training else 3 * scores

    images = torch.zeros(6, 3, 2, 2)
    images[:, 0, 0, 0] = torch.tensor([0, 1, 2, 3, 4, 5])
    targets = torch.tensor([0, 1, 2, 3, 9, 8])
    batches = [(images[:4], targets[:4]), (images[4:], targets[4:])]
    model = Fixed().train()
    result = evaluate(model, batches)
    assert model.training
    assert result.count == 6
    assert result.correct == 4
    assert result.top1 == pytest.approx(100 * 4 / 6)
    assert result.predictions.tolist() == [0, 1, 2, 3, 4, 5]
    expected = nn.functional.cross_entropy(model.eval()(images), targets)
    assert result.loss == pytest.approx(float(expected))
    assert evaluate(lambda x: model(x), batches).correct == 4


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"batch_size": 0}, {"lr": 0.0}, {"weight_decay": -1.0}, {"smoothing": 1.0}],
)
def test_a_config_outside_its_range_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TrainConfig(**wrong)
