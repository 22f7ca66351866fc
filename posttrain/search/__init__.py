"""Test-time search: best-of-n sampling."""
