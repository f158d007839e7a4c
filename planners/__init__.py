"""Plans as values: the domain's nouns, cost model, solvers, migration and fleet sizing.

Everything here is pure: no Ray, torch, clock, random state, file or network. A planner maps an
immutable problem to an immutable answer; whoever calls it does the reading, writing and acting.
"""
