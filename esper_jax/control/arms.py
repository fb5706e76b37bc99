"""The controllers that a run compares, and one of them chosen by a traced number (Esper's Tamiyo)."""

from __future__ import annotations

from jax import lax

from esper_jax.config import Config
from esper_jax.control import baselines, heuristic
from esper_jax.enums import BASELINE
from esper_jax.network import seed_bank
from esper_jax.types import Array, Controller


def default_controllers(cfg: Config) -> dict[str, Controller]:
    """The rules that a learned policy has to beat, with the blueprints that the configuration offers."""
    offered = cfg.lifecycle.offered
    modules = seed_bank.table(cfg.lifecycle.blueprints, cfg.host.modules)[1:]
    largest = [max(modules, key=lambda module: module.param_count(width)).name for width in cfg.host.slot_widths]
    rotation = tuple(name for name in heuristic.HeuristicConfig().rotation if name in offered)
    regular = "conv_light" if "conv_light" in offered else largest[-1]
    return {
        BASELINE: baselines.never(),
        "random": baselines.random(),
        "eager": baselines.eager(largest, lifecycle=cfg.lifecycle),
        "periodic": baselines.periodic(blueprint=regular, lifecycle=cfg.lifecycle),
        "heuristic": heuristic.make_controller(
            heuristic.HeuristicConfig(rotation=rotation or (largest[-1],), available=offered)
        ),
    }


def choose(controllers: list[Controller], number: Array) -> Controller:
    """One controller out of a list, by a traced number: `lax.switch` over their `act`s, with all their carries."""

    def init(key):
        return tuple(controller.init(key) for controller in controllers)

    def act(key, carries, obs):
        def branch(i):
            def run():
                carry, action, extras = controllers[i].act(key, carries[i], obs)
                return (*carries[:i], carry, *carries[i + 1 :]), action, extras

            return run

        return lax.switch(number, [branch(i) for i in range(len(controllers))])

    return Controller(init, act)


def controllers(cfg: Config, script: str | None) -> dict[str, Controller]:
    """The rules of a run: the default ones, and `script` if there is a text of one. Raises ValueError if it is bad."""
    rules = default_controllers(cfg)
    if script is not None:
        slots, decisions = len(cfg.host.slot_names), cfg.training.epochs - 1
        actions = baselines.parse_script(script, cfg.lifecycle, slots=slots, decisions=decisions)
        rules["script"] = baselines.script(actions, cfg.lifecycle)
    return rules
