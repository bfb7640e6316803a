"""Tables as Markdown and CSV, and plain data as JSON."""

import json
from pathlib import Path

from timm_tokens.files import write_json
from timm_tokens.tables import markdown, write_csv


def test_none_is_an_empty_cell_and_columns_have_their_format(tmp_path):
    rows = [("keys", 8, 0.5), ("none", None, None)]
    assert markdown(("merging", "r", "share"), rows, ("", "", ".1%")) == (
        "| merging | r | share |\n| --- | --- | --- |\n| keys | 8 | 50.0% |\n| none |  |  |"
    )
    write_csv(tmp_path / "new" / "table.csv", ("merging", "r", "share"), rows)
    assert (tmp_path / "new" / "table.csv").read_text().splitlines() == ["merging,r,share", "keys,8,0.5", "none,,"]


def test_what_json_does_not_know_is_text(tmp_path):
    write_json(tmp_path / "kept.json", {"out": Path("run"), "r": (1, 2)})
    assert json.loads((tmp_path / "kept.json").read_text()) == {"out": "run", "r": [1, 2]}
