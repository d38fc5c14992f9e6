"""What mkdocs does beside its own: files outside docs/ that pages link to become pages, too.

So a link to a program's file works on a code host, where it leaves docs/, and in the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# the file of a link or an image in Markdown, and what stands around it
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)]*)?\))")
DOCS, SOURCE = "docs/", "source/"


def _origin(uri: str) -> str:
    """A page's file from the project's root."""
    return uri.removeprefix(SOURCE) if uri.startswith(SOURCE) else DOCS + uri


def _target(origin: str, link: str, root: Path) -> str | None:
    """The file from the project's root that a link in another one names; of a folder its README.

    None for what is not there, and for a link within docs/, which mkdocs knows itself.
    """
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
    if (root / path).is_dir():
        path = posixpath.join(path, "README.md")
    within = origin.startswith(DOCS) and path.startswith(DOCS)
    return None if within or path.startswith("../") or not (root / path).is_file() else path


def _uri(path: str) -> str:
    """Where the site has a file."""
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    return SOURCE + path + (".md" if path.endswith(".py") else "")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that pages link to, and those that these link to."""
    root = Path(config.docs_dir).parent
    waiting = [(_origin(f.src_uri), f.content_string) for f in files.documentation_pages()]
    while waiting:
        origin, text = waiting.pop()
        for _, link, _ in LINK.findall(text):
            path = _target(origin, link, root)
            if path is None or files.get_file_from_path(_uri(path)):
                continue
            if path.endswith((".md", ".py")):
                content = (root / path).read_text(encoding="utf-8")
                if path.endswith(".md"):
                    waiting.append((path, content))
                else:
                    content = f"# {path}\n\n~~~~python\n{content}~~~~\n"
                files.append(File.generated(config, _uri(path), content=content))
            else:
                files.append(File.generated(config, _uri(path), abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links that leave docs/, or lead back there, lead to the site's pages."""
    root, uri = Path(config.docs_dir).parent, page.file.src_uri

    def lead(found: re.Match[str]) -> str:
        path = _target(_origin(uri), found[2], root)
        if path is None:
            return found[0]
        return found[1] + posixpath.relpath(_uri(path), posixpath.dirname(uri) or ".") + found[3]

    return markdown if uri.endswith(".py.md") else LINK.sub(lead, markdown)
