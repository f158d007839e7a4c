"""The controller's mind: immutable facts in, effects out. No Ray, torch, clock, thread or file.

`step.step` is called with the state, one snapshot of the cluster and the time; only the shell acts on what it returns.
"""
