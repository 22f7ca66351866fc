"""Evaluation of models and runs: accuracy, intervals, calibration, bias probes, diagnosis."""
