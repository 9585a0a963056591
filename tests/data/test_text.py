import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import CHARACTERS, character_tokenizer
from tokenizers import processors

from agcl.data.sources import BUILTIN_FOLDER
from agcl.data.text import load_text, text_windows
from agcl.errors import AgclError

SCRIPT = Path(__file__).parents[2] / "scripts" / "build_builtin_text.py"


def test_windows_are_evenly_spaced_and_do_not_overlap():
    ids = torch.arange(2, 2 + len(CHARACTERS))
    windows = text_windows(CHARACTERS, character_tokenizer(), num_windows=3, window_tokens=20)
    spacing = len(CHARACTERS) // 3
    assert windows.tolist() == [ids[i * spacing :][:20].tolist() for i in range(3)]


def test_a_beginning_token_is_added_where_the_tokenizer_does():
    tokenizer = character_tokenizer()
    tokenizer.bos_token = "<eos>"
    plain = text_windows(CHARACTERS, tokenizer, 3, 20)
    assert plain.shape == (3, 20)  # it has one, but does not begin its inputs with it
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 1)]
    )
    windows = text_windows(CHARACTERS, tokenizer, 3, 20)
    assert windows[:, 0].tolist() == [1, 1, 1]
    assert torch.equal(windows[:, 1:], plain)


def test_unusable_texts_are_refused(tmp_path):
    with pytest.raises(AgclError, match="The text has 3 tokens, too few for 2 windows of 2"):
        text_windows("abc", character_tokenizer(), 2, 2)
    with pytest.raises(AgclError, match=r"no built-in text `builtin:text/faust`; built in are text/alice"):
        load_text("builtin:text/faust")
    with pytest.raises(AgclError, match=r"The text .*nothing.txt cannot be read"):
        load_text(str(tmp_path / "nothing.txt"))
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(AgclError, match=r"cannot be read: .*utf-8"):
        load_text(str(tmp_path / "bytes.txt"))


def test_the_built_in_text_is_prose_and_nothing_else():
    text = load_text("builtin:text/alice")
    assert text.startswith("CHAPTER I. Down the Rabbit-Hole\n\nAlice was beginning to get very tired of sitting by her")
    assert text.endswith("remembering her own child-life, and the happy summer days.\n")
    assert text.count("\n\nCHAPTER ") == 11
    assert text.isascii()
    assert "utenberg" not in text
    assert 100_000 < len(text) < 200_000
    assert "public domain" in (BUILTIN_FOLDER / "text" / "LICENSE").read_text()


BOOK = (
    "\ufeffA frame\r\n\r\nCHAPTER I. Down\r\n\r\nAlice was\r\nbeginning to  get\r\n\r\n"
    "     In verse\r\n     of two lines\r\n\r\n  *    *\r\n\r\nShe slept.\r\n\r\n"
    "        THE END\r\n\r\nAn advertisement\r\n"
)


def run_script(archive, file, *options):
    command = [sys.executable, SCRIPT, archive, "--file", file, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_script_takes_the_prose_out_of_its_frame(tmp_path):
    archive, file = tmp_path / "source.tar.gz", tmp_path / "built.txt"
    content = BOOK.encode()
    with tarfile.open(archive, "w:gz") as files:
        info = tarfile.TarInfo("package-1.0/examples/alice.txt")
        info.size = len(content)
        files.addfile(info, io.BytesIO(content))
    assert run_script(archive, file).returncode == 0
    assert file.read_text() == "CHAPTER I. Down\n\nAlice was beginning to get\n\nShe slept.\n"
    assert run_script(archive, file, "--check").returncode == 0
    file.write_text("CHAPTER I. Up\n")
    result = run_script(archive, file, "--check")
    assert result.returncode == 1
    assert "built.txt is not what" in result.stderr
