"""The files in deploy/ are what systemd and container engines read, and agree with the page that explains them."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
COMPOSE = sorted(DEPLOY.glob("*.compose.yaml"))
# What each unit must say: as whom it runs, that it comes back, and what it may not do.
HARDENED = {
    "User": "fedfm",
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "StateDirectoryMode": "0700",
    "UMask": "0077",
}


def parse(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=True, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(path.read_text(encoding="utf-8"))
    return parser


def test_there_is_something_to_check() -> None:
    assert [path.name for path in UNITS] == ["fedfm-broker.service", "fedfm-coordinator.service", "fedfm-member.service"]
    assert [path.name for path in COMPOSE] == ["coordinator.compose.yaml", "member.compose.yaml"]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_units_are_whole_and_without_rights_that_they_do_not_need(path: Path) -> None:
    unit = parse(path)
    assert unit.sections() == ["Unit", "Service", "Install"]
    service = unit["Service"]
    assert {name: service[name] for name in HARDENED} == HARDENED
    assert service["Restart"] == "always" and service["CapabilityBoundingSet"] == "" and service["ExecStart"].startswith("/opt/fedfm/bin/")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not on this machine")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_accepts_the_units(path: Path, tmp_path: Path) -> None:
    for unit in UNITS:
        # The programs are not installed on this machine.
        text = re.sub(r"/opt/fedfm/bin/\S+", "/bin/true", unit.read_text(encoding="utf-8"))
        (tmp_path / unit.name).write_text(text, encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(tmp_path / path.name)], capture_output=True, text=True, check=False)
    said = [line for line in (done.stdout + done.stderr).splitlines() if str(tmp_path) in line or "fedfm" in line]
    assert not said, "\n".join(said)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not on this machine")
def test_systemd_would_complain_about_a_wrong_unit(tmp_path: Path) -> None:
    """Without this, the test above could pass because nothing is ever said."""
    path = tmp_path / "fedfm-wrong.service"
    path.write_text(
        UNITS[0].read_text(encoding="utf-8").replace("Restart=always", "Restrat=always").replace("/opt/fedfm/bin/nats-server", "/bin/true")
    )
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True, check=False)
    assert "Restrat" in done.stdout + done.stderr


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_containers_run_without_rights_and_hold_no_keys(path: Path) -> None:
    services: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))["services"]
    for service in services.values():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
        assert (path.parent / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert service["command"][0] in ("serve", "join")
        assert "ports" not in service or path.name.startswith("coordinator")


def test_the_image_is_built_from_what_is_there_and_runs_as_nobody_in_particular() -> None:
    lines = (DEPLOY / "Containerfile").read_text(encoding="utf-8").splitlines()
    steps = [line.split(None, 1) for line in lines if line and not line.startswith("#")]
    assert {step for step, _ in steps} <= {"FROM", "RUN", "WORKDIR", "COPY", "USER", "VOLUME", "ENV", "ENTRYPOINT", "CMD"}
    assert steps[0][0] == "FROM" and ["USER", "fedfm"] in steps
    # As root only what installs: everything that runs comes after USER.
    assert [step for step, _ in steps].index("USER") < [step for step, _ in steps].index("ENTRYPOINT")
    for step, rest in steps:
        if step == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1]), rest


def test_the_page_and_the_files_agree() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    for path in (*UNITS, *COMPOSE, DEPLOY / "Containerfile"):
        assert f"deploy/{path.name}" in page
    coordinator = parse(DEPLOY / "fedfm-coordinator.service")["Service"]["ExecStart"]
    broker = parse(DEPLOY / "fedfm-broker.service")["Service"]["ExecStart"]
    folder = coordinator.split()[-1]
    assert f"init {folder} " in page and f"{folder}/broker/broker.conf" in broker


def test_the_page_tells_every_setting_with_its_default() -> None:
    from dataclasses import MISSING, fields

    from fedfm.silos.consortium import Settings

    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    for field in fields(Settings):
        row = re.search(rf"^\| `{field.name}` \| ([^|]*)\|", page, re.MULTILINE)
        assert row is not None, field.name
        if field.default is not MISSING and field.name != "listen":
            assert row[1].strip().strip("`") == ("null" if field.default is None else str(field.default))
