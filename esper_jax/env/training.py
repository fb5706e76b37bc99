"""`host_training` under the name that scripts outside this repository import."""

from esper_jax.env.host_training import *  # noqa: F403
