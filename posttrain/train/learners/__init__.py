"""Learner implementations: one module each, with `make(…) -> Learner`; `train.learner` names the module."""
