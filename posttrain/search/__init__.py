"""Test-time compute: choosing among several completions."""
