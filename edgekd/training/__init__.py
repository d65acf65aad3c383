"""The training loop and what it stands on: the step, the distiller, the state of a run, its log."""
