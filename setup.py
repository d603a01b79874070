"""Metadata and dependencies. The tested versions are in constraints.txt, the tools' settings in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "src/hf_deit/__init__.py").read_text("utf-8"), re.MULTILINE)[1]

INSTALL = [
    "torch",
    "torchvision",  # timm imports it
    "transformers>=5.23,<6",
    "accelerate",
    "datasets>=5.2",  # this one and timm's: older ones may open pickles, which tests/test_security.py looks at
    "evaluate",
    "timm>=1.0.31",
    "albumentations==2.0.8",  # the last MIT release; its successor is AGPL
    "huggingface_hub",
    "matplotlib",
    "numpy",
    "opencv-python-headless",  # albumentations' own
    "pillow>=11",
    "pyarrow",
    "pyyaml",
    "safetensors",
    "scikit-learn",  # holds the quickstart's digits
    "scipy",
    "simplejpeg",
    "wrapt",
]
EXPORT = ["onnx", "onnxruntime", "onnxscript"]
TENSORBOARD = ["tensorboard"]
DEMO = ["gradio>=6"]  # gradio 6 wants Pillow below 13, so that it does not install with constraints.txt
HEIF = ["pillow-heif"]  # photos of iPhones
DOCS = ["mkdocstrings-python", "zensical"]
DEV = [
    *EXPORT,
    *TENSORBOARD,
    "hypothesis",
    "ipykernel",
    "nbclient",
    "optuna",
    "parameterized",
    "peft",
    "pyright[nodejs]",
    "pytest",
    "pytest-xdist",
    "ruff",
]

RECIPES = sorted(path.relative_to(HERE) for path in HERE.glob("recipes/**/*") if path.suffix in {".yaml", ".py"})


class BuildWithRecipes(build_py):
    """Copies `recipes/` into the package that is built. An editable install finds them where they are."""

    def run(self):
        super().run()
        for path in [] if self.editable_mode else RECIPES:
            target = Path(self.build_lib, "hf_deit", path)
            self.mkpath(str(target.parent))
            self.copy_file(str(path), str(target))

    def get_source_files(self):  # what a source distribution holds
        return [*super().get_source_files(), *map(str, RECIPES), "constraints.txt"]

    def get_outputs(self, include_bytecode=True):
        built = [] if self.editable_mode else [str(Path(self.build_lib, "hf_deit", path)) for path in RECIPES]
        return [*super().get_outputs(include_bytecode), *built]


setup(
    name="hf_deit",
    version=VERSION,
    description="A trainable DeiT for Hugging Face: train, distil, fine-tune, evaluate and publish.",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    url="https://github.com/hf-deit/hf_deit",
    project_urls={
        "Source": "https://github.com/hf-deit/hf_deit",
        "Issues": "https://github.com/hf-deit/hf_deit/issues",
        "Changelog": "https://github.com/hf-deit/hf_deit/blob/main/CHANGELOG.md",
    },
    keywords=["deit", "vision-transformer", "knowledge-distillation", "image-classification", "transformers"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Intended Audience :: Developers",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"hf_deit": ["py.typed"], "hf_deit.training": ["*.md"]},
    cmdclass={"build_py": BuildWithRecipes},
    entry_points={"console_scripts": ["hf-deit = hf_deit.__main__:main"]},
    install_requires=INSTALL,
    extras_require={
        "demo": DEMO,
        "dev": DEV,
        "docs": DOCS,
        "export": EXPORT,
        "heif": HEIF,
        "tensorboard": TENSORBOARD,
    },
)
