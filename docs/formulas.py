"""Formulas as SVG, set when the site is built: they need no network, no script and no font to be seen.

Their ink is the text's colour. Sizes are in em, so that a formula grows with the text around it; the LaTeX stays as a
label for screen readers.
"""

import html
from functools import cache
from typing import Any

import ziamath
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

# Points of a formula set beside text of one em; the math font is a little smaller than most text fonts.
EM, MAGNIFIED = 20.0, 1.06
logger = logging.getLogger(__name__)


@cache
def svg(latex: str, inline: bool) -> str:
    ziamath.config.svg2 = False
    formula = ziamath.Latex(latex, size=EM, inline=inline, color="currentColor")
    # The converter leaves what it does not know as it was written.
    if "\\" in formula.mathmlstr():
        raise ValueError("a command is not known")
    text = formula.svg()
    head, rest = text.split(">", 1)
    width, height = (float(head.split(f'{name}="')[1].split('"')[0]) for name in ("width", "height"))
    view = head.split('viewBox="')[1].split('"')[0]
    # From the baseline to the lower edge.
    depth = float(view.split()[1]) + height
    em = MAGNIFIED / EM
    place = f"width:{width * em:.3f}em;height:{height * em:.3f}em;vertical-align:{-depth * em:.3f}em"
    said = html.escape(latex.strip(), quote=True)
    return f'<svg class="formula" role="img" aria-label="{said}" viewBox="{view}" style="{place}">{rest}'


def render(latex: str, inline: bool, node: nodes.Node) -> str:
    try:
        return svg(latex, inline)
    except Exception as error:
        # Whatever the typesetter trips over, the build names the formula and goes on to the next.
        logger.warning("cannot set the formula %r: %s: %s", latex, type(error).__name__, error, location=node)
        return f"<code>{html.escape(latex)}</code>"


def visit_inline(translator: HTML5Translator, node: Any) -> None:
    translator.body.append(f'<span class="math">{render(node.astext(), True, node)}</span>')
    raise nodes.SkipNode


def visit_block(translator: HTML5Translator, node: Any) -> None:
    translator.body.append(f'<div class="math">{render(node.astext(), False, node)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("svg", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "version": "1"}
