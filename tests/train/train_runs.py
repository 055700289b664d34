"""What tests of training read off a run."""

import csv


def losses_of(report):
    return [epoch.train_loss for epoch in report.epochs]


def weights_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def history(folder):
    with (folder / "summary.csv").open() as stream:
        return list(csv.DictReader(stream))
