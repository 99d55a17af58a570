"""The reference pages, and a check of every page: `make docs`.

Writes build/docs/api.md from the docstrings of the installed package, then checks that every
relative link of the repository's markdown leads somewhere, that every command that it shows exists
as a make target or a module, and that every Python example runs.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from common import BUILD, ROOT, run, say
from demo import ensure_editable
from env import make_env

OUT = BUILD / "docs"
INSIDE = "--inside"


def pages() -> list[Path]:
    """Markdown files that git tracks or will track."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z", "*.md"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in sorted(set(names.split("\0"))) if name]


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(path: Path) -> Iterator[str]:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists():
            yield f"{path.relative_to(ROOT)}: link to {target}: no such file"
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text()):
            yield f"{path.relative_to(ROOT)}: link to {target}: no such heading"


def unknown_commands(path: Path) -> Iterator[str]:
    """`make X` and `python3 ci/X.py` in a page's shell blocks must exist."""
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    for block in re.findall(r"```(?:sh|bash|console)\n(.*?)```", path.read_text(), re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if "make" in words:
                wanted = [w for w in words[words.index("make") + 1 :] if "=" not in w]
                for word in wanted[:1]:
                    if word not in targets:
                        yield f"{path.relative_to(ROOT)}: make {word}: no such target"
            for word in words:
                if word.startswith("ci/") and not (ROOT / word).exists():
                    yield f"{path.relative_to(ROOT)}: {word}: no such file"


def run_examples(path: Path) -> Iterator[str]:
    """Run the ```python blocks of a page, one namespace a page."""
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    for number, block in enumerate(blocks, 1):
        try:
            exec(compile(block, f"{path.name} example {number}", "exec"), names)
        except Exception as error:
            yield f"{path.relative_to(ROOT)}: example {number}: {type(error).__name__}: {error}"


def modules() -> list[ModuleType]:
    import ridgeline

    found = pkgutil.walk_packages(ridgeline.__path__, "ridgeline.")
    skipped = ("__main__", "libridgeline", ".kernels", ".demo")
    names = [m.name for m in found if not any(word in m.name for word in skipped)]
    return [ridgeline, *(importlib.import_module(name) for name in names)]


def reference() -> str:
    """One section for every public function of the package, in the order of `__all__`."""
    import ridgeline

    lines = [f"# ridgeline {ridgeline.__version__}", "", inspect.getdoc(ridgeline) or "", ""]
    for name in ridgeline.__all__:
        thing = getattr(ridgeline, name)
        lines += [f"## {name}", ""]
        if callable(thing):
            lines += ["```", f"{name}{inspect.signature(thing)}", "```", ""]
            lines += ["```text", inspect.getdoc(thing) or "", "```", ""]
        else:
            lines += [f"`{thing!r}`", ""]
    return "\n".join(lines)


def inside() -> int:
    """The part that needs the package: it runs in .venv."""
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "api.md").write_text(reference())
    problems = []
    for module in modules():
        result = doctest.testmod(module)
        if result.failed:
            problems.append(f"{module.__name__}: {result.failed} examples failed")
    undocumented = [
        name
        for name in importlib.import_module("ridgeline").__all__
        if not inspect.getdoc(getattr(importlib.import_module("ridgeline"), name))
    ]
    problems += [f"ridgeline.{name}: no docstring" for name in undocumented]
    for page in pages():
        for check in (broken_links, unknown_commands, run_examples):
            problems += check(page)
    print("\n".join(problems) or f"docs: {len(pages())} pages are sound; build/docs/api.md written")
    return 1 if problems else 0


def main() -> None:
    if INSIDE in sys.argv:
        sys.exit(inside())
    python = make_env(".venv", "build", "demo")
    ensure_editable(python)
    code = run([python, ROOT / "ci" / "docs.py", INSIDE], check=False)
    say(f"docs: {'ok' if code == 0 else 'FAILED'}")
    sys.exit(code)


if __name__ == "__main__":
    main()
