"""Check that everything public is documented: `python docs/check.py`, or `make docs`; exit code 1 lists what is not.

- every public module, function, class and method in src/foretune has a docstring;
- every verb of the command line has a section of its own in docs/how-to.md;
- every column of records/schema.py is in its table's section of docs/run-folder.md;
- every relative link and picture in the Markdown files leads somewhere, headings included.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "foretune"
HOW_TO = ROOT / "docs" / "how-to.md"
RUN_FOLDER = ROOT / "docs" / "run-folder.md"
SKIPPED = {"node_modules", "demo", "runs", "trainer_output", "build", "dist"}
LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+)\)")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
HEADING = re.compile(r"^(#+)\s+(.*?)\s*$", re.MULTILINE)


def main() -> int:
    """Print what is missing; 0 when nothing is."""
    missing = [*undocumented_symbols(), *undocumented_verbs(), *undocumented_columns(), *broken_links()]
    for line in missing:
        print(line)
    print(f"docs: {len(missing)} missing" if missing else "docs: complete")
    return 1 if missing else 0


def undocumented_symbols() -> Iterator[str]:
    """Public names without a docstring."""
    for path in sorted(SOURCE.rglob("*.py")):
        place = path.relative_to(ROOT)
        tree = ast.parse(path.read_text("utf-8"))
        if tree.body and not ast.get_docstring(tree):
            yield f"{place}: no docstring"
        for name, node in _public(tree.body, ""):
            if not ast.get_docstring(node):
                yield f"{place}:{node.lineno}: {name} has no docstring"


def _public(
    body: list[ast.stmt], prefix: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body, f"{prefix}{node.name}.")


def undocumented_verbs() -> Iterator[str]:
    """Verbs without a section in the how-to."""
    from foretune.cli.main import VERBS

    sections = _sections(HOW_TO)
    for verb in VERBS:
        if verb not in sections:
            yield f"docs/how-to.md: no section '## {verb}'"
        elif f"foretune {verb}" not in sections[verb]:
            yield f"docs/how-to.md: the section '{verb}' has no example of `foretune {verb}`"


def undocumented_columns() -> Iterator[str]:
    """Columns of the run folder's tables that its documentation does not name."""
    from foretune.records.schema import TABLES

    sections = _sections(RUN_FOLDER)
    for table, schema in TABLES.items():
        title = f"`{table}.parquet`"
        if title not in sections:
            yield f"docs/run-folder.md: no section '## {title}'"
            continue
        rows = set(re.findall(r"^\| `([^`]+)` \|", sections[title], re.MULTILINE))
        for column in schema.names:
            if column not in rows:
                yield f"docs/run-folder.md: column {column} of {table} is missing"
        for column in sorted(rows - set(schema.names)):
            yield f"docs/run-folder.md: {table} has no column {column}"


def broken_links() -> Iterator[str]:
    """Relative links and pictures that lead nowhere."""
    for path in _pages():
        text = CODE.sub("", FENCE.sub("", path.read_text("utf-8")))
        for target in LINK.findall(text):
            if re.match(r"[a-z][a-z0-9+.-]*:", target):
                continue  # another site
            file, _, anchor = target.partition("#")
            found = (path.parent / file).resolve() if file else path
            if not found.exists():
                yield f"{path.relative_to(ROOT)}: {target} does not exist"
            elif anchor and found.suffix == ".md" and anchor not in _anchors(found):
                yield f"{path.relative_to(ROOT)}: {target} has no such heading"


def _pages() -> Iterator[Path]:
    for path in sorted(ROOT.rglob("*.md")):
        folders = path.relative_to(ROOT).parts[:-1]
        if not any(folder.startswith(".") or folder in SKIPPED for folder in folders):
            yield path


def _sections(path: Path) -> dict[str, str]:
    """The text below each heading of the second level."""
    parts = re.split(r"^## +(.*?) *$", path.read_text("utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = [title for _, title in HEADING.findall(FENCE.sub("", path.read_text("utf-8")))]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


if __name__ == "__main__":
    sys.exit(main())
