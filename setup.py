"""What pyproject.toml cannot say: the models of this repository become part of the package, as longread/box."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithModels(build_py):
    """The package and the models; an editable installation finds these where they are."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree("models", Path(self.build_lib, "longread", "box"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithModels})
