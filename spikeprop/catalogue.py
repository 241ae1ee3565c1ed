"""The rules under the names that the command line uses, and their options there.

The library itself passes rules as objects; names exist for people who type them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from spikeprop.errors import InputError
from spikeprop.homeostasis import Homeostasis
from spikeprop.losses import Hebbian
from spikeprop.rules.base import Rule
from spikeprop.rules.bptt import BPTT
from spikeprop.rules.contrastive_hebbian import ContrastiveHebbian
from spikeprop.rules.decoupled_interfaces import DecoupledInterfaces
from spikeprop.rules.direct_feedback_alignment import DirectFeedbackAlignment
from spikeprop.rules.e_prop import EProp
from spikeprop.rules.error_forward import ErrorForward
from spikeprop.rules.feedback_alignment import FeedbackAlignment
from spikeprop.rules.forward_forward import ForwardForward
from spikeprop.rules.forward_mode import ForwardMode
from spikeprop.rules.kolen_pollack import KolenPollack
from spikeprop.rules.local_classifier import LocalClassifier
from spikeprop.rules.local_representation_alignment import LocalRepresentationAlignment
from spikeprop.rules.node_perturbation import NodePerturbation
from spikeprop.rules.shallow import Shallow
from spikeprop.rules.sigprop import SigProp
from spikeprop.rules.target_propagation import TargetPropagation
from spikeprop.rules.uoro import UORO
from spikeprop.rules.weight_perturbation import WeightPerturbation
from spikeprop.surrogate import ATan, Hard, Membrane

RULES: dict[str, Rule] = {
    "bptt": BPTT(),
    "bptt-hard": BPTT(surrogate=Hard()),
    "shallow": Shallow(),
    "sigprop-surrogate": SigProp(learn_on=ATan()),
    "sigprop-membrane": SigProp(learn_on=Membrane()),
    "sigprop-raw-membrane": SigProp(learn_on=Membrane(clip=None)),
    "sigprop-hebbian": SigProp(loss=Hebbian()),
    "error-forward": ErrorForward(),
    "forward-forward": ForwardForward(),
    "feedback-alignment": FeedbackAlignment(),
    "direct-feedback-alignment": DirectFeedbackAlignment(),
    "kolen-pollack": KolenPollack(),
    "local-classifier": LocalClassifier(),
    "e-prop": EProp(),
    "forward-mode": ForwardMode(),
    "uoro": UORO(),
    "weight-perturbation": WeightPerturbation(),
    "node-perturbation": NodePerturbation(),
    "lra-diff": LocalRepresentationAlignment(feedback="diff"),
    "lra-fdbk": LocalRepresentationAlignment(feedback="fdbk"),
    "target-propagation": TargetPropagation(),
    "decoupled-interfaces": DecoupledInterfaces(),
    "contrastive-hebbian": ContrastiveHebbian(),
}

# What the command line can set; a rule has an option if `_set` finds something to change for it.
OPTIONS = (
    *("learning_rate", "temperature", "trace", "update_every", "read_every", "truncate", "broadcast", "reset_gradient"),
    "homeostasis",
)


def find(name: str) -> Rule:
    """The rule of that name with its own settings. Raises InputError, listing the known ones, for any other name."""
    if name not in RULES:
        raise InputError(f"unknown rule {name!r}; known: {', '.join(RULES)}")
    return RULES[name]


def settings_of(rule: Rule) -> dict[str, Any]:
    """What each of :data:`OPTIONS` is in a rule; None where it is None or the rule has no such setting."""
    found: Any = rule
    optimizer = getattr(rule, "optimizer", None)
    return {
        "learning_rate": getattr(optimizer, "keywords", {}).get("lr"),
        "temperature": getattr(getattr(found, "loss", None), "temperature", None),
        "trace": getattr(found, "trace", None),
        "update_every": None if isinstance(rule, BPTT) else getattr(found, "update_every", None),
        "read_every": getattr(found, "read_every", None),
        "truncate": found.update_every if isinstance(rule, BPTT) else None,
        "broadcast": getattr(found, "broadcast", None),
        "reset_gradient": getattr(found, "reset_gradient", None),
        "homeostasis": "off" if found.homeostasis is None else "on",
    }


def configure(name: str, options: Mapping[str, Any]) -> Rule:
    """The rule of that name with options other than None set.

    Raises:
        InputError: an unknown name, or an option that this rule does not have (the rules that have it are listed).
    """
    rule = find(name)
    for option in OPTIONS:
        value = options.get(option)
        if value is not None:
            changed = _set(rule, option, value)
            if changed is None:
                able = [other for other, known in RULES.items() if _set(known, option, value) is not None]
                hint = "; for BPTT it is --truncate" if option == "update_every" else f"; it does to {', '.join(able)}"
                raise InputError(f"--{option.replace('_', '-')} does not apply to the rule {name}{hint}")
            rule = changed
    return rule


def _set(rule: Any, option: str, value: Any) -> Rule | None:
    """The rule with one option set, or None if it has none of that name."""
    if option == "learning_rate":
        return replace(rule, optimizer=partial(rule.optimizer, lr=value))
    if option == "temperature":
        loss: Any = getattr(rule, "loss", None)
        return replace(rule, loss=replace(loss, temperature=value)) if hasattr(loss, "temperature") else None
    if option == "homeostasis":
        own = rule.homeostasis or Homeostasis()
        return replace(rule, homeostasis=own if value == "on" else None)
    if option in ("truncate", "update_every"):
        return replace(rule, update_every=value) if isinstance(rule, BPTT) == (option == "truncate") else None
    return replace(rule, **{option: value}) if hasattr(rule, option) else None
