"""A report as one HTML file that loads nothing, and as Markdown."""

import base64
import hashlib
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from anchorvec.files import without_surrogates
from anchorvec.reporting.charts import javascript
from anchorvec.reporting.content import Report

_PAGE = Path(__file__).parent / "page"

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters, and those that turn the direction of what stands behind them."""


def html_page(report: Report) -> str:
    """`report` as HTML: style, charts and Vega are in it, and its policy allows no request and no other script.

    Every text is escaped; control characters are shown as U+FFFD.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(_PAGE)
    environment = Environment(loader=loader, autoescape=True, finalize=shown, undefined=StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "allow_nan": False}
    vega, script = _inline(javascript()), _inline(_read("page.js"))
    return environment.get_template("page.html").render(
        report=report,
        version=version("anchorvec"),
        style=_read("page.css"),
        vega=vega,
        script=script,
        policy=_policy(vega, script),
    )


def _policy(*scripts: str) -> str:
    """A content security policy: these `scripts` run and no other, nothing is loaded or sent."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    others = "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {allowed}; {others}"


def _inline(script: str) -> str:
    """`script` as it can stand in a page: without an end of it inside, and with the line ends that a browser sees."""
    return script.replace("\r\n", "\n").replace("\r", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _read(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")


def shown(value: Any) -> Any:
    """`value`, if it is a text without what a reader could not see, or would see elsewhere."""
    if type(value) is str:  # and not markup, which is ours
        return _CONTROL.sub("\ufffd", without_surrogates(value))
    return value
