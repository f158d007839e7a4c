"""Affinity in plans made layer by layer: alike devices exchange what they hold, so that fewer tokens travel (eq. 5).

Which of several alike devices holds what makes no difference to a layer's time; it does to where tokens come from and
go to. So every layer's device contents are exchanged, pair by pair, while the links' time saved towards both
neighbouring layers grows. Contents stay together: regrouping experts for affinity is left to `joint`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .assemble import shares_R
from .comm import by_node, flow_pairs, hop_tokens
from .fields import BoolArray, FloatArray, IntArray
from .layout import Layout
from .problem import PlacementProblem
from .units import LayerProblem

PASSES = 2
"""Times that all layers are gone through: the first pass looks at the layer before alone, whose place is settled."""


def affine(problem: PlacementProblem) -> bool:
    """Whether it matters, beyond a layer's time, on which of alike devices its contents are."""
    return problem.loads.pairs_PEE is not None and problem.model.hidden_bytes > 0 and problem.devices > 1


def aligned(
    problem: PlacementProblem, layers: list[LayerProblem], layouts: list[Layout], in_time: Callable[[], bool]
) -> list[Layout]:
    """The layouts with contents exchanged between alike devices; layers with rules beyond slots stay as they are."""
    if not affine(problem):
        return layouts
    work = _Alignment(problem, layers, layouts)
    for again in range(PASSES):
        for index in range(1, len(layers)):
            if layers[index].plain and in_time():
                work.improve(index, both=again > 0)
    return work.layouts


def _alike(layer: LayerProblem) -> BoolArray:
    """Pairs of devices that may exchange their contents, shape (D, D)."""
    table = np.stack([layer.token_s_D, layer.read_UD[0], layer.base_D, layer.slots_D, layer.budget_D])
    base = (layer.base_CD[:, :, None] == layer.base_CD[:, None, :]).all(axis=0)
    alike: BoolArray = (table[:, :, None] == table[:, None, :]).all(axis=0) & base
    return alike


class _Alignment:
    """All layers' contents, and what tokens between them cost."""

    def __init__(self, problem: PlacementProblem, layers: list[LayerProblem], layouts: list[Layout]) -> None:
        self.problem = problem
        self.layers = layers
        self.layouts = list(layouts)
        each_s = problem.model.hidden_bytes / problem.devices
        self.node_s = each_s / problem.cluster.links.node_bytes_s
        self.cluster_s = each_s / problem.cluster.links.cluster_bytes_s
        self.share_LED = [self._shares(la, lay) for la, lay in zip(layers, layouts, strict=True)]

    def _shares(self, layer: LayerProblem, layout: Layout) -> FloatArray:
        share_ED = np.zeros((self.problem.experts, self.problem.devices))
        for u, d, share in zip(layout.unit_R.tolist(), layout.device_R.tolist(), shares_R(layer, layout), strict=True):
            share_ED[list(layer.members[u]), d] = share
        return share_ED

    def improve(self, index: int, both: bool) -> None:
        """Exchange the layer's contents between devices; kept where its part of the cost falls."""
        moves_DD = self._moves(index)
        gain_DD = moves_DD + self._from(index, index - 1)
        to = range(index, min(index + 1 + both, len(self.layers)))
        if len(to) > 1:
            gain_DD += self._from(index, index + 1)
        place_D = _exchanged(gain_DD, _alike(self.layers[index]))
        old_ED, before_s = self.share_LED[index], self._cost(to)
        self.share_LED[index] = old_ED[:, np.argsort(place_D)]
        moved_s = float(np.trace(moves_DD) - moves_DD[np.arange(len(place_D)), place_D].sum())
        if self._cost(to) + moved_s < before_s * (1.0 - 1e-12):
            layout = self.layouts[index]
            self.layouts[index] = Layout(layout.unit_R, place_D[layout.device_R], layout.tokens_R)
        else:
            self.share_LED[index] = old_ED

    def _pairs(self, index: int) -> FloatArray:
        """Tokens from each expert of the layer before to each of this one (mean over cases)."""
        regimes = self.problem.objective.regimes
        scale = sum(r.weight * r.token_scale for r in regimes) / sum(r.weight for r in regimes)
        tokens_E = self.problem.loads.mean_LE[index] * scale
        return flow_pairs(self.problem, index, tokens_E)

    def _from(self, index: int, other: int) -> FloatArray:
        """Seconds of links saved if what device g holds were on device p, towards one neighbouring layer: (g, p)."""
        pairs_EE = self._pairs(index).T if other < index else self._pairs(other)
        here_ED, there_ED = self.share_LED[index], self.share_LED[other]
        stay_DD = _kept(pairs_EE, here_ED, there_ED)
        near_DN = _kept(pairs_EE, here_ED, by_node(there_ED, self.problem.cluster))
        far_s = self.cluster_s - self.node_s
        saved: FloatArray = self.node_s * stay_DD + far_s * near_DN[:, self.problem.cluster.node_D]
        return saved

    def _moves(self, index: int) -> FloatArray:
        """Seconds of moving saved (eq. 9) if what device g holds were on device p."""
        layer = self.layers[index]
        on_UD = np.zeros((layer.units, layer.devices))
        layout = self.layouts[index]
        on_UD[layout.unit_R, layout.device_R] = layer.bytes_U[layout.unit_R]
        saved: FloatArray = layer.moved_byte_s * (on_UD.T @ layer.held_UD)
        return saved

    def _cost(self, layers: range) -> float:
        """Seconds of links between each of these layers and the one before it."""
        total = 0.0
        for to in layers:
            near, far = hop_tokens(self._pairs(to), self.share_LED[to - 1], self.share_LED[to], self.problem.cluster)
            total += near * self.node_s + far * self.cluster_s
        return total


def _kept(pairs_EE: FloatArray, here_ED: FloatArray, there_EX: FloatArray) -> FloatArray:
    """Tokens that contents g (columns of ``here``) share with places x: ``sum pairs min(shares)``, shape (D, X)."""
    kept_DX = np.zeros((here_ED.shape[1], there_EX.shape[1]))
    expert_R, device_R = np.nonzero(here_ED)
    share_R = here_ED[expert_R, device_R]
    for x in range(there_EX.shape[1]):
        other = np.flatnonzero(there_EX[:, x])
        shared_RO = np.minimum(share_R[:, None], there_EX[other, x]) * pairs_EE[np.ix_(expert_R, other)]
        kept_DX[:, x] = np.bincount(device_R, weights=shared_RO.sum(axis=1), minlength=len(kept_DX))
    return kept_DX


def _exchanged(gain_DD: FloatArray, alike_DD: BoolArray) -> IntArray:
    """Device for every device's contents: the best exchange of two at a time, until none helps."""
    place_D = np.arange(len(gain_DD))
    for _ in range(4 * len(gain_DD)):
        at_DD = gain_DD[:, place_D]
        own_D = np.diag(at_DD)
        more_DD = np.where(alike_DD, at_DD + at_DD.T - own_D[:, None] - own_D, 0.0)
        g, h = divmod(int(more_DD.argmax()), len(gain_DD))
        if not more_DD[g, h] > 1e-9 * float(np.abs(own_D).sum() + more_DD[g, h]):
            break
        place_D[[g, h]] = place_D[[h, g]]
    return place_D
