"""Distributions: what is in them, what they say, and that they run where they are installed. Nothing is downloaded."""

import base64
import csv
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
HOOKS = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
# Left over in a tree that was built and used in place.
GENERATED = (
    "effkern/_C.abi3.so",
    "effkern/_data.cpython-39-x86_64-linux-gnu.so",
    "effkern/__pycache__/x.cpython-39.pyc",
    "csrc/cpu/left.so",
    "runs/demo/report.md",
    "build/lib/effkern/_C.abi3.so",
)


def built(hook: str, tree: Path, out: Path, **variables: str) -> Path:
    """What `python -m build --no-isolation` calls in `tree`."""
    out.mkdir(parents=True, exist_ok=True)
    unset = ("EFFKERN_PURE", "EFFKERN_ABI3", "EFFKERN_CMAKE_ARGS")
    environment = {k: v for k, v in os.environ.items() if k not in unset and not k.startswith("PYTEST_")} | variables
    command = [sys.executable, "-c", HOOKS, hook, str(out)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source distribution of the tracked files, with generated ones lying about; unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in tracked():
        copy = folder / "tree" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    for name in GENERATED:
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "tree" / name).write_bytes(b"generated")
    packed = built("build_sdist", folder / "tree", folder / "dist")
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
    return folder / packed.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def pure(sdist, tmp_path_factory) -> Path:
    return built("build_wheel", sdist, tmp_path_factory.mktemp("pure"), EFFKERN_PURE="1")


def test_a_source_distribution_has_all_that_a_build_needs_and_no_more(sdist):
    found = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    needed = {name for name in tracked() if name.startswith(("effkern/", "csrc/"))}
    needed |= {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"}
    assert len(needed) > 200
    assert needed <= found
    of_setuptools = {"PKG-INFO", "setup.cfg"}
    assert {name for name in found - needed - of_setuptools if not name.startswith("effkern.egg-info/")} == set()


def test_cmake_finds_every_source_in_a_source_distribution(sdist, tmp_path):
    command = ["cmake", "-S", sdist, "-B", tmp_path, "-G", "Ninja", "-DEFFKERN_CUDA=OFF"]
    done = subprocess.run(
        [*command, f"-DPython_EXECUTABLE={sys.executable}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    plan = (tmp_path / "build.ninja").read_text()
    for source in [*(ROOT / "csrc" / "cpu").glob("*.cpp"), *(ROOT / "csrc" / "data").glob("*.cpp")]:
        assert f"{sdist}/csrc/{source.parent.name}/{source.name}" in plan


def test_a_pure_wheel_holds_the_package_and_nothing_else(pure):
    assert pure.name == "effkern-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(pure) as wheel:
        names = set(wheel.namelist())
        rows = list(csv.reader(wheel.read("effkern-0.1.0.dist-info/RECORD").decode().splitlines()))
        for name, digest, size in rows:
            if digest:
                algorithm, _, value = digest.partition("=")
                actual = hashlib.new(algorithm, wheel.read(name)).digest()
                assert base64.urlsafe_b64encode(actual).rstrip(b"=").decode() == value, name
                assert len(wheel.read(name)) == int(size)
    assert {row[0] for row in rows} == names
    package = {name for name in tracked() if name.startswith("effkern/")}
    assert {"effkern/py.typed", "effkern/train/hf/modeling_effkern.py"} <= package
    about = {name for name in names if name.startswith("effkern-0.1.0.dist-info/")}
    assert names - about == package
    assert "effkern-0.1.0.dist-info/licenses/LICENSE" in about


def test_metadata_ask_for_torch_alone_and_have_the_extras(pure):
    with zipfile.ZipFile(pure) as wheel:
        found = Parser().parsestr(wheel.read("effkern-0.1.0.dist-info/METADATA").decode())
        commands = wheel.read("effkern-0.1.0.dist-info/entry_points.txt").decode()
    assert [r for r in found.get_all("Requires-Dist") if "extra ==" not in r] == ["torch>=2.11"]
    assert {"train", "peers", "hf", "eval", "wandb", "curation", "datasets", "bench", "triton", "dev"} <= set(
        found.get_all("Provides-Extra")
    )
    assert found["Requires-Python"] == ">=3.10"
    assert found["License-Expression"] == "Apache-2.0"
    assert "effkern = effkern.cli:main" in commands


def test_an_installed_pure_wheel_computes_and_says_what_it_lacks(pure, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target"]
    subprocess.run([*command, str(tmp_path / "site"), str(pure)], check=True)
    code = """
import json, sys
# An editable install would lend its compiled modules to a package that has none.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import torch, effkern
from effkern import native
x, w, labels = torch.ones(3, 4, requires_grad=True), torch.eye(5, 4), torch.arange(3)
loss = effkern.linear_distill_loss(x, w, labels).loss
loss.backward()
plain = torch.nn.functional.cross_entropy(x @ w.t(), labels)
print(json.dumps([effkern.__file__, loss.item(), plain.item(), native.load("_C"), native.load("_data")]))
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "TRITON_INTERPRET": "0"}
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": False}
    done = subprocess.run([sys.executable, "-c", code], **run)
    assert done.returncode == 0, done.stderr
    where, loss, plain, *problems = json.loads(done.stdout)
    assert where == str(tmp_path / "site" / "effkern" / "__init__.py")
    assert loss == pytest.approx(plain, rel=1e-6)
    assert problems == ["effkern._C was not built", "effkern._data was not built"]
    done = subprocess.run([sys.executable, tmp_path / "site" / "bin" / "effkern", "--version"], **run)
    assert done.stdout == "0.1.0\n"


@pytest.mark.parametrize(
    ("variables", "tag", "data"),
    [
        ({}, f"cp3{sys.version_info.minor}-cp3{sys.version_info.minor}", True),
        ({"EFFKERN_ABI3": "1"}, "cp310-abi3", False),
    ],
)
def test_native_wheels_are_tagged_for_what_is_inside(variables, tag, data, sdist, tmp_path):
    """With a cmake that compiles nothing, in a tree that was built with other options before."""
    tree = tmp_path / "tree"
    subprocess.run(["cp", "-r", sdist, tree], check=True)
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    old = tree / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "effkern"
    old.mkdir(parents=True)
    (old / "_data.cpython-39-x86_64-linux-gnu.so").write_text("of an earlier build")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "cmake").write_text(
        f"#!{sys.executable}\n"
        "import pathlib, sys\n"
        "given = dict(word[2:].split('=', 1) for word in sys.argv if word.startswith('-D'))\n"
        "if given:\n"
        "    out = pathlib.Path(given['EFFKERN_OUTPUT_DIR'])\n"
        "    (out / '_C.abi3.so').write_text('')\n"
        "    if given['EFFKERN_DATA'] == 'ON':\n"
        "        (out / '_data.so').write_text('')\n"
    )
    (tools / "cmake").chmod(0o755)
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    wheel = built("build_wheel", tree, tmp_path / "dist", PATH=path, **variables)
    assert wheel.name == f"effkern-0.1.0-{tag}-{platform}.whl"
    with zipfile.ZipFile(wheel) as found:
        modules = {name for name in found.namelist() if name.endswith(".so")}
        assert "Root-Is-Purelib: false" in found.read("effkern-0.1.0.dist-info/WHEEL").decode()
    assert modules == {"effkern/_C.abi3.so"} | ({"effkern/_data.so"} if data else set())
