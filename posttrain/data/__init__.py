"""Rows, chat templates and batches."""
