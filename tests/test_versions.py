"""The declared versions: others are refused at import, and the minimums are those of the table in docs."""

import os
import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import capsule_heads
from capsule_heads.requirements import refuse_other_versions

ROOT = Path(capsule_heads.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install(name, version, *lines): the metadata of a distribution that hides an installed one."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, version, *lines):
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        text = "\n".join(["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", *lines])
        (folder / "METADATA").write_text(text + "\n")

    return write


def install_package(install, *needed, python=">=3.11"):
    install("capsule-heads", "0.1.0", f"Requires-Python: {python}", *(f"Requires-Dist: {line}" for line in needed))


@pytest.mark.parametrize(
    ("needed", "found"),
    [
        ("transformers>=5.23", "5.22.2"),
        ("transformers>=5.23", "5.23.0.dev0"),
        ("torch>=2.8", "2.7.1+cpu"),
        ("torch>=2.8", "2.8.0a0+git1234"),
        ("accelerate>=1.3", "1.2.1"),
        ("accelerate<2,>=1.3", "2.0.0"),
        ("filelock>=3.12", "3.9"),
        ("wrapt!=2.0.0,>=1.17", "2.0.0"),
    ],
)
def test_a_version_outside_its_range_is_refused_in_one_sentence(needed, found, install):
    install_package(install, "numpy>=2", needed)
    name = Requirement(needed).name
    install(name, found)
    with pytest.raises(ImportError) as refusal:
        refuse_other_versions()
    assert str(refusal.value) == f'found {name} {found}, but capsule_heads needs {needed}: pip install "{needed}"'


@pytest.mark.parametrize(
    ("needed", "found"),
    [
        ("transformers>=5.23", "5.23"),
        ("transformers>=5.23", "5.25.0.dev0"),
        ("torch>=2.8", "2.14.1+cpu"),
        ("torch>=2.8", "2.9.0a0+git1234"),
        ("torch>=2.8", "2.16.0.dev20261101+cu130"),
        ("accelerate", "0.1"),
        ("accelerate @ file:///accelerate.whl", "0.1"),
        ('torch>=2.8; python_version < "3"', "1.0"),
        ('peft>=0.18; extra == "peft"', "0.1"),  # of those who asked for it alone
        ("surely-not-installed>=1", None),
    ],
)
def test_a_version_inside_its_range_is_not_refused(needed, found, install):
    install_package(install, needed)
    if found:
        install(Requirement(needed).name, found)
    refuse_other_versions()


def test_several_versions_are_refused_together(install):
    install_package(install, "transformers>=5.23", "torch>=2.8", "accelerate>=1.3")
    for name, version in (("transformers", "5.20.0"), ("torch", "2.9.0"), ("accelerate", "1.2.1")):
        install(name, version)
    with pytest.raises(ImportError) as refusal:
        refuse_other_versions()
    assert str(refusal.value) == (
        "found transformers 5.20.0, accelerate 1.2.1, but capsule_heads needs transformers>=5.23, accelerate>=1.3: "
        'pip install "transformers>=5.23" "accelerate>=1.3"'
    )


def test_another_python_is_refused(install):
    install_package(install, python=">=99.1")
    with pytest.raises(ImportError) as refusal:
        refuse_other_versions()
    assert str(refusal.value) == (
        f"found Python {platform.python_version()}, but capsule_heads needs Python>=99.1: "
        "install it into an environment of such a Python"
    )


def test_importing_the_package_refuses(install, tmp_path):
    install_package(install, "transformers>=5.23")
    install("transformers", "5.20.0")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-c", "import capsule_heads"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: found transformers 5.20.0, but capsule_heads needs")


def test_every_dependency_declares_the_minimum_that_the_table_has():
    lines = [*PROJECT["dependencies"], *(line for group in PROJECT["optional-dependencies"].values() for line in group)]
    declared = {(r.name, str(r.specifier)) for r in map(Requirement, lines) if r.name != PROJECT["name"]}
    table = (ROOT / "docs" / "reference" / "versions.md").read_text(encoding="utf-8")
    assert dict(declared) == dict(re.findall(r"^\| ([\w.-]+) \| (>=[\d.]+) \|", table, re.MULTILINE))
    assert len(dict(declared)) == len(declared)  # one minimum for all extras


def test_python_and_the_libraries_here_are_in_range():
    refuse_other_versions()
    assert f"Python {PROJECT['requires-python'].removeprefix('>=')} or later" in (ROOT / "README.md").read_text()
