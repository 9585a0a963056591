"""What pyproject.toml cannot say: ``lightning_configs/`` is installed as ``agcl/configs/``."""

from setuptools import find_namespace_packages, setup

# Namespace packages, since folders of data are packages to setuptools.
packages = find_namespace_packages(include=["agcl", "agcl.*"], exclude=["*.__pycache__"])
configs = ["agcl.configs", *(f"agcl.configs.{name}" for name in find_namespace_packages("lightning_configs"))]

setup(packages=packages + configs, package_dir={"agcl.configs": "lightning_configs"})
