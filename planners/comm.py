"""Communication by link class (eq. 5)."""

from __future__ import annotations

import numpy as np

from .cluster import Cluster
from .fields import FloatArray
from .problem import PlacementProblem


def home_seconds_per_token_D(problem: PlacementProblem) -> tuple[FloatArray, FloatArray]:
    """Link seconds of one token sent to an expert on each device and back, by class: node, cluster.

    Tokens live evenly on all devices, and a class's bytes spread evenly over the devices' links of that class.
    """
    cluster = problem.cluster
    size_N = np.bincount(cluster.node_D)
    devices = problem.devices
    same_node_D = size_N[cluster.node_D] / devices
    bytes_both_ways = 2.0 * problem.model.hidden_bytes / devices
    node_D = bytes_both_ways * (same_node_D - 1.0 / devices) / cluster.links.node_bytes_s
    cluster_D = bytes_both_ways * (1.0 - same_node_D) / cluster.links.cluster_bytes_s
    return node_D, cluster_D


def by_node(share_ED: FloatArray, cluster: Cluster) -> FloatArray:
    """Shares per node, shape (E, nodes)."""
    member_DN = np.eye(len(cluster.nodes))[cluster.node_D]
    shares: FloatArray = share_ED @ member_DN
    return shares


def hop_tokens(pairs_EE: FloatArray, from_ED: FloatArray, to_ED: FloatArray, cluster: Cluster) -> tuple[float, float]:
    """Tokens that change device within their node, and tokens that change node, between two layers.

    A pair's tokens are matched greedily: first on the same device, then in the same node. Distances are nested, so
    no other matching moves less (eq. 5).
    """
    stay = overlap(pairs_EE, from_ED, to_ED)
    near = overlap(pairs_EE, by_node(from_ED, cluster), by_node(to_ED, cluster))
    return max(0.0, near - stay), max(0.0, float(pairs_EE.sum()) - near)


def overlap(pairs_EE: FloatArray, from_EX: FloatArray, to_EX: FloatArray) -> float:
    """``sum_ab pairs_ab sum_x min(from_ax, to_bx)``."""
    total = 0.0
    for x in range(from_EX.shape[1]):
        a, b = np.flatnonzero(from_EX[:, x]), np.flatnonzero(to_EX[:, x])
        total += float((pairs_EE[np.ix_(a, b)] * np.minimum(from_EX[a, x][:, None], to_EX[b, x])).sum())
    return total


def flow_pairs(problem: PlacementProblem, layer: int, tokens_E: FloatArray) -> FloatArray:
    """Tokens from each expert of ``layer - 1`` to each of ``layer``, scaled so that columns sum to ``tokens_E``."""
    assert problem.loads.pairs_PEE is not None
    pairs_EE = problem.loads.pairs_PEE[layer - 1]
    column_E = pairs_EE.sum(axis=0)
    even_E = np.full(problem.experts, 1.0 / problem.experts)
    part_EE = np.where(column_E > 0, pairs_EE / np.where(column_E > 0, column_E, 1.0), even_E[:, None])
    scaled: FloatArray = part_EE * tokens_E
    return scaled
