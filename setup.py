"""What pyproject.toml cannot say: a wheel holds the CPU kernels, compiled for every level.

Where there is no compiler, it is a wheel for any machine, whose kernels are compiled on first use.
"""

import functools
import runpy
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

_COMPILER = Path(__file__).parent / "kernels/cpu/compiler.py"


@functools.cache
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


class OfOneArchitecture(Distribution):
    def has_ext_modules(self) -> bool:
        return has_compiler()


class WheelOfAnyPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    distclass=OfOneArchitecture,
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelOfAnyPython},
)
