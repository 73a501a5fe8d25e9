"""requirements.txt, constraints.txt and pyproject.toml name the same things."""

import re
import tomllib

from conftest import ROOT


def required(name):
    """The requirements in a file, without comments and references to other files."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return sorted(line.strip() for line in lines if line.strip() and not line.startswith(("#", "-")))


def project_table():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_torch_is_a_range_and_the_tested_version_is_a_constraint():
    [torch] = [line for line in required("requirements.txt") if line.startswith("torch")]
    assert re.fullmatch(r"torch>=2\.\d+,<3", torch)
    assert required("constraints.txt") == ["torch==2.13.0"]
    assert (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").count("torch") == 0


def test_readmes_commands_install_the_tested_version():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    commands = [line for line in lines if "pip install -r requirements" in line]
    assert len(commands) == 2 and all("-c constraints.txt" in line for line in commands)
    assert [line for line in lines if "torch==" in line] == []
    first = next(line for line in lines if "requirements-dev.txt" in line)  # what .ci/run runs
    assert first.startswith("python3 -m venv .venv && ") and "-m pytest" in first


def test_pyproject_has_what_the_requirements_have():
    project = project_table()["project"]
    assert sorted(project["dependencies"]) == required("requirements.txt")
    extras = project["optional-dependencies"]
    assert set(extras) == {"hf", "data", "plot", "log", "dev"}
    assert sorted(extras["dev"]) == required("requirements-dev.txt")
    both = {line for name in ("hf", "data", "plot", "log") for line in extras[name]} - {"wandb>=0.18,<1"}
    assert both <= set(extras["dev"])  # one range for each library


def test_scripts_are_not_installed_as_a_package():
    tool = project_table()["tool"]
    assert tool["setuptools"] == {"packages": [], "py-modules": []} and tool["uv"] == {"package": False}
