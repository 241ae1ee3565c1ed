"""Where a trained network goes: Loihi fixed point and its integer simulator, and Intel's Lava.

Nothing in the core imports this package; a back-end's own dependency (Lava) is looked for only when it is run.
"""
