"""Virtual environment that adds TRL to this environment's torch and transformers."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRL = "1.16.0"
FOLDER = ROOT / "build" / "parity-venv"


def beside(folder: Path) -> Path:
    """Python of a virtual environment that also sees this one's packages and this package; created if missing."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=True)
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    site = Path(subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip())
    ours = sysconfig.get_paths()
    seen = dict.fromkeys([ours["purelib"], ours["platlib"], str(ROOT)])
    (site / "beside.pth").write_text("\n".join(seen), encoding="utf-8")
    return python


def environment(folder: Path = FOLDER) -> Path:
    """Python of the environment that has TRL and uses this environment's torch and transformers."""
    python = beside(folder)
    probe = [str(python), "-c", "import trl; print(trl.__version__)"]
    if subprocess.run(probe, capture_output=True, text=True).stdout.strip() != TRL:
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", f"trl=={TRL}"], check=True)
    return python
