"""The arms that answer a question about the learned policy, and how an arm's rows belong to policies."""

from __future__ import annotations

from typing import NamedTuple

from esper_jax.enums import BASELINE, GREEDY, LEARNED, POLICY


class Control(NamedTuple):
    """The question that a policy's difference to an arm answers, and the answer if the policy is ahead or behind."""

    question: str
    what: str  # the arm is
    ahead: str = ""
    behind: str = ""
    subject: str = POLICY  # what is compared with it
    rule: bool = False  # a way of growing that knows nothing of the policy, so one of those that it has to beat
    replayed: bool = False  # row p is made of policy p's own episodes


TUNED, ORACLE, RANDOM, STATIC, WIDE = "periodic_tuned", "oracle", "random", "static_final", "static_wide"
EAGER = "eager_"  # and the kind of seed that is grown everywhere
CONTROLS = {
    STATIC: Control(
        "Does growing matter, or only the final shape?",
        "what each of the policy's episodes kept, there from the first epoch on",
        "growing matters",
        "the final shape from the start is better",
        replayed=True,
    ),
    WIDE: Control(
        "Is it only the number of parameters?",
        "a bare host that is wider, nearest in size to what the policy kept",
        "it is more than their number",
        "a wider host is better",
    ),
    "blind": Control(
        "Does it need to look, beyond what is legal and what time it is?",
        "policies trained in the same way that see the time, and what is legal, alone",
        "looking pays",
        "it is better without looking",
    ),
    # the usual schedule is one of likeliest actions, so it is those that it is compared with
    "fixed": Control(
        "Does it adapt?",
        "each policy's most frequent schedule of likeliest actions, replayed without it",
        "it adapts, and that pays",
        "its usual schedule is better",
        subject=GREEDY,
        replayed=True,
    ),
    "random_matched": Control(
        "Is it more than doing as much at random?",
        "as many of each operation as the policy asked for, at random",
        "it is",
        "doing as much at random is better",
        replayed=True,
    ),
    TUNED: Control(
        "Does it beat a tuned rule?",
        "one module in every slot, one after the other; module and period chosen by return, which prices parameters",
        "it does",
        "the tuned rule is better",
        rule=True,
    ),
    ORACLE: Control(
        "How much is left to gain?", "the best schedule that a search found, by return, on keys of training"
    ),  # the yardstick of what is possible, and so no rule to be beaten
}
BEST_EAGER = Control(
    "Does it beat growing the best module at once?",
    "one module everywhere, at once; of all the best on report-test, which favours the rule",
    "it does",
    "growing it at once is better",
)


def is_rule(arm: str) -> bool:
    """One of those of which the best has to be beaten."""
    return arm not in (BASELINE, *LEARNED) and (arm not in CONTROLS or CONTROLS[arm].rule)


def is_control(arm: str) -> bool:
    """Played after a run, to explain it, and no arm of the run's own comparison."""
    return arm in CONTROLS or arm.startswith(EAGER)


def is_eager(arm: str) -> bool:
    """`eager`, or one of a single blueprint."""
    return arm == "eager" or arm.startswith(EAGER)


def same_policies(arm: str, other: str) -> bool:
    """Whether row p of both comes from policy p."""
    return all(name in (POLICY, GREEDY) or name in CONTROLS and CONTROLS[name].replayed for name in (arm, other))
