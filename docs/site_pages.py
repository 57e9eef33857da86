"""Pages of the site that are no files of docs/: one per package from its docstrings, and the project's own."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PROJECT_PAGES = {"Changelog": "CHANGELOG.md", "Contributing": "CONTRIBUTING.md", "Security": "SECURITY.md"}
SOURCE_LINK = re.compile(r"\]\((?:\.\./)*(t2i/[\w/]+)\.py\)")
"""A link to a module's file, as one follows it in a checkout."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """End the navigation with the API and the project's pages."""
    api = [{package: f"api/{package}.md"} for package in modules_by_package()]
    project = [{title: name.lower()} for title, name in PROJECT_PAGES.items()]
    config.nav = [*(config.nav or []), {"API": api}, {"Project": project}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the navigation names."""
    pages = {f"api/{package}.md": api_page(package, names) for package, names in modules_by_package().items()}
    pages |= {name.lower(): seen_from_docs((ROOT / name).read_text()) for name in PROJECT_PAGES.values()}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to a module's file into links to its API entry."""
    depth = page.file.src_uri.count("/")
    return SOURCE_LINK.sub(lambda link: f"]({'../' * depth}{api_address(link[1])})", markdown)


def modules_by_package() -> dict[str, list[str]]:
    """List every module of t2i, below the package that it stands in."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "t2i").rglob("*.py")):
        package = ".".join(path.parent.relative_to(ROOT).parts)
        found.setdefault(package, [])
        if path.stem not in ("__init__", "__main__"):
            found[package].append(f"{package}.{path.stem}")
    return {package: names for package, names in found.items() if names or package == "t2i"}


def api_page(package: str, names: list[str]) -> str:
    """Write one package's page: the package's docstring, then its modules in order of name."""
    own = f"::: {package}\n    options: {{members: false, heading_level: 1}}\n"
    return "\n".join([own, *(f"::: {name}\n    options: {{heading_level: 2}}\n" for name in names)])


def api_address(module: str) -> str:
    """Find a module's place in the API pages: t2i/data/loader -> api/t2i.data.md#t2i.data.loader."""
    name = module.replace("/", ".")
    return f"api/{name.rpartition('.')[0]}.md#{name}"


def seen_from_docs(markdown: str) -> str:
    """Let links of a page at the root hold from docs/, and links between root pages from there too."""
    named = "|".join(PROJECT_PAGES.values())
    lowered = re.sub(rf"\]\(({named})", lambda link: link[0].lower(), markdown)
    return lowered.replace("](docs/", "](")
