"""What the intervals of a comparison allow one to claim, in words.

Arms are f[P, E] in the metric's unit, of what was kept on the report-test split: the same environments in each, P = 1
for a rule, NaN where not measured. The comparisons of one subject, of `never` or of a learned arm, are two families:
with the arms of the run itself, and with the controls that were played later, so that those change nothing about what
a run has claimed. What is called better, worse or beyond chance is so after Holm's correction for its family;
intervals are the plain 95 % ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from esper_jax.enums import BASELINE, LEARNED, POLICY
from esper_jax.evidence.bootstrap import gap_closed
from esper_jax.evidence.controls import (
    BEST_EAGER,
    CONTROLS,
    ORACLE,
    RANDOM,
    WIDE,
    Control,
    is_control,
    is_eager,
    is_rule,
    same_policies,
)
from esper_jax.evidence.statistics import CONFIDENCE, Interval, difference, holm, signed
from esper_jax.metric import Metric

Arms = Mapping[str, np.ndarray]


class Claim(NamedTuple):
    """A difference between two arms, as one of several that are asked about."""

    interval: Interval  # not corrected
    p: float  # corrected for the family
    family: int  # comparisons in it

    @property
    def certain(self) -> bool:
        return self.p <= 1 - CONFIDENCE  # False for NaN

    def better(self, metric: Metric) -> bool:
        return self.certain and (self.interval.mean > 0) == metric.higher_is_better

    def worse(self, metric: Metric) -> bool:
        return self.certain and not self.better(metric)


def claims(values: Arms, pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Claim]:
    """The differences between pairs of arms, first minus second, as one family."""
    pairs = list(pairs)
    found = [difference(values[a], values[b], paired_policies=same_policies(a, b)) for a, b in pairs]
    corrected = holm(np.array([interval.p for interval in found]))
    family = int((~np.isnan(corrected)).sum())
    return {pair: Claim(i, float(p), family) for pair, i, p in zip(pairs, found, corrected, strict=True)}


def _of_subject(values: Arms, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], Claim]:
    """Claims in two families: about the arms of a run, and about controls."""
    controls = [pair for pair in pairs if any(map(is_control, pair))]
    return claims(values, [pair for pair in pairs if pair not in controls]) | claims(values, controls)


def gains(values: Arms) -> dict[str, Claim]:
    """Of every other arm over the bare host."""
    found = _of_subject(values, [(arm, BASELINE) for arm in values if arm != BASELINE])
    return {arm: found[arm, BASELINE] for arm in values if arm != BASELINE}


def against_all(values: Arms, subject: str) -> dict[str, Claim]:
    """Of a learned arm over every arm that is not learned, but for the bare host, which has a family of its own."""
    others = [arm for arm in values if arm not in (BASELINE, *LEARNED)]
    found = _of_subject(values, [(subject, other) for other in others])
    return {other: found[subject, other] for other in others}


def best(values: Arms, arms: Iterable[str], metric: Metric) -> str | None:
    """The arm with the best mean, the first of equals; None if none was measured."""
    means = {arm: metric.sign * difference(values[arm], values[BASELINE]).mean for arm in arms}
    means = {arm: mean for arm, mean in means.items() if not np.isnan(mean)}
    return max(means, key=lambda arm: means[arm]) if means else None


def headline(values: Arms, size: Arms, *, data: str, metric: Metric, meant: str | None = None) -> str:
    """What learned growth gained and the best rule, for ten seconds, then whether they differ by more than chance, and
    what else was better than both: no control that explains the gain is left to the table.

    Args:
      size: f[P, E] parameters relative to the bare host.
      meant: other data, about which nothing may be claimed.
    """
    digits = metric.digits - metric.higher_is_better  # of accuracies one less than in tables
    gained = gains(values)
    rule = best(values, filter(is_rule, values), metric)
    times = lambda arm: f"at {np.nanmean(size[arm]):.2f}x"
    own = gained[POLICY]
    if own.certain:
        start = f"learned growth {_did(own.interval, metric, metric.name)} {times(POLICY)} the parameters"
    else:
        unit = f"{metric.points} of {metric.name}" if metric.higher_is_better else f"{metric.name} (lower is better)"
        amount = signed(own.interval.mean, digits) + _half(own.interval, digits)
        start = f"no gain of learned growth may be claimed: {amount} {unit} {times(POLICY)} the parameters"
        start += _one_of_many(own)
    parts, against = [f"On {data}, {start}"], against_all(values, POLICY)
    if rule is not None:
        parts[0] += f"; the best rule ({rule}) {_did(gained[rule].interval, metric)} {times(rule)}"
        if ORACLE in values:
            parts[0] += (
                f"; the best schedule that a search found {_did(gained[ORACLE].interval, metric)} {times(ORACLE)}"
            )
        parts.append(_lead(against[rule], metric, digits))
    for arm, control in CONTROLS.items():
        if control.behind and not control.rule and arm in against and against[arm].worse(metric):
            did = _did(gained[arm].interval, metric)
            parts.append(f"{control.behind.capitalize()}: {arm} {did} {times(arm)}")
    if len(values[POLICY]) == 1:
        parts.append("One policy was trained, so nothing may be claimed about how training varies")
    if meant:
        parts.append(f"Nothing may be claimed about {meant}")
    return ". ".join(parts) + "."


def _did(gain: Interval, metric: Metric, name: str = "") -> str:
    digits = metric.digits - metric.higher_is_better
    amount = f"{abs(gain.mean):.{digits}f}{_half(gain, digits)}"
    if metric.higher_is_better:
        return f"{'lost' if gain.mean < 0 else 'gained'} {amount}" + (f" {metric.points} of {name}" if name else "")
    return f"{'raised' if gain.mean > 0 else 'lowered'} {name or 'it'} by {amount}"


def _half(interval: Interval, digits: int) -> str:
    return "" if np.isnan(interval.half) else f" ± {interval.half:.{digits}f}"


def _lead(claim: Claim, metric: Metric, digits: int) -> str:
    """On the difference between the two numbers before it: positive if the policy is ahead."""
    mean, low, high, *_ = claim.interval
    if not metric.higher_is_better:
        mean, low, high = -mean, -high, -low
    between = "" if np.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]"
    start = f"The difference to the rule, {signed(mean, digits)}{between},"
    if claim.certain:
        return f"{start} is beyond chance" + ("" if claim.better(metric) else ", in favour of the rule")
    return f"{start} may be chance" + _one_of_many(claim)


def _one_of_many(claim: Claim) -> str:
    """Why an interval that excludes 0 shows nothing."""
    return f", as one of {claim.family} comparisons" if claim.interval.excludes_zero else ""


def details(values: Arms, size: Arms, *, data: str, metric: Metric) -> str:
    """One sentence on every comparison: what was found better, worse, hardly worse with fewer parameters, or not."""
    gained = gains(values)
    parts = _sorted("", gained, f"than {BASELINE}", BASELINE, metric)
    for policy in (arm for arm in values if arm in LEARNED):
        against = against_all(values, policy)
        parts += _sorted(
            f"{policy} is ", against, "than", f"{policy} against", metric, _frugal(values, size, policy, metric)
        )
    policies = max((len(values[arm]) for arm in values if arm in LEARNED), default=0)
    n = values[BASELINE].shape[1]
    trained = f" and {policies} policies trained from different seeds" if policies > 1 else ""
    what = f"report-test {metric.name} of what was kept"
    return f"On {data}, by {what} of {n} environments per arm with the same keys{trained}: {'; '.join(parts)}."


def _frugal(values: Arms, size: Arms, policy: str, metric: Metric) -> dict[str, float]:
    """Arms than which the policy is worse by less than the margin, if at all, with under half of the parameters that
    they add: its added parameters over theirs. The family is that of `against_all`, shifted by the margin."""
    added = {arm: float(np.nanmean(size[arm])) - 1 for arm in values}
    shift = metric.margin if metric.higher_is_better else -metric.margin
    shifted = against_all({**values, policy: values[policy] + shift}, policy)
    share = {arm: added[policy] / added[arm] for arm in shifted if added[arm] > 0}
    return {arm: share[arm] for arm in share if share[arm] < 0.5 and shifted[arm].better(metric)}


def _sorted(
    subject: str,
    found: dict[str, Claim],
    than: str,
    against: str,
    metric: Metric,
    frugal: dict[str, float] | None = None,
) -> list[str]:
    """What may be said about each difference, sorted into better, worse and unknown; see `_frugal`."""
    said: dict[str, list[str]] = {
        "better": [],
        "worse": [],
        f"not worse by more than {metric.margin:g} {metric.points}": [],
    }
    better, worse, hardly = said.values()
    unknown = []
    for name, claim in found.items():
        text = f"{name} ({_numbers(claim.interval, metric)})"
        enough = name in (frugal or {}) and not claim.better(metric)
        if claim.certain:
            (better if claim.better(metric) else worse).append(text)
        elif not enough:
            unknown.append(name)
        if enough and frugal:
            hardly.append(f"{text} with {frugal[name]:.2f} times the parameters that it adds")
    colon = "" if subject else ":"
    parts = [f"{subject}{side} {than}{colon} {', '.join(names)}" for side, names in said.items() if names]
    on, of = (f"{against} ", "") if subject else ("", f" against {against}")
    return parts + ([f"nothing may be claimed about {on}{', '.join(unknown)}{of}"] if unknown else [])


def _numbers(interval: Interval, metric: Metric) -> str:
    mean, low, high = (signed(value, metric.digits) for value in interval[:3])
    return f"{mean} [{low}, {high}]"


def answers(values: Arms, size: Arms, metric: Metric) -> list[tuple[str, str]]:
    """A question for each control arm that is there, and its answer; corrected as in `against_all`.

    Args:
      size: f[P, E] parameters relative to the bare host.
    """
    against = {subject: against_all(values, subject) for subject in LEARNED if subject in values}
    asked = {arm: control for arm, control in CONTROLS.items() if arm in values and arm != ORACLE}
    eager = [arm for arm in values if is_eager(arm)]
    chosen = best(values, eager, metric) if len(eager) > 1 else None
    if chosen is not None:
        asked[chosen] = BEST_EAGER
    times = lambda arm: f"x{np.nanmean(size[arm]):.2f}"
    more = {WIDE: f" (it has {times(WIDE)} the parameters, and {POLICY} {times(POLICY)})"} if WIDE in asked else {}
    found = [
        (control.question, _answer(control, arm, against[control.subject][arm], metric) + more.get(arm, ""))
        for arm, control in asked.items()
        if control.subject in against
    ]
    if ORACLE in values and RANDOM in values:
        found.append((CONTROLS[ORACLE].question, _left(values, metric)))
    return found


def _answer(control: Control, arm: str, claim: Claim, metric: Metric) -> str:
    start = f"{control.subject} minus {arm} "
    if np.isnan(claim.interval.mean):
        return f"{start}-: not measured"
    start += f"{_numbers(claim.interval, metric)} {metric.points}: "
    if claim.certain:
        return start + (control.ahead if claim.better(metric) else control.behind)
    return f"{start}cannot be told apart{_one_of_many(claim)}"


def _left(values: Arms, metric: Metric) -> str:
    closed = gap_closed(values[POLICY], values[RANDOM], values[ORACLE], higher_is_better=metric.higher_is_better)
    if np.isnan(closed.mean):
        return f"not known: {ORACLE} is not better than {RANDOM} beyond chance, so there is no gap to close"
    mean, low, high = (f"{100 * value:.0f}" for value in closed[:3])
    found = f"the best schedule that a search found ({ORACLE}), a lower bound of what is possible"
    return f"{POLICY} closed {mean} % [{low}, {high}] of the gap between {RANDOM} and {found}"
