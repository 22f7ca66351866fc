"""Pipelines: stages of training and making data, each run once, from one file."""
