"""Networks as graphs of the Neuromorphic Intermediate Representation (NIR; Pedersen et al., Nature Communications 15, 2024).

NIR describes neurons by differential equations. In forward Euler steps of length dt (in seconds), current before membrane,

    I <- I + dt/tau_syn (w_in x - I);   v <- v + dt/tau_mem (v_leak - v + r I);   v > v_threshold: spike, v <- v_reset

the neuron of :mod:`spikeprop.neuron` is exactly

    alpha = 0, beta < 1    LIF       tau = dt / (1 - beta), r = tau / dt, so that the drive enters with gain 1
    alpha = 0, beta = 1    IF        r = 1 / dt
    alpha > 0, beta < 1    CubaLIF   tau_syn = dt / (1 - alpha), w_in = tau_syn / dt, tau_mem and r as in LIF

The bias acts on the membrane. It stands in the weights' node (Affine, Conv2d) where that is the same thing; behind a synaptic
current, behind pooling, and where it differs within a channel (centring under zero padding) it is v_leak = bias tau / dt.

NIR does not know the time step. It is written into the graph's metadata as ``dt``; a graph from elsewhere needs it said. A time
constant gives its decay back up to rounding, so the neuron nodes' metadata hold ``alpha`` and ``beta`` to the last digit. They
say nothing else: where they do not agree with the time constant up to rounding, they are ignored.

What has no counterpart is refused, with the node's or layer's name. Files are HDF5 and are read without unpickling anything.
"""

from spikeprop.backends.nir.common import NEURON_FIELDS, library
from spikeprop.backends.nir.export import to_graph, write
from spikeprop.backends.nir.importer import chain, from_graph, load_graph, read, time_step

__all__ = ["NEURON_FIELDS", "chain", "from_graph", "library", "load_graph", "read", "time_step", "to_graph", "write"]
