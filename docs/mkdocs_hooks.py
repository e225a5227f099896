"""What mkdocs does not do by itself: the README as front page, pages that are linked outside docs/, API pages.

`mkdocs.yml` names this file. Nothing of it is written to disk before the site is.
"""

import ast
import json
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "speed_diffusers"
FRONT_PAGE = "README.md"
# Code is left as it is: it comes first, so that what looks like a link in it is not found.
CODE_OR_LINK = re.compile(r"^```.*?^```$|`[^`]+`|(?<=\]\()(?!\w+:|#)(?P<link>[^)\s]+)(?=\))", re.M | re.S)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Ends the navigation with the API pages, one for each room of the library."""
    config.nav = [*(config.nav or []), {"API": ["api/index.md", *map(api_uri, rooms())]}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the front page, the API pages, the notebooks, and every file outside docs/ that links lead to."""
    waiting = [FRONT_PAGE, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    files.append(outside(FRONT_PAGE, config, InclusionLevel.INCLUDED))
    while waiting:
        page = waiting.pop()
        for linked in links(page):
            if site_uri(linked) not in files.src_uris and (ROOT / linked).is_file():
                files.append(outside(linked, config, InclusionLevel.NOT_IN_NAV))
                if linked.endswith(".md"):
                    waiting.append(linked)
    notebooks = sorted((ROOT / "docs").glob("*/*.ipynb"))
    made = {page_of(site_uri(path.relative_to(ROOT).as_posix())): notebook_page(path) for path in notebooks}
    for uri, text in (made | api_pages()).items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between places in the checkout into links between places in the site."""
    if page.file.abs_src_path is None:  # made here
        return markdown
    source = Path(page.file.abs_src_path).relative_to(ROOT).as_posix()
    here = posixpath.dirname(page.file.src_uri)
    return with_links(markdown, source, lambda path: posixpath.relpath(page_of(site_uri(path)), here or "."))


def outside(path: str, config: MkDocsConfig, inclusion: InclusionLevel) -> File:
    """A file of the checkout that lies outside docs/."""
    return File.generated(config, site_uri(path), abs_src_path=str(ROOT / path), inclusion=inclusion)


def site_uri(path: str) -> str:
    """Where a file of the checkout lies in the site: what is in docs/ at its top, all else under its path."""
    return "index.md" if path == FRONT_PAGE else path.removeprefix("docs/")


def page_of(uri: str) -> str:
    """A notebook's page instead of the notebook."""
    return re.sub(r"\.ipynb$", ".md", uri)


def links(page: str) -> list[str]:
    """Paths from the top of the checkout of all files that a page of it links to."""
    found: list[str] = []

    def note(path: str) -> str:
        found.append(path)
        return path

    with_links((ROOT / page).read_text("utf-8"), page, note)
    return found


def with_links(markdown: str, page: str, replaced: Callable[[str], str]) -> str:
    """Markdown with each link to a file replaced; both ends are paths from the top of the checkout."""

    def replace(match: re.Match[str]) -> str:
        if match["link"] is None:
            return match[0]
        name, hash_sign, anchor = match["link"].partition("#")
        return replaced(posixpath.normpath(posixpath.join(posixpath.dirname(page), name))) + hash_sign + anchor

    return CODE_OR_LINK.sub(replace, markdown)


def notebook_page(path: Path) -> str:
    """A notebook, which is committed without outputs, as a page that ends with a link to it."""
    parts = []
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            # A shell cell says so in its first line, which is no command.
            shell, plain = "%%bash\n", source.removeprefix("%%bash\n")
            source = f"```{'bash' if source.startswith(shell) else 'python'}\n{plain}\n```"
        parts.append(source)
    return "\n\n".join([*parts, f"[Download the notebook]({path.name})"]) + "\n"


def rooms() -> dict[str, Path]:
    """The rooms of the library, folders first, by full name, with the files whose docstrings say what they are."""
    folders = {f"speed_diffusers.{path.parent.name}": path for path in sorted(LIBRARY.glob("*/__init__.py"))}
    modules = {f"speed_diffusers.{path.stem}": path for path in sorted(LIBRARY.glob("*.py"))}
    del modules["speed_diffusers.__init__"]
    # Only an installation puts it inside the library.
    return folders | {"pipelines": ROOT / "pipelines" / "__init__.py"} | modules


def api_uri(room: str) -> str:
    """The place of a room's page in the site."""
    return f"api/{room.rpartition('.')[2]}.md"


def api_pages() -> dict[str, str]:
    """The API pages by their place in the site: a list of the rooms, and a page for each of them."""
    table = ["| room | |", "|---|---|"]
    for room, file in rooms().items():
        summary = (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").splitlines()[0]
        table.append(f"| [`{room}`]({posixpath.basename(api_uri(room))}) | {summary} |")
    public = [f"- [`{name}`][{path}]" for name, path in public_names()]
    front = ["# API", "", "What `import speed_diffusers` gives:", "", *public, "", "## The rooms", "", *table, ""]
    return {"api/index.md": "\n".join(front)} | {api_uri(room): api_page(room, file) for room, file in rooms().items()}


def api_page(room: str, file: Path) -> str:
    """The page of a room: of a folder its docstring and then each of its modules, where names are defined."""
    is_folder = file.stem == "__init__"
    parts = [
        f"---\ntitle: {room.rpartition('.')[2]}\n---",
        directive(room, {"heading_level": 1} | ({"members": False} if is_folder else {})),
    ]
    if is_folder:
        modules = sorted(path.stem for path in file.parent.glob("*.py") if path != file)
        parts += [directive(f"{room}.{module}", {"heading_level": 2}) for module in modules]
    return "\n\n".join(parts) + "\n"


def directive(name: str, options: dict[str, object]) -> str:
    """What mkdocstrings replaces by the documentation of a name."""
    return f"::: {name}\n    options: {json.dumps(options)}"


def public_names() -> Iterator[tuple[str, str]]:
    """The documented names that the package itself gives, each with its full name where it is defined."""
    for node in ast.parse((LIBRARY / "__init__.py").read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module != "version":
            for alias in node.names:
                yield alias.name, ".".join(filter(None, ("speed_diffusers", node.module, alias.name)))
