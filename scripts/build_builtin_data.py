"""Build the data sets that ship with the package from CLDR, as PyPI's `babel` carries it.

    python scripts/build_builtin_data.py           # write agcl/data/builtin/cldr/*.jsonl
    python scripts/build_builtin_data.py --check   # exit status 1 unless the files there are what babel gives

One file a language; every file asks for the same English words in the same order. What is left out, and why, is in
`agcl/data/builtin/README.md`.
"""

import argparse
import hashlib
import json
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

try:
    import babel
except ImportError:
    sys.exit("This script needs babel: pip install babel==2.18.0")

BABEL_VERSION = "2.18.0"  # another version may carry another CLDR, hence other rows
FOLDER = Path(__file__).parents[1] / "agcl" / "data" / "builtin" / "cldr"
LANGUAGES = {
    "Welsh": "cy",
    "Finnish": "fi",
    "Swahili": "sw",
    "Turkish": "tr",
    "Hungarian": "hu",
    "Basque": "eu",
    "Irish": "ga",
}
ROWS = 128
MAX_WORDS = 3
NOT_PLACES = {"EU", "EZ", "QO", "UN", "XA", "XB", "ZZ"}  # two-letter codes of alliances, test locales and the like


def folded(name: str) -> str:
    """The name without case, accents and the like: two names that differ in nothing else count as equal."""
    letters = unicodedata.normalize("NFKD", name).replace("\u0131", "i")  # Turkish dotless i
    return "".join(c for c in letters if not unicodedata.combining(c)).casefold()


def english_names() -> dict[tuple[str, str], str]:
    """English name of each usable territory and language, by ``(kind, code)``.

    Languages of two words (``British English``, ``Old Norse``) are mostly variants of others; territories without a
    two-letter code are continents and parts of them.
    """
    english = babel.Locale("en")
    names = {("territory", c): n for c, n in english.territories.items() if len(c) == 2 and c not in NOT_PLACES}
    names |= {("language", c): n for c, n in english.languages.items() if "_" not in c and " " not in n}
    times = Counter(folded(name) for name in names.values())  # Nauru is a territory and a language: two right answers
    return {
        key: name
        for key, name in names.items()
        if re.fullmatch(r"[A-Z][a-z]+( [A-Z][a-z]+)?", name) and times[folded(name)] == 1
    }


def is_usable(english: str, answer: str) -> bool:
    """Whether an answer is short, plain, in Latin letters and not simply the English name."""
    return (
        1 <= len(answer.split()) <= MAX_WORDS
        and all(c in " -" or (c.isalpha() and unicodedata.name(c).startswith("LATIN")) for c in answer)
        and folded(answer) != folded(english)
    )


def order_of(english: str) -> str:
    """Sort key that mixes territories and languages the same way everywhere, forever."""
    return hashlib.sha256(english.encode()).hexdigest()


def build() -> dict[str, str]:
    """Text of each file, by the file's name."""
    names = english_names()
    answers: dict[str, dict[tuple[str, str], str]] = {}
    for language, locale_code in LANGUAGES.items():
        locale = babel.Locale(locale_code)
        listed = {"territory": locale.territories, "language": locale.languages}
        found = {(kind, code): listed[kind].get(code, "") for kind, code in names}
        answers[language] = {key: answer for key, answer in found.items() if is_usable(names[key], answer)}
    common = [key for key in names if all(key in answers[language] for language in LANGUAGES)]
    chosen = sorted(common, key=lambda key: order_of(names[key]))[:ROWS]
    files = {}
    for language, by_key in answers.items():
        rows = [
            {
                "prompt": f"What is {names[key]} in {language}?",
                "answer": by_key[key],
                "rephrased": f"How do you say {names[key]} in {language}?",
                "english": names[key],
                "kind": key[0],
            }
            for key in chosen
        ]
        files[f"{language.lower()}.jsonl"] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return files


def main() -> None:
    """Write the files, or check them."""
    parser = argparse.ArgumentParser(description="Build agcl/data/builtin/cldr/*.jsonl from babel's CLDR.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file differs")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files are (default: in the package)")
    arguments = parser.parse_args()
    if babel.__version__ != BABEL_VERSION:
        sys.exit(
            f"This script needs babel {BABEL_VERSION}, found {babel.__version__}: pip install babel=={BABEL_VERSION}"
        )
    files = build()
    if not arguments.check:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (arguments.folder / name).write_text(text, encoding="utf-8", newline="\n")
        return
    found = {path.name: path.read_bytes() for path in arguments.folder.glob("*.jsonl")}
    expected = {name: text.encode() for name, text in files.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if found.get(name) != expected.get(name))
    if wrong:
        sys.exit(f"Not what babel {BABEL_VERSION} gives: {', '.join(wrong)}. Run python scripts/build_builtin_data.py")


if __name__ == "__main__":
    main()
