"""What is released: an sdist and the wheel made from it, which holds the package and nothing else and runs alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SDIST = "from setuptools.build_meta import build_sdist; build_sdist('dist')"


def ran(*command: str | Path, cwd: Path, **environment: str) -> str:
    """A command's output; what it said where it fails."""
    there = {**os.environ, **environment}
    done = subprocess.run(command, cwd=cwd, env=there, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as an installer without a wheel does it."""
    folder = tmp_path_factory.mktemp("release")
    source, made = folder / "source", folder / "made"
    kept = [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), ROOT / "LICENSE", ROOT / "MANIFEST.in"]
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    shutil.copytree(ROOT / "tests", source / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for file in kept:
        shutil.copy(file, source)
    ran(sys.executable, "-c", SDIST, cwd=source)
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        assert not [name for name in tar.getnames() if "/tests" in name]
        tar.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    ran(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", made, ".", cwd=unpacked)
    return next(made.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    package = ROOT / "src" / "intactkv"
    there = {str(path.relative_to(ROOT / "src")) for path in package.rglob("*") if path.is_file()}
    there = {name for name in there if "__pycache__" not in name}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == there
    assert {"intactkv/py.typed", "intactkv/demo/model/model.safetensors"} <= held


@pytest.mark.slow
def test_the_wheel_runs_the_demo_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("llmcompressor")
    site = tmp_path / "site"
    ran(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)
    where = ran(sys.executable, "-c", "import intactkv; print(intactkv.__file__)", cwd=tmp_path, PYTHONPATH=str(site))
    assert Path(where.strip()).is_relative_to(site)
    ran(sys.executable, "-m", "intactkv.cli", "demo", cwd=tmp_path, PYTHONPATH=str(site))
    assert (tmp_path / "intactkv-demo" / "demo.json").stat().st_size
