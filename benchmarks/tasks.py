"""The rows of the evidence table: data, network, training; and the settings that validation chose for each rule.

A configuration is a flat dictionary of settings, the task's own with a rule's choices over them, so that any of them can be
changed on the command line and all of them stand in the result file.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

import spikeprop as sp
from spikeprop.catalogue import RULES, configure
from spikeprop.errors import InputError
from spikeprop.models import heterogeneous, mlp
from spikeprop.rules.base import Rule
from spikeprop.runs import build_model

Settings = dict[str, Any]

COMMON: Settings = {
    "beta": 0.9,
    "threshold": 1.0,
    "alpha": 0.0,
    "recurrent": False,
    "noise": 0.0,
    "shift": 0,
    "flip": False,
    "batch_size": 128,
    "precision": "medium",
}
TASKS: dict[str, Settings] = {
    "mnist-mlp": {"data": "mnist", "model": "mlp:512,512", "num_steps": 8, "epochs": 12, "shift": 1},
    "fashion-mnist-mlp": {"data": "fashion-mnist", "model": "mlp:512,512", "num_steps": 8, "epochs": 16, "flip": True},
    "mnist-conv": {"data": "mnist", "model": "conv:32,64-128", "num_steps": 4, "epochs": 8, "beta": 1.0, "shift": 1},
    "fashion-mnist-conv": {
        **{"data": "fashion-mnist", "model": "conv:32,64-128", "num_steps": 4, "epochs": 8},
        **{"beta": 1.0, "flip": True},
    },
    "nmnist": {"data": "nmnist", "model": "mlp:256,256", "num_steps": 20, "epochs": 100, "batch_size": 32, "shift": 1},
    "braille": {
        **{"data": "braille", "model": "mlp:128,128", "num_steps": 256, "epochs": 60, "batch_size": 32},
        **{"delays": [0, 8, 16, 24, 32, 40, 48, 56], "taus": [2, 20], "current_taus": [2, 100], "gain": 0.4},
    },
}
RULES_OF_THE_TABLE = ("sigprop-surrogate", "sigprop-membrane", "sigprop-raw-membrane", "bptt", "shallow")
# (task, rule, homeostasis): what validation chose, benchmarks/results/tuning-<task>.json. None: whatever the homeostasis.
CHOSEN: dict[tuple[str, str, str | None], Settings] = {
    ("mnist-mlp", "sigprop-surrogate", None): {"learning_rate": 2e-3},
    ("mnist-mlp", "sigprop-membrane", None): {"learning_rate": 4e-3},
    ("mnist-mlp", "sigprop-raw-membrane", None): {"learning_rate": 4e-3},
    ("mnist-mlp", "bptt", None): {"learning_rate": 4e-3},
    ("mnist-mlp", "shallow", None): {"learning_rate": 3.2e-2},
    ("fashion-mnist-mlp", "sigprop-surrogate", None): {"learning_rate": 2e-3},
    ("fashion-mnist-mlp", "sigprop-membrane", None): {"learning_rate": 2e-3},
    ("fashion-mnist-mlp", "sigprop-raw-membrane", None): {"learning_rate": 2e-3},
    ("fashion-mnist-mlp", "bptt", None): {"learning_rate": 2e-3},
    ("fashion-mnist-mlp", "shallow", None): {"learning_rate": 1.6e-2},
    ("mnist-conv", "sigprop-surrogate", None): {"learning_rate": 5e-3},
    ("mnist-conv", "sigprop-membrane", None): {"learning_rate": 5e-3},
    ("mnist-conv", "sigprop-raw-membrane", None): {"learning_rate": 1e-3},
    ("mnist-conv", "bptt", None): {"learning_rate": 5e-3},
    ("mnist-conv", "shallow", None): {"learning_rate": 1.6e-2},
    # At this rate of learning the last layer's firing rates outrun the default ceiling: .155 at the end of training.
    ("fashion-mnist-conv", "sigprop-surrogate", None): {"learning_rate": 1e-2, "band_highest": 0.14},
    ("fashion-mnist-conv", "sigprop-membrane", None): {"learning_rate": 5e-3},
    ("fashion-mnist-conv", "sigprop-raw-membrane", None): {"learning_rate": 5e-3},
    ("fashion-mnist-conv", "bptt", "off"): {"learning_rate": 5e-3},
    ("fashion-mnist-conv", "bptt", "on"): {"learning_rate": 1e-2},
    ("fashion-mnist-conv", "shallow", None): {"learning_rate": 3.2e-2},
    ("nmnist", "sigprop-surrogate", None): {"learning_rate": 2e-3, "trace": "exact"},
    ("nmnist", "sigprop-membrane", None): {"learning_rate": 2e-3, "trace": "exact"},
    ("nmnist", "sigprop-raw-membrane", None): {"learning_rate": 1e-3},
    ("nmnist", "bptt", None): {"learning_rate": 4e-3},
    ("nmnist", "shallow", None): {"learning_rate": 3.2e-2},
    # Batches of 32 move the rates less: four times the strength, and a ceiling that keeps what remains below 0.15.
    ("braille", "sigprop-surrogate", None): {"learning_rate": 2e-3, "band_strength": 0.08, "band_highest": 0.14},
    ("braille", "sigprop-membrane", None): {"learning_rate": 2e-3, "band_strength": 0.08, "band_highest": 0.14},
    ("braille", "sigprop-raw-membrane", None): {"learning_rate": 8e-3, "band_strength": 0.08, "band_highest": 0.14},
    ("braille", "bptt", "off"): {"learning_rate": 8e-3},
    ("braille", "bptt", "on"): {"learning_rate": 4e-3},
    ("braille", "shallow", None): {"learning_rate": 1.6e-2},
}


def settings_of(task: str, rule: str, homeostasis: str, changed: Settings | None = None) -> Settings:
    """The configuration of a rule, with homeostasis "on" or "off", on a task. ``changed`` settings come last."""
    chosen = [CHOSEN.get((task, rule, kind), {}) for kind in (None, homeostasis)]
    return {**COMMON, **TASKS[task], **chosen[0], **chosen[1], **(changed or {})}


def make_rule(name: str, settings: Settings, homeostasis: str) -> Rule:
    """A rule by its name, with the settings that concern it; homeostasis "on" or "off"."""
    known = {key: settings.get(key) for key in ("learning_rate", "temperature", "trace")}
    rule: Any = configure(name, {**known, "homeostasis": homeostasis})
    if settings.get("weight_decay"):
        given = rule.optimizer.keywords
        rule = replace(rule, optimizer=partial(torch.optim.AdamW, weight_decay=settings["weight_decay"], **given))
    band = {key: settings[f"band_{key}"] for key in ("lowest", "highest", "strength") if f"band_{key}" in settings}
    if rule.homeostasis is not None and band:
        rule = replace(rule, homeostasis=replace(rule.homeostasis, **band))
    return rule


def recipe(name: str, settings: Settings, homeostasis: str) -> str:
    """The rule with everything that it was given and that it defaults to: a changed default of the library changes it."""
    return repr(make_rule(name, settings, homeostasis))


def make_network(data: sp.data.Data, settings: Settings, seed: int) -> sp.Network:
    if "taus" in settings:
        neurons = heterogeneous(tuple(settings["taus"]), tuple(settings["current_taus"]), threshold=settings["threshold"])
        kind, _, widths = settings["model"].partition(":")
        if kind != "mlp" or settings["recurrent"] or not {"current_taus", "gain"} <= settings.keys():
            raise InputError(f"tasks: taus = {settings['taus']} suit mlp without recurrence, and go with current_taus and gain")
        hidden = [int(width) for width in widths.split(",")]
        return mlp(data.input_shape, hidden, data.num_classes, neuron=neurons, gain=settings["gain"], seed=seed)
    neuron = sp.LIF(settings["beta"], settings["threshold"], alpha=settings["alpha"])
    return build_model(settings["model"], data, neuron=neuron, recurrent=settings["recurrent"], seed=seed)


def augmentation(settings: Settings) -> sp.Augmentation:
    return sp.Augmentation(**{name: settings[name] for name in ("noise", "shift", "flip", "drop", "delay") if name in settings})


def default_homeostasis(name: str) -> str:
    """Whether the rule's own default has homeostasis: "on" or "off"."""
    own: Any = RULES[name]
    return "off" if own.homeostasis is None else "on"


def homeostasis_of(name: str) -> list[str]:
    """With what homeostasis the table has a rule: both for those it compares, else the rule's own default."""
    return ["off", "on"] if name in ("sigprop-surrogate", "sigprop-membrane", "bptt") else [default_homeostasis(name)]
