"""Is an intact prefix worth having? One rule, in one place, from the paired interval of the KL that it closes.

A model whose perplexity, with the intact prefix, is still `BROKEN` times the full model's is **broken**: it has lost
the text, and a share of its KL, however certain, is not worth having.

The share of the KL to the full model that an intact prefix closes has a 95 % interval, by resampling whole held-out
windows. Against a floor of `WORTH_IT`, below which an effect, however certain, is not worth having:

    worth it    the whole interval lies at or above the floor
    marginal    the whole interval lies above 0, but begins below the floor and ends at or above it
    harmful     the whole interval lies below 0 and reaches minus the floor
    no effect   anything else: the interval contains 0, or lies between minus the floor and the floor
"""

from __future__ import annotations

from math import isfinite
from typing import Literal

from intactkv.evaluating.bootstrap import Interval

WORTH_IT = 0.02
BROKEN = 10.0  # log 10 = 2.3 nats worse for every token
NOTHING = 1e-6  # nats of mean KL: what two ways of computing the same differ by in float32

Verdict = Literal["broken", "worth it", "marginal", "no effect", "harmful"]

RULE = (
    "From the paired 95 % interval of the share of KL to the full model that the intact prefix closes, over held-out "
    f"windows: worth it if all of it is {100 * WORTH_IT:.0f} % or more; marginal if all of it is above 0 but it begins "
    f"below {100 * WORTH_IT:.0f} %; harmful if all of it is below 0 and it reaches −{100 * WORTH_IT:.0f} %; "
    "else no effect. Broken, whatever the interval, if its perplexity with the intact prefix is "
    f"{BROKEN:.0f} times the full model's or more."
)


def decide(gap: Interval, *, own_kl: float | None = None, times: float = 1.0) -> Verdict:
    """The verdict on a share of KL closed with its interval; `own_kl`, the mean KL in nats that could be closed.

    `times` is the perplexity with the intact prefix over the full model's.

    Below `NOTHING` nats there is nothing to close and no share means anything: no effect, as without an interval
    (one window).

    >>> decide(Interval(0.08, 0.07, 0.09)), decide(Interval(0.01, 0.005, 0.015))
    ('worth it', 'no effect')
    """
    if not times < BROKEN:
        return "broken"
    if (own_kl is not None and own_kl < NOTHING) or not (isfinite(gap.low) and isfinite(gap.high)):
        return "no effect"
    if gap.low >= WORTH_IT:
        return "worth it"
    if gap.low > 0 and gap.high >= WORTH_IT:
        return "marginal"
    if gap.high < 0 and gap.low <= -WORTH_IT:
        return "harmful"
    return "no effect"


def verdict(gap: Interval, *, own_kl: float | None = None, times: float = 1.0) -> str:
    """The verdict as one sentence with its figures."""
    share = f"{100 * gap.value:+.1f} % (95 % interval {100 * gap.low:+.1f} to {100 * gap.high:+.1f})"
    judged = decide(gap, own_kl=own_kl, times=times)
    if judged == "broken":
        return (
            f"broken: its perplexity with the intact prefix is {times:.3g} times the full model's ({BROKEN:.0f} is the "
            f"limit); the prefix closes {share} of a KL that no prefix can mend"
        )
    if own_kl is not None and own_kl < NOTHING:
        return f"no effect: the KL to the full model is {own_kl:.1g} nats, so that there is nothing to close"
    if judged == "harmful":
        return f"harmful: the intact prefix makes it worse, it closes {share} of the KL to the full model"
    if judged == "no effect" and not gap.low < 0 < gap.high:
        return f"no effect worth having: the intact prefix closes {share} of the KL to the full model"
    if judged == "no effect":
        return f"no effect that this text can show: {share} of the KL to the full model closed"
    return f"{judged}: the intact prefix closes {share} of the KL to the full model"
