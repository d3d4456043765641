"""Next tokens from logits: bias, penalties, constraint, temperature, top-k, top-p, min-p, and a stateless
random draw.

Randomness is a function of (seed, output index) only: SplitMix64's finalizer (Steele, Lea and Flood,
"Fast splittable pseudorandom number generators", OOPSLA 2014) gives one uniform per row, which is
put through the inverse CDF. So a request draws the same tokens in any batch and after a preemption.

Top-k, top-p and min-p each keep the n most likely tokens for some n, so together they keep the
smallest n. Tokens are ranked by descending probability, equals by ascending id, and drawn in rank order:
so a draw lands near the top, where few edges between tokens lie that a rounding could move it across.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from aioengine.request import SamplingParams, TokenLogprob
from aioengine.step import Sampled, SequenceWork

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MAX_LOGPROBS = 20  # SamplingParams' bound; always this many, so that ties cannot depend on the batch
_FIRST_CANDIDATES = 64
_BLOCK = 64
_ARGMAX_BLOCK = 1024


def sample(logits: Tensor, rows: Sequence[SequenceWork]) -> list[Sampled]:
    """Sample one token for each row.

    Args:
        logits: [N, vocab], any floating dtype; not modified.
        rows: the N sequences; uses ``params``, ``seed``, ``history`` and ``prompt_len``.

    Returns:
        N results in the same order. A row whose largest logit is NaN or infinite, or whose constraint
        fails, has ``error`` set and token -1; the other rows are not affected. Log-probabilities are
        those of the unmodified logits, in float32.
    """
    if not rows:
        return []
    best = _argmax(logits)
    top = logits.gather(1, best[:, None])[:, 0]
    tokens: list[int] = best.tolist()
    finite: list[bool] = torch.isfinite(top).tolist()

    results: dict[int, Sampled] = {
        i: Sampled(-1, error=f"the model's output is not finite: largest logit {top[i].item()}")
        for i in range(len(rows))
        if not finite[i]
    }
    changed = [
        i for i, row in enumerate(rows) if finite[i] and (row.params.changes_logits or not row.params.greedy)
    ]
    if changed:
        chosen, failed = _choose(logits, rows, changed)
        _assign(tokens, changed, chosen)
        results |= {changed[i]: Sampled(-1, error=why, fault="request") for i, why in failed.items()}
    scored = [i for i, row in enumerate(rows) if i not in results and row.params.logprobs is not None]
    logprobs = _logprobs(logits, rows, scored, tokens) if scored else {}
    return [results.get(i) or Sampled(tokens[i], logprobs.get(i)) for i in range(len(rows))]


def uniform(seed: int, index: int) -> float:
    """The uniform number in [0, 1) of a request's ``index``-th output token; 53 random bits."""
    return (_mix(_mix(seed & _MASK) + (index + 1) * _GAMMA) >> 11) * 2.0**-53


def _argmax(logits: Tensor) -> Tensor:
    """The first index of each row's largest value; a NaN counts as the largest.

    On a CPU torch finds the largest value of a row several times faster than where it is: so the block that
    it is in comes first.
    """
    vocab = logits.shape[1]
    block = min(vocab & -vocab, _ARGMAX_BLOCK)
    if logits.device.type != "cpu" or block < _BLOCK:
        return logits.argmax(dim=-1)
    blocks = logits.unflatten(1, (-1, block))
    which = blocks.amax(dim=-1).argmax(dim=-1)
    within = blocks[torch.arange(len(logits)), which].argmax(dim=-1)
    return which * block + within


def _mix(z: int) -> int:
    z &= _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _choose(
    logits: Tensor, rows: Sequence[SequenceWork], changed: list[int]
) -> tuple[list[int], dict[int, str]]:
    """Tokens of the rows that are not a plain argmax, and which of them failed, by index in ``changed``."""
    work = [rows[i] for i in changed]
    # The one copy of the logits; what follows works in place, for fresh pages cost more than math.
    scores = (logits if len(work) == len(rows) else logits[changed]).to(torch.float32, copy=True)
    _apply_bias(scores, work)
    _apply_penalties(scores, work)
    failed = _apply_constraints(scores, work)
    tokens = [0] * len(work)
    greedy = [i for i, row in enumerate(work) if row.params.greedy]
    random = [i for i, row in enumerate(work) if not row.params.greedy]
    if greedy:
        best = (scores[greedy] if random else scores).argmax(dim=-1)
        _assign(tokens, greedy, best.tolist())
    if not random:
        return tokens, failed

    params = [work[i].params for i in random]
    draws = [uniform(work[i].seed, len(work[i].history) - work[i].prompt_len) for i in random]
    x = scores[random] if greedy else scores
    temperature = torch.tensor([max(p.temperature, torch.finfo(x.dtype).tiny) for p in params])
    # The maximum comes off first, so that a tiny temperature cannot overflow it.
    x.sub_(x.amax(dim=-1, keepdim=True)).div_(temperature.to(x)[:, None])
    _assign(tokens, random, _draw_by_rank(x, params, draws))
    return tokens, failed


def _assign(target: list[int], places: Sequence[int], values: Sequence[int]) -> None:
    for place, value in zip(places, values, strict=True):
        target[place] = value


def _is_filtered(params: SamplingParams, vocab: int) -> bool:
    return 0 < params.top_k < vocab or params.top_p < 1.0 or params.min_p > 0.0


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
        device = scores.device
        flat = scores.view(-1)
        flat[torch.tensor(cells, device=device)] += torch.tensor(values, device=device)


def _apply_constraints(scores: Tensor, rows: Sequence[SequenceWork]) -> dict[int, str]:
    """Ban from ``scores`` [N, vocab], in place, what the rows' constraints do not allow.

    Returns why, by row, for those that have no token left to choose; their scores become 0.
    """
    vocab, device = scores.shape[1], scores.device
    width = -(-vocab // 8)
    failed: dict[int, str] = {}
    places: list[int] = []
    masks = bytearray()
    for i, row in enumerate(rows):
        constraint = row.params.constraint
        if constraint is None:
            continue
        try:
            mask = constraint.allowed(row.history[row.prompt_len :])
        except Exception as error:
            failed[i] = f"its constraint failed: {type(error).__name__}: {error}"
        else:
            places.append(i)
            masks += mask[:width].ljust(width, b"\0")
    if places:
        packed = torch.frombuffer(masks, dtype=torch.uint8).view(len(places), width, 1).to(device)
        bits = packed >> torch.arange(8, dtype=torch.uint8, device=device) & 1
        banned = bits.flatten(1)[:, :vocab] == 0
        scores[places] = scores[places].masked_fill_(banned, -math.inf)
        best: list[float] = scores[places].amax(dim=-1).tolist()
        for i, value in zip(places, best, strict=True):
            if not math.isfinite(value):
                failed[i] = "its constraint allows no token here"
    for i in failed:
        scores[i] = 0.0
    return failed


def _apply_penalties(scores: Tensor, rows: Sequence[SequenceWork]) -> None:
    """Penalise ``scores`` [N, vocab] in place, touching only the tokens that were seen."""
    active = [(i, row) for i, row in enumerate(rows) if row.params.has_penalties]
    if not active:
        return
    vocab, device = scores.shape[1], scores.device
    flat = scores.view(-1)

    def per_row(field: str) -> Tensor:
        return torch.tensor([getattr(row.params, field) for row in rows], dtype=torch.float32)

    def cells(output_only: bool) -> Tensor:
        parts = [
            torch.tensor(row.history[row.prompt_len if output_only else 0 :], dtype=torch.int64) + i * vocab
            for i, row in active
        ]
        return torch.cat(parts).to(device)

    seen = torch.unique(cells(output_only=False))
    penalty = per_row("repetition_penalty").to(device)[seen // vocab]
    value = flat[seen]
    flat[seen] = torch.where(value > 0, value / penalty, value * penalty)

    output, counts = torch.unique(cells(output_only=True), return_counts=True)
    row = output // vocab
    frequency = per_row("frequency_penalty").to(device)[row] * counts
    flat[output] -= frequency + per_row("presence_penalty").to(device)[row]
    limit = torch.finfo(scores.dtype).max
    scores.clamp_(max=limit)  # a tiny repetition penalty overflows; -inf (a banned token) stays


def _blocks(x: Tensor) -> Tensor:
    """``x`` [N, vocab] as [N, blocks, block]; a view unless the last block has to be padded."""
    missing = -x.shape[1] % _BLOCK
    if missing:
        x = torch.nn.functional.pad(x, (0, missing), value=-math.inf)
    return x.view(len(x), -1, _BLOCK)


def _largest(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """topk(width) by way of the blocks with the largest maxima, which hold all of the largest."""
    if x.shape[1] < 4 * width * _BLOCK:
        values, ids = x.topk(width, dim=-1)
        return values, ids
    blocks = _blocks(x)
    best = blocks.amax(dim=-1).topk(width, dim=-1).indices
    candidates = blocks.gather(1, best[:, :, None].expand(-1, -1, _BLOCK)).flatten(1)
    values, places = candidates.topk(width, dim=-1)
    return values, best.gather(1, places // _BLOCK) * _BLOCK + places % _BLOCK


def _draw_by_rank(x: Tensor, params: Sequence[SamplingParams], draws: Sequence[float]) -> list[int]:
    """Filter each row of ``x`` [N, vocab] (logits <= 0) and draw by inverse CDF in rank order.

    Looks at the most likely few tokens first and widens only for the rows that need more, which
    changes no result: the cumulative sums start at the most likely token.
    """
    vocab = x.shape[1]
    tokens = [0] * len(params)
    pending, width = list(range(len(params))), min(_FIRST_CANDIDATES, vocab)
    while pending:
        sub = x if len(pending) == len(params) else x[pending]
        values, ids = _largest(sub, width)
        ends = values.double().exp_().cumsum(dim=-1)
        keep, known = _kept(sub, values, ends, [params[i] for i in pending])
        target = torch.tensor([draws[i] for i in pending], dtype=torch.float64).to(x.device)
        row = torch.arange(len(pending), device=x.device)
        mass = ends[row, keep - 1]
        plain = [not _is_filtered(params[i], vocab) for i in pending]
        if width < vocab and any(plain):  # no filter: the mass is known, and most draws are near the top
            unfiltered = torch.tensor(plain).to(x.device)
            mass = torch.where(unfiltered, sub.exp().sum(dim=-1).double(), mass)
            known |= unfiltered & (target * mass < ends[:, -1])
        target *= mass
        rank = torch.minimum((ends <= target[:, None]).sum(dim=-1), keep - 1)
        chosen = _token_of_rank(sub, values, ids, rank)
        for i, token, sure in zip(pending, chosen, known.tolist(), strict=True):
            if sure:
                tokens[i] = token
        pending = [i for i, sure in zip(pending, known.tolist(), strict=True) if not sure]
        width = min(width * 8, vocab)
    return tokens


def _kept(x: Tensor, values: Tensor, ends: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """How many of the most likely tokens each row keeps, and whether ``values`` suffice to know it.

    ``values`` [N, width] are the row's largest of ``x``, descending; ``ends`` the running sums of
    their exponentials.
    """
    width, vocab = values.shape[1], x.shape[1]

    def per_row(numbers: list[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64).to(x.device)

    limit = per_row([float(p.top_k or vocab) for p in params]).clamp_(max=vocab)
    # top-p's mass is a share of what top-k left.
    total = ends.gather(1, limit.clamp(max=width).long()[:, None] - 1)[:, 0]
    if width < vocab and bool((limit == vocab).any()):
        total = torch.where(limit == vocab, x.exp().sum(dim=-1).double(), total)
    top_p = per_row([p.top_p if p.top_p < 1.0 else math.inf for p in params])
    floor = per_row([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params])

    # A token is in the nucleus if the more likely ones do not reach top_p yet; the first always is.
    nucleus = 1 + (ends[:, :-1] < (top_p * total)[:, None]).sum(dim=-1)
    likely = (values.double() >= floor[:, None]).sum(dim=-1)
    keep = torch.minimum(torch.minimum(nucleus, likely), limit.long()).clamp_(min=1, max=width)
    known = (limit <= width) | ((limit == vocab) & (keep < width))
    return keep, known


def _token_of_rank(x: Tensor, values: Tensor, ids: Tensor, rank: Tensor) -> list[int]:
    """The id of each row's token of that rank; among equal logits, ids ascend with the rank.

    topk leaves the order of equals open, and which of them it returns, so they are looked up.
    """
    value = values.gather(1, rank[:, None])
    equal = (values == value).sum(dim=-1)
    tied = (equal > 1) | ((value[:, 0] == values[:, -1]) & (values.shape[1] < x.shape[1]))
    above: list[int] = (values > value).sum(dim=-1).tolist()
    tokens: list[int] = ids.gather(1, rank[:, None])[:, 0].tolist()
    ranks: list[int] = rank.tolist()
    for i, is_tied in enumerate(tied.tolist()):
        if is_tied:
            tokens[i] = int((x[i] == value[i]).nonzero()[ranks[i] - above[i], 0])
    return tokens


def _logprobs(
    logits: Tensor, rows: Sequence[SequenceWork], scored: list[int], tokens: Sequence[int]
) -> dict[int, TokenLogprob]:
    table = logits[scored].float().log_softmax(dim=-1)
    chosen = torch.tensor([tokens[i] for i in scored]).to(table.device)
    own = table.gather(1, chosen[:, None])[:, 0].tolist()
    values, ids = _largest(table, min(_MAX_LOGPROBS, table.shape[1]))
    results = {}
    for i, logprob, *best in zip(scored, own, values.tolist(), ids.tolist(), strict=True):
        pairs = sorted(zip(best[1], best[0], strict=True), key=lambda pair: (-pair[1], pair[0]))
        results[i] = TokenLogprob(tokens[i], logprob, tuple(pairs[: rows[i].params.logprobs]))
    return results
