"""Makes the site of the repository's Markdown pages and notebooks where they lie: a hook of mkdocs.yml.

A page is known by its path in the repository, so links are those that work in a checkout too. Beside the pages
the site gets the files that they link to (figures, tables, scripts). A notebook becomes Markdown, with what its cells
showed, so that its links are checked and it looks like the other pages.
"""

import json
import re
import shutil
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
NOTEBOOKS = sorted(
    [*(ROOT / "docs" / "tutorials").glob("*.ipynb"), *ROOT.glob("*.ipynb"), *ROOT.glob("scripts/*.ipynb")]
)
LINK = re.compile(r"\]\((?!https?:|mailto:|data:|#)([^)#\s]+)")


class NotebookPage(File):
    """A notebook, which is a page of the site."""

    def is_documentation_page(self):
        return True

    @property
    def content_string(self):
        return markdown_of(Path(self.abs_src_path))


def on_files(files, config):
    """Returns the files of the site instead of those below docs/; what themes and plugins add stays."""
    pages = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
    texts = {page: page.read_text() for page in pages} | {page: markdown_of(page) for page in NOTEBOOKS}
    linked = {(page.parent / link).resolve() for page, text in texts.items() for link in LINK.findall(text)}
    others = sorted(path for path in linked - set(texts) if path.is_file() and path.suffix != ".md")
    added = [file for file in files if file.generated_by or not str(file.abs_src_path).startswith(config["docs_dir"])]
    return Files([*added, *(_file(path, config) for path in (*texts, *others, *(ROOT / "docs/assets").glob("*")))])


def on_post_build(config):
    """Puts each notebook beside its page, to be downloaded."""
    for path in NOTEBOOKS:
        page = _file(path, config)
        shutil.copyfile(path, Path(page.abs_dest_path).parent / path.name)


def _file(path, config):
    name = path.relative_to(ROOT).as_posix()
    kind = NotebookPage if path.suffix == ".ipynb" else File
    page = kind(name, str(ROOT), config["site_dir"], config["use_directory_urls"])
    if name.startswith("docs/"):  # its address does without the folder
        page.dest_uri = page.dest_uri.removeprefix("docs/")
    return page


def markdown_of(path):
    """Returns a notebook as Markdown: its cells, and under each what it showed."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts += [source] if cell["cell_type"] == "markdown" else [_code(source), *map(_shown, cell["outputs"])]
    note = f'<small>This page is a notebook: <a href="{path.name}" download>download it</a>.</small>'
    title, _, rest = parts[0].partition("\n")
    return "\n\n".join([title, note, rest.strip(), *parts[1:]])


def _code(source):
    first, _, rest = source.partition("\n")
    if first.startswith("%%writefile "):
        name = first.split()[1]
        return _fence(rest, "python" if name.endswith(".py") else "yaml", f' title="{name}"')
    if first.startswith("!"):
        return _fence("\n".join(line.removeprefix("!") for line in source.splitlines()), "console")
    return _fence(source, "python")


def _shown(output):
    data = output.get("data", {})
    if "image/png" in data:
        return f"![what the cell draws](data:image/png;base64,{''.join(data['image/png']).replace(chr(10), '')})"
    text = "".join(output.get("text") or data.get("text/plain", ""))
    return _fence(text, "{ .text .output .no-copy }") if text.strip() else ""


def _fence(text, language, title=""):
    marks = "~" * (3 + max((len(found) for found in re.findall(r"^~+", text, re.MULTILINE)), default=0))
    return f"{marks} {language}{title}\n{text.rstrip()}\n{marks}"
