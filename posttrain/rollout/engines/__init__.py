"""Engines: one file each, with `make(policy, cfg) -> Generator`; `rollout.engine` names the file."""
