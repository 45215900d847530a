"""What `mkdocs build` adds to the pages of docs/: the documents that stand elsewhere, and assets/.

On GitHub all links are paths in the repository. Here they become links of the site: to the page
that a document has become, or, where a file has no page, its name alone.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {  # documents outside docs/, and the pages they become
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "records/README.md": "records.md",
    "VTP/README.md": "vtp.md",
    "VTP/checkpoints/vtp_tiny_f16d64/README.md": "vtp_tiny_f16d64.md",
}
PICTURES = (".png", ".gif", ".mp4")
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def on_files(files, config):
    """Add the documents and pictures that lie outside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for path in sorted((ROOT / "assets").iterdir()):
        if path.suffix in PICTURES:
            files.append(File.generated(config, f"assets/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Return the page with its links pointing at pages and pictures of the site."""
    sources = {page: source for source, page in PAGES.items()}
    name = page.file.src_uri
    folder = posixpath.dirname(sources.get(name, f"docs/{name}"))

    def link(match: re.Match) -> str:
        target, _, anchor = match["target"].partition("#")
        if not target or ":" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        place = PAGES.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(place) is None:
            if not (ROOT / path).exists():
                return match[0]  # mkdocs says that it leads nowhere
            return match["text"]
        there = posixpath.relpath(place, posixpath.dirname(name) or ".")
        if anchor:
            there += f"#{anchor}"
        return f"{match['picture']}[{match['text']}]({there})"

    return LINK.sub(link, markdown)
