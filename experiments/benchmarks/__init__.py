"""Speed, and agreement with other implementations: all of experiments/ that is not a command of the main job. Nothing in the library imports it."""
