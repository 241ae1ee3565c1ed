"""What a user installs: the wheel holds every module once and works outside the repository; imports stay lean."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = {"spikeprop": "spikeprop", "spikeprop/backends": "backends", "spikeprop/models": "models"}  # in the wheel: here
LEFT_BEHIND = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*cache")

# Walks the packages as installed and prints each module's name and file. Not by pkgutil.walk_packages, which skips what
# does not import. Lava's processes run in worker.py, a script of its own, but it must import too.
IMPORT_ALL = """
import importlib, pathlib, spikeprop
root = pathlib.Path(spikeprop.__file__).parent
for path in sorted(root.rglob("*.py")):
    parts = path.relative_to(root.parent).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    print(name, importlib.import_module(name).__file__)
"""

NOT_AT_IMPORT = ["h5py", "lava", "matplotlib", "nir", "nirtorch", "norse", "numba", "sklearn", "snntorch"]
LOADED = f"import sys; print([name for name in {NOT_AT_IMPORT} if name in sys.modules])"


def run(*command, **options):
    """Runs a command without this process's import path, and returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MAKE", "MFLAGS"))}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment | options.pop("env", {}), check=False, **options
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def files_on_disk():
    """What the wheel should hold: every file of the packages, by its path there."""
    files = set()
    for place, folder in SOURCES.items():
        for directory, folders, names in os.walk(REPOSITORY / folder):  # does not follow the links to backends and models
            folders[:] = [name for name in folders if name != "__pycache__"]
            files |= {(Path(place) / Path(directory, name).relative_to(REPOSITORY / folder)).as_posix() for name in names}
    return files


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A source archive, and a wheel built from it, from a copy: building in the checkout would leave files there."""
    copy = tmp_path_factory.mktemp("build") / "copy"
    copy.mkdir()
    for name in ("spikeprop", "backends", "models"):
        shutil.copytree(REPOSITORY / name, copy / name, symlinks=True, ignore=LEFT_BEHIND)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", copy / "dist", copy)
    return copy / "dist"


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The bin folder of a new environment with the wheel, which sees this environment's libraries but not this checkout."""
    environment = tmp_path_factory.mktemp("installed") / "venv"
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    libraries = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # A path line adds the folder but, unlike addsitedir, runs none of its .pth files, where an editable install hooks in.
    (libraries / "outside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment / "bin"


def test_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert len(names) == len(set(names))
    assert set(names) == files_on_disk()
    assert {"spikeprop/py.typed", "spikeprop/backends/lava/worker.py", "spikeprop/rules/sigprop.py"} <= set(names)


def test_wheel_carries_the_licence_and_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (licence,) = [name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
    assert "Apache License" in archive.read(licence).decode()
    (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    assert "License-Expression: Apache-2.0" in archive.read(metadata).decode()


def test_every_module_of_the_wheel_imports_outside_the_repository(installed, wheel, tmp_path):
    lines = run(installed / "python", "-c", IMPORT_ALL, cwd=tmp_path).splitlines()
    modules = dict(line.split(maxsplit=1) for line in lines)
    assert len(modules) == sum(name.endswith(".py") for name in zipfile.ZipFile(wheel).namelist())
    for name, path in modules.items():
        assert Path(path).is_relative_to(installed.parent), f"{name} comes from {path}"


def test_the_command_is_installed(installed, tmp_path):
    assert "train" in run(installed / "spikeprop", "--help", cwd=tmp_path)


def test_no_package_is_forgotten():
    text = (REPOSITORY / "pyproject.toml").read_text()
    listed = ast.literal_eval(re.search(r"^packages = (\[.*?\])", text, re.MULTILINE | re.DOTALL)[1])
    on_disk = {Path(name).parent.as_posix().replace("/", ".") for name in files_on_disk() if name.endswith(".py")}
    assert sorted(listed) == sorted(on_disk)


@pytest.mark.parametrize("module", ["", ".models", ".cli"])
def test_import_is_lean(module):
    assert run(sys.executable, "-c", f"import spikeprop{module}; {LOADED}", cwd=REPOSITORY).strip() == "[]"


def test_links_in_the_checkout_are_relative():
    for name in ("backends", "models"):
        link = REPOSITORY / "spikeprop" / name
        assert link.is_symlink() and os.readlink(link) == f"../{name}"


@pytest.fixture
def make(tmp_path):
    """Runs make in a folder with the Makefile alone and a PATH of stand-ins for Python; returns the exit status and output."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "make", "sh"):
        (programs / name).symlink_to(shutil.which(name))
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path)

    def run_make(*arguments, **pythons):
        for name, script in pythons.items():
            path = programs / name.replace("_", ".")
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
        done = subprocess.run(
            ["make", *arguments],
            cwd=tmp_path,
            env={"PATH": str(programs)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return run_make


def pretending(version):
    """A stand-in that runs what `python -c` is given under the real Python, which takes itself for another version."""
    return f"exec {sys.executable} -c 'import sys; sys.version_info = {version}; exec(sys.argv[1])' \"$2\""


@pytest.mark.parametrize("target", ["demo", "test", "check"])
def test_make_stops_without_a_usable_python_and_says_what_it_found(make, target, tmp_path):
    status, output = make(
        target, python3=pretending((3, 9)), python3_13=pretending((3, 14)), python3_12="echo 'no such version' >&2; exit 127"
    )
    assert status != 0
    assert "needs Python 3.10, 3.11, 3.12 or 3.13" in output
    assert re.search(r"python3: 3\.\d+\.\d+\n.*python3.13: 3\.\d+\.\d+\n", output)
    assert "python3.12: missing, or does not run" in output
    assert "python3.11: missing, or does not run" in output
    assert "installing" not in output
    assert not (tmp_path / ".venv").exists()


def test_make_takes_the_python_it_is_given_or_stops(make):
    status, output = make("demo", "PYTHON=mine", mine="echo 3.14.0; exit 1", python3=f'exec {sys.executable} "$@"')
    assert status != 0
    assert "mine: 3.14.0" in output
    assert "python3:" not in output


def test_make_passes_over_a_python_that_does_not_run(make, tmp_path):
    status, output = make(".venv/bin/pip", python3="exit 127", python3_13=f'echo "$@" >> ran; exec {sys.executable} "$@"')
    assert status == 0, output
    assert "creating .venv with python3.13" in output
    assert (tmp_path / ".venv" / "bin" / "pip").exists()


def test_a_failed_install_shows_its_error_and_leaves_no_stamp(make, tmp_path):
    pip = tmp_path / ".venv" / "bin" / "pip"
    pip.parent.mkdir(parents=True)
    pip.touch()
    python = pip.with_name("python")
    python.write_text("#!/bin/sh\necho 'ERROR: no space left' >&2; exit 1\n")
    python.chmod(0o755)
    status, output = make("demo")
    assert status != 0
    assert "ERROR: no space left" in output
    assert not list((tmp_path / ".venv").glob("*.stamp"))
