"""`torchthaw train --profile`."""

import json
import sys

import pytest

from torchthaw import cli


def test_a_profiled_run_says_what_bounds_it_and_leaves_the_traces(make_image_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    options = ["backbone=shufflenet_v2_x0_5", "weights=null", "image_size=32", "epochs=3", "batch_size=8"]
    options += ["num_workers=0", "data.validation=0.25"]
    arguments = ["train", "staged", "--data", make_image_folder(per_class=12), "--output", out, "--json", "--profile"]
    arguments += [word for option in options for word in ("--set", option)]
    monkeypatch.setattr(sys, "argv", ["torchthaw", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    captured = capsys.readouterr()
    assert not exit_.value.code, captured.err
    json.loads(captured.out)
    summary = json.loads((out / "profile" / "summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == ["head", "last block", "all"]
    for stage in summary["stages"]:
        assert (out / "profile" / stage["trace"]).is_file()
        assert stage["sentence"] in captured.err
        assert stage["advice"] is None or f"In the recipe: {stage['advice']}" in captured.err
    assert "where the time of a training step goes" in captured.err
