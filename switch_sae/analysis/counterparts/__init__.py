"""Which latents of two SAEs belong together: behind `matching` and `fates`."""
