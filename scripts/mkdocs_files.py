"""Takes into the site what its pages link to outside of docs/, so that no link leads out of it.

A file of the repository becomes `repository/<its path>` there: a page if it is Markdown, with what it links
to in its turn, else a file as it is. A link to a folder becomes its text.
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
    """Return the path in the repository of a page or file of the site."""
    return uri.removeprefix(PREFIX) if uri.startswith(PREFIX) else f"docs/{uri}"


def uri_of(path: str) -> str:
    """Return where a file of the repository is in the site."""
    return path.removeprefix("docs/") if path.startswith("docs/") else PREFIX + path


def target_of(source: str, link: str) -> str:
    """Return the path in the repository that a link in the file `source` leads to."""
    return normpath(str(PurePosixPath(source).parent / link))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is linked to, and what that links to."""
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
    """Turn the links of a page from the repository's paths to the site's."""
    source = source_of(page.file.src_uri)
    here = str(PurePosixPath(page.file.src_uri).parent)

    def turned(link: re.Match[str]) -> str:
        path = target_of(source, link[2])
        if (ROOT / path).is_dir():
            return link[1]
        return f"[{link[1]}]({relpath(uri_of(path), here)}{link[3] or ''})"

    parts = OUTSIDE_OF_CODE.split(markdown)  # code stands at odd places
    return "".join(part if place % 2 else LINK.sub(turned, part) for place, part in enumerate(parts))
