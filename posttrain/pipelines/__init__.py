"""Pipelines: training and data stages from one file, each run once."""
