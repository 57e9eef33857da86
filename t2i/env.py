"""What this machine has: versions, compiler, shared memory, disk. `python -m t2i.env` is what a bug report needs."""

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("t2i", "torch", "deepspeed", "transformers", "diffusers", "mosaicml-streaming", "numpy")
SHARED_MEMORY = Path("/dev/shm")


def extensions_folder() -> Path:
    """Where DeepSpeed's C++ operators are built: in this Python environment, so that it can be thrown away whole."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path(sys.prefix) / "torch_extensions"))


def operators_built(*names: str) -> bool:
    """Tell whether DeepSpeed's C++ operators of these names are there, so that nobody waits for a compiler."""
    return all(any(extensions_folder().rglob(f"{name}*.so")) for name in names)


def use_own_tools() -> None:
    """Put this environment's programs first on PATH: torch calls `ninja` by name, and a venv need not be active."""
    own = str(Path(sys.executable).parent)
    if os.environ.get("PATH", "").split(os.pathsep)[0] != own:
        os.environ["PATH"] = os.pathsep.join([own, os.environ.get("PATH", os.defpath)])


def describe() -> dict[str, str]:
    """Collect the facts, one short text each."""
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": str(os.cpu_count()),
    }
    for name in PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    use_own_tools()
    for tool in ("g++", "ninja"):
        facts[tool] = shutil.which(tool) or "not found: DeepSpeed's operators cannot be built"
    facts["operators"] = str(extensions_folder())
    for label, folder in (("shared memory", SHARED_MEMORY), ("disk here", Path())):
        facts[label] = f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free" if folder.exists() else "none"
    return facts


if __name__ == "__main__":
    for key, value in describe().items():
        print(f"{key:20s} {value}")
