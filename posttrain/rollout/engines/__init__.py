"""Sampling engines: one module each, with `make(policy, cfg) -> Generator`; `rollout.engine` names the module."""
