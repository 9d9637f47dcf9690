"""What the documentation site does beyond MkDocs: it takes in files from outside docs/, and refuses a page that would load from elsewhere.

MkDocs calls these functions by their names; mkdocs.yml lists the file.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"\[([^\[\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
# What a browser fetches by itself; a link that a reader follows may lead anywhere.
FETCHED = re.compile(r"""<(?:script|img|iframe|source|link rel="?stylesheet"?)[^>]*?(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and examples outside docs/, and every notebook as a page beside the notebook itself."""
    for name in PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    for path in sorted((ROOT / "examples").rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), content=path.read_bytes()))
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        page = File.generated(config, file.src_uri.removesuffix(".ipynb") + ".md", content=page_of(file))
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links to files outside docs/ to their copies in the site; name the path of a file that has no copy.

    Where the text of a link is the name of a page's file, the reader of the site sees the page's title.
    """
    here = posixpath.dirname(page.file.src_uri)
    is_outside = page.file.src_uri in PAGES

    def mended(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        if re.match(r"\w+:", target):
            return link[0]
        in_repository = posixpath.normpath(posixpath.join("" if is_outside else "docs", here, target))
        in_site = re.sub(r"\.ipynb$", ".md", in_repository.removeprefix("docs/"))
        if (file := files.get_file_from_path(in_site)) is not None:
            named = title_of(file) if text in (posixpath.basename(target), in_repository) else text
            return f"[{named}]({posixpath.relpath(in_site, here or '.')}{anchor})"
        if in_repository.startswith("docs/") or not (ROOT / in_repository).exists():
            return link[0]  # MkDocs says what is wrong with it
        return f"`{in_repository}`" if text == in_repository else f"{text} (`{in_repository}`)"

    return LINK.sub(mended, markdown)


def title_of(file: File) -> str:
    """Return the title of a page, or the name of a file that is none."""
    found = re.match(r"# (.+)", file.content_string) if file.src_uri.endswith(".md") else None
    return found[1] if found else posixpath.basename(file.src_uri)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Refuse a page for which a browser would ask another server."""
    if found := FETCHED.findall(output):
        raise PluginError(f"{page.file.src_uri} loads {', '.join(sorted(set(found)))}; a page of the site loads files of the site only")
    return output


# -------------------- notebooks


def page_of(file: File) -> str:
    """Return a notebook as Markdown: its texts, its code, what the code printed and drew."""
    name = posixpath.basename(file.src_uri)
    cells = [_cell(cell) for cell in json.loads(file.content_string)["cells"]]
    title, _, rest = cells[0].partition("\n")
    return "\n\n".join([title, f'This page is a notebook: <a href="{name}" download>download it</a>.', rest, *cells[1:]])


def _cell(cell: dict[str, Any]) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    return "\n\n".join([f"```python\n{source}\n```", *map(_output, cell["outputs"])])


def _output(output: dict[str, Any]) -> str:
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text'])}```"
    png = "".join(output["data"]["image/png"]).replace("\n", "")
    return f'<img alt="{"".join(output["data"]["text/plain"])}" src="data:image/png;base64,{png}">'
