"""The layout holds: which module may import which, and what lies where. CONTRIBUTING.md says why."""

import ast
import re
import subprocess
import tomllib

import pytest
from conftest import ROOT, project_code

SCRIPTS = {"train", "sample"} | {f"tools.{name}" for name in ("plot", "export", "evaluate", "plan", "bench", "gpu_check")}


def module_name(path):
    """nanogpt/errors.py -> nanogpt.errors, nanogpt/__init__.py -> nanogpt."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in project_code() if path.parts[0] != "config"}


def tree_of(path):
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def imports_of(module):
    """The project's modules that `module` imports, inside functions too."""
    found = set()
    for node in ast.walk(tree_of(MODULES[module])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            # `from nanogpt import optim` names a module, `from nanogpt.optim import Muon` does not
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & MODULES.keys() or {node.module}
    return {name for name in found if name.partition(".")[0] in {m.partition(".")[0] for m in MODULES}}


IMPORTS = {module: imports_of(module) for module in MODULES}


def room(module):
    return module.partition(".")[0]


def test_the_imports_are_found_by_this_file():
    """Each kind once: of a module, of a name in it, inside a function."""
    assert {"nanogpt.optim", "nanogpt.cpu_kernels"} <= IMPORTS["model"]
    assert {"configurator", "model", "data.bins", "nanogpt.optim"} <= IMPORTS["train"]
    assert IMPORTS["nanogpt.errors"] == set()
    assert len(MODULES) > 20 and SCRIPTS <= MODULES.keys()


def test_every_module_that_is_imported_exists():
    assert {name for names in IMPORTS.values() for name in names} <= MODULES.keys()


def test_nothing_in_nanogpt_imports_what_stands_above_it():
    above = {m: sorted(i for i in IMPORTS[m] if room(i) != "nanogpt") for m in MODULES if room(m) == "nanogpt"}
    assert {module: found for module, found in above.items() if found} == {}


def test_errors_imports_nothing_of_the_project():
    assert IMPORTS["nanogpt.errors"] == set()


@pytest.mark.parametrize("module, may_import", [
    ("configurator", {"nanogpt"}), ("model", {"nanogpt"}), ("data", {"nanogpt", "configurator", "data"}),
])  # fmt: skip
def test_configurator_model_and_data_import_only_what_stands_below_them(module, may_import):
    found = {m: sorted(i for i in IMPORTS[m] if room(i) not in may_import) for m in MODULES if room(m) == module}
    assert {m: others for m, others in found.items() if others} == {}


def test_nothing_imports_a_script():
    scripts = SCRIPTS | {module for module in MODULES if module.endswith(".prepare")}
    assert {module: names & scripts for module, names in IMPORTS.items() if names & scripts} == {}


def test_no_modules_import_each_other_in_a_circle():
    left = {module: names - {module} for module, names in IMPORTS.items()}
    while leaves := [module for module, names in left.items() if not names & left.keys()]:
        for module in leaves:
            del left[module]
    assert left == {}


def test_the_top_level_holds_the_files_of_the_layout_and_nothing_else():
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no git, or no git checkout")
    found = {line.partition("/")[0] for line in done.stdout.splitlines()}
    files = "train.py model.py sample.py configurator.py README.md CONTRIBUTING.md LICENSE pyproject.toml"
    files += " requirements.txt requirements-dev.txt constraints.txt .gitignore"
    folders = "config data docs nanogpt tests tools .ci .github"
    assert found <= set(f"{files} {folders}".split())


def test_contributing_names_every_module_of_nanogpt():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    modules = [str(path) for path in project_code() if path.parts[0] == "nanogpt" and path.name != "__init__.py"]
    assert [path for path in modules if f"`{path}`" not in text] == []


# ----------------------------------------------------------------------------------------------
# requirements.txt, constraints.txt and pyproject.toml name the same things


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
    assert len(commands) >= 2 and all("-c constraints.txt" in line for line in commands)
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
