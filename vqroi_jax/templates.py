"""Texts that runs leave for people, from the Jinja templates beside this module."""

import jinja2

from vqroi_jax.report import number


def render_text(template: str, **values: object) -> str:
    """Fills in a template of plain text or Markdown.

    Args:
        template: name of its file.
        **values: by the names that it uses; one that is missing is an error. The filter `cell` keeps a text within a
            cell of a Markdown table, `number` is `vqroi_jax.report.number`.
    """
    return _ENVIRONMENT.get_template(template).render(**values)


def _cell(value: object) -> str:
    return str(value).replace('|', '\\|').replace('\n', ' ')


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader('vqroi_jax', '.'),
    autoescape=False,  # no HTML
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters |= {'cell': _cell, 'number': number}
