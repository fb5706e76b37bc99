"""Seed modules against the reference's values and gradients, whatever their host."""

import golden
import jax
import torch_layout as torch

from esper_jax.types import BLUEPRINTS


def check_values_and_gradients(topology: torch.Topology, case, close) -> None:
    """A case of `blueprints_*`; `close` compares its values."""
    name, width = BLUEPRINTS[int(case["meta/blueprint"])], int(case["meta/width"])
    blueprint = topology.modules[name]
    params = topology.seed_params(name, golden.sub(case, "param"))
    golden.close(blueprint.param_count(width), case["meta/n_params"], "n_params")
    assert {key: p.shape for key, p in blueprint.spec(width).items()} == {key: p.shape for key, p in params.items()}

    x, g = topology.features(case["x"]), topology.features(case["g"])

    @jax.jit
    def run(params, x, g):
        y, pullback = jax.vjp(blueprint.apply, params, x)
        return y, *pullback(g)

    y, grads, grad_x = run(params, x, g)
    close(y, topology.features(case["y"]), "y")
    # the gradient of the one scalar sums over all elements and may cancel: a rounding of 6e-8 for each
    rounding = {"strength": 6e-8 * x.size}
    for key, wanted in topology.seed_params(name, golden.sub(case, "grad")).items():
        torch.assert_close(grads[key], wanted, f"grad/{key}", relative=2e-5, absolute=rounding.get(key, 0.0))
    torch.assert_close(grad_x, topology.features(case["grad_x"]), "grad_x", relative=2e-5)


def check_parameter_counts(topology: torch.Topology, case) -> None:
    """All widths that the reference's table lists."""
    blueprint = topology.modules[case.name.split()[-1]]
    for width, count in case["n_params"].items():
        golden.close(blueprint.param_count(int(width)), count, f"n_params at width {width}")
