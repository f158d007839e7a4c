"""From logits to tokens, for a whole batch at once.

The random number of a token is a hash of (seed, position in the sequence) and picks from the row's own cumulative
distribution. So a token depends on its sequence alone: not on what else is in the batch, not on the worker, and not on
whether the sequence was recomputed on the way.

Order of the steps: log-probabilities are those of the raw logits; then stop ids are masked (``min_tokens``), and
temperature, top-k, top-p (over what top-k left) and min-p (relative to the most likely token) apply. Among equal
logits the lower id ranks first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ..protocol import SamplingParams, TokenLogprob

_CANDIDATES = 512  # most likely tokens looked at before a whole row is sorted
_SEGMENT = 256  # ids summed up first
_AT_ONCE = 1 << 17  # probabilities worked on at a time: larger temporaries cost more in page faults than in arithmetic
_COLDEST = 1e-30  # logits over this stay within float32
_BELOW_ONE = 1 - 2.0**-53


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What the sampler knows of one row of logits.

    ``position`` is the index of the token to choose within its sequence (prompt included), ``generated`` how many
    were generated before it.
    """

    sampling: SamplingParams
    seed: int
    position: int
    generated: int
    stop_ids: frozenset[int] = frozenset()

    @property
    def masked(self) -> bool:
        return self.generated < self.sampling.min_tokens and bool(self.stop_ids)


@dataclass(frozen=True, slots=True)
class Sampled:
    """The chosen token, or None where the logits are not finite; its log-probability where asked for."""

    token: int | None
    logprob: TokenLogprob | None = None


def sample(logits_RV: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    """Choose one token for each row.

    Parameters
    ----------
    logits_RV : Tensor
        float32; not changed.
    rows : sequence of SampleRow
        As many as there are rows of logits.
    """
    if not rows:
        return []
    raw_RV = logits_RV
    logits_RV = _mask_stop_ids(logits_RV, rows)
    tokens, finite = _greedy(logits_RV)
    drawn = [i for i, row in enumerate(rows) if row.sampling.temperature > 0 and finite[i]]
    at_once = max(1, _AT_ONCE // logits_RV.shape[1])
    for some in (drawn[i : i + at_once] for i in range(0, len(drawn), at_once)):
        for i, token in zip(some, _draw(_rows(logits_RV, some), [rows[i] for i in some]), strict=True):
            tokens[i] = token
    logprobs = _logprobs(raw_RV, rows, tokens)
    return [
        Sampled(token, logprob) if ok else Sampled(None)
        for token, logprob, ok in zip(tokens, logprobs, finite, strict=True)
    ]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments; 53 random bits."""
    key = (seed & (1 << 64) - 1).to_bytes(8, "little") + position.to_bytes(8, "little")
    return (int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def _mask_stop_ids(logits_RV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    pairs = [(i, token) for i, row in enumerate(rows) if row.masked for token in sorted(row.stop_ids)]
    if not pairs:
        return logits_RV
    where_R, where_V = torch.tensor(pairs, device=logits_RV.device).T
    return logits_RV.index_put((where_R, where_V), logits_RV.new_tensor(float("-inf")))


def _rows(x_RV: Tensor, which: Sequence[int]) -> Tensor:
    return x_RV if len(which) == x_RV.shape[0] else x_RV[which]


def _greedy(logits_RV: Tensor) -> tuple[list[int], list[bool]]:
    """Most likely tokens, the lowest id among equals, and whether their logits are finite.

    A NaN counts as the largest, so that a row with one is not finite, without a second pass.
    """
    if logits_RV.device.type == "cpu":  # NumPy's argmax is vectorised: ten times faster than torch's
        ids_R = torch.from_numpy(logits_RV.numpy().argmax(axis=1))
    else:
        ids_R = logits_RV.argmax(dim=1)
    top_R = logits_RV.gather(1, ids_R[:, None])[:, 0]
    return ids_R.tolist(), torch.isfinite(top_R).tolist()


def _draw(logits_RV: Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """Random tokens for rows with a temperature above 0 and finite logits."""
    temperatures = [max(row.sampling.temperature, _COLDEST) for row in rows]
    if any(t != 1.0 for t in temperatures):
        logits_RV = logits_RV / logits_RV.new_tensor(temperatures)[:, None]
    probs_RV = logits_RV.softmax(dim=1)
    tokens = [0] * len(rows)
    ranked = [i for i, row in enumerate(rows) if row.sampling.top_k > 0 or row.sampling.top_p < 1.0]
    plain = [i for i, row in enumerate(rows) if row.sampling.top_k == 0 and row.sampling.top_p >= 1.0]
    for part, pick in ((plain, _pick_by_id), (ranked, _pick_by_rank)):
        if part:
            for i, token in zip(part, pick(_rows(probs_RV, part), [rows[i] for i in part]), strict=True):
                tokens[i] = token
    return tokens


def _pick_by_id(probs_RV: Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """Without top-k and top-p nothing needs ranking: the distribution is summed up in the order of ids.

    First over segments of the vocabulary, then within the one that was hit.
    """
    if any(row.sampling.min_p > 0 for row in rows):
        least_R = probs_RV.amax(dim=1) * probs_RV.new_tensor([row.sampling.min_p for row in rows])
        probs_RV = probs_RV.masked_fill(probs_RV < least_R[:, None], 0.0)
    probs_RV = functional.pad(probs_RV, (0, -probs_RV.shape[1] % _SEGMENT))
    probs_RSW = probs_RV.unflatten(1, (-1, _SEGMENT))
    u_R = torch.tensor([uniform(r.seed, r.position) for r in rows], dtype=torch.float64, device=probs_RV.device)
    segment_R, rest_R = _invert(probs_RSW.sum(dim=2), u_R)
    within_RW = probs_RSW[torch.arange(len(rows), device=probs_RV.device), segment_R]
    place_R, _ = _invert(within_RW, rest_R)
    return (segment_R * _SEGMENT + place_R).tolist()


def _invert(weights_RC: Tensor, u_R: Tensor) -> tuple[Tensor, Tensor]:
    """Index at which the running sum of a row's weights passes ``u`` of their total, and how far into it, in [0, 1).

    Weights of 0 are never hit.
    """
    sums_RC = weights_RC.cumsum(dim=1, dtype=torch.float64)
    target_R1 = (u_R * sums_RC[:, -1])[:, None]
    last_R1 = torch.searchsorted(sums_RC, sums_RC[:, -1:].contiguous())  # for rounding: the last positive weight
    index_R1 = torch.minimum(torch.searchsorted(sums_RC, target_R1, right=True), last_R1)
    weight_R1 = weights_RC.gather(1, index_R1).double()
    before_R1 = sums_RC.gather(1, index_R1) - weight_R1
    into_R1 = ((target_R1 - before_R1) / weight_R1).clamp(0.0, _BELOW_ONE)
    return index_R1[:, 0], into_R1[:, 0]


def _pick_by_rank(probs_RV: Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """With top-k or top-p: rank the most likely tokens, and whole rows only where these do not settle it.

    On the CPU, wherever the logits are: NumPy sorts integers ten times faster than torch sorts stably.
    """
    keys_RV = _rank_keys(probs_RV.cpu().numpy())
    candidates = max(_CANDIDATES, *(row.sampling.top_k for row in rows))
    if keys_RV.shape[1] <= 2 * candidates:
        return _pick_ranked(np.sort(keys_RV, axis=1), rows)[0]
    few_RC = np.sort(np.partition(keys_RV, candidates, axis=1)[:, :candidates], axis=1)
    tokens, settled = _pick_ranked(few_RC, rows)
    rest = [i for i, ok in enumerate(settled) if not ok]
    if rest:
        late = _pick_ranked(np.sort(keys_RV[rest], axis=1), [rows[i] for i in rest])[0]
        for i, token in zip(rest, late, strict=True):
            tokens[i] = token
    return tokens


def _rank_keys(probs_RV: NDArray[np.float32]) -> NDArray[np.uint64]:
    """Integers in the order of falling probability, then of rising id: bits of floats >= 0 are ordered as they are."""
    keys_RV = (~probs_RV.view(np.uint32)).astype(np.uint64)
    keys_RV <<= np.uint64(32)
    keys_RV |= np.arange(probs_RV.shape[1], dtype=np.uint64)
    return keys_RV


def _pick_ranked(keys_RC: NDArray[np.uint64], rows: Sequence[SampleRow]) -> tuple[list[int], list[bool]]:
    """Tokens drawn from the C most likely, and whether less likely ones could not have been among the kept.

    What is kept is always a head of the ranking.
    """
    width = keys_RC.shape[1]
    probs_RC = (~(keys_RC >> np.uint64(32)).astype(np.uint32)).view(np.float32).astype(np.float64)
    sums_RC = probs_RC.cumsum(axis=1)
    each = np.arange(len(rows))
    top_k_R = np.array([min(row.sampling.top_k or width, width) for row in rows])
    limited_R = np.array([row.sampling.top_k > 0 for row in rows])
    mass_R = np.where(limited_R, sums_RC[each, top_k_R - 1], 1.0)  # what top-p refers to
    enough_R = np.array([row.sampling.top_p for row in rows]) * mass_R
    least_R = np.array([row.sampling.min_p for row in rows]) * probs_RC[:, 0]
    kept_RC = (sums_RC - probs_RC < enough_R[:, None]) & (probs_RC >= least_R[:, None]) & (probs_RC > 0)
    kept_R = np.minimum(kept_RC.sum(axis=1), top_k_R)
    target_R = sums_RC[each, kept_R - 1] * [uniform(row.seed, row.position) for row in rows]
    place_R = np.minimum((sums_RC <= target_R[:, None]).sum(axis=1), kept_R - 1)
    ids_R = keys_RC[each, place_R] & np.uint64(0xFFFFFFFF)
    return ids_R.tolist(), (limited_R | (kept_R < width)).tolist()


def _logprobs(raw_RV: Tensor, rows: Sequence[SampleRow], tokens: Sequence[int]) -> list[TokenLogprob | None]:
    asked = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
    answers: list[TokenLogprob | None] = [None] * len(rows)
    if not asked:
        return answers
    log_probs_AV = _rows(raw_RV, asked).log_softmax(dim=1)
    chosen_A = torch.tensor([tokens[i] for i in asked], device=raw_RV.device)
    chosen = log_probs_AV.gather(1, chosen_A[:, None])[:, 0].tolist()
    wanted = [min(rows[i].sampling.logprobs or 0, raw_RV.shape[1]) for i in asked]
    best_AK, ids_AK = log_probs_AV.topk(max(wanted), dim=1)
    for i, logprob, count, best, ids in zip(asked, chosen, wanted, best_AK.tolist(), ids_AK.tolist(), strict=True):
        ranked = sorted(zip(ids, best, strict=True), key=lambda pair: (-pair[1], pair[0]))
        answers[i] = TokenLogprob(logprob, tuple(ranked[:count]))
    return answers
