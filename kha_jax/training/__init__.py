"""What a run is and does: its config, the compiled step, the optimizer and what it traces. The
config alone needs no optax and no grain: import `kha_jax.training.run_config`."""
