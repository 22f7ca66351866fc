"""Learners, samplers and judges in processes of their own, on one machine or on a Ray cluster."""
