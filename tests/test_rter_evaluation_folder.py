"""The folder of an evaluation: killed and resumed bit for bit, and not given up to another one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from any_model import MODELS, WEAK, cnn, images, timeless
from rter import UserError, evaluate_model
from rter.evaluate import JOURNAL
from rter.evaluation import Evaluation
from rter.journal import Journal
from runs import broken_off
from torch import Tensor, nn

Begun = tuple[nn.Module, Tensor, Tensor, dict[str, Any]]


@pytest.mark.parametrize("kind", MODELS)
def test_a_killed_evaluation_resumes_to_the_same_bits(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[kind]()
    x, y = images(model)
    whole = evaluate_model(model, x, y, suite="quick", **WEAK)
    deaths, computed = 0, set[str]()
    for after in (1, 4, 9, 2, 10**6):
        with monkeypatch.context() as patch:
            broken_off(after, patch)
            torch.manual_seed(after)  # nothing may depend on it
            try:
                resumed = evaluate_model(model, x, y, suite="quick", out=tmp_path, **WEAK)
            except SystemExit:
                deaths += 1
                lines = (tmp_path / JOURNAL).read_bytes().splitlines()[:-1]
                parts = {json.loads(line)["part"] for line in lines[1:]}
                assert computed < parts or after == 1  # what an earlier attempt has finished is kept
                computed = parts
                assert not (tmp_path / "report.json").exists()
    assert deaths == 4 and timeless(resumed) == timeless(whole)
    assert all(torch.equal(resumed.examples[name], value) for name, value in whole.examples.items())
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "examples.safetensors", "outcomes.safetensors"}
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(resumed.to_json())
    assert model.training and 0 < whole.verdict.value <= whole.ra.value <= whole.sa.value == 0.95


def test_a_finished_evaluation_is_not_replaced_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = cnn()
    x, y = images(model)
    options = {"suite": "pgd", "out": tmp_path} | WEAK
    evaluate_model(model, x, y, **options)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.delattr(Evaluation, "of_each")  # nothing is measured before the refusal
    other = cnn()
    with torch.no_grad():
        other[5].bias[0] += 1e-6
    for changed, message in (
        (lambda: evaluate_model(other, x, y, **options), "of another model"),
        (lambda: evaluate_model(model, x[:10], y[:10], **options), "of other images"),
        (lambda: evaluate_model(model, x, y, **options | {"eps": 0.05}), "with eps 0.02, not 0.05"),
    ):
        with pytest.raises(UserError, match=rf"report.json is of an evaluation {message}: give another folder"):
            changed()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    report = json.loads(before["report.json"])
    later = {key: value for key, value in report.items() if key != "checks"}  # a version without them
    for known in (report, later):
        for identity in (None, {}, report["identity"] | {"torch": "1.0"}):
            (tmp_path / "report.json").write_text(json.dumps(known | {"identity": identity}))
            with pytest.raises(UserError, match=r"evaluation (that another version made|with torch 1.0, not .*): give"):
                evaluate_model(model, x, y, **options)
            assert not (tmp_path / JOURNAL).exists()


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Begun:
    """A model, images, labels and options of an evaluation in tmp_path that was killed."""
    model = cnn()
    x, y = images(model)
    options = {"suite": "quick", "out": tmp_path} | WEAK
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        broken_off(3, patch)
        evaluate_model(model, x, y, **options)
    return model, x, y, options


def test_a_refused_evaluation_keeps_what_it_had_begun(tmp_path: Path, begun: Begun) -> None:
    model, x, y, options = begun
    kept, other = (tmp_path / JOURNAL).read_bytes(), tmp_path / "other"
    evaluate_model(model, x[:10], y[:10], **options | {"suite": "pgd", "out": other})
    (other / "report.json").rename(tmp_path / "report.json")
    with pytest.raises(UserError, match=r"report.json is of an evaluation of other images: give another folder"):
        evaluate_model(model, x, y, **options)
    whole = kept[: kept.rindex(b"\n") + 1]  # without the torn line
    assert whole.count(b"\n") > 1 and (tmp_path / JOURNAL).read_bytes().startswith(whole)


def test_a_folder_with_another_unfinished_evaluation_is_refused(tmp_path: Path, begun: Begun) -> None:
    model, x, y, options = begun
    file = tmp_path / JOURNAL
    kept = file.read_bytes()
    other = cnn()
    with torch.no_grad():
        other[5].bias[0] += 1e-6
    for changed, message in (
        (lambda: evaluate_model(other, x, y, **options), "another model"),
        (lambda: evaluate_model(nn.Sequential(model, nn.Hardtanh()), x, y, **options), "another model"),
        (lambda: evaluate_model(model, x[:10], y[:10], **options), "other images"),
        (lambda: evaluate_model(model, x, y, **options | {"eps": 0.05}), "eps 0.02, not 0.05"),
        (lambda: evaluate_model(model, x, y, **options | {"suite": "full"}), "suite quick, not full"),
    ):
        with pytest.raises(UserError, match=rf"holds an unfinished evaluation (of|with) {message}: [^\n]*$"):
            changed()
    assert file.read_bytes() == kept[: kept.rindex(b"\n") + 1]  # without the torn line
    with Journal(file, {}, 0, x.device).file, pytest.raises(UserError, match=r"is in use by another evaluation$"):
        evaluate_model(model, x, y, **options)
    file.write_bytes(kept.replace(b'"seconds"', b'"second'))
    with pytest.raises(UserError, match=r"is damaged: remove it to start the evaluation again$"):
        evaluate_model(model, x, y, **options)
    file.unlink()
    assert evaluate_model(model, x, y, **options).sa.value == 0.95
