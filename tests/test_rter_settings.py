"""Settings, data split and files of the application."""

import dataclasses
import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from rter.checkpoint import load_tensors, save_tensors, write_atomic
from rter.config import Config
from rter.data.load import load_data
from rter.distributed import choose_device
from rter.errors import UserError
from rter.settings import load_config, load_settings, make_config

CONFIGS = Path(__file__).parent.parent / "docs" / "configs"


def test_a_config_is_read_as_it_was_written(tmp_path: Path) -> None:
    config = make_config(method="pgd-at", eps="8/255", epochs="7", seed=3)
    assert config.eps == 8 / 255 and config.epochs == 7
    (tmp_path / "config.json").write_text(config.to_json())
    assert load_config(tmp_path / "config.json") == config
    (tmp_path / "settings.toml").write_text('method = "pgd-at"\neps = "8/255"\nepochs = 7\nseed = 3\n')
    assert load_config(tmp_path / "settings.toml") == config


@pytest.mark.parametrize(("name", "text"), [("C.TOML", "seed = 3  # größe"), ("C.JSON", '{"seed": 3}')])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])  # the latter with a byte order mark, as Windows writes it
def test_settings_files_of_other_systems_are_read(tmp_path: Path, name: str, text: str, encoding: str) -> None:
    (tmp_path / name).write_text(text, encoding=encoding)
    assert load_settings(tmp_path / name) == {"seed": 3}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_documented_settings_are_valid(path: Path) -> None:
    assert load_config(path) != make_config()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "magic"}, "method must be one of standard, pgd-at, trades, "),
        ({"data": "letters"}, "data must be one of digits, cifar10, svhn"),
        ({"gate": "garden"}, "gate must be one of hard, sigmoid, softmax, soft, straight_through, got 'garden'"),
        ({"eps": -0.1}, "eps must be above 0, got -0.1"),
        ({"eps": "nan"}, "eps must be a finite number, got 'nan'"),
        ({"eps": "1/0"}, "eps must be a finite number, got '1/0'"),
        ({"eps": 8}, "eps must be at most 1 in the Linf norm"),
        ({"epochs": 1.5}, "epochs must be a whole number, got 1.5"),
        ({"epochs": True}, "epochs must be a whole number, got True"),
        ({"epochs": -1}, "epochs must be at least 0, got -1"),
        ({"explore": 1.5}, "explore must be between 0 and 1, got 1.5"),
        ({"num_experts": 1}, "num_experts must be at least 2 for rt-er, got 1"),
        ({"method": 3}, "method must be text, got 3"),
        ({"faithful": 1}, "faithful must be true or false, got 1"),
        ({"method": "pgd-at", "faithful": True}, "faithful must be given with rt-er, dual or jtdmoe, got pgd-at"),
        ({"method": "dual", "gate": "soft"}, "gate must be one that chooses an expert for dual, got soft"),
        ({"method": "nine-experts", "num_experts": 4}, "num_experts must be 9 for nine-experts, got 4"),
        ({"method": "nine-experts", "gate": "hard"}, "gate must be soft for nine-experts, got hard"),
        ({"dual_alpha": 2}, "dual_alpha must be between 0 and 1, got 2.0"),
        ({"awp_gamma": -1}, "awp_gamma must be at least 0, got -1.0"),
        ({"ema": 1}, "ema must be at least 0 and below 1, got 1.0"),
        ({"method": ["rt-er"]}, "method must be text, got ['rt-er']"),
        ({"model": {}}, "model must be text, got {}"),
        (
            {"schedule": "multi-step"},
            "drops must be numbers below epochs, 50, with commas between, got 100,105",
        ),
    ],
)
def test_config_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        make_config(**settings)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_setting_that_is_not_given_is_the_methods_default() -> None:
    assert (make_config().beta, make_config(method="trades").beta) == (2, 3)
    assert make_config(method="trades", beta=6).beta == 6
    nine = make_config(method="nine-experts")
    assert (nine.num_experts, nine.gate, nine.lr) == (9, "soft", make_config().lr)
    faithful = make_config(faithful=True, clean_weight=0.5)
    assert (faithful.gate, faithful.beta, faithful.balance_weight, faithful.clean_weight) == ("hard", 6, 0, 0.5)


def test_settings_are_checked_together_or_not_at_all() -> None:
    for unknown in ({"epoch": 3}, {"epoch": None}):
        with pytest.raises(TypeError, match="epoch"):
            make_config(**unknown)
    with pytest.raises(TypeError, match="missing"):
        Config(method="trades")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.json", "{", "must be a JSON file"),
        ("s.toml", "[", "must be a TOML file"),
        ("s.json", "[1]", "must hold one JSON object, got list"),
        ("s.json", '{"epoch": 3}', "unknown setting 'epoch'"),
    ],
)
def test_settings_file_refuses(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_settings(tmp_path / name)


def test_seeds_differ_by_purpose_and_follow_from_the_seed() -> None:
    config = make_config()
    purposes: list[tuple[str | int, ...]] = [("attack", 0), ("attack", 1), ("shuffle", 0), ("attack", "0")]
    assert len({config.seed_for(*purpose) for purpose in purposes}) == len(purposes)
    assert config.seed_for("attack", 0) == make_config().seed_for("attack", 0)
    assert config.seed_for("attack", 0) != dataclasses.replace(config, seed=1).seed_for("attack", 0)


def test_split_is_disjoint_complete_and_by_seed() -> None:
    data = load_data("digits", 360, seed=0)
    assert data.train.x.shape == (1437, 1, 8, 8) and data.held_out.x.shape == (360, 1, 8, 8)
    assert data.train.x.min() == 0 and data.train.x.max() == 1 and data.num_classes == 10
    every = torch.cat([data.train.x, data.held_out.x]).flatten(1)
    other = load_data("digits", 100, seed=5)
    assert torch.equal(every.sum(0), torch.cat([other.train.x, other.held_out.x]).flatten(1).sum(0))
    again, reseeded = load_data("digits", 360, seed=0), load_data("digits", 360, seed=1)
    assert torch.equal(data.held_out.x, again.held_out.x) and torch.equal(data.held_out.y, again.held_out.y)
    assert not torch.equal(data.held_out.y, reseeded.held_out.y)


@pytest.mark.parametrize("held_out", [0, 1797])
def test_split_refuses(held_out: int) -> None:
    with pytest.raises(UserError, match=f"held_out must be between 1 and 1796 for digits, got {held_out}"):
        load_data("digits", held_out, seed=0)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.safetensors"
    save_tensors(path, {"w": torch.ones(3)})

    def fail(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*last\.safetensors'"):
        write_atomic(path, "half")
    assert torch.equal(load_tensors(path)["w"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / "last.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(UserError, match=r"last\.safetensors is damaged"):
        load_tensors(tmp_path / "last.safetensors")


def test_the_device_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with two GPUs, the second of which is the current one; then in the second of two processes."""
    current: list[int] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", current.append)
    chosen = [choose_device(name) for name in (None, "cpu", "cuda", "cuda:0")]
    assert [str(device) for device in chosen] == ["cuda:1", "cpu", "cuda:1", "cuda:0"] and current == [1, 1, 0]
    for name in ("cuda:2", "gpu", "cuda:", "cuda:-1", "CPU", ""):
        with pytest.raises(UserError, match=f"device must be .*, got '{name}'"):
            choose_device(name)
    monkeypatch.setattr("os.environ", {"WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    assert str(choose_device()) == str(choose_device("cuda")) == "cuda:0" and str(choose_device("cpu")) == "cpu"
    with pytest.raises(UserError, match="device must be cpu, cuda, got 'cuda:1'"):
        choose_device("cuda:1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert str(choose_device()) == "cpu"
