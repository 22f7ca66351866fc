"""Datasets, chat templates and batches."""
