"""The code blocks of a page in Markdown, and a program that runs them: `python pages.py PAGE`, in an empty folder.

A comment in front of a block says what the block is, if it is not simply run:

    <!-- not run: why -->
    <!-- file: name of the file that the block is written to -->

Blocks of a page share one folder; its blocks in Python share one namespace.
"""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

BLOCK = re.compile(
    r"^(?:<!-- (?P<key>not run|file): (?P<value>.+?) -->\n\n?)?"
    r"(?P<fence>```+)(?P<language>[^`\n]*)\n(?P<code>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
RUN = {"sh", "bash", "python"}
# What needs a process of its own: shells, and heads that a page registers again
SHELL = re.compile(r"[|&;<>$*?(){}`]|--import|^(?!capsule-heads )", re.MULTILINE)
# What a machine has once: a page may show it, and the tests have done it.
INSTALLS = re.compile(r"^(pip|pipx|uv) .*\n?", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A code block, with the line of its page that it begins on."""

    line: int
    language: str
    code: str
    not_run: str | None
    file: str | None

    @property
    def runs(self) -> bool:
        """Whether the block is code that a test runs."""
        return self.language in RUN and self.not_run is None and self.file is None


def blocks_of(page: Path) -> list[Block]:
    """Return the code blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            line=text.count("\n", 0, found.start("fence")) + 1,
            language=found["language"],
            code=found["code"],
            not_run=found["value"] if found["key"] == "not run" else None,
            file=found["value"] if found["key"] == "file" else None,
        )
        for found in BLOCK.finditer(text)
    ]


def run(page: Path) -> None:
    """Run the blocks of a page, and end the process at the first that fails."""
    namespace = {"__name__": "__main__"}
    sys.path.insert(0, "")  # modules that a page writes
    for block in blocks_of(page):
        where = f"{page}:{block.line}"
        if block.file:
            Path(block.file).parent.mkdir(parents=True, exist_ok=True)
            Path(block.file).write_text(block.code, encoding="utf-8")
        elif block.runs and block.language == "python":
            exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)
        elif block.runs and not run_commands(INSTALLS.sub("", block.code)):
            sys.exit(f"{where}: the commands failed")


def run_commands(code: str) -> bool:
    """Run commands of a shell, and return whether all succeeded.

    Those of `capsule-heads` alone run in this process, which saves each of them its imports.
    """
    lines = [line for line in code.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
    if SHELL.search("\n".join(lines)):
        return not subprocess.run(["bash", "-euo", "pipefail", "-c", code], stdin=subprocess.DEVNULL).returncode
    from capsule_heads.cli import main

    for line in lines:
        try:
            main(shlex.split(line, comments=True)[1:])
        except SystemExit as end:
            if end.code:
                return False
    return True


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    run(Path(sys.argv[1]))
