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

import torch
from torch import Tensor

from ..protocol import SamplingParams, TokenLogprob

_CANDIDATES = 256  # most likely tokens looked at before a whole row is sorted


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
    top_R, greedy_R = logits_RV.max(dim=1)
    # max() is NaN if any logit is, so no second pass is needed to find rows that cannot be sampled.
    finite = torch.isfinite(top_R).tolist()
    tokens: list[int] = greedy_R.tolist()
    drawn = [i for i, row in enumerate(rows) if row.sampling.temperature > 0 and finite[i]]
    if drawn:
        chosen = _draw(logits_RV if len(drawn) == len(rows) else logits_RV[drawn], [rows[i] for i in drawn])
        for i, token in zip(drawn, chosen, strict=True):
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


def _draw(logits_RV: Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """Random tokens for rows with a temperature above 0 and finite logits."""
    # Differences to the largest logit first, and a divisor that float32 can hold: tiny temperatures give no NaN.
    temperature_R = logits_RV.new_tensor([max(row.sampling.temperature, 1e-37) for row in rows])
    probs_RV = ((logits_RV - logits_RV.amax(dim=1, keepdim=True)) / temperature_R[:, None]).softmax(dim=1)
    u_R = torch.tensor([uniform(r.seed, r.position) for r in rows], dtype=torch.float64, device=logits_RV.device)
    plain = [i for i, row in enumerate(rows) if row.sampling.top_k == 0 and row.sampling.top_p >= 1.0]
    if len(plain) == len(rows):
        return _pick_by_id(probs_RV, rows, u_R)
    tokens = [0] * len(rows)
    ranked = [i for i, row in enumerate(rows) if row.sampling.top_k > 0 or row.sampling.top_p < 1.0]
    for part, pick in ((plain, _pick_by_id), (ranked, _pick_by_rank)):
        if part:
            for i, token in zip(part, pick(probs_RV[part], [rows[i] for i in part], u_R[part]), strict=True):
                tokens[i] = token
    return tokens


def _pick_by_id(probs_RV: Tensor, rows: Sequence[SampleRow], u_R: Tensor) -> list[int]:
    """Without top-k and top-p nothing needs sorting: the distribution is summed up in the order of ids."""
    if any(row.sampling.min_p > 0 for row in rows):
        least_R = probs_RV.amax(dim=1) * probs_RV.new_tensor([row.sampling.min_p for row in rows])
        probs_RV = probs_RV.masked_fill(probs_RV < least_R[:, None], 0.0)
    return _invert(probs_RV, u_R).tolist()


def _pick_by_rank(probs_RV: Tensor, rows: Sequence[SampleRow], u_R: Tensor) -> list[int]:
    """With top-k or top-p: look at the most likely tokens, and sort whole rows only where these do not settle it."""
    vocab = probs_RV.shape[1]
    candidates = max(_CANDIDATES, 2 * max(row.sampling.top_k for row in rows))
    if candidates >= vocab:
        return _pick_sorted(*_rank(probs_RV), rows, u_R)[0]
    likely_RC, ids_RC = probs_RV.topk(candidates, dim=1)
    # topk leaves equal values in any order: rank them by id.
    ids_RC, order_RC = ids_RC.sort(dim=1)
    likely_RC, rank_RC = _rank(likely_RC.gather(1, order_RC))
    tokens, settled = _pick_sorted(likely_RC, ids_RC.gather(1, rank_RC), rows, u_R)
    rest = [i for i, ok in enumerate(settled) if not ok]
    if rest:
        late = _pick_sorted(*_rank(probs_RV[rest]), [rows[i] for i in rest], u_R[rest])[0]
        for i, token in zip(rest, late, strict=True):
            tokens[i] = token
    return tokens


def _rank(probs_RC: Tensor) -> tuple[Tensor, Tensor]:
    return probs_RC.sort(dim=1, descending=True, stable=True)


def _pick_sorted(
    probs_RC: Tensor, ids_RC: Tensor, rows: Sequence[SampleRow], u_R: Tensor
) -> tuple[list[int], list[bool]]:
    """Tokens drawn from ranked candidates, and whether further candidates could not have changed them.

    They could not if the last one kept is strictly more likely than the last one seen.
    """
    width = probs_RC.shape[1]
    rank_C = torch.arange(width, device=probs_RC.device)
    top_k_R = torch.tensor([row.sampling.top_k or width for row in rows], device=probs_RC.device)
    probs_of_k_RC = probs_RC.masked_fill(rank_C >= top_k_R[:, None], 0.0)
    before_RC = probs_of_k_RC.cumsum(dim=1, dtype=torch.float64).roll(1, dims=1)
    # The mass that top-p refers to: what top-k left, or the whole distribution (whose mass is 1).
    mass_R = before_RC[:, 0].clone().masked_fill_(~_limited(rows, width, probs_RC), 1.0)
    before_RC[:, 0] = 0.0
    top_p_R = torch.tensor([r.sampling.top_p for r in rows], dtype=torch.float64, device=probs_RC.device)
    least_R = probs_RC[:, 0] * probs_RC.new_tensor([row.sampling.min_p for row in rows])
    kept_RC = (before_RC < (top_p_R * mass_R)[:, None]) & (probs_RC >= least_R[:, None]) & (probs_of_k_RC > 0)
    last_R = (kept_RC.sum(dim=1) - 1).clamp_(min=0)
    settled_R = probs_RC.gather(1, last_R[:, None])[:, 0] > probs_RC[:, -1]
    picked_R = _invert(probs_of_k_RC.masked_fill(~kept_RC, 0.0), u_R)
    return ids_RC.gather(1, picked_R[:, None])[:, 0].tolist(), settled_R.tolist()


def _limited(rows: Sequence[SampleRow], width: int, like: Tensor) -> Tensor:
    return torch.tensor([0 < row.sampling.top_k <= width for row in rows], device=like.device)


def _invert(weights_RC: Tensor, u_R: Tensor) -> Tensor:
    """Index at which the running sum of each row's weights passes ``u`` times their total."""
    sums_RC = weights_RC.cumsum(dim=1, dtype=torch.float64)
    # Right-sided search skips weights of 0; u < 1 keeps it inside except for rounding, hence the clamp to the last
    # index whose weight is positive.
    index_R = torch.searchsorted(sums_RC, (u_R * sums_RC[:, -1])[:, None], right=True)[:, 0]
    last_R = torch.searchsorted(sums_RC, sums_RC[:, -1:].contiguous())[:, 0]
    return torch.minimum(index_R, last_R)


def _logprobs(raw_RV: Tensor, rows: Sequence[SampleRow], tokens: Sequence[int]) -> list[TokenLogprob | None]:
    asked = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
    answers: list[TokenLogprob | None] = [None] * len(rows)
    if not asked:
        return answers
    log_probs_AV = (raw_RV if len(asked) == len(rows) else raw_RV[asked]).log_softmax(dim=1)
    chosen_A = torch.tensor([tokens[i] for i in asked], device=raw_RV.device)
    chosen = log_probs_AV.gather(1, chosen_A[:, None])[:, 0].tolist()
    wanted = [min(rows[i].sampling.logprobs or 0, raw_RV.shape[1]) for i in asked]
    best_AK, ids_AK = log_probs_AV.topk(max(wanted), dim=1)
    for i, logprob, count, best, ids in zip(asked, chosen, wanted, best_AK.tolist(), ids_AK.tolist(), strict=True):
        ranked = sorted(zip(ids, best, strict=True), key=lambda pair: (-pair[1], pair[0]))
        answers[i] = TokenLogprob(logprob, tuple(ranked[:count]))
    return answers
