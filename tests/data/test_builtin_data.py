import json
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from agcl.data.sources import BUILTIN_FOLDER, load_rows
from agcl.data.tasks import Task

FOLDER = BUILTIN_FOLDER / "cldr"
SCRIPT = Path(__file__).parents[2] / "scripts" / "build_builtin_data.py"
LANGUAGES = ["Basque", "Finnish", "Hungarian", "Irish", "Swahili", "Turkish", "Welsh"]
COLUMNS = ["prompt", "answer", "rephrased", "english", "kind"]


def rows_of(language):
    path = FOLDER / f"{language.lower()}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def letters(text):
    """Its letters without case and accents; Turkish has an i of its own without a dot, which is no accent."""
    decomposed = unicodedata.normalize("NFD", text.replace("\u0131", "i"))
    return [c for c in decomposed.lower() if c.isalpha()]


def run_script(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_the_folder_holds_these_languages_and_the_licence():
    assert sorted(path.stem for path in FOLDER.glob("*.jsonl")) == [language.lower() for language in LANGUAGES]
    assert (FOLDER / "LICENSE").read_text(encoding="utf-8").startswith("UNICODE LICENSE V3")


@pytest.mark.parametrize("language", LANGUAGES)
def test_rows_load_as_a_builtin_source(language):
    loaded = load_rows(Task(name="t", source=f"builtin:cldr/{language.lower()}"), "train", COLUMNS)
    assert loaded.column_names == COLUMNS
    assert loaded.to_list() == rows_of(language)
    assert len(loaded) == 128


@pytest.mark.parametrize("language", LANGUAGES)
def test_prompts_ask_for_the_word_in_the_language(language):
    for row in rows_of(language):
        assert row["prompt"] == f"What is {row['english']} in {language}?"
        assert row["rephrased"] == f"How do you say {row['english']} in {language}?"
        assert row["kind"] in ("territory", "language")


def test_every_language_asks_for_the_same_words_in_the_same_order():
    words = [(row["english"], row["kind"]) for row in rows_of("Welsh")]
    assert len({english for english, _ in words}) == len(words)
    assert {kind for _, kind in words[:32]} == {"territory", "language"}  # a slice of the rows is a mixture too
    for language in LANGUAGES:
        assert [(row["english"], row["kind"]) for row in rows_of(language)] == words


@pytest.mark.parametrize("language", LANGUAGES)
def test_answers_are_short_latin_and_not_the_english_word(language):
    for row in rows_of(language):
        answer = row["answer"]
        assert letters(answer) != letters(row["english"])
        assert 1 <= len(answer.split()) <= 3
        assert answer == " ".join(answer.split())
        assert all("LATIN" in unicodedata.name(c) for c in answer if c not in " -"), answer


def test_known_translations():
    known = {"Welsh": "Almaeneg", "Finnish": "saksa", "Swahili": "Kijerumani", "Turkish": "Almanca"}
    known |= {"Hungarian": "német", "Basque": "alemana", "Irish": "Gearmáinis"}
    assert {la: next(r["answer"] for r in rows_of(la) if r["english"] == "German") for la in LANGUAGES} == known


def test_files_and_licence_are_what_babel_gives():
    babel = pytest.importorskip("babel")
    result = run_script("--check")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    licence = Path(babel.__file__).parent / "locale-data" / "LICENSE.unicode"
    assert (FOLDER / "LICENSE").read_bytes() == licence.read_bytes()


def test_check_names_the_files_that_differ(tmp_path):
    pytest.importorskip("babel")
    folder = tmp_path / "cldr"
    shutil.copytree(FOLDER, folder)
    welsh = folder / "welsh.jsonl"
    welsh.write_text(welsh.read_text(encoding="utf-8").replace("Almaeneg", "Almaen"), encoding="utf-8")
    (folder / "irish.jsonl").unlink()
    (folder / "klingon.jsonl").touch()
    result = run_script("--check", "--folder", str(folder))
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "gives: irish.jsonl, klingon.jsonl, welsh.jsonl." in line

    assert run_script("--folder", str(folder)).returncode == 0
    assert welsh.read_bytes() == (FOLDER / "welsh.jsonl").read_bytes()
    assert (folder / "irish.jsonl").read_bytes() == (FOLDER / "irish.jsonl").read_bytes()
