"""esper_jax: reinforcement learning of growth in neural networks."""
