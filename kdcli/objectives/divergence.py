"""How far the student's distribution over classes is from the teacher's, and the derivatives of that.

p is the teacher's distribution, q the student's. All functions take log-probabilities (rows, classes) in fp32 and
return the divergence of each row, (rows,), and its derivative by the student's logits, (rows, classes), or None.
"""

import math

import torch
from torch import Tensor

from kdcli.objectives.term import Divergence


def compare(own: Tensor, other: Tensor, divergence: Divergence, *, slope: bool = True) -> tuple[Tensor, Tensor | None]:
    """Return the divergence of each row and, with `slope`, its derivative by the student's logits.

    own: log q; other: log p.
    """
    match divergence.name:
        case "kl":
            return _kl(own, other, slope)
        case "reverse-kl":
            return _of_own(own, own - other, slope)
        case "js":
            return _js(own, other, divergence.beta, slope)
        case "skew-kl":
            return _skew_kl(own, other, divergence.skew, slope)
        case "skew-reverse-kl":
            return _skew_reverse_kl(own, other, divergence.skew, slope)


def compare_top(
    own: Tensor, ids: Tensor, other: Tensor, divergence: Divergence, *, slope: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return the divergence over k + 1 outcomes, k tokens and all others together, and its derivative by all logits.

    own: log q (rows, classes); ids: the tokens, (rows, k), fewer than there are; other: log p, (rows, k + 1).
    """
    top, rest = top_and_rest(own, ids)
    values, outcomes = compare(torch.cat([top, rest], 1), other, divergence, slope=slope)
    if outcomes is None:
        return values, None
    # What the rest gets is shared out by the share that each token has in it.
    gradient = (own - rest).exp_().mul_(outcomes[:, -1:])
    return values, gradient.scatter_(1, ids, outcomes[:, :-1])


def top_and_rest(log_probabilities: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of some tokens, (rows, k), and of all others together, (rows, 1)."""
    others = log_probabilities.scatter(1, ids, -torch.inf)
    return log_probabilities.gather(1, ids), others.logsumexp(1, keepdim=True)


def _kl(own: Tensor, other: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
    """KL(p || q) = sum p log(p / q); its derivative is q - p (Hinton et al. 2015, equation 2)."""
    p = other.exp()
    values = (other - own).mul_(p).sum(-1)
    return values, own.exp().sub_(p) if slope else None


def _of_own(own: Tensor, ratio: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
    """Return sum q r for a ratio r = log(q / m) of which d(sum q r) / dq = r but for a constant."""
    q = own.exp()
    values = (q * ratio).sum(-1)
    return values, _by_logits(q, ratio) if slope else None


def _js(own: Tensor, other: Tensor, beta: float, slope: bool) -> tuple[Tensor, Tensor | None]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (GKD, arXiv 2306.13649, equation 1)."""
    mean = _mixture(other, own, beta)
    p, ratio = other.exp(), (own - mean).mul_(1.0 - beta)
    values, gradient = _of_own(own, ratio, slope)
    return values + beta * (other - mean).mul_(p).sum(-1), gradient


def _skew_kl(own: Tensor, other: Tensor, skew: float, slope: bool) -> tuple[Tensor, Tensor | None]:
    """KL(p || m) with m = skew p + (1 - skew) q (DistiLLM, arXiv 2402.03898, section 3.1)."""
    mean, p = _mixture(other, own, skew), other.exp()
    values = (other - mean).mul_(p).sum(-1)
    return values, _by_logits(own.exp(), (other - mean).exp_().mul_(skew - 1.0)) if slope else None


def _skew_reverse_kl(own: Tensor, other: Tensor, skew: float, slope: bool) -> tuple[Tensor, Tensor | None]:
    """KL(q || m) with m = (1 - skew) p + skew q (DistiLLM, arXiv 2402.03898, section 3.1)."""
    mean, q = _mixture(other, own, 1.0 - skew), own.exp()
    ratio = own - mean
    values = (q * ratio).sum(-1)
    return values, _by_logits(q, ratio - (own - mean).exp_().mul_(skew)) if slope else None


def _mixture(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Return log(share e^first + (1 - share) e^second)."""
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))


def _by_logits(q: Tensor, slope: Tensor) -> Tensor:
    """Return the derivative by the logits of q from that by q itself, which may miss a constant."""
    mean = (q * slope).sum(-1, keepdim=True)
    return (slope - mean).mul_(q)
