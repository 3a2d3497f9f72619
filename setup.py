"""What pyproject.toml cannot say: a wheel holds the CPU kernels, compiled for every level.

Where there is no compiler, it is a wheel for any machine, whose kernels are compiled on first use.
"""

import runpy
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

_COMPILER = Path(__file__).parent / "kernels/cpu/compiler.py"


def has_compiler() -> bool:
    module = runpy.run_path(str(_COMPILER))
    try:
        return bool(module["find_compiler"]())
    except module["BuildError"]:
        return False


class BuildWithKernels(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode and has_compiler():
            directory = Path(self.build_lib) / "kernels/cpu/lib"
            subprocess.run([sys.executable, str(_COMPILER), str(directory)], check=True)


class WheelOfThisArchitecture(bdist_wheel):
    """For any Python."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = not has_compiler()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelOfThisArchitecture})
