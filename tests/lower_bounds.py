"""Runs tests with the lowest versions that pyproject.toml allows.

    python -m tests.lower_bounds peft transformers tokenizers safetensors

installs each package without its dependencies into a temporary folder that comes first on the path. Packages that
restrict each other's versions, as these do, must be tried together.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ("tests/test_weights.py", "tests/test_learner.py", "tests/test_packing.py")


def lower_bounds() -> dict[str, str]:
    """Package → lowest version, of the package's own requirements."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pairs = (re.fullmatch(r"([\w.-]+)>=([\w.]+)", requirement) for requirement in project["dependencies"])
    return {match[1]: match[2] for match in pairs if match}


def main(packages: list[str]) -> int:
    """Installs the packages and runs TESTS; returns pytest's exit status."""
    lowest = lower_bounds()
    unknown = [name for name in packages if name not in lowest]
    if unknown or not packages:
        print(f"give packages of pyproject.toml: {', '.join(lowest)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
        subprocess.run([*install, *(f"{name}=={lowest[name]}" for name in packages)], check=True)
        path = os.pathsep.join([folder, str(ROOT)])
        print(f"testing with {', '.join(f'{name} {lowest[name]}' for name in packages)}")
        command = [sys.executable, "-m", "pytest", "-q", *TESTS]
        return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
