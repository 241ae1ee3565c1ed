"""Loihi in integers: quantise a network, code its inputs, and simulate it exactly as Lava and the chip run it.

    chip = quantize(network, inputs="graded", input_range=(0, 1))
    messages = encode(chip, inputs, num_steps=8)        # the integers that the simulator and Lava both receive
    counts = simulate(chip, messages).counts[-1]        # [B, n] spikes of the last layer, for the network's readout

``network.py`` has the registers, ``quantize.py`` the way into them, ``simulator.py`` what they do, ``aware.py`` training with
them in the loop, ``account.py`` what they ask of the chip.
"""

from spikeprop.backends.loihi.account import account
from spikeprop.backends.loihi.aware import QuantizationAware
from spikeprop.backends.loihi.network import Convolution, LoihiLayer, LoihiNetwork, load, save
from spikeprop.backends.loihi.quantize import quantize
from spikeprop.backends.loihi.simulator import LOIHI, Simulation, Simulator, check_messages, decode, encode, simulate

__all__ = [
    "LOIHI",
    "Convolution",
    "LoihiLayer",
    "LoihiNetwork",
    "QuantizationAware",
    "Simulation",
    "Simulator",
    "account",
    "check_messages",
    "decode",
    "encode",
    "load",
    "quantize",
    "save",
    "simulate",
]
