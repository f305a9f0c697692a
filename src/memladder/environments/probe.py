"""What an environment can say about itself, asked inside it.

    python -m memladder.environments.probe MODULE FRAMEWORK DEVICE

prints one line of JSON. Nothing but the standard library is imported before the interpreter is
known to be new enough.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterable

LEAST_PYTHON = (3, 10)


def main(arguments: list[str]) -> int:
    """Print the answer; exit status 2 and one line on stderr where there is none."""
    if sys.version_info < LEAST_PYTHON:
        sys.stderr.write(f"it is Python {platform.python_version()}, workers need 3.10\n")
        return 2
    from memladder import frameworks

    module, key, device = arguments
    try:
        framework = frameworks.load(module, key)
    except ModuleNotFoundError as error:
        answer = {
            "available": False,
            "reason": f"{error.name} not installed",
            "install": f"pip install {error.name}, in the environment that {key} runs in",
            "plans": False,
        }
        packages = {}
    else:
        found = framework.availability(device)
        answer = {
            "available": found.available,
            "version": found.version,
            "reason": found.reason,
            "install": found.install,
            "plans": found.plans,
        }
        packages = package_versions(framework.packages)
    said = {"availability": answer, "python": platform.python_version(), "packages": packages}
    sys.stdout.write(f"\n{json.dumps(said)}\n")
    return 0


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Installed versions of the distributions among `names`; missing ones are left out.

    torch's says what it was built for, which its distribution's need not: on the CPU a CUDA build
    takes some 500 MiB more.
    """
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "torch" in found:
        from memladder.frameworks._shared.torch_common import torch_version

        found["torch"] = torch_version() or found["torch"]
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
