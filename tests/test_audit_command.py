"""`torchthaw audit`, and the audit that every training begins with."""

import json

import pytest
from PIL import Image

import torchthaw.cli

TRAIN = (
    "--backbone", "shufflenet_v2_x0_5", "--weights", "builtin", "--set", "image_size=32", "--set", "plan=head",
    "--set", "epochs=1", "--set", "num_workers=0", "--set", "batch_size=8", "--quiet",
)  # fmt: skip


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line in this process; returns exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["torchthaw", *map(str, arguments)])
        code = 0
        try:
            torchthaw.cli.main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def photos(tmp_path, draw_photo):
    """12 + 12 photographs; ant/000 is there a second time as a file, and a third time recompressed."""
    root = tmp_path / "photos"
    for index, label in enumerate(("ant", "bee")):
        (root / label).mkdir(parents=True)
        for number in range(12):
            draw_photo(20 * index + number).save(root / label / f"{number:03d}.jpg", quality=90)
    (root / "ant" / "again.jpg").write_bytes((root / "ant" / "000.jpg").read_bytes())
    Image.open(root / "ant" / "000.jpg").save(root / "ant" / "smaller.jpg", quality=50)
    return root


def test_findings_are_told_and_written(run, photos, tmp_path):
    code, out, err = run("audit", photos, "--output", tmp_path / "out" / "audit.json")
    assert (code, out) == (0, "")
    assert "audit of 26 train images: warn" in err
    assert "warn exact duplicates within a split: 1 picture is there more than once" in err
    assert "train: ant/000.jpg (ant) = train: ant/again.jpg (ant)" in err
    assert "not looked at: groups" in err
    document = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert document["verdict"] == "warn"
    code, _, err = run("audit", photos, "--output", tmp_path / "out" / "audit.json")
    assert code == 2
    assert "nothing is overwritten" in err


def test_json_is_all_of_stdout(run, photos):
    code, out, err = run("audit", photos, "--json", "--quiet")
    assert (code, err) == (0, "")
    assert [finding["name"] for finding in json.loads(out)["findings"]] == [
        "exact duplicates within a split",
        "near duplicates within a split",
    ]


def test_strict_ends_with_1_where_a_finding_fails(run, photos):
    assert run("audit", photos, "--strict", "-q")[0] == 0
    (photos / "bee" / "wrong.jpg").write_bytes((photos / "ant" / "003.jpg").read_bytes())
    code, _, err = run("audit", photos, "--strict")
    assert code == 1
    assert "fail the same picture under different labels" in err


def test_a_cut_is_audited_as_training_would_make_it(run, photos):
    cut = ("--validation", "0.3", "--test", "4")
    code, _, err = run("audit", photos, *cut, "--group", r"(\d)\d*\.jpg")
    assert code == 2
    assert "again.jpg" in err
    pattern = r"/(..).*\.jpg"
    code, out, _ = run("audit", photos, *cut, "--group", pattern, "--json", "-q")
    document = json.loads(out)
    assert code == 0
    assert set(document["num_images"]) == {"train", "validation", "test"}
    assert "groups" in document["checks"]
    assert not [finding for finding in document["findings"] if finding["name"] == "groups across splits"]
    arguments = ("--validation", "0.3", "--group", pattern, "--split-by", "image", "--json", "-q")
    document = json.loads(run("audit", photos, *arguments)[1])
    assert "groups across splits" in [finding["name"] for finding in document["findings"]]
    assert document["verdict"] == "fail"


def test_a_class_of_which_no_image_can_be_read_is_a_finding(run, photos, tmp_path):
    for file in (photos / "bee").iterdir():
        file.write_bytes(b"broken")
    code, out, _ = run("audit", photos, "--json", "-q")
    findings = {finding["name"]: finding for finding in json.loads(out)["findings"]}
    assert code == 0
    assert findings["unreadable images"]["count"] == 12
    assert findings["classes without images"]["verdict"] == "fail"
    for audit in ("warn", "off"):
        output = tmp_path / audit
        code, _, err = run("train", "staged", "--data", photos, "--output", output, "--set", f"audit={audit}", *TRAIN)
        assert code == 2
        assert "12 of 26 images cannot be used" in err
        assert "bee/000.jpg" in err


def test_suspicious_labels_take_a_backbone(run, photos):
    code, out, _ = run("audit", photos, "--backbone", "shufflenet_v2_x0_5", "--weights", "builtin", "--json", "-q")
    document = json.loads(out)
    assert code == 0
    assert "suspicious labels" in document["checks"]
    assert "suspicious labels" not in document["not_checked"]
    code, _, err = run("audit", photos, "--backbone", "shuflenet_v2_x0_5")
    assert code == 2
    assert "shufflenet_v2_x0_5" in err


def test_fixed_data_trains_without_the_copies(run, photos, tmp_path):
    clean = tmp_path / "clean.csv"
    files = {file: file.read_bytes() for file in photos.rglob("*.jpg")}
    code, out, _ = run("audit", photos, "--fix", clean, "--json", "-q")
    assert code == 0
    assert json.loads(out)["fixed"] == {"file": str(clean), "images": 26, "dropped": 1}
    assert {file: file.read_bytes() for file in photos.rglob("*.jpg")} == files
    assert run("audit", photos, "--fix", clean)[0] == 2
    assert json.loads(run("audit", photos, "--splits", clean, "--json", "-q")[1])["num_images"] == {"train": 25}
    output = tmp_path / "run"
    code, out, err = run(
        "train", "staged", "--data", photos, "--output", output, "--set", f"data.splits={clean}", "--json", *TRAIN
    )
    assert code == 0, err
    assert sum(json.loads(out)["num_images"].values()) == 25


def test_training_keeps_copies_together_and_says_so(run, photos, tmp_path):
    def torn_apart(seed, *options):
        document = json.loads(run("audit", photos, "--validation", "0.3", "--seed", seed, "--json", "-q", *options)[1])
        return any("across" in finding["name"] for finding in document["findings"])

    # A split by image that tears copies apart; with the same seed, training does not.
    seed = next(seed for seed in range(20) if torn_apart(seed, "--split-by", "image"))
    assert not torn_apart(seed)
    output = tmp_path / "run"
    code, out, err = run(
        "train", "staged", "--data", photos, "--output", output, "--set", "data.validation=0.3",
        "--set", f"seed={seed}", "--json", *TRAIN,
    )  # fmt: skip
    assert code == 0, err
    results, audit = json.loads(out), json.loads((output / "audit.json").read_text())
    validated = {json.loads(line)["path"] for line in (output / "predictions/validation.jsonl").open()}
    assert len(validated & {"ant/000.jpg", "ant/again.jpg", "ant/smaller.jpg"}) in (0, 3)
    assert results["data"]["split_by"] == "image"
    assert "copies of the same picture kept together (1 set)" in results["data"]["method"]
    assert not [finding for finding in audit["findings"] if "across" in finding["name"]]
    assert "suspicious labels" in audit["checks"]
    assert "exact duplicates within a split" in (output / "README.md").read_text()


def test_a_strict_recipe_stops_before_anything_is_written(run, photos, tmp_path):
    (photos / "bee" / "wrong.jpg").write_bytes((photos / "ant" / "003.jpg").read_bytes())
    output = tmp_path / "run"
    code, _, err = run("train", "staged", "--data", photos, "--output", output, "--set", "audit=strict", *TRAIN)
    assert code == 2
    assert "the same picture under different labels" in err
    assert "audit: warn" in err
    assert not output.exists()


def test_without_an_audit_images_are_split_one_by_one(run, photos, tmp_path):
    output = tmp_path / "run"
    code, out, err = run(
        "train", "staged", "--data", photos, "--output", output, "--set", "audit=off", "--json", *TRAIN
    )
    assert code == 0, err
    assert json.loads(out)["data"]["method"].startswith("stratified by class, chosen by")
    assert not (output / "audit.json").exists()
    assert "No audit of the data was run" in (output / "README.md").read_text()


def test_a_dry_run_audits_without_weights(run, photos):
    # The file is looked for, but not read.
    weights = photos / "weights.pth"
    weights.touch()
    arguments = ("--backbone", "mobilenet_v2", "--weights", weights, "--set", "batch_size=4", "--dry-run")
    code, _, err = run("train", "staged", "--data", photos, *arguments)
    assert code == 0, err
    assert "exact duplicates within a split" in err


def test_names_of_files_do_not_reach_the_terminal_as_they_are(run, photos):
    try:
        (photos / "ant" / "\x1b[31mred[bold].jpg").write_bytes((photos / "ant" / "003.jpg").read_bytes())
    except OSError:
        pytest.skip("this file system does not allow such names")
    _, _, err = run("audit", photos)
    assert "\x1b[31mred" not in err
    assert r"\x1b[31mred[bold].jpg" in err
