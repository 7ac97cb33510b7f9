"""How GitOps tools read an AsyncRLJob, by their own engines, for every row of docs/gitops.md."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from asyncrl_api.parsing import load_documents, parse_job
from support.cluster.gitops_rows import ROWS, Object, Row

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
GITOPS = ROOT / "gitops"
ARGO = GITOPS / "argocd"
ACTIONS = ARGO / "actions"


@pytest.fixture(scope="module")
def engines() -> Path:
    """The kit's `gitops` command: kstatus, Argo CD's and Flux's engines."""
    folder = os.environ.get("KUBEBUILDER_ASSETS")
    if not folder:
        pytest.skip("KUBEBUILDER_ASSETS is not set: it names the folder with `gitops`, the GitOps engines")
    program = Path(folder) / "gitops"
    if not program.exists():
        pytest.skip(f"{program} is not there: readings by GitOps engines are not tested")
    return program


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


@pytest.fixture
def found(row: Row) -> Object:
    return row.make()


def ask(engines: Path, found: Object, *arguments: str) -> Any:
    """Return the answer of an engine to an object."""
    command = [str(engines), *arguments]
    text = json.dumps(found)
    run = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=30)
    assert run.returncode == 0 and not run.stderr, run.stderr
    return json.loads(run.stdout)


def expressions() -> dict[str, str]:
    [[entry]] = load_documents(GITOPS / "flux" / "health-check-exprs.yaml")
    assert (entry.pop("apiVersion"), entry.pop("kind")) == ("asyncrl.dev/v1alpha1", "AsyncRLJob")
    return dict(entry)


def test_kstatus_needs_no_code_of_ours(engines: Path, row: Row, found: Object) -> None:
    assert ask(engines, found, "kstatus")["status"] == row.kstatus


def test_argo_cd_shows_the_health(engines: Path, row: Row, found: Object) -> None:
    health = ask(engines, found, "argo-health", "--lua", f"asyncrl.dev/AsyncRLJob={ARGO / 'health.lua'}")
    assert health["status"] == row.argo
    assert health.get("message"), "a person is told why"


def test_flux_reads_the_expressions(engines: Path, row: Row, found: Object) -> None:
    given = expressions()
    arguments = ["--current", given["current"], "--failed", given["failed"]]
    health = ask(engines, found, "flux-health", *arguments, "--in-progress", given["inProgress"])
    assert health["status"] == row.flux


def test_argo_cd_offers_what_can_be_done(engines: Path, row: Row, found: Object) -> None:
    offered = ask(engines, found, "argo-actions", "--discovery", str(ACTIONS / "discovery.lua"))
    assert tuple(each["name"] for each in offered or ()) == row.actions


@pytest.mark.parametrize(("action", "suspend"), [("suspend", True), ("resume", False)])
def test_an_action_changes_suspend_alone(engines: Path, found: Object, action: str, suspend: bool) -> None:
    after = ask(engines, found, "argo-actions", "--action", str(ACTIONS / action / "action.lua"))
    assert after["operation"] == "patch"
    assert after["object"] == {**found, "spec": {**found["spec"], "suspend": suspend}}


def test_the_document_has_the_tested_rows() -> None:
    lines = [line for line in (ROOT / "docs" / "gitops.md").read_text().splitlines() if line.startswith("| ")]
    table = {}
    for line in lines[1:]:
        situation, ready, _, kstatus, argo, flux, actions = (each.strip() for each in line.split("|")[1:-1])
        table[situation] = (kstatus, argo, flux, tuple(actions.split()))
        conditions = {each["type"]: each for each in ROWS[situation].make()["status"].get("conditions", [])}
        if ready not in ("absent", "as before"):
            shown = conditions["Ready"]
            assert f"{shown['status']}, {shown['reason']}".startswith(ready), situation
    assert table == {name: (row.kstatus, row.argo, row.flux, row.actions) for name, row in ROWS.items()}


def test_argocd_cm_holds_the_scripts() -> None:
    [patch] = load_documents(ARGO / "argocd-cm.yaml")
    health, actions = (
        patch["data"][f"resource.customizations.{what}.asyncrl.dev_AsyncRLJob"]
        for what in ("health", "actions")
    )
    assert len(patch["data"]) == 2
    assert health == (ARGO / "health.lua").read_text()
    menu = YAML(typ="safe").load(actions)
    assert menu["discovery.lua"] == (ACTIONS / "discovery.lua").read_text()
    assert {each["name"]: each["action.lua"] for each in menu["definitions"]} == {
        name: (ACTIONS / name / "action.lua").read_text() for name in ("suspend", "resume")
    }


def test_the_examples_hold_what_is_tested() -> None:
    examples = GITOPS / "examples"
    [kustomization] = load_documents(examples / "jobs" / "kustomization.yaml")
    resources = [load_documents(examples / "jobs" / name) for name in kustomization["resources"]]
    [claim], [job] = resources
    parsed = parse_job(job)
    assert parsed.spec.checkpoint.location.claim_name == claim["metadata"]["name"]
    assert "suspend" not in job["spec"], "left out, so that an action of Argo CD is not undone"
    _, flux = load_documents(examples / "flux" / "kustomization.yaml")
    [application] = load_documents(examples / "argocd" / "application.yaml")
    assert flux["spec"]["healthCheckExprs"] == load_documents(GITOPS / "flux" / "health-check-exprs.yaml")[0]
    for path in (flux["spec"]["path"], application["spec"]["source"]["path"]):
        assert (ROOT / path).samefile(examples / "jobs")
    [ignored] = application["spec"]["ignoreDifferences"]
    assert (ignored["group"], ignored["kind"], ignored["jsonPointers"]) == (
        "asyncrl.dev",
        "AsyncRLJob",
        ["/spec/suspend"],
    )
