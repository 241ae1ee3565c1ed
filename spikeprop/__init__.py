"""Train spiking neural networks without a backward pass, and put them on neuromorphic hardware exactly as trained.

>>> import spikeprop as sp
>>> sp.LIF(beta=0.9, threshold=1.0)
LIF(beta=0.9, threshold=1.0, alpha=0.0, bias=0.0, reset_mechanism=zero)
"""

from spikeprop import alignment, data, encoding, errors
from spikeprop.augmentation import Augmentation
from spikeprop.diagnosis import Diagnosis, diagnose
from spikeprop.encoding import Current, Events, Latency, Poisson
from spikeprop.evaluation import Change, Evaluation, Health, changes, dead_neurons, evaluate, total_change
from spikeprop.homeostasis import Homeostasis
from spikeprop.losses import Hebbian, Pairwise, SimilarityCrossEntropy
from spikeprop.network import Layer, Network
from spikeprop.neuron import (
    IF,
    LIF,
    Activity,
    Bernoulli,
    Binary,
    NeuronState,
    Rate,
    WinnerTakeAll,
    decay_from_tau,
    lif,
    tau_from_decay,
)
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
from spikeprop.signals import FixedProjection, LearnedProjection
from spikeprop.storage import load_network as load
from spikeprop.storage import save_network as save
from spikeprop.surrogate import ATan, FastSigmoid, Hard, Membrane, ReLU, Sigmoid
from spikeprop.synapse import AvgPool2d, Chain, Conv2d, Dense, Flatten
from spikeprop.training import History, fit

__version__ = "0.1.0"

__all__ = [
    "Augmentation",
    "BPTT",
    "IF",
    "LIF",
    "ATan",
    "Activity",
    "AvgPool2d",
    "Bernoulli",
    "Binary",
    "Chain",
    "Change",
    "Conv2d",
    "Current",
    "Dense",
    "Diagnosis",
    "DirectFeedbackAlignment",
    "Evaluation",
    "Events",
    "FastSigmoid",
    "FixedProjection",
    "Flatten",
    "Health",
    "Hebbian",
    "History",
    "Homeostasis",
    "Latency",
    "Layer",
    "LearnedProjection",
    "Membrane",
    "Network",
    "NeuronState",
    "Pairwise",
    "Poisson",
    "Rate",
    "ReLU",
    "Shallow",
    "Sigmoid",
    "SigProp",
    "SimilarityCrossEntropy",
    "WinnerTakeAll",
    "alignment",
    "changes",
    "data",
    "dead_neurons",
    "decay_from_tau",
    "diagnose",
    "encoding",
    "errors",
    "evaluate",
    "fit",
    "lif",
    "load",
    "save",
    "tau_from_decay",
    "total_change",
    "ContrastiveHebbian",
    "DecoupledInterfaces",
    "EProp",
    "ErrorForward",
    "FeedbackAlignment",
    "ForwardForward",
    "ForwardMode",
    "KolenPollack",
    "LocalClassifier",
    "LocalRepresentationAlignment",
    "NodePerturbation",
    "TargetPropagation",
    "UORO",
    "WeightPerturbation",
    "Hard",
]
