"""What a wheel and an editable install of the tree hold: all of ours, under our name only."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "planners", "workers", "orchestrator")
_NOT_SOURCE = shutil.ignore_patterns(
    ".*", "__pycache__", "build", "dist", "*.egg-info", "tests", "benchmarks", "typings"
)


def modules_of_the_tree() -> set[str]:
    files = [*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))]
    return {f"concertina/{file.relative_to(ROOT)}" for file in files}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in a wheel built from a copy of the tree, so that nothing is written here and no old build is found."""
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("these tests do not run from a source tree")
    tmp = tmp_path_factory.mktemp("wheel")
    tree = shutil.copytree(ROOT, tmp / "tree", ignore=_NOT_SOURCE)
    (tree / "README.md").touch()
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(tmp), str(tree)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


@pytest.mark.ray  # pip and setuptools as processes
def test_the_wheel_holds_every_module_of_the_tree(wheel: set[str]) -> None:
    """A package forgotten in pyproject's list is missing here."""
    assert {name for name in wheel if name.endswith(".py")} == modules_of_the_tree()


@pytest.mark.ray
def test_the_wheel_has_one_top_level_name(wheel: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"concertina"}


def run_python(code: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_install_adds_no_bare_folder_names(tmp_path: Path) -> None:
    """Elsewhere than in the checkout, ``import kernels`` finds nothing of ours; ``import concertina`` does."""
    code = (
        "import importlib.util as u\n"
        f"for name in {FOLDERS!r}:\n"
        "    spec = u.find_spec(name)\n"
        "    places = list(spec.submodule_search_locations or [spec.origin]) if spec else []\n"
        "    print(*places, sep='\\n')\n"
    )
    assert str(ROOT) not in run_python(code, tmp_path).replace(sys.prefix, "")
    shown = run_python("import concertina.kernels.moe, concertina; print(concertina.__file__)", tmp_path)
    assert Path(shown.strip()).name == "__init__.py"


@pytest.mark.ray  # takes seconds: transformers and torch in a process of its own
def test_transformers_works_with_the_checkout_on_the_path() -> None:
    """As in Ray workers and with ``--working-dir .``; a package called ``kernels`` would shadow Hugging Face's."""
    shown = run_python(
        "import sys; sys.path.insert(0, '')\n"
        "import transformers, concertina\n"
        "from transformers import AutoModelForCausalLM, MixtralForCausalLM\n"
        "print(MixtralForCausalLM.__name__)",
        ROOT,
    )
    assert shown.split() == ["MixtralForCausalLM"]
