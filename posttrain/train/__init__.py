"""The learner and its five verbs."""
