"""Next tokens from logits: bias, penalties, constraint, temperature, top-k, top-p, min-p, and a stateless
random draw.

Randomness is a function of (seed, output index) only: SplitMix64's finalizer (Steele, Lea and Flood,
"Fast splittable pseudorandom number generators", OOPSLA 2014) gives one uniform per row, which is
put through the inverse CDF. So a request draws the same tokens in any batch and after a preemption.

Top-k, top-p and min-p each keep the n most likely tokens for some n, so together they keep the
smallest n. Tokens are ranked by descending probability, equals by ascending id, and drawn in rank order:
so a draw lands near the top, where few edges between tokens lie that a rounding could move it across.
Where the most likely few do not decide, a CPU finds the token by sums over buckets (`ranks.py`) and a GPU
sorts the row.

On a GPU the host waits once, for the tokens of all rows together; and once more for log-probabilities, for
draws that have to look at all tokens, and for constraints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import msgspec
import torch
from torch import Tensor

from aioengine.kernels.portable import plain
from aioengine.kernels.transfer import send
from aioengine.model.constraints import Masks, collect
from aioengine.model.penalties import Penalties
from aioengine.model.ranks import Ranks
from aioengine.request import SamplingParams, TokenLogprob
from aioengine.step import Sampled, SequenceWork

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MAX_LOGPROBS = 20  # SamplingParams' bound; always this many, so that ties cannot depend on the batch
_FIRST_CANDIDATES = 64
_WIDE_CELLS = 1 << 21
"""Candidates, of all rows together, that are looked at in one piece after the first look: each takes up to 50
bytes."""
_BLOCK = 64


def sample(
    logits: Tensor,
    rows: Sequence[SequenceWork],
    penalties: Penalties | None = None,
    argmax: Callable[[Tensor], Tensor] = plain.argmax,
) -> list[Sampled]:
    """Sample one token for each row.

    Args:
        logits: [N, vocab], any floating dtype; not modified.
        rows: the N sequences; uses ``params``, ``seed``, ``history``, ``prompt_len``, and ``draft``, which
            stands for tokens after the history.
        penalties: The same for successive steps, so that earlier tokens are not counted again.
        argmax: That of :class:`~aioengine.kernels.Backend`.

    Returns:
        N results in the same order. A row whose largest logit is NaN or infinite, or whose constraint
        fails, has ``error`` set and token -1, one whose constraint is late has ``late``; the other rows are
        not affected. Log-probabilities are those of the unmodified logits, in float32.
    """
    if not rows:
        return []
    best = argmax(logits)
    if all(row.params.is_plain for row in rows):  # nearly always
        tokens = best.tolist()
        if min(tokens) >= 0:
            return [Sampled(token) for token in tokens]
    changed = [i for i, row in enumerate(rows) if row.params.changes_logits or not row.params.greedy]
    tokens, chosen, masks = _choose(logits, best, rows, changed, penalties or Penalties())
    results = {
        i: Sampled(-1, error=f"the model's output is not finite: largest logit {logits[i].max().item()}")
        for i, token in enumerate(tokens)
        if token < 0
    }
    _assign(tokens, changed, chosen)
    for i, why in masks.failed.items():
        results.setdefault(changed[i], Sampled(-1, error=why, fault="request"))
    for i in masks.late:
        results.setdefault(changed[i], Sampled(-1, late=True))
    scored = [i for i, row in enumerate(rows) if i not in results and row.params.logprobs is not None]
    logprobs: dict[int, TokenLogprob] = {}
    if scored:
        entries = token_logprobs(_rows(logits, scored), [tokens[i] for i in scored], _MAX_LOGPROBS)
        for i, entry in zip(scored, entries, strict=True):
            logprobs[i] = msgspec.structs.replace(entry, top=entry.top[: rows[i].params.logprobs])
    forced = {changed[i]: tuple(after) for i, after in masks.forced.items()}
    return [
        results.get(i) or Sampled(tokens[i], logprobs.get(i), forced=forced.get(i, ()))
        for i in range(len(rows))
    ]


def token_logprobs(logits: Tensor, tokens: Sequence[int], most: int) -> list[TokenLogprob]:
    """Return the log-probability, in float32, of each of ``tokens`` (N of them) under its row of ``logits``
    [N, vocab], beside the ``most`` most likely tokens of the row."""
    table = logits.float().log_softmax(dim=-1)
    own = table.gather(1, _sent(torch.tensor(tokens), table)[:, None])
    if not most:
        return [TokenLogprob(token, row[0]) for token, row in zip(tokens, own.tolist(), strict=True)]
    values, ids = _largest(table, min(_MAX_LOGPROBS, table.shape[1]))
    # Read together; float64 holds all of them as they are.
    together = torch.cat([own.double(), values.double(), ids.double()], dim=1).tolist()
    width, entries = values.shape[1], []
    for token, (logprob, *rest) in zip(tokens, together, strict=True):
        pairs = [(int(i), value) for value, i in zip(rest[:width], rest[width:], strict=True)]
        # topk leaves the order of equals open
        if any(a == b for (_, a), (_, b) in pairwise(pairs)):
            pairs.sort(key=lambda pair: (-pair[1], pair[0]))
        entries.append(TokenLogprob(token, logprob, tuple(pairs[:most])))
    return entries


def uniform(seed: int, index: int) -> float:
    """Return the uniform number in [0, 1) of a request's ``index``-th output token; 53 random bits."""
    return (_mix(_mix(seed & _MASK) + (index + 1) * _GAMMA) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z &= _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _choose(
    logits: Tensor, best: Tensor, rows: Sequence[SequenceWork], changed: list[int], penalties: Penalties
) -> tuple[list[int], list[int], Masks]:
    """Return ``best`` [N], the plain argmax of each row (-1: not finite), and the tokens of the rows that are
    something else with what became of their constraints, by index in ``changed``."""
    work, masks = [rows[i] for i in changed], Masks({}, set(), {}, {})
    if not changed:
        return best.tolist(), [], masks
    # The only copy of the logits. Later operations work in place: new pages cost more than arithmetic.
    scores = _rows(logits, changed).to(torch.float32, copy=True)
    _apply_bias(scores, work)
    if any(row.params.has_penalties for row in work):
        penalties.apply(scores, work)
    if any(row.params.constraint is not None for row in work):
        masks = _apply_constraints(scores, work, alone=len(work) == len(rows))
    _ban_the_end(scores, work)
    tokens = [0] * len(work)
    greedy = [i for i, row in enumerate(work) if row.params.greedy]
    random = [i for i, row in enumerate(work) if not row.params.greedy]
    found = [best]
    if greedy:
        found.append(_rows(scores, greedy).argmax(dim=-1))
    draw = None
    if random:
        broken = _rows(best, [changed[i] for i in random]) < 0  # any token will do
        draw = _Draw(_rows(scores, random), [work[i] for i in random])
        token, known = draw.look(draw.everyone, draw.width)
        found += [token, known | broken]
    read: list[int] = torch.cat(found).tolist()
    plain, read = read[: len(rows)], read[len(rows) :]
    _assign(tokens, greedy, read[: len(greedy)])
    if draw is not None:
        values = read[len(greedy) :]
        _assign(tokens, random, draw.finish(values[: len(random)], values[len(random) :]))
    return plain, tokens, masks


def _output_length(row: SequenceWork) -> int:
    return len(row.history) - row.prompt_len + len(row.draft)


def _sent(values: Tensor, like: Tensor) -> Tensor:
    return values if like.device.type == "cpu" else send([values], like.device)[0]


def _rows(x: Tensor, places: Sequence[int]) -> Tensor:
    """Return the rows ``places`` (ascending) of ``x``, or ``x`` itself if that is all of them."""
    if len(places) == len(x):
        return x
    return x.index_select(0, _sent(torch.tensor(places), x))


def _assign(target: list[int], places: Sequence[int], values: Sequence[int]) -> None:
    for place, value in zip(places, values, strict=True):
        target[place] = value


def _apply_bias(scores: Tensor, rows: Sequence[SequenceWork]) -> None:
    """Add each row's ``logit_bias`` to ``scores`` [N, vocab] in place."""
    vocab = scores.shape[1]
    cells: list[int] = []
    values: list[float] = []
    for i, row in enumerate(rows):
        for token, value in row.params.logit_bias.items():
            if token < vocab:
                cells.append(i * vocab + token)
                values.append(value)
    if cells:
        where, added = send([torch.tensor(cells), torch.tensor(values)], scores.device)
        scores.view(-1)[where] += added


def _apply_constraints(scores: Tensor, rows: Sequence[SequenceWork], *, alone: bool) -> Masks:
    """Ban from ``scores`` [N, vocab], in place, what the rows' constraints do not allow.

    Those that have no token left to choose have failed. The scores of rows without a token become 0.
    """
    vocab, device = scores.shape[1], scores.device
    width = -(-vocab // 8)
    masks = collect(rows, alone=alone, vocab=vocab)
    if masks.found:
        places = list(masks.found)
        joined = bytearray().join(mask[:width].ljust(width, b"\0") for mask in masks.found.values())
        packed = torch.frombuffer(joined, dtype=torch.uint8).view(len(places), width, 1)
        packed, where = send([packed, torch.tensor(places)], device)
        bits = packed >> torch.arange(8, dtype=torch.uint8, device=device) & 1
        banned = bits.flatten(1)[:, :vocab] == 0
        allowed = scores.index_select(0, where).masked_fill_(banned, -math.inf)
        scores.index_copy_(0, where, allowed)
        best: list[float] = allowed.amax(dim=-1).tolist()
        for i, value in zip(places, best, strict=True):
            if not math.isfinite(value):
                masks.failed[i] = "its constraint allows no token at this place"
    for i in (*masks.failed, *masks.late):
        scores[i] = 0.0
    return masks


def _ban_the_end(scores: Tensor, rows: Sequence[SequenceWork]) -> None:
    """Ban from ``scores`` [N, vocab], in place, what would end a row before its ``min_tokens``, unless its
    constraint leaves nothing else."""
    for i, row in enumerate(rows):
        params = row.params
        if _output_length(row) >= params.min_tokens or not params.stop_token_ids:
            continue
        ends = _sent(torch.tensor(params.stop_token_ids), scores)
        kept = scores[i, ends]
        scores[i, ends] = -math.inf
        if params.constraint is not None and not torch.isfinite(scores[i].max()):
            scores[i, ends] = kept


def _blocks(x: Tensor) -> Tensor:
    """Return ``x`` [N, vocab] as [N, blocks, block]; a view unless the last block has to be padded."""
    missing = -x.shape[1] % _BLOCK
    if missing:
        x = torch.nn.functional.pad(x, (0, missing), value=-math.inf)
    return x.view(len(x), -1, _BLOCK)


def _mass(x: Tensor) -> Tensor:
    """Return the sum of e^x of each row of ``x`` [N, vocab]: [N] float64.

    Block by block: torch adds up a row that is alone, and long, in as many parts as there are threads.
    """
    return _blocks(x).exp().sum(dim=-1).double().sum(dim=-1)


def _largest(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Compute topk(width) by way of the blocks with the largest maxima, which hold all of the largest."""
    if x.shape[1] < 4 * width * _BLOCK:
        values, ids = x.topk(width, dim=-1)
        return values, ids
    blocks = _blocks(x)
    best = blocks.amax(dim=-1).topk(width, dim=-1).indices
    candidates = blocks.gather(1, best[:, :, None].expand(-1, -1, _BLOCK)).flatten(1)
    values, places = candidates.topk(width, dim=-1)
    return values, best.gather(1, places // _BLOCK) * _BLOCK + places % _BLOCK


def _by_id(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return descending ``values`` [N, width] and their ``ids``, with the ids of equal values ascending: topk
    leaves their order open."""
    ids, order = ids.sort(dim=-1)
    values, places = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, places)


class _Draw:
    """Filters each row of ``x`` [N, vocab] (scores; overwritten) and draws by inverse CDF in rank order.

    Looks at the most likely few tokens first, and at all only for the rows that need more, which changes no
    result: the cumulative sums start at the most likely token.
    """

    def __init__(self, x: Tensor, rows: Sequence[SequenceWork]) -> None:
        self._params = [row.params for row in rows]
        self._draws = [uniform(row.seed, _output_length(row)) for row in rows]
        tiny = torch.finfo(x.dtype).tiny
        temperature = torch.tensor([max(p.temperature, tiny) for p in self._params], dtype=x.dtype)
        # The maximum comes off first, so that a tiny temperature cannot overflow it.
        self._x = x.sub_(x.amax(dim=-1, keepdim=True)).div_(_sent(temperature, x)[:, None])
        vocab = x.shape[1]
        has_all = any(not 0 < p.top_k < vocab for p in self._params)
        self._mass = _mass(self._x) if has_all else x.new_zeros(len(rows), dtype=torch.float64)
        """Mass of each row's whole vocabulary; not needed where top-k leaves less in all of them."""
        self.everyone = list(range(len(rows)))
        self.width = min(_FIRST_CANDIDATES, x.shape[1])

    def look(self, pending: list[int], width: int) -> tuple[Tensor, Tensor]:
        """Return the tokens of the rows ``pending`` by their ``width`` most likely ones, and which are
        certain; on the device."""
        x, params = _rows(self._x, pending), [self._params[i] for i in pending]
        vocab = x.shape[1]
        if width < vocab:
            values, ids = _by_id(*_largest(x, width))
        else:  # topk takes several times as long for so many
            values, ids = x.sort(dim=-1, descending=True, stable=True)
        all_mass = _rows(self._mass, pending)
        ends = values.double().exp_().cumsum(dim=-1)
        keep, known = _kept(values, ends, params, vocab, all_mass)
        target = _sent(torch.tensor([self._draws[i] for i in pending], dtype=torch.float64), x)
        row = torch.arange(len(pending), device=x.device)
        mass = ends[row, keep - 1]
        plain = [not (0 < p.top_k < vocab or p.top_p < 1.0 or p.min_p > 0.0) for p in params]
        if width < vocab and any(plain):  # no filter: the mass is known, and most draws are near the top
            unfiltered = _sent(torch.tensor(plain), x)
            mass = torch.where(unfiltered, all_mass, mass)
            known |= unfiltered & (target * mass < ends[:, -1])
        target *= mass
        rank = torch.minimum((ends <= target[:, None]).sum(dim=-1), keep - 1)
        if width < vocab:  # of equals at the end there may be more, with smaller ids
            known &= values.gather(1, rank[:, None])[:, 0] > values[:, -1]
        return ids.gather(1, rank[:, None])[:, 0], known

    def finish(self, tokens: list[int], known: Sequence[int]) -> list[int]:
        """Return the tokens of all rows, where those of the first look are certain only as ``known`` says."""
        pending = [i for i in self.everyone if not known[i]]
        vocab = self._x.shape[1]
        if self._x.device.type == "cpu":
            drawn = [Ranks(self._x[i]).draw(self._params[i], self._draws[i]) for i in pending]
            _assign(tokens, pending, drawn)
            return tokens
        size = max(1, _WIDE_CELLS // vocab)
        for piece in (pending[at : at + size] for at in range(0, len(pending), size)):
            _assign(tokens, piece, self.look(piece, vocab)[0].tolist())
        return tokens


def _kept(
    values: Tensor, ends: Tensor, params: Sequence[SamplingParams], vocab: int, mass: Tensor
) -> tuple[Tensor, Tensor]:
    """Return how many of the most likely tokens each row keeps, and whether ``values`` suffice to know it.

    ``values`` [N, width] are the row's largest scores, descending; ``ends`` the running sums of their
    exponentials; ``mass`` [N] the sums of all.
    """
    width = values.shape[1]
    limits = [min(p.top_k or vocab, vocab) for p in params]
    top_ps = [p.top_p if p.top_p < 1.0 else math.inf for p in params]
    floors = [math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params]
    limit, top_p, floor = _sent(torch.tensor([limits, top_ps, floors], dtype=torch.float64), values)
    # top-p's mass is a share of what top-k left.
    total = ends.gather(1, limit.clamp(max=width).long()[:, None] - 1)[:, 0]
    if width < vocab and max(limits) == vocab:
        total = torch.where(limit == vocab, mass, total)

    # A token is in the nucleus if the more likely ones do not reach top_p yet; the first always is.
    nucleus = 1 + (ends[:, :-1] < (top_p * total)[:, None]).sum(dim=-1)
    likely = (values.double() >= floor[:, None]).sum(dim=-1)
    keep = torch.minimum(torch.minimum(nucleus, likely), limit.long()).clamp_(min=1, max=width)
    known = (limit <= width) | ((limit == vocab) & (keep < width))
    return keep, known
