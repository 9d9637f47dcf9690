"""The elements of a page: trees, never texts, so that whatever comes from outside is escaped when they are written."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from reinforce_ada.outside import printable

Content = str | Element
Head = tuple[str, str]  # of a column: its name, and the class of its cells


def element(tag: str, *content: Content, **attributes: str) -> Element:
    """Return an element with texts and elements in it.

    Characters that HTML does not allow, and those that turn the direction of a line, are shown as escapes. In the names of attributes a
    final `_` is left out, and any other becomes a hyphen.
    """
    made = Element(tag, {name.removesuffix("_").replace("_", "-"): printable(value) for name, value in attributes.items()})
    for part in content:
        if isinstance(part, Element):
            made.append(part)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + printable(part)
        else:
            made.text = (made.text or "") + printable(part)
    return made


def table(heads: Sequence[Head], rows: Iterable[tuple[Sequence[Content], str]], *, class_: str) -> Element:
    """Return a table that scrolls sideways where it is too wide; a row comes with its class."""
    head = element("tr", *(element("th", name, class_=kind, scope="col") for name, kind in heads))
    body = [
        element("tr", *(element("td", cell, class_=kind) for cell, (_, kind) in zip(cells, heads, strict=True)), class_=row_class)
        for cells, row_class in rows
    ]
    return element("div", element("table", element("thead", head), element("tbody", *body), class_=class_), class_="scroll", tabindex="0")


def document(title: str, body: Element, *, style: str, script: str) -> str:
    """Return a page that loads nothing: its security policy admits this style sheet, this script and pictures that stand in it."""
    admitted = f"img-src data:; style-src '{digest(style)}'; script-src '{digest(script)}'"
    policy = f"default-src 'none'; {admitted}; base-uri 'none'; form-action 'none'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", title),
        element("style", style),
    )
    page = element("html", head, element("body", body, element("script", script)), lang="en")
    return f"<!DOCTYPE html>\n{ElementTree.tostring(page, encoding='unicode', method='html')}\n"


def digest(text: str) -> str:
    """Return what a security policy calls an inline style sheet or script by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def picture(light: bytes, dark: bytes, about: str) -> Element:
    """Return an SVG picture that follows the reader's choice of colours. As an image it can neither run a script nor load anything."""
    light_url, dark_url = (f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" for svg in (light, dark))
    source = element("source", media="(prefers-color-scheme: dark)", srcset=dark_url)
    return element("picture", source, element("img", src=light_url, alt=about, loading="lazy"))
