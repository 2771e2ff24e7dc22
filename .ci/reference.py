"""The API reference as HTML pages, from the docstrings of every module; a warning is an error.

python .ci/reference.py FOLDER
"""

import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

import vqroi_jax

warnings.simplefilter('error', UserWarning)  # pdoc's kind
# Optax's types of states and parameters name this one of their own, which only optax can resolve.
warnings.filterwarnings('ignore', '.* Import of ArrayTree failed')
pdoc.render.configure(docformat='google')
children = (f'vqroi_jax.{module.name}' for module in pkgutil.iter_modules(vqroi_jax.__path__))
pdoc.pdoc('vqroi_jax', *children, output_directory=Path(sys.argv[1]))
print(f'Open {Path(sys.argv[1]) / "index.html"}')
