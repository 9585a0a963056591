"""What is public changes only on purpose: names, their arguments and defaults are written down."""

import runpy
from pathlib import Path

import agcl

HERE = Path(__file__).parent
SCRIPT = HERE.parent / "scripts" / "public_api.py"


def test_public_api_is_the_one_written_down():
    listed = (HERE / "public_api.txt").read_text().splitlines()
    found = runpy.run_path(str(SCRIPT))["listing"]()
    difference = [f"- {line}" for line in listed if line not in found] + [
        f"+ {line}" for line in found if line not in listed
    ]
    assert not difference, (
        "The public API has changed:\n" + "\n".join(difference) + "\nIf that is meant, say so in CHANGELOG.md and run: "
        "python scripts/public_api.py > tests/public_api.txt"
    )
    assert listed == found


def test_every_public_name_is_there_and_listed_once():
    assert sorted(set(agcl.__all__)) == sorted(agcl.__all__)
    assert {"__version__", *agcl._HOMES} == set(agcl.__all__)
