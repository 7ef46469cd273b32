"""The commands. In a wheel this folder is the package switch_sae.commands (setup.py), so its modules import each other relatively."""
