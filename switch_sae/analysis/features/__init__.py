"""How latents lie to each other: behind `geometry`, `duplication` and surgery."""
