"""Experiment trackers, one module each with `open(run) -> Tracker`; `run.track` selects them."""
