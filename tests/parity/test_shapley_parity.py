"""Attribution from full tables of accuracies against the reference's engine."""

import golden
import jax
import jax.numpy as jnp
import numpy as np

from esper_jax.env import attribution as A

each_table = golden.each_case("shapley", lambda case: "values" in case)
# `attribute` reads whole tables, which are made up to four slots
each_small_table = golden.each_case(
    "shapley", lambda case: "values" in case and case["on"].shape[1] <= A.MAX_TABLE_SLOTS
)
each_list = golden.each_case("shapley", lambda case: any(key.startswith("full_factorial") for key in case))


def tables(case):
    """Accuracies in the order of `configurations`, whatever the file's order of columns."""
    column = np.argsort(case["on"] @ 2 ** np.arange(case["on"].shape[1]))
    return jnp.asarray(case["values"][:, column], jnp.float32)


def close(actual, expected, what):
    # the absolute part: sums of a few differences of float32 accuracies of up to 100 points, rounded by 4e-6 each
    golden.close(actual, expected, what, rtol=1e-5, atol=5e-5)


@each_table
def test_shapley_values(case):
    values = tables(case)
    actual = jax.vmap(A.shapley)(values)
    close(actual, case["shapley"], "shapley")
    close(actual.sum(-1), case["full"] - case["baseline"], "sum of shapley")


@each_table
def test_leave_one_out_and_interactions(case):
    values = tables(case)
    close(jax.vmap(A.leave_one_out)(values), case["leave_one_out"], "leave_one_out")
    expected = np.where(np.eye(case["on"].shape[1], dtype=bool), 0.0, case["interaction"])
    close(jax.vmap(A.interactions)(values), expected, "interaction")


@each_small_table
def test_marginal_contribution_is_the_mean_over_rows(case):
    """The engine's on/off means follow from the same table by the rows that `configurations` names."""
    values, on = tables(case), A.configurations(case["on"].shape[1]).astype(np.float32)
    rows = len(on)
    close(values @ (2 * on - 1) * (2 / rows), case["marginal"], "marginal")


@each_small_table
def test_attribute_reads_the_same_numbers(case):
    n_slots = case["on"].shape[1]
    live = jnp.ones(n_slots, bool)
    read = jax.vmap(lambda values: A.attribute(values, A.configurations(n_slots), live))(tables(case))
    pair = np.where(np.eye(n_slots, dtype=bool), 0.0, case["interaction"])
    close(read.contribution, case["leave_one_out"], "contribution")
    close(read.shapley, case["shapley"], "attributed shapley")
    close(read.total_improvement, case["full"] - case["baseline"], "total_improvement")
    close(read.interaction_sum, pair.sum(-1), "interaction_sum")
    close(read.boost, np.maximum(pair.max(-1), 0), "boost")


@each_list
def test_configuration_lists(case):
    """Full tables up to four slots; beyond, the reference's ablation list with the all-off row second."""
    for name, expected in case.items():
        kind, n_slots = name.split("/")
        n_slots = int(n_slots)
        ours = A.configurations(n_slots)
        if kind == "full_factorial" and n_slots <= A.MAX_TABLE_SLOTS:
            golden.close(ours, expected, name)
        if kind == "ablation_only" and n_slots > A.MAX_TABLE_SLOTS:
            golden.close(ours[[0, *range(2, 2 + n_slots), 1]], expected, name)
