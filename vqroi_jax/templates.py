"""What runs leave for people to read, pages and texts, from the Jinja templates in the folder `pages`."""

import math
from typing import Any

import jinja2
from markupsafe import Markup


def number(value: float | None) -> str:
    """A figure with three digits that matter; None, which JSON has for what is not finite, as a dash."""
    if value is None:
        return '–'
    if not 1e-4 <= abs(value) < 1e6:
        return f'{value:.2e}' if value else '0'
    return f'{value:.{max(2 - math.floor(math.log10(abs(value))), 0)}f}'


def render_page(template: str, **values: object) -> Markup:
    """Fills in a template of HTML: what is filled in is text, unless it is `Markup`, as what this returns.

    Args:
        template: name of its file.
        **values: by the names that it uses; one that is missing is an error. The function `number` is there too.
    """
    return Markup(_PAGES.get_template(template).render(**values))


def render_text(template: str, **values: object) -> str:
    """Fills in a template of plain text or Markdown.

    Args:
        template: name of its file.
        **values: by the names that it uses; one that is missing is an error. The filter `cell` keeps a text within a
            cell of a Markdown table, `number` is the function of that name.
    """
    return _TEXTS.get_template(template).render(**values)


def _cell(value: object) -> str:
    return str(value).replace('|', '\\|').replace('\n', ' ')


_SHARED: dict[str, Any] = {'loader': jinja2.PackageLoader('vqroi_jax', 'pages'), 'undefined': jinja2.StrictUndefined}
_PAGES = jinja2.Environment(autoescape=True, **_SHARED)
_PAGES.globals['number'] = number
_TEXTS = jinja2.Environment(
    autoescape=False, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, **_SHARED
)
_TEXTS.filters |= {'cell': _cell, 'number': number}
