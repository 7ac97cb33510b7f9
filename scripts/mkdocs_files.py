"""Adds to the site the files outside docs/ that its pages link to, so that no link leads out of the site.

A file of the repository becomes `repository/<its path>` there. Markdown becomes a page, and what it links to
is added in turn; any other file stays as it is. A link to a folder becomes plain text.
"""

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PREFIX = "repository/"
LINK = re.compile(r"\[([^\]]*)\]\((?!https?://|#)([^)\s#]+)(#[^)\s]*)?\)")
OUTSIDE_OF_CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def source_of(uri: str) -> str:
    """Return the repository path of a page or file of the site."""
    return uri.removeprefix(PREFIX) if uri.startswith(PREFIX) else f"docs/{uri}"


def uri_of(path: str) -> str:
    """Return where in the site a file of the repository is."""
    return path.removeprefix("docs/") if path.startswith("docs/") else PREFIX + path


def target_of(source: str, link: str) -> str:
    """Return the repository path that a link in the file `source` leads to."""
    return normpath(str(PurePosixPath(source).parent / link))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that are linked to, and the files that those link to."""
    waiting = [file.src_uri for file in files.documentation_pages()]
    while waiting:
        source = source_of(waiting.pop())
        for _, link, _ in LINK.findall((ROOT / source).read_text()):
            path = target_of(source, link)
            uri = uri_of(path)
            if (ROOT / path).is_file() and files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
                if uri.endswith(".md"):
                    waiting.append(uri)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn a page's links from paths in the repository into paths in the site."""
    source = source_of(page.file.src_uri)
    here = str(PurePosixPath(page.file.src_uri).parent)

    def turned(link: re.Match[str]) -> str:
        path = target_of(source, link[2])
        if (ROOT / path).is_dir():
            return link[1]
        return f"[{link[1]}]({relpath(uri_of(path), here)}{link[3] or ''})"

    parts = OUTSIDE_OF_CODE.split(markdown)  # the odd parts are code
    return "".join(part if place % 2 else LINK.sub(turned, part) for place, part in enumerate(parts))
