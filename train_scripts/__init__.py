"""The scripts, each to be launched: `python train_scripts/NAME.py`, or `-m speed_diffusers.train_scripts.NAME`."""
