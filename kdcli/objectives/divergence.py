"""How far the student's distribution over classes is from the teacher's, and the derivatives of that.

p is the teacher's distribution, q the student's. All functions take log-probabilities (rows, classes) in fp32 and
return the divergence of each row, (rows,), and its derivative by the student's logits, (rows, classes), or None. They
use up the teacher's: over a vocabulary every table more is felt.
"""

import math

import torch
from torch import Tensor

from kdcli.objectives.term import Divergence


def compare(own: Tensor, other: Tensor, divergence: Divergence, *, slope: bool = True) -> tuple[Tensor, Tensor | None]:
    """Return the divergence of each row and, with `slope`, its derivative by the student's logits.

    own: log q; other: log p, which is overwritten.
    """
    match divergence.name:
        case "kl":
            return _kl(own, other, slope)
        case "reverse-kl":
            return _of_own(own, other.neg_().add_(own), slope)
        case "js":
            return _js(own, other, divergence.beta, slope)
        case "skew-kl":
            return _skew_kl(own, other, divergence.skew, slope)
        case "skew-reverse-kl":
            return _skew_reverse_kl(own, other, divergence.skew, slope)
        case "hard":
            return _hard(own, other, slope)


def compare_top(
    own: Tensor, ids: Tensor, other: Tensor, divergence: Divergence, *, slope: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return the divergence over k + 1 outcomes, k tokens and all others together, and its derivative by all logits.

    own: log q (rows, classes); ids: the tokens, (rows, k), fewer than there are; other: log p, (rows, k + 1).
    """
    top, rest = top_and_rest(own, ids)
    other = other.clone()
    if divergence.name == "hard":
        # All others together are no class.
        other[:, -1] = -torch.inf
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
    values = other.sub_(own).mul_(p).sum(-1)
    return values, own.exp().sub_(p) if slope else None


def _of_own(own: Tensor, ratio: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
    """Return sum q r for a ratio r = log(q / m) of which d(sum q r) / dq = r but for a constant; r is overwritten."""
    q = own.exp()
    values = torch.linalg.vecdot(q, ratio)
    return values, _by_logits(q, ratio) if slope else None


def _js(own: Tensor, other: Tensor, beta: float, slope: bool) -> tuple[Tensor, Tensor | None]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (GKD, arXiv 2306.13649, equation 1)."""
    mean = _mixture(other, own, beta)
    teacher = _of_teacher(other, mean)
    student, gradient = _of_own(own, mean.neg_().add_(own).mul_(1.0 - beta), slope)
    return beta * teacher + student, gradient


def _skew_kl(own: Tensor, other: Tensor, skew: float, slope: bool) -> tuple[Tensor, Tensor | None]:
    """KL(p || m) with m = skew p + (1 - skew) q (DistiLLM, arXiv 2402.03898, section 3.1)."""
    mean = _mixture(other, own, skew)
    share = (other - mean).exp_().mul_(skew - 1.0) if slope else None
    return _of_teacher(other, mean), _by_logits(own.exp(), share) if share is not None else None


def _skew_reverse_kl(own: Tensor, other: Tensor, skew: float, slope: bool) -> tuple[Tensor, Tensor | None]:
    """KL(q || m) with m = (1 - skew) p + skew q (DistiLLM, arXiv 2402.03898, section 3.1)."""
    ratio, q = _mixture(other, own, 1.0 - skew).neg_().add_(own), own.exp()
    values = torch.linalg.vecdot(q, ratio)
    return values, _by_logits(q, ratio.sub_(ratio.exp().mul_(skew))) if slope else None


def _hard(own: Tensor, other: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
    """-log q of the teacher's most probable class (DeiT, arXiv 2012.12877, equation 3)."""
    best = other.argmax(-1, keepdim=True)
    values = own.gather(-1, best)[:, 0].neg_()
    return values, own.exp().scatter_add_(-1, best, -torch.ones_like(values)[:, None]) if slope else None


def _of_teacher(other: Tensor, mean: Tensor) -> Tensor:
    """Return KL(p || m) of each row; other, log p, is overwritten."""
    p = other.exp()
    return other.sub_(mean).mul_(p).sum(-1)


def _mixture(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Return log(share e^first + (1 - share) e^second)."""
    found = first + math.log(share)
    return torch.logaddexp(found, second + math.log1p(-share), out=found)


def _by_logits(q: Tensor, slope: Tensor) -> Tensor:
    """Return the derivative by the logits of q in the place of that by q itself, which may miss a constant."""
    mean = torch.linalg.vecdot(q, slope)[:, None]
    return slope.sub_(mean).mul_(q)
