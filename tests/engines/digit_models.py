"""Handwritten digits, and small models that tell them."""

import torch
from sklearn.datasets import load_digits
from torch import nn


def digits(side):
    """Digits as images (N, 3, side, side), and their classes; every fifth is held out."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    images = nn.functional.interpolate(images, (side, side), mode="bilinear").expand(-1, 3, -1, -1)
    classes = torch.tensor(found.target)
    held_out = torch.arange(len(classes)) % 5 == 0
    return images[~held_out], classes[~held_out], images[held_out], classes[held_out]


def trained(model, images, classes, steps):
    """Return the model, trained until it tells most digits."""
    torch.manual_seed(0)
    steps_of = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(steps_of, 3e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,))
        loss = nn.functional.cross_entropy(model(images[chosen]), classes[chosen])
        steps_of.zero_grad()
        loss.backward()
        steps_of.step()
        schedule.step()
    return model.eval()


def convolutions(activation=nn.GELU):
    """The least that tells digits: two convolutions and a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 4, stride=4),
        activation(),
        nn.Conv2d(16, 32, 2, stride=2),
        activation(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
