"""Build the prose that ships with the package from the copy in the source distribution of PyPI's `wordcloud`.

    pip download wordcloud==1.9.6 --no-deps --no-binary wordcloud
    python scripts/build_builtin_text.py wordcloud-1.9.6.tar.gz           # write agcl/data/builtin/text/alice.txt
    python scripts/build_builtin_text.py wordcloud-1.9.6.tar.gz --check   # exit status 1 if the file there differs

It takes the prose of the twelve chapters: verse, which is indented, is left out, and a paragraph becomes one line.
"""

import argparse
import re
import sys
import tarfile
from pathlib import Path

MEMBER = "examples/alice.txt"
FILE = Path(__file__).parents[1] / "agcl" / "data" / "builtin" / "text" / "alice.txt"
FIRST, END = "CHAPTER I.", "THE END"


def read_member(archive: Path) -> str:
    """The book as it is in the source distribution."""
    with tarfile.open(archive) as files:
        for member in files:
            if member.name.endswith(MEMBER):
                return files.extractfile(member).read().decode("utf-8-sig")  # type: ignore[union-attr]
    sys.exit(f"{archive} holds no {MEMBER}")


def clean(book: str) -> str:
    """The chapters' prose, one paragraph a line, an empty line between two."""
    chapters = book.replace("\r\n", "\n")
    chapters = chapters[chapters.index(FIRST) : chapters.index(END)]
    paragraphs = [paragraph.strip("\n") for paragraph in re.split(r"\n\s*\n", chapters)]
    prose = [" ".join(p.split()) for p in paragraphs if p and not p.startswith(" ")]
    return "\n\n".join(prose) + "\n"


def main() -> None:
    """Write the file, or check it."""
    parser = argparse.ArgumentParser(description="Build agcl/data/builtin/text/alice.txt.")
    parser.add_argument("archive", type=Path, help="source distribution of wordcloud")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the file differs")
    parser.add_argument("--file", type=Path, default=FILE, help="where the text is (default: in the package)")
    arguments = parser.parse_args()
    text = clean(read_member(arguments.archive)).encode()
    if not arguments.check:
        arguments.file.parent.mkdir(parents=True, exist_ok=True)
        arguments.file.write_bytes(text)
    elif not arguments.file.is_file() or arguments.file.read_bytes() != text:
        sys.exit(f"{arguments.file} is not what {arguments.archive} gives.")


if __name__ == "__main__":
    main()
