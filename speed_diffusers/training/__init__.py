"""The trainer: its options, a run and its parts, one step, and what makes it resume exactly."""
