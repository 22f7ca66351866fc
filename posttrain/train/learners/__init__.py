"""Learners: one file each, with `make(…) -> Learner`; `train.learner` names the file."""
