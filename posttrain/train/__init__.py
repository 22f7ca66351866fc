"""Training: learners, forward passes and the step loop."""
