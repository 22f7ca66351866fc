"""Losses, advantage estimators and other pure functions of tensors; they import only torch."""
