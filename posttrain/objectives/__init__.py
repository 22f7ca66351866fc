"""The mathematics: pure functions of tensors that import only torch."""
