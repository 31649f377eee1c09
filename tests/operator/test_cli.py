import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
import yaml

from octavo_operator import __version__, cli

ROOT: Final = Path(__file__).parents[2]
SAMPLE: Final = ROOT / "manifests/samples/inferenceservice.yaml"


def render(path: Path, text: str) -> int:
    path.write_text(text)
    return cli.main(["render", f"--filename={path}"])


def test_the_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"kubectl-octavo {__version__}\n"


def test_without_a_command_the_usage_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([])
    assert end.value.code == 2
    assert "kubectl octavo" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "manifests/samples").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_sample_renders(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["render", "-f", str(path)]) == 0
    kinds = [child["kind"] for child in yaml.safe_load_all(capsys.readouterr().out)]
    assert {"Service", "Deployment"} <= set(kinds)


def test_standard_input_is_read_for_a_dash(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(SAMPLE.read_text()))
    assert cli.main(["render", "-f", "-", "--engine-image=mine:1"]) == 0
    assert "image: mine:1" in capsys.readouterr().out


def test_what_was_never_in_a_cluster_owns_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["render", "-f", str(SAMPLE)]) == 0
    assert "ownerReferences" not in capsys.readouterr().out


def test_an_object_out_of_kubectl_get_renders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = yaml.safe_load(SAMPLE.read_text())
    document["metadata"] |= {"uid": "1234", "generation": 3, "managedFields": [{}], "creationTimestamp": None}
    document["status"] = {"anything": "a newer operator writes"}
    everything = {"apiVersion": "v1", "kind": "List", "items": [document]}
    assert render(tmp_path / "list.yaml", yaml.safe_dump(everything)) == 0
    assert "uid: '1234'" in capsys.readouterr().out


def test_other_objects_are_skipped_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim = "apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {name: models}\n---\n"
    assert render(tmp_path / "two.yaml", claim + SAMPLE.read_text()) == 0
    output = capsys.readouterr()
    assert "skipped a PersistentVolumeClaim of v1" in output.err
    assert "kind: Deployment" in output.out


def test_a_file_without_services_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert render(tmp_path / "other.yaml", "apiVersion: v1\nkind: Secret\n") == 1
    assert "holds no InferenceService of serving.octavo.dev/v1alpha1" in capsys.readouterr().err


def test_every_wrong_field_is_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = SAMPLE.read_text() + "  replcas: 2\n  rollout: {drainSeconds: -1}\n"
    assert render(tmp_path / "typo.yaml", text) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines() == [
        'kubectl octavo render: the InferenceService "smollm2" is invalid:',
        "  spec.rollout.drainSeconds: Input should be greater than or equal to 0",
        "  spec.replcas: unknown field",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "is not YAML"),
        ("- just\n- a list\n", "it has no kind"),
        ("kind: InferenceService\napiVersion: serving.octavo.dev/v9\n", "apiVersion: "),
        ("kind: InferenceService\napiVersion: serving.octavo.dev/v1alpha1\nmetadata: x\n", "metadata: "),
    ],
)
def test_what_is_no_service_is_refused_with_the_cause(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    assert render(tmp_path / "bad.yaml", text) == 1
    assert says in capsys.readouterr().err


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["render", f"--filename={tmp_path}/none.yaml"]) == 1
    assert "none.yaml" in capsys.readouterr().err


def test_the_command_answers_without_kopf_and_clients() -> None:
    code = (
        "import sys, octavo_operator.cli; print(sorted({'kopf', 'kubernetes', 'aiohttp', 'torch'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    assert run.stdout == "[]\n"


def test_kubectl_finds_the_command_by_its_name() -> None:
    program = Path(sys.executable).parent / "kubectl-octavo"
    run = subprocess.run([program, "--version"], check=True, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    assert run.stdout == f"kubectl-octavo {__version__}\n"
