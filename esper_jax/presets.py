"""Named configurations: the hosts of the reference and the three sizes of the main job."""

from __future__ import annotations

import dataclasses

from esper_jax.config import (
    Config,
    DataConfig,
    HostConfig,
    LifecycleConfig,
    PPOConfig,
    TrackerConfig,
    TrainingConfig,
    nearest_hint,
)

HOSTS = {
    # channels after the blocks: 8, 16, 32; 6,418 parameters
    "cifar10": HostConfig(n_blocks=3, base_channels=8, pool_layers=3, kernel_size=3),
    # 8 ... 128 channels, 32x32 pooled down to 1x1; 99,922 parameters
    "cifar10_deep": HostConfig(n_blocks=5, base_channels=8, pool_layers=5, kernel_size=3),
    # 1x1 kernels and no pooling: sees colours, not shapes; 2,986 parameters
    "cifar10_blind": HostConfig(n_blocks=2, base_channels=32, pool_layers=0, kernel_size=1),
    # for 8x8 images
    "digits": HostConfig(n_blocks=2, base_channels=8, pool_layers=2, kernel_size=3),
}

PRESETS = {
    "smoke": Config(
        data=DataConfig(image_size=8, train_limit=2048, validation_size=256, test_limit=512),
        training=TrainingConfig(epochs=16, batches_per_epoch=12, batch_size=64),
        # fewer kinds of seeds compile faster
        lifecycle=LifecycleConfig(blueprints=("conv_light", "attention", "norm")),
        ppo=PPOConfig(anneal_rounds=2),
        n_envs=8,
        rounds=2,
        report_envs=8,
    ),
    "quick": Config(
        data=DataConfig(image_size=16, train_limit=10_000, validation_size=512),
        # small, so that growth helps and enough rounds fit into the time for the policy to learn something; and one
        # pooling less than `cifar10`: 16x16 images keep 4x4 positions, so that a convolution in a slot sees space
        host=dataclasses.replace(HOSTS["cifar10"], base_channels=4, pool_layers=2),
        training=TrainingConfig(batches_per_epoch=12, batch_size=128),
        # an eighth of the images in an epoch, measured on a fifth of the images: changes are larger and noisier
        tracker=TrackerConfig(plateau_threshold=1.5, stabilization_threshold=0.05, stabilization_epochs=2),
        ppo=PPOConfig(learning_rate=1e-3, epochs=6, minibatches=4, anneal_rounds=14),
        n_envs=16,
        rounds=14,
        report_envs=16,
    ),
    "full": Config(
        training=TrainingConfig(compute_dtype="bfloat16", tile_pixels=0),
        ppo=PPOConfig(anneal_rounds=100, minibatches=8),
        n_envs=256,
        env_chunk=64,
        rounds=100,
        report_envs=256,
    ),
}


def get(name: str) -> Config:
    """The preset of that name. Raises ValueError naming the nearest one for an unknown name."""
    return _lookup(PRESETS, "preset", name)


def host(name: str) -> HostConfig:
    """The host preset of that name. Raises ValueError naming the nearest one for an unknown name."""
    return _lookup(HOSTS, "host", name)


def _lookup(table: dict, kind: str, name: str):
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}{nearest_hint(name, table)} (known: {', '.join(table)})")
    return table[name]
