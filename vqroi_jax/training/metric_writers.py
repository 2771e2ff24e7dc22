"""Where a training run's numbers and figures go: `metrics.jsonl`, TensorBoard, `figures/` and the terminal.

The loop calls these on every process; only the primary one writes and prints.
"""

import functools
import json
import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

import matplotlib.image
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from vqroi_jax.workdir import is_primary, write_atomically

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

METRICS_FILE = 'metrics.jsonl'
TENSORBOARD_FOLDER = 'tensorboard'
FIGURES_FOLDER = 'figures'
BAR = '{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]'


class MetricWriter:
    """Writes metrics and figures of a run that is at `step`; what an earlier attempt wrote of later steps goes.

    `metrics.jsonl` has one JSON object a line: `step` and numbers, null where one is not finite. `figures/NAME.png` is
    the newest figure of that name, `figures/steps/NAME_STEP.png` are all of them. A context manager.

    Args:
        workdir: the run's folder.
        step: updates done so far; 0 for a new run.
    """

    def __init__(self, workdir: Path, step: int):
        self._workdir = workdir
        self._active = is_primary()
        if not self._active:
            return
        path = workdir / METRICS_FILE
        rows = [row for row in read_metrics(path) if row['step'] <= step and step > 0]
        write_atomically(path, ''.join(json.dumps(row) + '\n' for row in rows))
        self._file = open(path, 'a', encoding='utf-8')  # noqa: SIM115 (closed by __exit__)
        self._purge = step + 1 if step else 0  # TensorBoard hides what was written of these steps before

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        if self._active:
            self._file.close()
            if '_events' in vars(self):
                self._events.close()

    @functools.cached_property
    def _events(self) -> 'SummaryWriter':
        """Opened by what is first written, for tensorboardX imports PyTorch where it is installed, which takes long."""
        from tensorboardX import SummaryWriter

        return SummaryWriter(str(self._workdir / TENSORBOARD_FOLDER), purge_step=self._purge)

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds one line to `metrics.jsonl`, and each number to TensorBoard."""
        if not self._active:
            return
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({'step': step, **row}) + '\n')
        self._file.flush()
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)

    def figures(self, step: int, figures: Mapping[str, Figure]) -> None:
        """Writes each figure to `figures/` as PNG and to TensorBoard."""
        if not self._active:
            return
        folder = self._workdir / FIGURES_FOLDER / 'steps'
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            image = np.asarray(canvas.buffer_rgba())[..., :3]
            path = folder / f'{name}_{step:08d}.png'
            matplotlib.image.imsave(path, image)
            shutil.copyfile(path, folder.parent / f'{name}.png')
            self._events.add_image(name, image, step, dataformats='HWC')


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl`: a number or None for each name.

    A last line that was cut off by a crash is left out; a missing file has none.
    """
    rows = []
    lines = path.read_text(encoding='utf-8').splitlines() if path.exists() else []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class Progress:
    """Tells the user how a run gets on: a bar on a terminal, one line a log interval elsewhere. A context manager.

    Args:
        step: updates done so far.
        total: updates in all.
        bar: where a bar goes if it is a terminal; stderr by default.
        lines: where lines go; stdout by default.
    """

    def __init__(self, step: int, total: int, bar: TextIO | None = None, lines: TextIO | None = None):
        bar = bar or sys.stderr
        self._lines = lines or sys.stdout
        self._active = is_primary()
        self._total = total
        self._bar = None
        if self._active and bar.isatty():
            self._bar = tqdm(total=total, initial=step, file=bar, bar_format=BAR, dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, step: int, metrics: Mapping[str, float], rate: float | None) -> None:
        """Moves the bar to `step`, with these metrics and `rate` steps a second (None: not known yet)."""
        if self._bar is not None:
            self._bar.set_postfix_str(self._text(step, metrics, rate), refresh=False)
            self._bar.update(step - self._bar.n)

    def log(self, step: int, metrics: Mapping[str, float], rate: float | None, memory: float) -> None:
        """Where there is no bar, prints the line of an interval; `memory` is the peak in GiB."""
        if self._bar is None:
            text = self._text(step, metrics, rate)
            self.message(f'step {step}/{self._total}  {text}  peak memory {memory:.2f} GiB')

    def message(self, text: str) -> None:
        """Prints a line of its own."""
        if self._bar is not None:
            self._bar.write(text, file=self._lines)
        elif self._active:
            print(text, file=self._lines, flush=True)

    def _text(self, step: int, metrics: Mapping[str, float], rate: float | None) -> str:
        text = format_metrics(metrics)
        if rate:
            text += f'  {rate:.3g} steps/s  ETA {tqdm.format_interval((self._total - step) / rate)}'
        return text


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Names and numbers on one line, e.g. 'loss 0.1234  val/psnr 24.31'."""
    return '  '.join(f'{name} {value:.4g}' for name, value in metrics.items())
