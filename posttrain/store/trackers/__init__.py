"""Trackers: one file each, with `open(…) -> Tracker`; `run.track` names them."""
