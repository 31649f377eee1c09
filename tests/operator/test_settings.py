import pytest

from octavo_operator.resources import Key
from octavo_operator.settings import Settings


def test_only_the_engine_image_must_be_given() -> None:
    assert Settings.parse(["--engine-image=octavo/engine:1"]) == Settings(engine_image="octavo/engine:1")


def test_every_flag_reaches_its_field() -> None:
    settings = Settings.parse(
        [
            "--engine-image=e",
            "--namespace=a",
            "--namespace=b",
            "--namespace=a",
            "--prometheus-url=http://prometheus:9090/p",
            "--lease=octavo-system/octavo.1",
            "--log-level=debug",
            "--log-format=json",
            "--health-port=1",
            "--metrics-port=2",
        ]
    )
    assert settings == Settings(
        engine_image="e",
        namespaces=("a", "b"),
        prometheus_url="http://prometheus:9090/p",
        lease=Key("octavo-system", "octavo.1"),
        log_level="debug",
        log_format="json",
        health_port=1,
        metrics_port=2,
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--engine-image"),
        (["--engine-image="], "must not be empty"),
        (["--engine-image=e", "--namespace="], "must not be empty"),
        (["--engine-image=e", "--log-level=loud"], "invalid choice: 'loud'"),
        (["--engine-image=e", "--health-port=0"], "'0' is not a TCP port"),
        (["--engine-image=e", "--metrics-port=x"], "'x' is not a TCP port"),
        (["--engine-image=e", "--prometheus-url=prometheus:9090"], "is not a URL such as"),
        (["--engine-image=e", "--lease=octavo"], "'octavo' is not a namespace and a name such as"),
        (["--engine-image=e", "--lease=a/b/c"], "'a/b/c' is not a namespace and a name such as"),
        (["--engine-image=e", "--metrics-port=8080"], "they must differ"),
        (["--engine=e"], "--engine-image"),
    ],
)
def test_a_bad_flag_is_refused_by_name(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        Settings.parse(arguments)
    assert exit_.value.code == 2
    assert sentence in capsys.readouterr().err
