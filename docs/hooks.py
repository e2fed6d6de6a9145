"""Makes the site of the repository's Markdown pages where they lie: a hook of mkdocs.yml.

A page is known by its path in the repository, so links are those that work in a checkout too. Beside the pages
the site gets the files that they link to (figures, tables, scripts).
"""

import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
FOLDERS = (
    "docs",
    "installation",
    "cfg",
    "exp_specs",
    "figure",
    "data",
    "benchmarks",
    "parity_tests",
    "changed_robomimic",
)
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")


def on_files(files, config):
    """Returns the files of the site instead of those below docs/; what themes and plugins add stays."""
    pages = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
    linked = {(page.parent / link).resolve() for page in pages for link in LINK.findall(page.read_text())}
    others = sorted(path for path in linked - set(pages) if path.is_file() and path.suffix != ".md")
    added = [file for file in files if file.generated_by or not str(file.abs_src_path).startswith(config["docs_dir"])]
    return Files([*added, *(_file(path, config) for path in (*pages, *others, *(ROOT / "docs/assets").glob("*")))])


def _file(path, config):
    name = path.relative_to(ROOT).as_posix()
    page = File(name, str(ROOT), config["site_dir"], config["use_directory_urls"])
    if name.startswith("docs/"):  # its address does without the folder
        page.dest_uri = page.dest_uri.removeprefix("docs/")
    return page
